"""Train on a Ray cluster: python launch/cluster/ray_train.py recipe.yaml --num-workers 16 [key=value ...]"""

import argparse
import sys
from pathlib import Path

from qwen3vl_train.config import Recipe, load_recipe
from qwen3vl_train.dist.rendezvous import NCCL_SETTINGS


def train_recipe(values: dict) -> None:
    """What each worker runs: Ray has joined the ranks, the rest is any other run."""
    from qwen3vl_train.config import recipe_from_dict
    from qwen3vl_train.train.loop import train

    recipe: Recipe = recipe_from_dict(values)
    train(recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune Qwen3-VL from a recipe, on the workers of a Ray cluster.")
    parser.add_argument("recipe", help="recipe file; its paths must be visible to every worker")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--num-workers", type=int, default=1, help="ranks, each with one GPU")
    parser.add_argument("--cpu", action="store_true", help="workers without a GPU")
    arguments = parser.parse_intermixed_args()  # overrides may follow options, as the first line says
    recipe = load_recipe(arguments.recipe, arguments.overrides)

    from ray.train import FailureConfig, RunConfig, ScalingConfig  # type: ignore[import-not-found]  # an extra
    from ray.train.torch import TorchConfig, TorchTrainer  # type: ignore[import-not-found]

    trainer = TorchTrainer(
        train_recipe,
        train_loop_config=recipe.to_dict(),
        # Small sums of the loop travel by gloo, so both are needed where there are GPUs.
        torch_config=TorchConfig(
            backend="gloo" if arguments.cpu else "cpu:gloo,cuda:nccl", timeout_s=int(recipe.parallel.timeout_seconds)
        ),
        scaling_config=ScalingConfig(num_workers=arguments.num_workers, use_gpu=not arguments.cpu),
        run_config=RunConfig(
            name=recipe.name,
            storage_path=str(Path(recipe.output_dir).resolve() / ".ray"),  # Ray's own notes
            failure_config=FailureConfig(max_failures=3),  # the run itself resumes from its last checkpoint
            worker_runtime_env={"env_vars": dict(NCCL_SETTINGS)},  # read when Ray joins the ranks, before train() runs
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    sys.exit(main())
