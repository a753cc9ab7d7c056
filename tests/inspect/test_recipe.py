"""The facts of a data set whose faults are known, row for row."""

import json
import shutil

import pytest

from qwen3vl_train.inspect.findings import CHECKS
from qwen3vl_train.inspect.recipe import inspect_recipe
from tests.helpers import finding_rows as rows
from tests.helpers.finding_rows import finding_rows_recipe
from tests.helpers.small_runs import picture, row, write_rows


def rows_of(inspection, check, source="train.jsonl"):
    """Return the rows of the only finding of a check and a source, None if there is none."""
    found = [one for one in inspection.facts.findings if one.check == check and one.source == source]
    assert len(found) <= 1
    return [int(one) for one in found[0].rows] if found else None


def test_counts_rows_and_tokens(inspection, recipe):
    training, text, held_out = inspection.facts.sources
    assert [one.role for one in inspection.facts.sources] == ["train", "train", "eval"]
    assert (training.rows, training.usable, training.rejected, training.examined) == (19, 15, 4, 15)
    assert (text.rows, text.weight, held_out.rows, held_out.weight) == (8, 2.0, 2, 1.0)
    assert training.formats == {"openai": 15}
    assert (training.images, training.rows_with_images, training.videos) == (11, 11, 0)
    assert training.tokens == training.examined_tokens
    shown = [sample for sample in inspection.samples if sample["source"] == training.name]
    assert training.tokens == sum(len(sample["ids"]) for sample in shown)
    assert training.label_tokens == sum(weight > 0 for sample in shown for weight in sample["weights"])
    assert training.visual_tokens == sum(length for sample in shown for _, length in sample["visual"])


def test_histograms_cover_every_row(training):
    for name, total in {"text_tokens": 15, "visual_tokens": 15, "images": 15, "turns": 15, "aspect_ratios": 11}.items():
        assert sum(training.histograms[name].counts) == total
    assert training.histograms["turns"].maximum == 3
    assert training.histograms["aspect_ratios"].maximum == 2


def test_rejects_are_grouped_by_reason(training):
    assert [(group.count, group.rows) for group in training.rejects] == [(2, ["16", "17"]), (1, ["18"]), (1, ["19"])]
    assert "missing.png" in training.rejects[0].reason
    assert training.nothing_to_learn == ["19"]


def test_every_planted_fault_is_found_in_its_row(inspection):
    planted = {
        "boxes_pixel": [rows.PIXEL],
        "boxes_unit": [rows.UNIT],
        "boxes_xywh": [rows.XYWH],
        "special_token": [rows.MARKUP],
        "media_mark": [rows.MARKUP],
        "empty_answer": [rows.EMPTY],
        "reasoning_on_instruct": [rows.THINK],
        "nothing_to_learn": [19],
        "duplicates": [rows.REPEAT],
        "no_reasoning": None,
        "answers_left_out": None,
        "few_labels": None,
    }
    assert {check: rows_of(inspection, check) for check in planted} == planted
    assert rows_of(inspection, "leak", "eval.jsonl") == [1]
    assert rows_of(inspection, "rejects", "") == []
    assert not any(one.source == "text.jsonl" for one in inspection.facts.findings)


def test_findings_are_sorted_and_name_a_remedy(inspection):
    levels = [finding.level for finding in inspection.facts.findings]
    assert levels == sorted(levels, key=("error", "warning", "note").index)
    for finding in inspection.facts.findings:
        assert finding.check in CHECKS
        assert finding.message.endswith(".")
        assert finding.remedy.endswith(".")
        assert finding.evidence


def test_pairs_of_equal_rows(inspection, data_folder):
    training, _, held_out = inspection.facts.sources
    twin = f"{data_folder}/train.jsonl:{rows.TWIN}"
    assert training.duplicates.count == 1
    assert training.duplicates.pairs == [(str(rows.REPEAT), twin)]
    assert (held_out.duplicates.count, held_out.duplicates.leaked) == (0, 1)
    assert held_out.duplicates.leaked_pairs == [("1", twin)]


def test_packs_are_those_of_the_loader(inspection, recipe):
    packs = inspection.facts.packs
    text, training = inspection.facts.sources[1], inspection.facts.sources[0]
    tokens = training.tokens + 2 * text.tokens  # weight 2
    assert packs.mean_fill == pytest.approx(tokens / (packs.packs * 512))
    assert sum(packs.histograms["sequences"].counts) == packs.packs
    assert packs.histograms["sequences"].total == 15 + 2 * 8
    assert packs.steps_per_epoch == -(-packs.packs // 2)
    assert packs.num_steps == 2 * packs.steps_per_epoch


def test_facts_are_json_without_infinities(inspection):
    plain = inspection.facts.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == json.loads(json.dumps(plain))
    assert plain["sources"][0]["rejected"] == 4


def test_max_rows_examines_evenly_spaced_rows(recipe, inspection):
    few = inspect_recipe(recipe, num_samples=0, max_rows=3)
    training = few.facts.sources[0]
    assert (training.examined, training.usable) == (3, 15)
    assert training.tokens == inspection.facts.sources[0].tokens
    assert sum(training.histograms["text_tokens"].counts) == 15
    assert sum(training.histograms["turns"].counts) == 3
    assert (few.samples, few.pack) == ([], None)


def test_progress_ends_at_its_total(recipe):
    seen = []
    inspect_recipe(recipe, num_samples=0, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (25, 25)
    assert [done for done, _ in seen] == list(range(1, 26))


def write_boxes(folder, box):
    picture(200, 100, 0).save(folder / "small.png")
    numbered = [row(f"Where {number}?", f"[{number}, {number}, {box}]", ["small.png"]) for number in range(25)]
    write_rows(folder / "train.jsonl", numbered)
    return {"train": [{"path": str(folder / "train.jsonl")}], "num_workers": 0, "max_tokens_per_pack": 512}


def test_boxes_that_all_fit_small_images_are_suspected(tiny_folder, tmp_path):
    for box, expected in (("190, 95", []), ("190, 900", None)):
        changed = finding_rows_recipe(tiny_folder, tmp_path, data=write_boxes(tmp_path, box))
        assert rows_of(inspect_recipe(changed), "boxes_small_pixel") == expected


def test_thinking_checkpoint_on_data_without_reasoning(tiny_folder, data_folder, tmp_path):
    import tiny_checkpoint
    from tokenizers import Tokenizer

    model = shutil.copytree(tiny_folder, tmp_path / "thinking")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    limits = {"min_pixels": 64 * 64, "max_pixels": 512 * 512}
    tiny_checkpoint.write_processor_files(model, tokenizer, template="thinking", **limits)
    data = {"train": [{"path": str(data_folder / "text.jsonl")}], "num_workers": 0}
    found = inspect_recipe(finding_rows_recipe(model, data_folder, data=data), num_samples=0)
    assert found.facts.model["template"] == "thinking"
    assert rows_of(found, "no_reasoning", "text.jsonl") == list(range(1, 9))


def test_run_that_ends_while_warming_up(recipe, tiny_folder, data_folder):
    short = finding_rows_recipe(tiny_folder, data_folder, optim={"lr": 1e-3, "warmup": 100})
    checks = [finding.check for finding in inspect_recipe(short, num_samples=0).facts.findings]
    assert "short_run" in checks


def test_files_of_a_pattern_are_one_source(tiny_folder, data_folder, tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        shutil.copy(data_folder / "text.jsonl", tmp_path / name)
    data = {"train": [{"path": f"{tmp_path}/*.jsonl", "name": "both"}], "num_workers": 0}
    found = inspect_recipe(finding_rows_recipe(tiny_folder, data_folder, data=data))
    (source,) = found.facts.sources
    assert (source.name, source.files, source.rows) == ("both", 2, 16)
    assert source.duplicates.count == 8
    assert source.duplicates.pairs[0] == ("b.jsonl:1", f"{tmp_path}/a.jsonl:1")
    assert {sample["row"] for sample in found.samples} >= {"a.jsonl:1", "b.jsonl:8"}


def test_sources_of_one_name_are_numbered(tiny_folder, data_folder):
    paths = [str(data_folder / "text.jsonl"), str(data_folder / "eval.jsonl")]
    data = {"train": [{"path": path, "name": "same"} for path in paths], "num_workers": 0}
    found = inspect_recipe(finding_rows_recipe(tiny_folder, data_folder, data=data))
    assert [source.name for source in found.facts.sources] == ["same", "same (2)"]
    assert {sample["source"] for sample in found.samples} == {"same", "same (2)"}


def test_rejects_of_a_file_listed_twice_belong_to_its_entries(tiny_folder, tmp_path):
    rows = [row("a", "b"), "not json", {"q": "a", "a": "b"}, {"q": "c", "a": "d"}]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    columns = {"path": path, "name": "columns", "columns": {"question": "q", "answer": "a"}}
    data = {"train": [{"path": path}, columns, {**columns, "name": "again"}], "num_workers": 0}
    found = inspect_recipe(finding_rows_recipe(tiny_folder, tmp_path, data=data), num_samples=0).facts.sources
    assert [(source.usable, source.rejected, source.dropped) for source in found] == [(1, 3, 0), (3, 1, 0), (3, 1, 0)]
    assert [row for group in found[1].rejects for row in group.rows] == ["2"]
