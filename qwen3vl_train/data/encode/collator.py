"""Samples -> one `PackedBatch`, for one checkpoint: its tokenizer, its template, its pixel limits."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.batch import PackedBatch, VisionSlice
from qwen3vl_train.data.encode import processor
from qwen3vl_train.data.encode.encoder import EncodedSample, Encoder, RawSample, as_sample, concat_patches
from qwen3vl_train.data.encode.template import check_template, find_template
from qwen3vl_train.data.encode.tokenizer import ChatTokenizer
from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.media.budgets import Budgets
from qwen3vl_train.data.media.image import MERGE
from qwen3vl_train.data.rows.sample import Sample


@dataclass(frozen=True)
class MultimodalCollator(Encoder):
    """Encode samples and pack them. It has no open file and can be pickled, so it can be sent to worker processes."""

    position_table_side: int = field(kw_only=True)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        max_visual_tokens_per_image: int | None = None,
        min_visual_tokens_per_image: int | None = None,
        max_visual_tokens_per_video: int | None = None,
        max_visual_tokens_per_sample: int | None = None,
        shrink_to_tokens: int | None = None,
        shrink_to_patches: int | None = None,
        fps: float | None = None,
        min_frames: int | None = None,
        max_frames: int | None = None,
        max_image_pixels: int | None = None,
        video_markup: str = "bare",
    ) -> "MultimodalCollator":
        """Read config, tokenizer, chat template and preprocessor settings of a local checkpoint.

        Visual tokens (32x32 pixels of an image, or of a pair of frames) and the sampling of clips default to the
        checkpoint's own limits. Raise ValueError for files that are missing, contradict each other, or ask for what
        Qwen3-VL does not do.

        shrink_to_tokens, shrink_to_patches: the media of a sample with more, including text, are shrunk until it fits.
        max_image_pixels: larger images and frames are a fault; None: beyond Pillow's own limit.
        video_markup: bare or wrapped, see `vision_markup`.
        """
        arch = Qwen3VLArch.from_pretrained(path)
        tokenizer = ChatTokenizer.from_pretrained(path, arch)
        dialect = check_template(*find_template(path))
        limits = processor.read_image_limits(path, arch)
        limits = processor.override_image_limits(limits, min_visual_tokens_per_image, max_visual_tokens_per_image)
        rules = processor.read_clip_rules(path, arch)
        if rules is not None:
            rules = processor.override_clip_rules(rules, fps, min_frames, max_frames, max_visual_tokens_per_video)
        if max_visual_tokens_per_sample is not None and max_visual_tokens_per_sample < 1:
            raise ValueError(f"data.max_visual_tokens_per_sample: got {max_visual_tokens_per_sample}; use at least 1")
        if max_image_pixels is not None and max_image_pixels < 1:
            raise ValueError(f"data.max_image_pixels: got {max_image_pixels}; use at least 1")
        if video_markup not in ("bare", "wrapped"):
            raise ValueError(f"model.video_markup: got {video_markup!r}; use bare or wrapped")
        budgets = Budgets(*limits, rules, max_visual_tokens_per_sample, max_image_pixels)
        wrapped, side = video_markup == "wrapped", arch.vision.position_table_side
        return cls(tokenizer, dialect, budgets, wrapped, shrink_to_tokens, shrink_to_patches, position_table_side=side)

    def fingerprint(self) -> dict[str, str]:
        """Return what changes with the template, the tokenizer or a budget, as JSON."""
        settings = {setting.name: getattr(self, setting.name) for setting in fields(Encoder)}
        return {name: self.tokenizer.digest if name == "tokenizer" else repr(value) for name, value in settings.items()}

    def __call__(self, samples: Sequence[RawSample]) -> PackedBatch:
        """Pack all samples into one batch, in order. A sample is {"messages": [...]} or a Sample.

        Media paths of a dict are local paths, not bounded by a media_root. A sample without an answer is packed without
        labels. Raise ValueError that names the sample.
        """
        return self.pack([self._encode_named(sample, f"sample {index}") for index, sample in enumerate(samples)])

    def prompt(self, messages: RawSample | Sequence[dict[str, Any]]) -> PackedBatch:
        """Render a conversation up to the beginning of the answer: one sequence without labels, for generation.

        messages: a list of messages or a full sample; it must end before the answer. Raise ValueError.
        """
        raw = messages if isinstance(messages, dict | Sample) else {"messages": list(messages)}
        encoded = self._encode_named(raw, "prompt", generation_prompt=True)
        labels = ("label_rows", "label_ids", "label_weights")
        return self.pack([replace(encoded, **{name: getattr(encoded, name)[:0] for name in labels})])

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def pack(self, samples: Sequence[EncodedSample]) -> PackedBatch:
        """Concatenate encoded samples. Labels and positions are each sample's own."""
        assert samples, "a pack holds at least one sample"
        slices, label_rows = [], []
        start = row = 0
        for sample in samples:
            slices.append([VisionSlice(offset, length, first + row) for offset, length, first in sample.slices])
            label_rows.append(sample.label_rows + start)
            start += sample.input_ids.numel()
            row += sample.patches.shape[0] // MERGE**2
        return PackedBatch.from_samples(
            input_ids=torch.cat([sample.input_ids for sample in samples]),
            positions=torch.cat([sample.positions for sample in samples], dim=1),
            sequence_lengths=[sample.input_ids.numel() for sample in samples],
            label_rows=torch.cat(label_rows),
            label_ids=torch.cat([sample.label_ids for sample in samples]),
            label_weights=torch.cat([sample.label_weights for sample in samples]),
            pixel_values=concat_patches([sample.patches for sample in samples]),
            grid_thw=[grid for sample in samples for grid in sample.grids],
            vision_slices_per_seq=slices,
            position_table_side=self.position_table_side,
            merge_size=MERGE,
            sample_ids=tuple(sample.sample_id for sample in samples),
        )

    def _encode_named(self, raw: RawSample, name: str, *, generation_prompt: bool = False) -> EncodedSample:
        """Encode a sample. Raise ValueError that names it."""
        try:
            sample = as_sample(raw, name)
            name = sample.sample_id
            last = len(sample.messages) - 1
            if generation_prompt and sample.messages[last].role == "assistant":
                raise RowFault(f"messages[{last}]: a prompt that ends with an answer; remove the answer")
            return self.encode(sample, generation_prompt=generation_prompt)
        except RowFault as fault:
            raise ValueError(f"{name}: {fault}") from None
