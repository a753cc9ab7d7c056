"""The packed batch: what it derives from its primary fields, and what it refuses."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from qwen3vl_train.batch import PackedBatch, Segments, VisionSlice, slice_rows, vision_index
from tests.helpers.messages import message_of


def test_segments():
    segments = Segments.from_lengths([3, 1, 5])
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 9]
    assert segments.cu_seqlens.dtype == torch.int32
    assert (segments.lengths, segments.max_length) == ((3, 1, 5), 5)
    nothing = Segments.from_lengths([])
    assert (nothing.cu_seqlens.tolist(), nothing.max_length) == ([0], 0)


def test_vision_segments_are_frames_and_not_clips():
    assert vision_index([(2, 16, 20), (1, 4, 2)], side=48, merge=2).segments.lengths == (320, 320, 8)


def test_patches_come_in_blocks_that_merge():
    patch_hw = vision_index([(1, 2, 4)], side=8, merge=2).patch_hw.tolist()
    assert patch_hw == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    twice = vision_index([(2, 2, 4)], side=8, merge=2).patch_hw.tolist()
    assert twice == patch_hw * 2


def test_corners_and_weights_are_bilinear_with_aligned_corners():
    # Interpolating a table whose value is its own row (or column) must give back the position that linspace asks for.
    side, height, width = 8, 6, 4
    index = vision_index([(1, height, width)], side=side, merge=2)
    torch.testing.assert_close(index.corner_weight.sum(0), torch.ones(height * width))
    assert int(index.corner_index.max()) == side * side - 1
    rows = (index.corner_weight * (index.corner_index // side)).sum(0)
    columns = (index.corner_weight * (index.corner_index % side)).sum(0)
    torch.testing.assert_close(rows, torch.linspace(0, 7, height)[index.patch_hw[:, 0].long()])
    torch.testing.assert_close(columns, torch.linspace(0, 7, width)[index.patch_hw[:, 1].long()])


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 18, 24), (3, 48, 6), (1, 100, 2)])
def test_corners_equal_transformers(grid):
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    index = vision_index([grid], side=48, merge=2)
    corners, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([grid]), num_grid_per_side=48, mode="bilinear", align_corners=True, spatial_merge_size=2, kwargs={}
    )
    # As a sum over a table, since corners of weight 0 may be named differently.
    table = torch.randn(48 * 48, generator=torch.Generator().manual_seed(0))
    mine = (table[index.corner_index.long()] * index.corner_weight).sum(0)
    torch.testing.assert_close(mine, (table[corners] * weights).sum(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(0, 2, 2), (1, 3, 2), (1, 2, 5), (1, 0, 2), (1, 2, -2)])
def test_grids_that_cannot_be(grid):
    assert message_of(ValueError, vision_index, [(1, 2, 2), grid], side=48, merge=2) == (
        f"grid_thw: got {grid}; time must be at least 1, height and width positive multiples of 2"
    )


def test_slice_rows():
    slices = [[VisionSlice(1, 2, 4)], [VisionSlice(0, 1, 0), VisionSlice(2, 2, 6)]]
    token_rows, feature_rows = slice_rows([4, 5], slices, 9)
    assert token_rows.tolist() == [1, 2, 4, 6, 7]
    assert feature_rows.tolist() == [4, 5, 0, 6, 7]
    nothing = slice_rows([4], [[]], 4)
    assert [rows.shape for rows in nothing] == [(0,), (0,)]
    assert nothing[0].dtype == torch.int64


def primary(**changes: Any) -> dict[str, Any]:
    """Two sequences of 5 and 3 tokens; the first has an image of 2 merged rows."""
    values: dict[str, Any] = {
        "input_ids": torch.arange(8),
        "positions": torch.arange(8).expand(3, -1),
        "sequence_lengths": [5, 3],
        "label_rows": torch.tensor([3, 5, 6]),
        "label_ids": torch.tensor([7, 1, 2]),
        "label_weights": torch.tensor([1.0, 1.0, 0.5]),
        "pixel_values": torch.zeros(8, 768, dtype=torch.uint8),
        "grid_thw": [(1, 2, 4)],
        "vision_slices_per_seq": [[VisionSlice(1, 2, 0)], []],
        "position_table_side": 8,
        "merge_size": 2,
        "sample_ids": ("a", "b"),
    }
    return values | changes


def test_everything_is_derived():
    batch = PackedBatch.from_samples(**primary())
    assert batch.visual_pos_mask.tolist() == [False, True, True, False, False, False, False, False]
    assert (batch.visual_rows.tolist(), batch.num_labels) == ([1, 2], 3)
    assert batch.labels.tolist() == [-100, -100, -100, 7, -100, 1, 2, -100]
    assert batch.loss_weights.tolist() == [0, 0, 0, 1, 0, 1, 0.5, 0]
    assert batch.segments.lengths == (5, 3)
    assert batch.vision.segments.lengths == (8,)
    assert (batch.num_tokens, batch.num_patches, batch.num_visual_tokens) == (8, 8, 2)
    assert (batch.sequence_lengths.tolist(), batch.sequence_lengths.dtype) == ([5, 3], torch.int64)
    assert batch.grid_thw.tolist() == [[1, 2, 4]]
    assert batch.sample_ids == ("a", "b")


def test_a_pack_without_images():
    nothing = {"pixel_values": torch.zeros(0, 768), "grid_thw": [], "vision_slices_per_seq": [[], []]}
    batch = PackedBatch.from_samples(**primary(**nothing))
    assert batch.grid_thw.shape == (0, 3)
    assert not batch.visual_pos_mask.any()
    assert batch.vision.corner_index.shape == batch.vision.corner_weight.shape == (4, 0)
    assert batch.vision.patch_hw.shape == (0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label_ids": torch.zeros(4, dtype=torch.int64)},
            "pack: label_rows, label_ids and label_weights have the shapes [(3,), (4,), (3,)]; give one of each",
        ),
        ({"label_weights": torch.ones(3).double()}, "pack: label_weights are torch.float64; give float32"),
        ({"label_rows": torch.tensor([3, 6, 5])}, "pack: label_rows must ascend within the 8 tokens"),
        ({"label_rows": torch.tensor([3, 5, 8])}, "pack: label_rows must ascend within the 8 tokens"),
        ({"label_rows": torch.tensor([-1, 5, 6])}, "pack: label_rows must ascend within the 8 tokens"),
        ({"positions": torch.arange(8)}, "pack: positions (8,) do not fit 8 tokens"),
        (
            {"pixel_values": torch.zeros(4, 768)},
            "pack: 4 patches and 2 placeholder tokens, but the grids make 8 patches and 2 merged rows",
        ),
        (
            {"vision_slices_per_seq": [[VisionSlice(1, 1, 0)], []]},
            "pack: 8 patches and 1 placeholder tokens, but the grids make 8 patches and 2 merged rows",
        ),
        (
            {"vision_slices_per_seq": [[VisionSlice(0, 1, 1), VisionSlice(1, 1, 0)], []]},
            "vision slices: rows do not count up from 0; lay features down in the order of the tokens",
        ),
        ({"sequence_lengths": [5, 4]}, "sequence_lengths: sum is 9 but the pack has 8 tokens"),
    ],
)
def test_fields_that_disagree(changes, message):
    assert message_of(ValueError, PackedBatch.from_samples, **primary(**changes)) == message


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "__dataclass_fields__"):
        return [tensor for field in fields(value) for tensor in tensors_of(getattr(value, field.name))]
    return []


def test_moving_takes_every_tensor_and_nothing_else():
    batch = PackedBatch.from_samples(**primary())
    moved = batch.to("meta")
    assert len(tensors_of(moved)) == len(tensors_of(batch)) == 13
    assert all(tensor.is_meta for tensor in tensors_of(moved))
    assert not any(tensor.is_meta for tensor in tensors_of(batch))
    assert moved.segments.lengths == batch.segments.lengths
    assert moved.vision_slices_per_seq == batch.vision_slices_per_seq
    assert moved.num_labels == 3


def test_a_token_may_have_two_labels():
    batch = PackedBatch.from_samples(**primary(label_rows=torch.tensor([3, 3, 6])))
    assert (batch.num_labels, batch.label_ids.tolist()) == (3, [7, 1, 2])
