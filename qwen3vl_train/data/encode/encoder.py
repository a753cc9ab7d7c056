"""One sample -> token ids, next-token labels, positions and patches; or its cost, from headers alone."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen3vl_train.batch import VisionSlice
from qwen3vl_train.data.encode.chat import DIALECTS, Pad, Piece, Slot, Special, Text, vision_markup
from qwen3vl_train.data.encode.media import Measured, measure, read_patches
from qwen3vl_train.data.encode.positions import Run, mrope_positions
from qwen3vl_train.data.encode.tokenizer import ChatTokenizer
from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.budgets import Budgets, Grid, num_tokens
from qwen3vl_train.data.media.clips import repeat_still_frames
from qwen3vl_train.data.media.image import MERGE, PATCH
from qwen3vl_train.data.rows.parse import parse_sample
from qwen3vl_train.data.rows.sample import Sample

RawSample = Sample | dict[str, Any]
"""A parsed sample, or {"messages": [...]}."""


class SampleCost(NamedTuple):
    """What a sample takes. tokens: all of them, including visual ones.

    patches, patch_pairs: of the vision encoder; pairs are the sum of squares over frames.
    num_shrunk: media that a limit made smaller than they are.
    """

    tokens: int
    visual_tokens: int
    patches: int
    patch_pairs: int
    num_shrunk: int


@dataclass(frozen=True)
class EncodedSample:
    """One sample, ready to be packed: n tokens, P patches.

    input_ids, positions: (n,) and (3, n) int64.
    label_rows, label_ids, label_weights: (R,) each, see `PackedBatch`.
    slices: rows count from the sample's own first medium.
    patches: (P, 768) uint8 where all media are stills, (P, 1536) otherwise.
    """

    input_ids: Tensor
    label_rows: Tensor
    label_ids: Tensor
    label_weights: Tensor
    positions: Tensor
    slices: list[VisionSlice]
    grids: list[Grid]
    patches: Tensor
    sample_id: str


class TokenLayout(NamedTuple):
    """The tokens of a sample before they are tensors. weights: loss weight of each token, 0 where it is not trained."""

    ids: list[int]
    weights: list[float]
    runs: list[Run]
    slices: list[VisionSlice]


def lay_out(pieces: Iterable[Piece], grids: Sequence[Grid], tokenizer: ChatTokenizer) -> TokenLayout:
    """Tokenise pieces whose slots are filled. grids: of the media in them, in order.

    Adjacent texts are encoded in one call, as if the chat were one string; a token is trained if it is entirely inside
    trained text. "assistant\\n" + "\\nYes" -> "assistant", "\\n\\n" (not trained), "Yes" (trained).
    """
    ids, weights, runs, slices = [], [], [], []
    frame_grids = ((1, height, width) for frames, height, width in grids for _ in range(frames))
    row = text_start = 0
    for is_text, group in groupby(pieces, key=_is_text):
        if is_text:
            text_ids, text_weights = _encode_texts([piece for piece in group if isinstance(piece, Text)], tokenizer)
            ids += text_ids
            weights += text_weights
            continue
        for piece in group:
            if isinstance(piece, Special):
                ids.append(tokenizer.special_ids[piece.name])
                weights.append(piece.weight)
            elif isinstance(piece, Pad):
                runs += [len(ids) - text_start, next(frame_grids)]
                slices.append(VisionSlice(len(ids), piece.count, row))
                ids += [tokenizer.special_ids[piece.name]] * piece.count
                weights += [0.0] * piece.count
                row, text_start = row + piece.count, len(ids)
    return TokenLayout(ids, weights, [*runs, len(ids) - text_start], slices)


def is_trained(pieces: Sequence[Piece]) -> bool:
    """Return whether any piece is trained."""
    return any(piece.weight > 0 for piece in pieces if isinstance(piece, Text | Special))


def _is_text(piece: Piece) -> bool:
    return isinstance(piece, Text)


def _encode_texts(texts: list[Text], tokenizer: ChatTokenizer) -> tuple[list[int], list[float]]:
    ids, offsets = tokenizer.encode("".join(text.text for text in texts))
    weights = [0.0] * len(ids)
    start = 0
    for weight, group in groupby(texts, key=lambda text: text.weight):
        end = start + sum(len(text.text) for text in group)
        if weight:
            for index, (first, last) in enumerate(offsets):
                if start <= first and last <= end:
                    weights[index] = weight
        start = end
    return ids, weights


@dataclass(frozen=True)
class Encoder:
    """Encode samples for one checkpoint.

    dialect: a key of DIALECTS.
    wrapped_clips: the markup of clips, see `vision_markup`.
    max_tokens, max_patches: all media of a sample with more are shrunk by a common factor until it fits; it is a fault
        where it never does. None: no limit.
    """

    tokenizer: ChatTokenizer
    dialect: str
    budgets: Budgets
    wrapped_clips: bool = False
    max_tokens: int | None = None
    max_patches: int | None = None

    def render(self, sample: Sample, *, generation_prompt: bool = False) -> list[Piece]:
        """Render a sample in the checkpoint's dialect. Raise RowFault for what its template would drop."""
        return DIALECTS[self.dialect](sample.messages, sample.tools, generation_prompt=generation_prompt)

    def cost(self, raw: RawSample) -> SampleCost:
        """Return the exact lengths that `encode` gives, from text and media headers alone. Raise RowFault."""
        sample = as_sample(raw)
        return self.cost_of(self.render(sample), sample.media_root)

    def cost_of(self, pieces: Sequence[Piece], media_root: str | None) -> SampleCost:
        """Return the `cost` of a rendered sample."""
        measured, grids = self._measure(pieces, media_root)
        patches = sum(t * h * w for t, h, w in grids)
        return SampleCost(
            tokens=self._count(pieces, grids, measured),
            visual_tokens=patches // MERGE**2,
            patches=patches,
            patch_pairs=sum(t * (h * w) ** 2 for t, h, w in grids),
            num_shrunk=self.budgets.count_shrunk([medium.size for medium in measured], grids),
        )

    def _measure(self, pieces: Sequence[Piece], media_root: str | None) -> tuple[list[Measured], list[Grid]]:
        """Read the headers of all media and return their grids within every limit."""
        measured, own_grids = [], []
        for slot in _slots(pieces):
            with _naming_part(slot):
                measured.append(measure(slot.part, self.budgets, media_root))
                own_grids.append(self.budgets.grid(measured[-1].size))
        sizes = [medium.size for medium in measured]
        grids = self.budgets.fit(sizes, own_grids)
        visual_tokens = num_tokens(grids)
        limit = visual_tokens if self.max_patches is None else self.max_patches // MERGE**2
        if self.max_tokens is not None:
            limit = min(limit, self.max_tokens - self._count(pieces, grids, measured) + visual_tokens)
        if visual_tokens > max(limit, 0):
            grids = self.budgets.fit(sizes, own_grids, max(limit, 0))
        return measured, grids

    def _fill_slots(
        self, pieces: Sequence[Piece], grids: Sequence[Grid], measured: Sequence[Measured]
    ) -> Iterator[Piece]:
        """Replace the slots by their markup."""
        media = iter(zip(grids, measured, strict=True))
        for piece in pieces:
            if isinstance(piece, Slot):
                (_, height, width), medium = next(media)
                yield from vision_markup(piece, height * width // MERGE**2, medium.times, wrapped=self.wrapped_clips)
            else:
                yield piece

    def _count(self, pieces: Sequence[Piece], grids: Sequence[Grid], measured: Sequence[Measured]) -> int:
        """Return the number of tokens that `lay_out` makes of the pieces, without making them."""
        count = 0
        for is_text, group in groupby(self._fill_slots(pieces, grids, measured), key=_is_text):
            if is_text:
                count += self.tokenizer.count("".join(piece.text for piece in group if isinstance(piece, Text)))
            else:
                count += sum(piece.count if isinstance(piece, Pad) else 1 for piece in group)
        return count

    def encode(self, raw: RawSample, *, generation_prompt: bool = False) -> EncodedSample:
        """Decode, resize and tokenise a sample. Raise RowFault that names the part at fault."""
        sample = as_sample(raw)
        pieces = self.render(sample, generation_prompt=generation_prompt)
        measured, grids = self._measure(pieces, sample.media_root)
        patches = [torch.zeros(0, 3 * PATCH * PATCH, dtype=torch.uint8)]
        for slot, medium, grid in zip(_slots(pieces), measured, grids, strict=True):
            with _naming_part(slot):
                limit = self.budgets.max_image_pixels
                patches.append(read_patches(slot.part, medium, grid, sample.media_root, limit))
        layout = lay_out(self._fill_slots(pieces, grids, measured), grids, self.tokenizer)
        input_ids = torch.tensor(layout.ids, dtype=torch.int64)
        next_weights = torch.tensor(layout.weights[1:], dtype=torch.float32)
        label_rows = (next_weights > 0).nonzero().squeeze(1)
        return EncodedSample(
            input_ids=input_ids,
            label_rows=label_rows,
            label_ids=input_ids[label_rows + 1],
            label_weights=next_weights[label_rows],
            positions=mrope_positions(layout.runs),
            slices=layout.slices,
            grids=grids,
            patches=concat_patches(patches),
            sample_id=sample.sample_id,
        )


def as_sample(raw: RawSample, name: str = "sample") -> Sample:
    """Parse a dict. Raise RowFault."""
    return raw if isinstance(raw, Sample) else parse_sample(raw, name)


def concat_patches(patches: Sequence[Tensor]) -> Tensor:
    """Concatenate patches: (P, 768) where all are of images, else (P, 1536) with the frame of images repeated."""
    if any(one.shape[1] != 3 * PATCH * PATCH for one in patches):
        patches = [repeat_still_frames(one) for one in patches]
    return torch.cat(list(patches))


@contextmanager
def _naming_part(slot: Slot) -> Iterator[None]:
    """Add the position of a part to its faults."""
    try:
        yield
    except MediaFault as fault:
        raise fault.at(slot.where) from None


def _slots(pieces: Sequence[Piece]) -> list[Slot]:
    return [piece for piece in pieces if isinstance(piece, Slot)]
