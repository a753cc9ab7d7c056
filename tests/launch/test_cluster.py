"""The cluster files: well formed by their tools' schemas, and the Slurm script run with a fake srun."""

import ast
import os
import py_compile
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from qwen3vl_train.config import load_recipe
from tests.helpers import launchers, small_runs
from tests.launch import cluster_schemas

CLUSTER = launchers.ROOT / "launch" / "cluster"


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def check_shell(script: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def recipes_in(text: str) -> list[str]:
    return re.findall(r"recipes/[\w.-]+\.yaml", text)


@pytest.mark.parametrize("file", sorted(CLUSTER.iterdir()), ids=lambda file: file.name)
def test_recipes_that_the_files_name_exist(file: Path):
    for recipe in recipes_in(file.read_text()) if file.is_file() else []:
        load_recipe(str(launchers.ROOT / recipe))


def test_the_jobset_fits_its_schema_and_its_numbers_agree():
    jobset = read("jobset.yaml")
    jsonschema.validate(jobset, cluster_schemas.JOBSET)
    (node,) = jobset["spec"]["replicatedJobs"]
    job = node["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["parallelism"] == job["completions"] == int(env["NNODES"])
    assert job["completionMode"] == "Indexed"  # JOB_COMPLETION_INDEX exists only then
    (command,) = container["args"]
    check_shell(command)
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']} " in command
    name = jobset["metadata"]["name"]
    assert f"--master-addr={name}-{node['name']}-0-0.{name} " in command
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] > int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}


def test_kubernetes_accepts_the_job_of_the_jobset():
    """With the whole schema of Kubernetes, where `pip install kubernetes-validate` (111 MB) has brought it."""
    kubernetes = pytest.importorskip("kubernetes_validate")
    (node,) = read("jobset.yaml")["spec"]["replicatedJobs"]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": node["name"]},
        "spec": node["template"]["spec"],
    }
    kubernetes.validate(job, "1.33", strict=True)
    job["spec"]["template"]["spec"]["containers"][0]["imagee"] = "misspelt"
    with pytest.raises(kubernetes.ValidationError, match="imagee"):
        kubernetes.validate(job, "1.33", strict=True)


def test_the_skypilot_file_fits_its_schema():
    task = read("sky.yaml")
    jsonschema.validate(task, cluster_schemas.SKY)
    check_shell(task["setup"])
    check_shell(task["run"])
    (folder,) = task["volumes"]
    assert f"output_dir={folder}" in task["run"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("jobset", lambda values: values["spec"].update(maxRestarts=3)),
        ("jobset", lambda values: values["spec"]["replicatedJobs"][0].update(name="Node_1")),
        ("sky", lambda values: values["resources"].update(accelerators="H100:8:2")),
        ("sky", lambda values: values["envs"].update(OMP_NUM_THREADS=1)),
    ],
)
def test_the_schemas_refuse_what_the_tools_refuse(name: str, change: Any):
    change(values := read(f"{name}.yaml"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, getattr(cluster_schemas, name.upper()))


def test_the_ray_script_imports_ray_only_when_it_runs(tmp_path: Path):
    file = CLUSTER / "ray_train.py"
    py_compile.compile(str(file), cfile=str(tmp_path / "compiled"), doraise=True)
    tree = ast.parse(file.read_text())
    at_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any(name.split(".")[0] == "ray" for node in at_top for name in _imported(node))
    (worker,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train_recipe"]
    calls = [node for node in ast.walk(worker) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "train(recipe)" in [ast.unparse(call) for call in calls]
    assert ("qwen3vl_train.train.loop", "train") in _names_from(worker)
    (trainer,) = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "TorchTrainer"
    ]  # fmt: skip
    assert ast.unparse(trainer.args[0]) == "train_recipe"
    asked = subprocess.run(
        [sys.executable, str(file), "--help"], env=launchers.environment(), capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr
    assert "--num-workers" in asked.stdout
    options_last = [sys.executable, str(file), str(tmp_path / "none.yaml"), "--num-workers", "2", "train.num_steps=1"]
    assert "unrecognized arguments" not in launchers.run(options_last).stderr


def test_a_ray_worker_trains(tiny_folder: Path, task: Path, tmp_path: Path):
    pytest.importorskip("ray.train.torch")
    recipe = launchers.short_recipe(tiny_folder, task, tmp_path)
    command = [sys.executable, str(CLUSTER / "ray_train.py"), str(recipe), "--cpu", "train.num_steps=1"]
    done = launchers.run(command, PYTHONPATH=os.pathsep.join([str(launchers.ROOT), *sys.path]))
    assert done.returncode == 0, done.stderr
    assert len(small_runs.losses(tmp_path / "run")) == 1


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]


def _names_from(tree: ast.AST) -> set[tuple[str | None, str]]:
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {(node.module, alias.name) for node in imports for alias in node.names}


def test_no_script_has_the_name_of_a_module():
    # The folder of a script is first on its path, so `import ray` would find a ray.py beside it.
    for script in [*CLUSTER.glob("*.py"), *CLUSTER.parent.glob("*.py")]:
        taken = {*sys.stdlib_module_names, "ray", "torch", "datasets", "accelerate", "deepspeed", "wandb", "evaluate"}
        assert script.stem not in taken


# A fake srun: starts the tasks on this host with the variables that Slurm sets, returns the highest exit code.
SRUN = """#!/bin/bash
echo "$@" >> "$CALLS"
if [ -n "${FAKE_CODE:-}" ]; then exit "$FAKE_CODE"; fi
while [[ $1 == --* ]]; do shift; done
pids=()
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids+=($!)
done
worst=0
for pid in "${pids[@]}"; do wait "$pid" || { code=$?; [ $code -gt $worst ] && worst=$code; }; done
exit $worst
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
if [ "$1" = show ]; then printf '127.0.0.1\\nother\\n'; fi
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job of two tasks."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    job = {"SLURM_JOB_ID": launchers.free_port(), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}
    path = f"{folder}{os.pathsep}{launchers.environment()['PATH']}"
    return {**job, "SLURM_CPUS_PER_TASK": "1", "CALLS": str(tmp_path / "calls"), "PATH": path}


SBATCH = ["bash", str(CLUSTER / "slurm.sbatch")]


def test_the_slurm_script_trains_one_rank_a_task(tiny_folder: Path, task: Path, tmp_path: Path, slurm: dict[str, str]):
    check_shell((CLUSTER / "slurm.sbatch").read_text())
    recipe = launchers.short_recipe(tiny_folder, task, tmp_path)
    done = launchers.run([*SBATCH, str(recipe), "train.num_steps=2"], **slurm)
    assert done.returncode == 0, done.stderr
    assert "full, 2 ranks on cpu" in done.stdout
    assert len(small_runs.losses(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "logs" / "rank-1.log").is_file()


@pytest.mark.parametrize(("code", "queued_again"), [(75, True), (1, False), (0, False)])
def test_only_a_run_that_was_asked_to_stop_is_queued_again(slurm: dict[str, str], code: int, queued_again: bool):
    done = launchers.run([*SBATCH, "recipe.yaml"], FAKE_CODE=str(code), **slurm)
    assert done.returncode == code
    calls = Path(slurm["CALLS"]).read_text()
    assert (f"scontrol requeue {slurm['SLURM_JOB_ID']}\n" in calls) == queued_again


def test_the_slurm_header_asks_for_as_many_tasks_as_gpus():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", (CLUSTER / "slurm.sbatch").read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("USR1@")  # to the tasks; B: would go to the batch shell instead
