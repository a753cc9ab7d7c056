import pytest

from qwen3vl_train.model.hf_names import from_huggingface, to_huggingface

PUBLISHED = {
    "model.language_model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
    "model.language_model.layers.35.self_attn.q_norm.weight": "language_model.model.layers.35.self_attn.q_norm.weight",
    "model.language_model.norm.weight": "language_model.model.norm.weight",
    "lm_head.weight": "language_model.lm_head.weight",
    "model.visual.patch_embed.proj.bias": "visual.vision.patch_embed.proj.bias",
    "model.visual.deepstack_merger_list.2.norm.bias": "visual.vision.deepstack_merger_list.2.norm.bias",
}
OLDER = {
    "visual.merger.norm.weight": "visual.vision.merger.norm.weight",
    "model.layers.0.mlp.up_proj.weight": "language_model.model.layers.0.mlp.up_proj.weight",
    "model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
    "model.norm.weight": "language_model.model.norm.weight",
    "model.lm_head.weight": "language_model.lm_head.weight",
}


@pytest.mark.parametrize(("theirs", "ours"), PUBLISHED.items())
def test_published_names_go_both_ways(theirs, ours):
    assert from_huggingface(theirs) == ours
    assert to_huggingface(ours) == theirs


@pytest.mark.parametrize(("theirs", "ours"), OLDER.items())
def test_older_spellings_are_read(theirs, ours):
    assert from_huggingface(theirs) == ours
    assert to_huggingface(ours) != theirs


@pytest.mark.parametrize("name", ["transformer.h.0.weight", "model.vision_tower.x", "lm_heads.weight", ""])
def test_names_of_other_models_have_none_of_ours(name):
    assert from_huggingface(name) is None


def test_modules_are_named_like_their_weights():
    assert to_huggingface("visual.vision.merger.linear_fc1") == "model.visual.merger.linear_fc1"
    assert to_huggingface("language_model.lm_head") == "lm_head"
    assert to_huggingface("visual.vision") == "model.visual"
    with pytest.raises(ValueError, match=r"optimizer\.state: not part of the module tree"):
        to_huggingface("optimizer.state")
