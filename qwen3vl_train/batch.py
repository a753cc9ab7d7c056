"""The packed batch: the one form in which data reaches the model.

T packed tokens, P patches, N media, S sequences, M merged vision rows, R labels, F attention segments of the vision
tower. Every index that the model uses is computed here, on the host, in the worker process that packs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import NamedTuple, Self

import torch
from torch import Tensor

IGNORE_LABEL = -100


class VisionSlice(NamedTuple):
    """One image, or one frame pair of a clip: tokens offset .. offset+length of a sequence take rows row .. row+length.

    offset: first placeholder token, counted from the start of its own sequence.
    length: number of placeholder tokens (merged rows).
    row: first row of the pack's merged vision features.
    """

    offset: int
    length: int
    row: int


@dataclass(frozen=True)
class MovableTensors:
    """A dataclass of tensors, of other such dataclasses, and of host values, which stay as they are."""

    def _apply(self, move: Callable[[Tensor], Tensor]) -> Self:
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = move(value)
            elif isinstance(value, MovableTensors):
                moved[field.name] = value._apply(move)
        return replace(self, **moved)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Move every tensor; host integers stay host integers."""
        return self._apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class Segments(MovableTensors):
    """The segments of a packed row that attention never crosses, in the forms that attention kernels take.

    lengths: host integers.
    cu_seqlens: (S+1,) int32, cumulative, starting with 0.
    max_length: host integer.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_length: int

    @classmethod
    def from_lengths(cls, lengths: Sequence[int]) -> "Segments":
        """Build from host lengths. No segment at all is legal: a pack without images has none for the vision tower."""
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu_seqlens[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
        return cls(tuple(lengths), cu_seqlens, max(lengths, default=0))


@dataclass(frozen=True)
class VisionIndex(MovableTensors):
    """What the vision tower needs of `grid_thw`: positions and attention segments, computed from the grids alone.

    segments: F attention segments, one a frame (h*w patches each, t times a clip).
    patch_hw: (P, 2) int32, row and column of every patch in its frame, in merge-block order.
    corner_index: (4, P) int32, rows of the learned position table.
    corner_weight: (4, P) float32, their bilinear weights.
    """

    segments: Segments
    patch_hw: Tensor
    corner_index: Tensor
    corner_weight: Tensor


@lru_cache(maxsize=4096)
def _frame_index(height: int, width: int, side: int, merge: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (patch_hw, corner_index, corner_weight) of one frame; see `VisionIndex`."""
    rows = torch.linspace(0, side - 1, height, dtype=torch.float32)
    cols = torch.linspace(0, side - 1, width, dtype=torch.float32)
    row0, col0 = rows.int(), cols.int()
    row1, col1 = (row0 + 1).clamp(max=side - 1), (col0 + 1).clamp(max=side - 1)
    row_frac, col_frac = (rows - row0)[:, None], (cols - col0)[None, :]
    index = torch.stack([row[:, None] * side + col for row in (row0, row1) for col in (col0, col1)])
    weight = torch.stack(
        [(1 - row_frac) * (1 - col_frac), (1 - row_frac) * col_frac, row_frac * (1 - col_frac), row_frac * col_frac]
    )
    row_col = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).int()

    def merge_order(x_CHW: Tensor) -> Tensor:
        blocks = x_CHW.reshape(-1, height // merge, merge, width // merge, merge)
        return blocks.permute(0, 1, 3, 2, 4).reshape(x_CHW.shape[0], -1)

    return merge_order(row_col).T.contiguous(), merge_order(index).contiguous(), merge_order(weight).contiguous()


def vision_index(grid_thw: list[tuple[int, int, int]], *, side: int, merge: int) -> VisionIndex:
    """Compute positions, interpolation corners and attention segments of every patch from the grids alone.

    side: the learned table is side x side (48 for all released sizes).
    merge: spatial merge size (2).

    Agrees with `fast_pos_embed_interpolate` of transformers 4.57: align_corners=True, the same for every frame.
    Raises ValueError for a grid whose height or width is not a positive multiple of `merge`.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    lengths: list[int] = []
    for frames, height, width in grid_thw:
        if frames < 1 or height < merge or width < merge or height % merge or width % merge:
            raise ValueError(
                f"grid_thw: got {(frames, height, width)}; time must be at least 1, "
                f"height and width positive multiples of {merge}"
            )
        parts += [_frame_index(height, width, side, merge)] * frames
        lengths += [height * width] * frames
    if not parts:
        empty = torch.zeros(4, 0)
        return VisionIndex(Segments.from_lengths([]), torch.zeros(0, 2, dtype=torch.int32), empty.int(), empty)
    patch_hw, index, weight = zip(*parts, strict=True)
    return VisionIndex(
        Segments.from_lengths(lengths), torch.cat(patch_hw), torch.cat(index, dim=1), torch.cat(weight, dim=1)
    )


def slice_rows(
    sequence_lengths: Sequence[int], vision_slices_per_seq: list[list[VisionSlice]], num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return (token_rows, feature_rows), both (M,) int64: token `token_rows[i]` takes feature row `feature_rows[i]`.

    token_rows is strictly increasing. Raises ValueError where slices overlap, run out of their sequence, or the
    number of sequences or tokens does not match.
    """
    if len(sequence_lengths) != len(vision_slices_per_seq):
        raise ValueError(
            f"vision slices: {len(vision_slices_per_seq)} lists for {len(sequence_lengths)} sequences; give one each"
        )
    if sum(sequence_lengths) != num_tokens:
        raise ValueError(f"sequence_lengths: sum is {sum(sequence_lengths)} but the pack has {num_tokens} tokens")
    token_rows = [torch.zeros(0, dtype=torch.int64)]
    feature_rows = [torch.zeros(0, dtype=torch.int64)]
    start = 0
    for sequence, (length, slices) in enumerate(zip(sequence_lengths, vision_slices_per_seq, strict=True)):
        end_of_last = 0
        for offset, count, row in slices:
            if offset < end_of_last or count < 1 or offset + count > length or row < 0:
                raise ValueError(
                    f"vision slices: (offset {offset}, length {count}, row {row}) of sequence {sequence} overlaps the "
                    f"one before or leaves the sequence of {length} tokens"
                )
            end_of_last = offset + count
            token_rows.append(torch.arange(start + offset, start + offset + count))
            feature_rows.append(torch.arange(row, row + count))
        start += length
    return torch.cat(token_rows), torch.cat(feature_rows)


def scatter_labels(label_rows: Tensor, values: Tensor, num_tokens: int, fill: float) -> Tensor:
    """Return a (T,) tensor that holds values[i] at label_rows[i] and `fill` elsewhere."""
    return values.new_full((num_tokens,), fill).index_copy(0, label_rows, values)


@dataclass(frozen=True)
class PackedBatch(MovableTensors):
    """All sequences of a pack in one row, all patches in another, with every index the model needs.

    Build it with `PackedBatch.from_samples`, which checks the fields against each other.

    input_ids: (T,) int64.
    positions: (3, T) int64, M-RoPE, restarting in every sequence.
    label_rows: (R,) int64, ascending, the tokens whose next token is trained; a token may have several labels.
    label_ids: (R,) int64, the next token of each label row.
    label_weights: (R,) float32, factors of the losses.
    pixel_values: (P, 768) uint8 where the pack holds stills only (a still repeats its one frame, so it travels once),
        (P, 1536) uint8 otherwise, stills with their frame twice.
    grid_thw: (N, 3) int64, one row for an image (time 1) and one for a clip (time: frame pairs).
    vision_slices_per_seq: S lists of VisionSlice; merged rows lie in the order of their tokens.
    visual_rows: (M,) int64, ascending, the tokens that vision features fill.
    segments: the sequences, for text attention.
    vision: what the vision tower needs of the grids.
    sample_ids: names of the samples, for messages about this pack.
    """

    input_ids: Tensor
    positions: Tensor
    label_rows: Tensor
    label_ids: Tensor
    label_weights: Tensor
    pixel_values: Tensor
    grid_thw: Tensor
    vision_slices_per_seq: list[list[VisionSlice]]
    visual_rows: Tensor
    segments: Segments
    vision: VisionIndex
    sample_ids: tuple[str, ...] = ()

    @classmethod
    def from_samples(
        cls,
        *,
        input_ids: Tensor,
        positions: Tensor,
        sequence_lengths: Sequence[int],
        label_rows: Tensor,
        label_ids: Tensor,
        label_weights: Tensor,
        pixel_values: Tensor,
        grid_thw: list[tuple[int, int, int]],
        vision_slices_per_seq: list[list[VisionSlice]],
        position_table_side: int,
        merge_size: int,
        sample_ids: tuple[str, ...] = (),
    ) -> "PackedBatch":
        """Check the fields against each other and compute the indices. Raises ValueError where they disagree."""
        num_tokens = input_ids.numel()
        if positions.shape != (3, num_tokens):
            raise ValueError(f"pack: positions {tuple(positions.shape)} do not fit {num_tokens} tokens")
        _check_labels(label_rows, label_ids, label_weights, num_tokens)
        visual_rows, feature_rows = slice_rows(sequence_lengths, vision_slices_per_seq, num_tokens)
        if not torch.equal(feature_rows, torch.arange(feature_rows.numel())):
            raise ValueError("vision slices: rows do not count up from 0; lay features down in the order of the tokens")
        patches = sum(t * h * w for t, h, w in grid_thw)
        if pixel_values.shape[0] != patches or visual_rows.numel() != patches // merge_size**2:
            raise ValueError(
                f"pack: {pixel_values.shape[0]} patches and {visual_rows.numel()} placeholder tokens, but the grids "
                f"make {patches} patches and {patches // merge_size**2} merged rows"
            )
        return cls(
            input_ids=input_ids,
            positions=positions,
            label_rows=label_rows,
            label_ids=label_ids,
            label_weights=label_weights,
            pixel_values=pixel_values,
            grid_thw=torch.tensor(grid_thw, dtype=torch.int64).reshape(-1, 3),
            vision_slices_per_seq=vision_slices_per_seq,
            visual_rows=visual_rows,
            segments=Segments.from_lengths(sequence_lengths),
            vision=vision_index(grid_thw, side=position_table_side, merge=merge_size),
            sample_ids=sample_ids,
        )

    def pin_memory(self) -> "PackedBatch":
        """Copy every tensor to page-locked memory, so that `.to(device, non_blocking=True)` does not wait."""
        return self._apply(lambda tensor: tensor.pin_memory())

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_labels(self) -> int:
        return self.label_rows.numel()

    @property
    def num_patches(self) -> int:
        return self.pixel_values.shape[0]

    @property
    def num_visual_tokens(self) -> int:
        return self.visual_rows.numel()

    # One value for each token or sequence, for readers outside of training.

    @property
    def sequence_lengths(self) -> Tensor:
        """Return the length of every sequence, (S,) int64."""
        return self.segments.cu_seqlens.diff().long()

    @property
    def labels(self) -> Tensor:
        """Return the NEXT token to predict at each token, (T,) int64, -100 where none."""
        return scatter_labels(self.label_rows, self.label_ids, self.num_tokens, IGNORE_LABEL)

    @property
    def loss_weights(self) -> Tensor:
        """Return the weight of each token's label, (T,) float32, 0 where it has none."""
        return scatter_labels(self.label_rows, self.label_weights, self.num_tokens, 0.0)

    @property
    def visual_pos_mask(self) -> Tensor:
        """Return True at the tokens that vision features fill, (T,) bool."""
        mask = torch.zeros(self.num_tokens, dtype=torch.bool, device=self.visual_rows.device)
        return mask.index_fill(0, self.visual_rows, True)


def _check_labels(label_rows: Tensor, label_ids: Tensor, label_weights: Tensor, num_tokens: int) -> None:
    shapes = [tuple(tensor.shape) for tensor in (label_rows, label_ids, label_weights)]
    if label_rows.dim() != 1 or len(set(shapes)) != 1:
        raise ValueError(f"pack: label_rows, label_ids and label_weights have the shapes {shapes}; give one of each")
    if label_weights.dtype != torch.float32:
        raise ValueError(f"pack: label_weights are {label_weights.dtype}; give float32")
    if (label_rows.diff() < 0).any() or (label_rows < 0).any() or (label_rows >= num_tokens).any():
        raise ValueError(f"pack: label_rows must ascend within the {num_tokens} tokens")
