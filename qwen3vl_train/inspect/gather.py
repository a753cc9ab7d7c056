"""Open the data of a recipe as training does, and collect everything that can be said of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen3vl_train.config import Recipe
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.errors import Reject
from qwen3vl_train.data.media.image import FACTOR
from qwen3vl_train.data.open import open_collator
from qwen3vl_train.data.packing.index import Index
from qwen3vl_train.data.sources import FileSource
from qwen3vl_train.inspect.duplicates import DuplicateFinder
from qwen3vl_train.inspect.entries import Entry, entries_of
from qwen3vl_train.inspect.facts import Facts, Hazard, PackFacts
from qwen3vl_train.inspect.hazards import box_hazards, make, recipe_hazards, row_hazards, source_hazards
from qwen3vl_train.inspect.packs import pack_facts, view_pack
from qwen3vl_train.inspect.samples import choose_rows, view_sample
from qwen3vl_train.inspect.scan import Scan, add_up, look_at
from qwen3vl_train.inspect.training import Training, open_held_out, open_training

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
    Raises ValueError for files that cannot be read; that no row can be used is a finding.
    """
    collate = open_collator(recipe)
    training = open_training(recipe, collate, max_rows)
    entries = name_entries(training, open_held_out(recipe, collate))
    scans = _scan_all(entries, collate, max_rows, progress)
    packs = pack_facts(training, recipe)
    samples = [
        view_sample(entries[ref.entry], ref, scans[ref.entry].kinds_of.get(ref, frozenset()), collate)
        for ref in choose_rows(entries, scans, num_samples)
    ]
    facts = Facts(
        recipe.name,
        _model_facts(recipe, collate),
        [scan.facts for scan in scans],
        packs,
        _judge(scans, samples, packs, recipe),
    )
    return Inspection(facts, samples, view_pack(training, recipe) if num_samples else None)


def name_entries(training: Training, held_out: list[tuple[Index, list[FileSource]]]) -> list[Entry]:
    """Return the entries of a recipe in order, the training ones first, each under a name of its own."""
    entries = entries_of("train", [(training.index, training.sources)], training.weights, 0)
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
    for scan, same in zip(scans, finder.facts(), strict=True):
        scan.facts.duplicates = same
    return scans


def _judge(scans: list[Scan], samples: list[dict[str, Any]], packs: PackFacts, recipe: Recipe) -> list[Hazard]:
    """Return everything that looks wrong, the worst first."""
    hazards = recipe_hazards([scan.facts for scan in scans], packs, recipe)
    for scan in scans:
        shown = [sample for sample in samples if sample["source"] == scan.facts.name]
        broken = [sample["row"] for sample in shown if sample["fault"]]
        if broken:
            hazards.append(make("undecodable", scan.facts.name, len(broken), len(shown), broken))
        hazards += source_hazards(scan.facts) + box_hazards(scan.facts, scan.boxes)
        hazards += row_hazards(scan.facts, scan.rows_of)
    return sorted(hazards, key=lambda hazard: ("error", "warning", "note").index(hazard.level))
