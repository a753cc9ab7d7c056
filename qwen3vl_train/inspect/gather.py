"""Open the data of a recipe as training does, and collect everything that can be said of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qwen3vl_train.config import Recipe
from qwen3vl_train.data.collate import MultimodalCollator
from qwen3vl_train.data.faults import Reject
from qwen3vl_train.data.media import FACTOR
from qwen3vl_train.dist import Ranks
from qwen3vl_train.inspect.duplicates import DuplicateFinder
from qwen3vl_train.inspect.entries import Entry, RowRef, entries_of
from qwen3vl_train.inspect.facts import SHOWN_ROWS, DuplicateFacts, Facts, Hazard, PackFacts
from qwen3vl_train.inspect.hazards import recipe_hazards, row_hazards, source_hazards
from qwen3vl_train.inspect.histogram import histogram
from qwen3vl_train.inspect.samples import choose_rows, view_pack, view_sample
from qwen3vl_train.inspect.scan import Scan, add_up, look_at
from qwen3vl_train.inspect.training import Training, open_training
from qwen3vl_train.train.data import TrainingData, open_data

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""


@dataclass(frozen=True)
class Inspection:
    """facts: what `--json` writes. samples, pack: what the page shows beside them, as plain values."""

    facts: Facts
    samples: list[dict[str, Any]]
    pack: dict[str, Any] | None


def inspect_recipe(
    recipe: Recipe, *, num_samples: int = 12, max_rows: int | None = None, progress: Progress | None = None
) -> Inspection:
    """Look at all data of a recipe: text and media headers of the rows, pixels of the samples shown.

    max_rows: examine no more rows of a source than these, evenly spread; token counts and packs stay those of all.
    Raises ValueError where the data cannot be opened, or no row of it can be used.
    """
    data = open_data(recipe, Ranks(0, 1, 0, torch.device("cpu")))
    training = open_training(recipe, data, max_rows)
    collate = training.collate
    entries = open_entries(data, training)
    scans = _scan_all(entries, collate, max_rows, progress)
    packs = _pack_facts(training, recipe, data.num_steps)
    facts = Facts(
        recipe.name,
        _model_facts(recipe, collate),
        [scan.facts for scan in scans],
        packs,
        _judge(entries, scans, packs, recipe),
    )
    samples = []
    for ref in choose_rows(entries, scans, num_samples):
        view = view_sample(entries[ref.entry], ref, scans[ref.entry].kinds_of.get(ref, frozenset()), collate)
        samples += [view] if view is not None else []
    return Inspection(facts, samples, view_pack(training, recipe.data.max_tokens_per_pack) if num_samples else None)


def open_entries(data: TrainingData, training: Training) -> list[Entry]:
    """Return the entries of a recipe in order, the training ones first, each under a name of its own."""
    entries = entries_of("train", [(training.index, training.sources)], training.weights, 0)
    held_out = data.files if training.streamed else data.files[1:]
    entries += entries_of("eval", held_out, [1.0], len(entries))
    taken: dict[str, int] = {}
    for entry in entries:
        taken[entry.name] = taken.get(entry.name, 0) + 1
        if taken[entry.name] > 1:
            entry.name += f" ({taken[entry.name]})"
    return entries


def _model_facts(recipe: Recipe, collate: MultimodalCollator) -> dict[str, Any]:
    budgets = collate.encoder.budgets
    return {
        "path": recipe.model.path,
        "template": collate.encoder.dialect,
        "min_visual_tokens_per_image": budgets.min_pixels // FACTOR**2,
        "max_visual_tokens_per_image": budgets.max_pixels // FACTOR**2,
    }


def _scan_all(
    entries: list[Entry], collate: MultimodalCollator, max_rows: int | None, progress: Progress | None
) -> list[Scan]:
    finder = DuplicateFinder(entries)
    refs_to_read = [entry.spread(max_rows) for entry in entries]
    total, done = sum(map(len, refs_to_read)), 0
    scans: list[Scan] = []
    for entry, refs in zip(entries, refs_to_read, strict=True):
        read, broken = [], []
        for ref in refs:
            facts = look_at(entry, ref, collate)
            if isinstance(facts, Reject):
                broken.append(facts)
            else:
                read.append((ref, facts))
                finder.add(facts.key, ref)
            done += 1
            if progress is not None:
                progress(done, total)
        scans.append(add_up(entry, read, broken))
    found = _duplicates(finder, entries)
    return [replace(scan, facts=replace(scan.facts, duplicates=same)) for scan, same in zip(scans, found, strict=True)]


def _duplicates(finder: DuplicateFinder, entries: list[Entry]) -> list[DuplicateFacts]:
    """Return what repeats in each entry. Rows were added in the order of the entries, training before held-out ones."""
    repeats: list[list[tuple[str, str]]] = [[] for _ in entries]
    leaks: list[list[tuple[str, str]]] = [[] for _ in entries]

    def full_name(ref: RowRef) -> str:
        source = entries[ref.entry].files[ref.file].source
        return f"{source.name}:{source.row_number(ref.row)}"

    for group in finder.groups():
        first_of: dict[str, RowRef] = {}
        for ref in group:
            entry = entries[ref.entry]
            first = first_of.setdefault(entry.role, ref)
            if first is not ref:
                repeats[ref.entry].append((entry.label(ref), full_name(first)))
            if entry.role == "eval" and "train" in first_of:
                leaks[ref.entry].append((entry.label(ref), full_name(first_of["train"])))
    return [
        DuplicateFacts(len(same), same[:SHOWN_ROWS], len(leaked), leaked[:SHOWN_ROWS])
        for same, leaked in zip(repeats, leaks, strict=True)
    ]


def _pack_facts(training: Training, recipe: Recipe, num_steps: int) -> PackFacts:
    packs = training.packs
    tokens = np.array([int(training.index.tokens[pack].sum()) for pack in packs])
    room = recipe.data.max_tokens_per_pack
    return PackFacts(
        streamed=training.streamed,
        packs=len(packs),
        packs_per_step=recipe.train.packs_per_step,
        max_tokens_per_pack=room,
        steps_per_epoch=None if training.streamed else -(-len(packs) // recipe.train.packs_per_step),
        num_steps=num_steps,
        mean_fill=float(tokens.sum() / (room * len(packs))),
        histograms={
            "fill_percent": histogram(np.floor(100 * tokens / room)),
            "sequences": histogram(np.array([len(pack) for pack in packs])),
        },
    )


def _judge(entries: list[Entry], scans: list[Scan], packs: PackFacts, recipe: Recipe) -> list[Hazard]:
    """Return everything that looks wrong, the worst first."""
    hazards = recipe_hazards([scan.facts for scan in scans], packs, recipe)
    for entry, scan in zip(entries, scans, strict=True):
        found = {kind: [entry.label(ref) for ref in refs] for kind, refs in scan.refs_of.items()}
        hazards += source_hazards(scan.facts, scan.boxes_in_pixels) + row_hazards(scan.facts, found)
    return sorted(hazards, key=lambda hazard: ("error", "warning", "note").index(hazard.level))
