import pytest

from qwen3vl_train.model.selection import train_whole
from qwen3vl_train.modules import GROUPS, group_of, grouped_parameters


def test_every_parameter_is_in_exactly_one_group(ours):
    groups = grouped_parameters(ours)
    names = [name for members in groups.values() for name, _ in members]
    assert sorted(names) == sorted(name for name, _ in ours.named_parameters())
    assert set(groups) == set(GROUPS)
    head = [] if ours.arch.tie_word_embeddings else ["language_model.lm_head.weight"]
    assert [name for name, _ in groups["lm_head"]] == ["language_model.model.norm.weight", *head]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("visual.vision.patch_embed.proj.weight", "vision_embed"),
        ("visual.vision.pos_embed.weight", "vision_embed"),
        ("visual.vision.blocks.23.attn.qkv.bias", "vision_attn"),
        ("visual.vision.blocks.0.norm1.weight", "vision_attn"),
        ("visual.vision.blocks.0.norm2.weight", "vision_mlp"),
        ("visual.vision.blocks.10.mlp.linear_fc1.weight", "vision_mlp"),
        ("visual.vision.merger.linear_fc1.weight", "merger"),
        ("visual.vision.deepstack_merger_list.2.linear_fc1.weight", "deepstack"),
        ("language_model.model.embed_tokens.weight", "text_embed"),
        ("language_model.model.layers.35.self_attn.q_norm.weight", "text_attn"),
        ("language_model.model.layers.1.input_layernorm.weight", "text_attn"),
        ("language_model.model.layers.1.post_attention_layernorm.weight", "text_mlp"),
        ("language_model.model.layers.1.mlp.gate_proj.lora_A.default.weight", "text_mlp"),
        ("language_model.model.norm.weight", "lm_head"),
        ("language_model.lm_head.weight", "lm_head"),
    ],
)
def test_group_of_a_name(name, group):
    assert group_of(name) == group


def _trained(model, *names: str) -> set[str]:
    model.requires_grad_(False)
    train_whole(model, names, "tune.train")
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_exactly_the_named_groups_train(ours):
    for group in GROUPS:
        if ours.arch.tie_word_embeddings and group in ("lm_head", "text_embed"):
            continue
        assert {group_of(name) for name in _trained(ours, group)} == {group}


def test_a_tied_head_trains_with_its_embedding_or_not_at_all(ours):
    _trained(ours, "lm_head", "text_embed", "merger")
    assert ours.language_model.lm_head.weight.requires_grad
    for group, other in (("lm_head", "text_embed"), ("text_embed", "lm_head")):
        if ours.arch.tie_word_embeddings:
            with pytest.raises(ValueError, match=f"lm_head and text_embed train together; got only {group}"):
                _trained(ours, group)
        else:
            assert {group_of(name) for name in _trained(ours, group)} == {group} != {other}


def test_weights_by_regular_expression_match_a_module_or_a_weight(ours):
    layer = {name for name, _ in ours.named_parameters() if name.startswith("language_model.model.layers.1.")}
    assert _trained(ours, r"model\.language_model\.layers\.1") == layer
    norms = {name for name in layer if name.endswith("_layernorm.weight")}
    assert _trained(ours, r".*\.layers\.1\..*_layernorm\.weight", r".*\.layers\.1\.input_layernorm") == norms
    assert _trained(ours, r"model\.language_model\.layers\.1", "merger") > layer
    with pytest.raises(
        ValueError, match=r"tune\.train: 'model.layers.1' matches no module or weight; near names: model\."
    ):
        _trained(ours, "model.layers.1")
