"""The packs of the first epoch: how full they are, and one of them from sample to sample."""

from typing import Any

import numpy as np

from qwen3vl_train.batch import IGNORE_LABEL, PackedBatch
from qwen3vl_train.config import Recipe
from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.inspect.facts import PackFacts
from qwen3vl_train.inspect.histogram import histogram
from qwen3vl_train.inspect.training import Training


def pack_facts(training: Training, recipe: Recipe) -> PackFacts:
    """Sum up the packs."""
    packs = training.packs
    tokens = np.array([int(training.index.tokens[pack].sum()) for pack in packs])
    room = recipe.data.max_tokens_per_pack
    return PackFacts(
        streamed=training.streamed,
        packs=len(packs),
        packs_per_step=recipe.train.packs_per_step,
        max_tokens_per_pack=room,
        steps_per_epoch=None if training.streamed else -(-len(packs) // recipe.train.packs_per_step),
        num_steps=training.num_steps,
        mean_fill=float(tokens.sum() / (room * len(packs))) if packs else 0.0,
        histograms={
            "fill_percent": histogram(np.floor(100 * tokens / room)),
            "sequences": histogram(np.array([len(pack) for pack in packs])),
        },
    )


def view_pack(training: Training, recipe: Recipe) -> dict[str, Any] | None:
    """Build one planned pack, if it can be one of several samples, and return where its samples lie.

    number: of the pack, from 1. None where no row can be used, or all rows of the pack break when decoded.
    """
    place = next((place for place, pack in enumerate(training.packs) if len(pack) > 1), 0)
    encoded = []
    for number in training.packs[place] if training.packs else []:
        try:
            encoded.append(training.collate.encode(training.sample(number)))
        except RowFault:
            continue
    if not encoded:
        return None
    pack = training.collate.pack(encoded)
    return {"number": place + 1, "max_tokens": recipe.data.max_tokens_per_pack, "sequences": _sequences(pack)}


def _sequences(pack: PackedBatch) -> list[dict[str, Any]]:
    is_label, is_visual_token = pack.labels != IGNORE_LABEL, pack.visual_pos_mask
    sequences, start = [], 0
    for name, length in zip(pack.sample_ids, pack.segments.lengths, strict=True):
        span = slice(start, start + length)
        trained = is_label[span].roll(1).tolist()
        visual = is_visual_token[span].tolist()
        runs: list[list[Any]] = []  # [kind, length], in order
        for is_visual, is_trained in zip(visual, trained, strict=True):
            kind = "visual" if is_visual else "trained" if is_trained else "prompt"
            if runs and runs[-1][0] == kind:
                runs[-1][1] += 1
            else:
                runs.append([kind, 1])
        last = pack.positions[:, start + length - 1].tolist()
        sequences.append({"id": name, "start": start, "length": length, "runs": runs, "last_position": last})
        start += length
    return sequences
