"""Load the recipe of a run, one YAML file, with `load_recipe`. Its fields are in `fields`."""

from qwen3vl_train.config.data_fields import DataSection, EvalSource, TrainSource
from qwen3vl_train.config.fields import OptimSection, ParallelSection, Recipe
from qwen3vl_train.config.loading import load_recipe, recipe_from_dict
from qwen3vl_train.config.rules import RecipeError, check_world_size
from qwen3vl_train.config.saving import public_dict, recipe_differences, run_dir, save_recipe
from qwen3vl_train.config.tune_fields import FullTune, LoraTune

__all__ = [
    "DataSection",
    "EvalSource",
    "FullTune",
    "LoraTune",
    "OptimSection",
    "ParallelSection",
    "Recipe",
    "RecipeError",
    "TrainSource",
    "check_world_size",
    "load_recipe",
    "public_dict",
    "recipe_differences",
    "recipe_from_dict",
    "run_dir",
    "save_recipe",
]
