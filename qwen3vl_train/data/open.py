"""From a recipe to the parts of its data path."""

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.config import DataSection, Recipe
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.packing.index import LengthRule
from qwen3vl_train.data.packing.plan import CostModel, PackLimits
from qwen3vl_train.modules import VISION_GROUPS


def open_collator(recipe: Recipe) -> MultimodalCollator:
    """Return the collator of the recipe's checkpoint, with the recipe's budgets and its sampling of clips."""
    data = recipe.data
    return MultimodalCollator.from_pretrained(
        recipe.model.path,
        max_visual_tokens_per_image=data.max_visual_tokens_per_image,
        min_visual_tokens_per_image=data.min_visual_tokens_per_image,
        max_visual_tokens_per_video=data.max_visual_tokens_per_video,
        max_visual_tokens_per_sample=data.max_visual_tokens_per_sample,
        shrink_to_tokens=length_rule(data).max_tokens if data.too_long == "shrink_media" else None,
        shrink_to_patches=data.max_patches_per_pack if data.too_long == "shrink_media" else None,
        fps=data.fps,
        min_frames=data.min_frames,
        max_frames=data.max_frames,
        max_image_pixels=data.max_image_pixels,
        video_markup=recipe.model.video_markup,
    )


def length_rule(data: DataSection) -> LengthRule:
    """Return what happens to samples that are too long."""
    field = "max_tokens_per_pack" if data.max_tokens_per_sample is None else "max_tokens_per_sample"
    return LengthRule(getattr(data, field), f"data.{field}", data.max_patches_per_pack, data.too_long)


def pack_limits(data: DataSection) -> PackLimits:
    return PackLimits(data.max_tokens_per_pack, data.max_patches_per_pack, data.max_sequences_per_pack)


def cost_model(recipe: Recipe) -> CostModel:
    """Return the cost model of the recipe's architecture and of what it trains."""
    trained, of_trained = recipe.tune.trained_groups(), 3 if recipe.tune.method == "full" else 2
    sees = recipe.tune.has_patterns() or any(group in VISION_GROUPS for group in trained)
    reads = any(group.startswith("text") for group in trained)
    return CostModel.from_arch(
        Qwen3VLArch.from_pretrained(recipe.model.path),
        text_passes=of_trained if reads else 2,
        vision_passes=of_trained if sees else 1,
    )
