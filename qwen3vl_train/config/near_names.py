"""Which key did the user mean: keys of the recipe near a wrong one, and what other tools call the same thing."""

import difflib
import re

# Usual name elsewhere -> (our key, what differs in its unit or meaning).
USUAL_NAMES: dict[str, tuple[str, str]] = {
    "learning_rate": ("optim.lr", ""),
    "max_lr": ("optim.lr", ""),
    "vision_tower_lr": ("optim.vision_lr", ""),
    "vit_lr": ("optim.vision_lr", ""),
    "mm_projector_lr": ("optim.merger_lr", "the main merger alone; optim.deepstack_lr is for the DeepStack mergers"),
    "aligner_lr": ("optim.merger_lr", "the main merger alone; optim.deepstack_lr is for the DeepStack mergers"),
    "adam_beta1": ("optim.betas", "both in one list"),
    "adam_beta2": ("optim.betas", "both in one list"),
    "adam_epsilon": ("optim.eps", ""),
    "warmup_ratio": ("optim.warmup_steps", "a number of steps"),
    "lr_scheduler_type": ("optim.schedule", ""),
    "lr_scheduler": ("optim.schedule", ""),
    "max_norm": ("optim.max_grad_norm", ""),
    "gradient_clipping": ("optim.max_grad_norm", ""),
    "clip_grad_norm": ("optim.max_grad_norm", ""),
    "epochs": ("train.num_epochs", ""),
    "num_train_epochs": ("train.num_epochs", ""),
    "max_epochs": ("train.num_epochs", ""),
    "max_steps": ("train.num_steps", ""),
    "steps": ("train.num_steps", ""),
    "batch_size": ("train.packs_per_step", "packs of all ranks together"),
    "global_batch_size": ("train.packs_per_step", "packs of all ranks together"),
    "train_batch_size": ("train.packs_per_step", "packs of all ranks together"),
    "gradient_accumulation_steps": ("train.packs_per_step", "packs of all ranks together"),
    "per_device_train_batch_size": ("train.packs_per_step", "packs of all ranks together"),
    "gradient_checkpointing": ("train.activation_checkpointing", "none or full"),
    "random_seed": ("train.seed", ""),
    "max_length": ("data.max_tokens_per_pack", ""),
    "cutoff_len": ("data.max_tokens_per_pack", ""),
    "max_seq_length": ("data.max_tokens_per_pack", ""),
    "max_seq_len": ("data.max_tokens_per_pack", ""),
    "model_max_length": ("data.max_tokens_per_pack", ""),
    "max_pixels": ("data.max_visual_tokens_per_image", "one token is 32 x 32 pixels"),
    "image_max_pixels": ("data.max_visual_tokens_per_image", "one token is 32 x 32 pixels"),
    "min_pixels": ("data.min_visual_tokens_per_image", "one token is 32 x 32 pixels"),
    "video_max_pixels": ("data.max_visual_tokens_per_video", "one token is 32 x 32 pixels of two frames"),
    "total_pixels": ("data.max_visual_tokens_per_video", "one token is 32 x 32 pixels of two frames"),
    "video_fps": ("data.fps", "frames taken a second"),
    "video_min_frames": ("data.min_frames", ""),
    "video_max_frames": ("data.max_frames", ""),
    "video_maxlen": ("data.max_frames", ""),
    "image_min_pixels": ("data.min_visual_tokens_per_image", "one token is 32 x 32 pixels"),
    "dataset": ("data.train", "a list of {path, media_root, weight}"),
    "train_file": ("data.train", "a list of {path, media_root, weight}"),
    "data_path": ("data.train", "a list of {path, media_root, weight}"),
    "eval_dataset": ("data.eval", "a list of {path, media_root, name}"),
    "val_dataset": ("data.eval", "a list of {path, media_root, name}"),
    "image_folder": ("data.train.*.media_root", ""),
    "image_root": ("data.train.*.media_root", ""),
    "media_dir": ("data.train.*.media_root", ""),
    "dataloader_num_workers": ("data.num_workers", ""),
    "preprocessing_num_workers": ("data.num_workers", ""),
    "model_name_or_path": ("model.path", ""),
    "model_name": ("model.path", ""),
    "model_id": ("model.path", ""),
    "torch_dtype": ("model.dtype", ""),
    "precision": ("model.dtype", "bfloat16 or float32"),
    "bf16": ("model.dtype", "bfloat16 or float32"),
    "lora_r": ("tune.rank", ""),
    "lora_rank": ("tune.rank", ""),
    "r": ("tune.rank", ""),
    "lora_alpha": ("tune.alpha", ""),
    "lora_dropout": ("tune.dropout", ""),
    "target_modules": ("tune.targets", ""),
    "lora_target": ("tune.targets", ""),
    "use_rslora": ("tune.rslora", ""),
    "use_dora": ("tune.dora", ""),
    "finetuning_type": ("tune.method", "lora or full"),
    "train_type": ("tune.method", "lora or full"),
    "trainable_modules": ("tune.train", "module groups, with method full"),
    "run_name": ("name", ""),
    "save_steps": ("checkpoint.every_steps", ""),
    "save_every_steps": ("checkpoint.every_steps", ""),
    "save_total_limit": ("checkpoint.keep_last", ""),
    "resume_from_checkpoint": ("checkpoint.resume", "auto or never"),
    "eval_steps": ("eval.every_steps", ""),
    "eval_every_steps": ("eval.every_steps", ""),
    "report_to": ("track.wandb", "offline, online or off"),
    "wandb_mode": ("track.wandb", "offline, online or off"),
    "wandb_project": ("track.project", ""),
    "strategy": ("parallel.engine", ""),
    "distributed_type": ("parallel.engine", ""),
}
_SECRET = re.compile(r"(?i)(api_?key|token|password|secret)$")


def unknown_key_message(key: str, known: list[str]) -> str:
    """Say that a dotted key is unknown, and which of `known` was probably meant.

    known: every dotted key of the recipe; a place in a list is written `*` there and as its number in `key`.
    """
    *sections, leaf = key.split(".")
    leaf = leaf.lower().replace("-", "_")
    if _SECRET.search(leaf):
        return "unknown key; a recipe holds no secrets, set them in the environment (WANDB_API_KEY)"
    places = [part for part in sections if part.isdigit()]
    meant, note = USUAL_NAMES.get(leaf, ("", ""))
    pattern = ".".join("*" if part.isdigit() else part for part in [*sections, leaf])
    section = pattern.rpartition(".")[0]
    if meant.rpartition(".")[2] in _fields_of(section, known):
        meant = f"{section}.{meant.rpartition('.')[2]}".lstrip(".")
    if not meant:
        meant = _nearest(pattern, known)
    if not meant or meant == pattern:
        fields = _fields_of(section, known)
        return f"unknown key; known here: {', '.join(fields)}" if fields else "unknown key"
    for place in places:
        meant = meant.replace("*", place, 1)
    return f"unknown key; did you mean {meant.replace('*', '0')}{f' ({note})' if note else ''}?"


def _nearest(pattern: str, known: list[str]) -> str:
    """First a near name in the same section, then the same last part elsewhere, then the nearest whole key."""
    section, _, leaf = pattern.rpartition(".")
    siblings = _fields_of(section, known)
    near = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.7)
    if near:
        return f"{section}.{near[0]}" if section else near[0]
    namesakes = [key for key in known if key.rpartition(".")[2] == leaf]
    if namesakes:
        return difflib.get_close_matches(pattern, namesakes, n=1, cutoff=0.0)[0]
    return next(iter(difflib.get_close_matches(pattern, known, n=1, cutoff=0.7)), "")


def _fields_of(section: str, known: list[str]) -> list[str]:
    prefix = f"{section}." if section else ""
    return [key.removeprefix(prefix) for key in known if key.startswith(prefix) and "." not in key.removeprefix(prefix)]
