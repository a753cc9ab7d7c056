import pytest
import torch

from qwen3vl_train.batch import Segments
from qwen3vl_train.model.attention import PackedAttention


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
