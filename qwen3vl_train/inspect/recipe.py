"""Open the data of a recipe as training does, and collect the facts, findings and samples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen3vl_train.checkpoint.hub_model import with_local_model
from qwen3vl_train.config import Recipe
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.errors import Reject
from qwen3vl_train.data.media.image import FACTOR
from qwen3vl_train.data.open import open_collator
from qwen3vl_train.inspect.as_json import rejects_to_json, sample_to_json
from qwen3vl_train.inspect.duplicates import DuplicateFinder
from qwen3vl_train.inspect.facts import Facts, Finding, PackFacts
from qwen3vl_train.inspect.findings import box_findings, make_finding, recipe_findings, row_findings, source_findings
from qwen3vl_train.inspect.samples import choose_rows, pack_facts, view_pack, view_sample
from qwen3vl_train.inspect.scan import Scan, scan_row, summarize
from qwen3vl_train.inspect.training import Entry, name_entries, open_held_out, open_training

Progress = Callable[[int, int], None]  # (rows done, number of rows)


@dataclass(frozen=True)
class Inspection:
    """The facts, and the samples and pack that the page shows beside them, as plain values.

    rejects: rows that cannot be used, the first ones of each entry, as `--json` writes them.
    """

    facts: Facts
    samples: list[dict[str, Any]]
    rejects: list[dict[str, Any]]
    pack: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` writes: the facts, the samples shown, without what only draws them, and the rejects."""
        samples = [sample_to_json(sample) for sample in self.samples]
        return {**self.facts.to_json(), "samples": samples, "rejects": self.rejects}


def inspect_recipe(
    recipe: Recipe, *, num_samples: int = 12, max_rows: int | None = None, progress: Progress | None = None
) -> Inspection:
    """Read all data of a recipe: text and media headers of the rows, and pixels of the samples shown.

    num_samples: rows to show.
    max_rows: rows of a source to examine at most, evenly spaced; token counts and packs are always of all rows.
    Raises ValueError for files that cannot be read; that no row can be used is a finding.
    """
    recipe = with_local_model(recipe)
    collate = open_collator(recipe)
    training = open_training(recipe, collate, max_rows)
    entries = name_entries(training, open_held_out(recipe, collate))
    scans = _scan_all(entries, collate, max_rows, progress)
    packs = pack_facts(training, recipe)
    samples = [
        view_sample(entries[ref.entry], ref, scans[ref.entry].failed_checks.get(ref, frozenset()), collate)
        for ref in choose_rows(entries, scans, num_samples)
    ]
    model = {
        "path": recipe.model.path,
        "template": collate.dialect,
        "min_visual_tokens_per_image": collate.budgets.min_pixels // FACTOR**2,
        "max_visual_tokens_per_image": collate.budgets.max_pixels // FACTOR**2,
    }
    findings = _judge(scans, samples, packs, recipe)
    facts = Facts(recipe.name, model, [scan.facts for scan in scans], packs, findings)
    rejects = [reject for entry, scan in zip(entries, scans, strict=True) for reject in rejects_to_json(entry, scan)]
    return Inspection(facts, samples, rejects, view_pack(training, recipe) if num_samples else None)


def _scan_all(
    entries: list[Entry], collate: MultimodalCollator, max_rows: int | None, progress: Progress | None
) -> list[Scan]:
    finder = DuplicateFinder(entries)
    refs_to_read = [entry.evenly_spaced(max_rows) for entry in entries]
    total, done = sum(map(len, refs_to_read)), 0
    scans: list[Scan] = []
    for entry, refs in zip(entries, refs_to_read, strict=True):
        read, broken = [], []
        for ref in refs:
            facts = scan_row(entry, ref, collate)
            if isinstance(facts, Reject):
                broken.append(facts)
            else:
                read.append((ref, facts))
                finder.add(facts.key, ref)
            done += 1
            if progress is not None:
                progress(done, total)
        scans.append(summarize(entry, read, broken))
    for scan, duplicates in zip(scans, finder.facts(), strict=True):
        scan.facts.duplicates = duplicates
    return scans


def _judge(scans: list[Scan], samples: list[dict[str, Any]], packs: PackFacts, recipe: Recipe) -> list[Finding]:
    """Return everything that looks wrong, the worst first."""
    findings = list(recipe_findings([scan.facts for scan in scans], packs, recipe))
    for scan in scans:
        name = scan.facts.name
        shown = [sample for sample in samples if sample["source"] == name]
        broken = [sample["row"] for sample in shown if sample["fault"]]
        if broken:
            findings.append(make_finding("undecodable", name, len(broken), len(shown), broken))
        findings += [*source_findings(scan.facts), *box_findings(scan.facts, scan.boxes)]
        findings += row_findings(scan.facts, scan.rows_by_check, scan.details)
    return sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.level))
