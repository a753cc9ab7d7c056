import pytest
import torch

from qwen3vl_train.batch import Segments
from qwen3vl_train.model.attention import PackedAttention
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


def decoder_inputs(small, tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor, PackedAttention]:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(tokens, small.arch.text.hidden_size, generator=generator)
    return embeds, torch.arange(tokens).expand(3, -1), PackedAttention(Segments.from_lengths([tokens]), causal=True)


@pytest.mark.parametrize(("rows", "number"), [(None, 0), (torch.tensor([1, 2, 3]), 3)])
def test_deepstack_features_must_fit_visual_rows(small, rows, number):
    deepstack = [torch.zeros(2, small.arch.text.hidden_size)]
    message = f"DeepStack has 2 rows for {number} visual_rows; pass the row of each one's token"
    with pytest.raises(ValueError, match=message):
        small.language_model.model(*decoder_inputs(small), deepstack_visual_embeds=deepstack, visual_rows=rows)


@torch.no_grad()
def test_deepstack_feature_k_is_added_after_layer_k(small):
    model = small.language_model.model
    rows = torch.tensor([1, 3])
    features = [torch.full((2, small.arch.text.hidden_size), float(number + 1)) for number in range(3)]
    came_out: list[torch.Tensor] = []
    went_in: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _layer, args: went_in.append(args[0]))
        layer.register_forward_hook(lambda _layer, _args, output: came_out.append(output))
    inputs = decoder_inputs(small)
    model(*inputs, deepstack_visual_embeds=features, visual_rows=rows)
    for number in range(3):
        added = went_in[number + 1] - came_out[number]
        torch.testing.assert_close(added[rows], features[number], atol=1e-5, rtol=0)
        assert not added[[0, 2, 4, 5]].any()


@torch.no_grad()
def test_norms_compute_in_float32(small):
    norm = small.language_model.model.norm.bfloat16()
    x = (torch.randn(4, small.arch.text.hidden_size, generator=torch.Generator().manual_seed(0)) * 100).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    assert torch.equal(norm(x), norm.weight * exact.float().bfloat16())
