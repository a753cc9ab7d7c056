import pytest
import torch

from qwen3vl_train.batch import Segments


def decoder_inputs(small, tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor, Segments]:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(tokens, small.arch.text.hidden_size, generator=generator)
    return embeds, torch.arange(tokens).expand(3, -1), Segments.from_lengths([tokens])


def test_deepstack_without_a_mask_is_an_error(small):
    deepstack = [torch.zeros(2, small.arch.text.hidden_size)]
    with pytest.raises(ValueError, match="DeepStack features came without visual_pos_mask; pass the mask of their tok"):
        small.language_model.model(*decoder_inputs(small), deepstack_visual_embeds=deepstack)


def test_deepstack_must_have_as_many_rows_as_the_mask_marks(small):
    mask = torch.tensor([False, True, True, True, False, False])
    deepstack = [torch.zeros(2, small.arch.text.hidden_size)]
    with pytest.raises(ValueError, match="visual_pos_mask marks 3 tokens, but DeepStack has 2 rows"):
        small.language_model.model(*decoder_inputs(small), visual_pos_mask=mask, deepstack_visual_embeds=deepstack)


@torch.no_grad()
def test_feature_k_is_added_behind_layer_k_where_the_mask_says(small):
    model = small.language_model.model
    mask = torch.tensor([False, True, False, True, False, False])
    features = [torch.full((2, small.arch.text.hidden_size), float(number + 1)) for number in range(3)]
    came_out: list[torch.Tensor] = []
    went_in: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _layer, args: went_in.append(args[0]))
        layer.register_forward_hook(lambda _layer, _args, output: came_out.append(output))
    inputs = decoder_inputs(small)
    by_mask = model(*inputs, visual_pos_mask=mask, deepstack_visual_embeds=features)
    for number in range(3):
        added = went_in[number + 1] - came_out[number]
        torch.testing.assert_close(added[mask], features[number], atol=1e-5, rtol=0)
        assert not added[~mask].any()
    rows = torch.tensor([1, 3])
    by_rows = model(*inputs, visual_pos_mask=mask, deepstack_visual_embeds=features, visual_rows=rows)
    assert torch.equal(by_rows, by_mask)


@torch.no_grad()
def test_norms_compute_in_float32(small):
    norm = small.language_model.model.norm.bfloat16()
    x = (torch.randn(4, small.arch.text.hidden_size, generator=torch.Generator().manual_seed(0)) * 100).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    assert torch.equal(norm(x), norm.weight * exact.float().bfloat16())


def test_a_tied_head_is_the_embedding_itself(ours):
    text = ours.language_model
    assert (text.lm_head.weight is text.model.embed_tokens.weight) == ours.arch.tie_word_embeddings
