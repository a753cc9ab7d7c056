"""The vision tower by itself: its inputs, its learned positions, its graph; and the worked example at real size."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from qwen3vl_train.arch import VisionArch
from qwen3vl_train.model.vision import Qwen3VLVisionModel

# Vision tower of the 4B checkpoint.
ARCH_4B = VisionArch(
    depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, in_channels=3, patch_size=16,
    temporal_patch_size=2, spatial_merge_size=2, out_hidden_size=2560, num_position_embeddings=48 * 48,
    deepstack_visual_indexes=(5, 11, 17),
)  # fmt: skip


def tower_of_4b() -> Qwen3VLVisionModel:
    """Random weights; parameters of one shape share one tensor, so that 415 million of them take 0.2 GB."""
    with torch.device("meta"):
        model = Qwen3VLVisionModel(ARCH_4B)
    generator = torch.Generator().manual_seed(0)
    made: dict[torch.Size, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.shape not in made:
                value = torch.empty(parameter.shape).normal_(std=0.02, generator=generator)
                made[parameter.shape] = torch.nn.Parameter(value + (parameter.ndim == 1))
            setattr(module, name, made[parameter.shape])
    return model.requires_grad_(False)


def test_worked_example_at_the_size_of_4b(small_collate):
    picture = Image.effect_noise((400, 300), 64).convert("RGB")  # width x height
    question = {"role": "user", "content": [{"type": "image", "image": picture}]}
    batch = small_collate.prompt([question])
    assert batch.pixel_values.shape == (432, 768)  # 288 x 384 pixels: 18 x 24 patches
    assert batch.pixel_values.dtype == torch.uint8
    assert batch.grid_thw.tolist() == [[1, 18, 24]]
    assert batch.visual_pos_mask.sum() == 108

    model = tower_of_4b()
    both_frames = batch.pixel_values.view(432, 3, 1, 256).expand(-1, -1, 2, -1).reshape(432, 1536)
    patches = model.patch_embed(batch.pixel_values)
    assert patches.shape == (432, 1024)
    torch.testing.assert_close(model.patch_embed(both_frames), patches, atol=1e-4, rtol=0)  # order of a sum of 1536
    assert model.fast_pos_embed_interpolate(batch.grid_thw).shape == (432, 1024)
    assert model.rot_pos_emb(batch.grid_thw).shape == (432, 32)  # angles; each rotates two of the 64 dims of a head

    seen: dict[int, torch.Tensor] = {}
    rotary = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _block, _args, output, number=number: seen.update({number: output}))
    model.blocks[0].register_forward_pre_hook(lambda _block, args: rotary.extend(args[1]))
    output = model(batch.pixel_values, batch.grid_thw, batch.vision)
    assert [tensor.shape for tensor in rotary] == [(432, 64), (432, 64)]
    assert len(seen) == 24
    assert output.last_hidden_state.shape == (432, 1024)
    assert torch.equal(output.last_hidden_state, seen[23])
    assert output.pooler_output.shape == (108, 2560)
    assert [feature.shape for feature in output.deepstack_features] == [(108, 2560)] * 3
    for tap, merger, feature in zip((5, 11, 17), model.deepstack_merger_list, output.deepstack_features, strict=True):
        assert torch.equal(feature, merger(seen[tap]))


def test_mergers_normalise_before_and_after_the_join():
    model = tower_of_4b()
    assert model.merger.norm.normalized_shape == (1024,)
    assert {merger.norm.normalized_shape for merger in model.deepstack_merger_list} == {(4096,)}
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


@torch.no_grad()
def test_patch_embedding_equals_the_convolution_in_every_form(small):
    embed = small.visual.vision.patch_embed
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 4, 32, 48), dtype=torch.uint8, generator=generator)  # two clips of 2x2x3
    normal = (pixels.float() - 127.5) / 127.5
    convolved = F.conv3d(normal, embed.proj.weight, embed.proj.bias, stride=embed.proj.stride)
    expected = convolved.flatten(2).transpose(1, 2).reshape(2 * 12, -1)
    patches = pixels.view(2, 3, 2, 2, 2, 16, 3, 16).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(24, 1536)
    # Sums of 1536 products of size 1, in float32.
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(embed(pixels), expected, **close)
    torch.testing.assert_close(embed(normal), expected, **close)
    torch.testing.assert_close(embed(patches), expected, **close)
    torch.testing.assert_close(embed((patches.float() - 127.5) / 127.5), expected, **close)

    stills = pixels[:, :, 0]
    repeated = normal[:, :, :1].expand(-1, -1, 2, -1, -1)
    convolved = F.conv3d(repeated, embed.proj.weight, embed.proj.bias, stride=embed.proj.stride)
    expected = convolved.flatten(2).transpose(1, 2).reshape(2 * 6, -1)
    one_frame = stills.view(2, 3, 2, 16, 3, 16).permute(0, 2, 4, 1, 3, 5).reshape(12, 768)
    torch.testing.assert_close(embed(stills), expected, **close)
    torch.testing.assert_close(embed(normal[:, :, 0]), expected, **close)
    torch.testing.assert_close(embed(one_frame), expected, **close)


def test_one_frame_gives_both_kernel_halves_their_gradient(small):
    embed = small.visual.vision.patch_embed
    one_frame = torch.randint(0, 256, (6, 3, 1, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for patches in (one_frame.reshape(6, 768), one_frame.expand(-1, -1, 2, -1).reshape(6, 1536)):
        embed.zero_grad()
        embed(patches).square().sum().backward()
        gradients.append(embed.proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 1000), r"patch_embed: got shape \(4, 1000\); give \(P, 1536\), \(P, 768\), \(N, 3, H, W\) or \(N, 3, T"),
        ((1, 3, 40, 32), r"patch_embed: got shape \(1, 3, 2, 40, 32\); sizes must be multiples of \(2, 16, 16\)"),
        ((1, 3, 3, 32, 32), r"patch_embed: got shape \(1, 3, 3, 32, 32\); sizes must be multiples of"),
        ((1, 4, 32, 32), r"patch_embed: got shape \(1, 4, 2, 32, 32\)"),
        ((1536,), r"patch_embed: got shape \(1536,\)"),
    ],
)
def test_patch_embedding_refuses_other_shapes(small, shape, message):
    with pytest.raises(ValueError, match=message):
        small.visual.vision.patch_embed(torch.zeros(shape))


def test_patches_must_be_as_many_as_the_grids_count(small):
    with pytest.raises(ValueError, match="vision: 8 patches, but grid_thw counts 4"):
        small.visual(torch.zeros(8, 1536), torch.tensor([[1, 2, 2]]))


def test_tower_reads_grids_where_no_index_is_given(small, small_collate):
    picture = Image.effect_noise((96, 160), 64).convert("RGB")
    batch = small_collate.prompt([{"role": "user", "content": [{"type": "image", "image": picture}]}])
    with_index = small.visual(batch.pixel_values, batch.grid_thw, batch.vision).pooler_output
    assert torch.equal(small.visual(batch.pixel_values, batch.grid_thw).pooler_output, with_index)


def test_frozen_tower_runs_without_a_graph(small):
    tower = small.visual.vision
    pixels, grids = torch.randint(0, 256, (16, 768), dtype=torch.uint8), torch.tensor([[1, 4, 4]])

    def has_graph() -> tuple[bool, bool, list[bool]]:
        output = small.visual(pixels, grids)
        tensors = (output.last_hidden_state, output.pooler_output, *output.deepstack_features)
        last, merged, *taps = [tensor.grad_fn is not None for tensor in tensors]
        return last, merged, taps

    assert has_graph() == (True, True, [True] * 3)
    tower.requires_grad_(False)
    assert has_graph() == (False, False, [False] * 3)
    tower.merger.requires_grad_(True)
    assert has_graph() == (False, True, [False] * 3)
    tower.deepstack_merger_list[1].requires_grad_(True)
    assert has_graph() == (False, True, [False, True, False])
    tower.merger.requires_grad_(False)
    tower.blocks[2].norm2.weight.requires_grad_(True)  # a graph from here on, and through every merger above
    assert has_graph() == (True, True, [False, True, True])
