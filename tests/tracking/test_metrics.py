import json
import math
import subprocess
import sys

import pytest
import torch

from qwen3vl_train.data.packing.loader import StepPacks
from qwen3vl_train.data.packing.plan import PlanHash
from qwen3vl_train.tracking.loss_by_source import SourceLoss
from qwen3vl_train.tracking.metrics import (
    MetricsLog,
    StepTally,
    StepTimes,
    bf16_peak_flops,
    device_peak_flops,
    read_metrics,
    step_metrics,
)

TALLY = StepTally(
    step=3, loss=1.25, lr=1e-4, tokens=3000, label_tokens=400, visual_tokens=1200, patches=4800, flops=4.945e14,
    grad_norms={"all": 0.5, "merger": 0.25}, sources={"a": SourceLoss(1.25, 400), "b": SourceLoss(None, 0)},
)  # fmt: skip
PACKS = StepPacks(
    packs=[], pack_numbers=[], num_packs=2, epoch=1, rejected=[], state={}, balance=1.25,
    plan_hash=PlanHash(0, 0), ends_epoch=False, num_dropped=2, num_shrunk=3, num_seen=9,
)  # fmt: skip
TIMES = StepTimes(step=2.0, data_wait=0.5, checkpoint_stall=0.0)


def row_of(*, world_size: int, peak_flops: float | None) -> dict:
    return step_metrics(
        TALLY, PACKS, TIMES, num_rejected=1, max_tokens_per_pack=2048,
        world_size=world_size, peak_flops=peak_flops, peak_memory_gib=1.5,
    )  # fmt: skip


def test_a_step_has_the_fields_of_metrics_jsonl():
    assert row_of(world_size=2, peak_flops=989e12) == {
        "step": 3,
        "epoch": 1,
        "loss": 1.25,
        "grad_norm": 0.5,
        "lr": 1e-4,
        "tokens": 3000,
        "label_tokens": 400,
        "visual_tokens": 1200,
        "patches": 4800,
        "tokens_per_second": 1500.0,
        "pack_efficiency": 3000 / 4096,
        "rank_balance": 1.25,
        "data_wait_fraction": 0.25,
        "mfu": pytest.approx(0.125),  # 4.945e14 / (2 s x 2 devices x 9.89e14)
        "peak_memory_gib": 1.5,
        "seconds": 2.0,
        "rejected": 1,
        "dropped": 2,
        "shrunk": 3,
        "checkpoint_stall_seconds": 0.0,
        "sources": {"a": {"loss": 1.25, "label_tokens": 400}, "b": {"loss": None, "label_tokens": 0}},
    }


def test_mfu_is_null_where_the_peak_is_not_known():
    assert row_of(world_size=1, peak_flops=None)["mfu"] is None
    assert device_peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L400", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_device_name(name, peak):
    assert bf16_peak_flops(name) == peak


def test_peak_memory_is_in_gib():
    script = (
        "import torch; from qwen3vl_train.tracking.metrics import peak_memory_gib as peak; d = torch.device('cpu');"
        "before = peak(d); block = torch.ones(2**27); print(before, peak(d))"  # half a GiB of float32
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = map(float, answer.stdout.split())
    # A process that has imported torch holds 0.1 to 1 GiB; the allocator may round up and reuse a little.
    assert 0.05 < before < 2
    assert after - before == pytest.approx(0.5, abs=0.1)


def test_rows_are_flushed_strict_json_with_null_for_nan(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"step": 1, "loss": math.nan, "deep": [math.inf, {"x": -math.inf}], "lr": 1.0})
        line = path.read_text()
    assert line == '{"step": 1, "loss": null, "deep": [null, {"x": null}], "lr": 1.0}\n'
    assert read_metrics(path)[0]["loss"] is None


@pytest.mark.parametrize("rest", ['\n{"step": 2, "lo', '\n{"step": 2', "\n{", ""])
def test_a_half_written_line_is_removed(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}' + rest)  # a whole line is kept, also without its newline
    assert read_metrics(path) == [{"step": 1}]
    with MetricsLog(path) as log:
        log.append({"step": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]


def test_the_last_row_of_a_step_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 1}\n{"step": 3, "a": 1}\n{"step": 2, "a": 2}\n')
    assert read_metrics(path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 3, "a": 1}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON object with a step; remove the line"):
        read_metrics(path)
