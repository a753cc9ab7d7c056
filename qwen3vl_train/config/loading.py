"""Read a recipe from a file and overrides, or raise one error that lists everything that is wrong with them."""

import difflib
import re
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from qwen3vl_train.config.fields import Recipe
from qwen3vl_train.config.rules import RecipeError, field_conflicts
from qwen3vl_train.config.yaml12 import format_value, read_yaml

Fault = tuple[str, str]  # (dotted key, what is wrong with it)

# Errors of pydantic -> what the field takes.
_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list of two numbers",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "dict_type": "a section of keys",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}
# (our key, what differs in its unit or meaning): names that other tools use for it.
_NAMES_ELSEWHERE: dict[tuple[str, str], str] = {
    ("optim.lr", ""): "learning_rate max_lr",
    ("optim.vision_lr", ""): "vision_tower_lr vit_lr",
    ("optim.merger_lr", "the main merger alone; optim.deepstack_lr is for the DeepStack mergers"): (
        "mm_projector_lr aligner_lr"
    ),
    ("optim.betas", "both in one list"): "adam_beta1 adam_beta2",
    ("optim.eps", ""): "adam_epsilon",
    ("optim.warmup", "steps, or a share of the run below 1"): "warmup_ratio warmup_steps num_warmup_steps warmup_iters",
    ("optim.schedule", ""): "lr_scheduler_type lr_scheduler",
    ("optim.min_lr", "a rate"): "lr_end cosine_min_lr lr_scheduler_kwargs",
    ("optim.min_lr", "a rate, so this share times optim.lr"): "min_lr_ratio min_lr_rate",
    ("optim.decay_share", "of the run, with schedule wsd"): "decay_ratio num_decay_steps wsd_decay_ratio",
    ("optim.max_grad_norm", ""): "max_norm gradient_clipping clip_grad_norm gradient_clip_val",
    ("train.num_epochs", ""): "epochs num_train_epochs max_epochs",
    ("train.num_steps", ""): "max_steps steps",
    ("train.packs_per_step", "packs of all ranks together"): (
        "batch_size global_batch_size train_batch_size gradient_accumulation_steps per_device_train_batch_size"
    ),
    ("train.activation_checkpointing", "none or full, of both towers or {vision: ..., text: ...}"): (
        "gradient_checkpointing disable_gradient_checkpointing gradient_checkpointing_kwargs use_reentrant_gc "
        "vit_gradient_checkpointing"
    ),
    ("train.seed", ""): "random_seed data_seed",
    ("data.max_tokens_per_pack", ""): "max_length cutoff_len max_seq_length max_seq_len model_max_length",
    (
        "data.max_visual_tokens_per_image",
        "one token is 32 x 32 pixels",
    ): "max_pixels image_max_pixels image_max_token_num",
    (
        "data.min_visual_tokens_per_image",
        "one token is 32 x 32 pixels",
    ): "min_pixels image_min_pixels image_min_token_num",
    ("data.max_visual_tokens_per_video", "of a whole clip; one token is 32 x 32 pixels of two frames"): (
        "video_max_pixels total_pixels video_max_token_num"
    ),
    ("data.fps", "frames taken a second"): "video_fps",
    ("data.min_frames", ""): "video_min_frames fps_min_frames",
    ("data.max_frames", ""): "video_max_frames video_maxlen fps_max_frames",
    ("data.train", "a list of {path, media_root, weight}"): "dataset train_file data_path dataset_name dataset_dir",
    ("data.eval", "a list of {path, media_root, name}"): "eval_dataset val_dataset",
    ("data.eval.*.split", ""): "dataset_test_split",
    ("data.train.*.media_root", ""): "image_folder image_root media_dir",
    ("data.train.*.max_rows", ""): "max_samples",
    ("data.train.*.weight", "how often each of its rows is drawn in an epoch"): "interleave_probs interleave_prob",
    ("data.train.*.streaming", ""): "dataset_streaming",
    ("data.train.*.split", ""): "dataset_train_split",
    ("data.train.*.subset", ""): "dataset_config",
    ("data.train.*.train_on", "all or last"): "mask_history loss_scale",
    ("data.eval_share", ""): "val_size split_dataset_ratio",
    ("data.stream_window", "rows of a stream that are packed together"): "buffer_size shuffle_buffer_size",
    ("data.shuffle", ""): "disable_shuffling shuffle_dataset dataset_shuffle train_dataloader_shuffle",
    ("data.too_long", "nothing is cut"): "truncation_strategy",
    ("data.num_workers", ""): "dataloader_num_workers preprocessing_num_workers dataset_num_proc",
    ("model.path", ""): "model_name_or_path model_name model_id",
    ("model.revision", ""): "model_revision",
    ("model.hub_id", "the base that exports name; nothing is uploaded"): "hub_model_id",
    ("model.dtype", ""): "torch_dtype",
    ("model.dtype", "bfloat16 or float32"): "precision bf16 pure_bf16",
    ("tune.rank", ""): "lora_r lora_rank r",
    ("tune.alpha", ""): "lora_alpha",
    ("tune.dropout", ""): "lora_dropout",
    ("tune.targets", ""): "target_modules lora_target lora_target_modules",
    ("tune.start_from", "an adapter or a run"): "adapter_name_or_path adapters resume_from_adapter",
    ("tune.full", "module groups"): "modules_to_save additional_target lora_modules_to_save",
    ("optim.lora_b_lr", "a rate, not a ratio"): "loraplus_lr_ratio loraplus_lr lora_plus_scale lorap_lr_ratio",
    ("tune.new_tokens", "all, or a list of tokens that the tokenizer has"): (
        "add_tokens new_tokens add_special_tokens new_special_tokens trainable_token_indices resize_vocab"
    ),
    ("tune.rslora", ""): "use_rslora",
    ("tune.dora", ""): "use_dora",
    ("tune.method", "lora or full"): "finetuning_type train_type tuner_type use_peft",
    ("tune.train", "module groups, with method full"): "trainable_modules",
    ("tune.train", "what trains is listed, with method full; with lora it is tune.targets"): (
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model freeze_vit freeze_aligner freeze_llm"
    ),
    ("checkpoint.every_steps", ""): "save_steps save_every_steps",
    ("checkpoint.keep_last", ""): "save_total_limit",
    ("checkpoint.resume", "auto or never"): "resume_from_checkpoint overwrite_output_dir",
    ("checkpoint.every_epochs", "or checkpoint.every_steps"): "save_strategy",
    ("checkpoint.keep_optimizer", "a run can always be resumed from its newest checkpoint"): "save_only_model",
    ("checkpoint.keep_best", "the name of a held-out set"): "load_best_model_at_end",
    ("eval.every_epochs", "or eval.every_steps"): "eval_strategy evaluation_strategy",
    ("eval.every_steps", ""): "eval_steps eval_every_steps",
    ("track.wandb", "offline, online or off"): "report_to wandb_mode",
    ("track.project", ""): "wandb_project",
    ("track.run_name", "the name in W&B; name is that of the run folder"): "wandb_name wandb_run_name",
    ("track.entity", ""): "wandb_entity",
    ("track.group", ""): "wandb_group run_group",
    ("track.tags", ""): "wandb_tags",
    ("parallel.engine", ""): "strategy distributed_type deepspeed fsdp",
    ("parallel.timeout_seconds", ""): "ddp_timeout",
}
_OUR_KEYS = {name: key_and_note for key_and_note, names in _NAMES_ELSEWHERE.items() for name in names.split()}
_SECRET = re.compile(r"(?i)(api_?key|token|password|secret)$")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML or JSON recipe, apply overrides such as `optim.lr=2e-5`, and check everything.

    An override names a dotted key (`data.train.0.path` reaches into a list); its value is read as YAML. No other file
    is read: paths in the recipe are not opened. Raises RecipeError that lists all wrong fields at once; rules between
    fields are checked once every field is right.
    """
    values, faults = _read(Path(path))
    faults += [fault for override in overrides or [] if (fault := _apply(values, override))]
    return _check(values, str(path), faults)


def recipe_from_dict(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check plain values as `load_recipe` checks those of a file. where: the name for them in an error."""
    return _check(values, where, [])


def _read(path: Path) -> tuple[dict[str, Any], list[Fault]]:
    where = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(where, ["not UTF-8 text; save it as UTF-8"]) from None
    except OSError as error:
        raise RecipeError(where, [f"cannot be read ({error.strerror}); give a recipe file"]) from None
    if path.suffix == ".json":
        text = text.replace("\t", " ")  # JSON may be indented with tabs and YAML may not; JSON strings hold none.
    try:
        values, duplicates = read_yaml(text)
    except ValueError as error:
        raise RecipeError(where, [str(error)]) from None
    if not isinstance(values, dict):
        got = "empty" if values is None else f"line 1: a {'list' if isinstance(values, list) else 'single value'}"
        raise RecipeError(where, [f"{got}, not a mapping; a recipe is keys and values, such as name: my-run"])
    return values, duplicates


def _apply(values: dict[str, Any], override: str) -> Fault | None:
    """Set one `key=value` in `values`. Return a fault if that is impossible; unknown keys are found later."""
    key, equals, text = override.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals or not all(parts):
        return f"override {override!r}", "not key=value; write it like optim.lr=2e-5"
    try:
        value, duplicates = read_yaml(text)
    except ValueError as error:
        return key, f"override {override!r}: {error}"
    if duplicates:
        return f"{key}.{duplicates[0][0]}", duplicates[0][1]
    node: Any = values
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                what = f"{part} is not an index of a list of {len(node)}; indices start at 0"
                return key, f"override {override!r}: {what}"
        elif not isinstance(node, dict):
            return key, f"override {override!r}: {'.'.join(parts[:depth])} is {format_value(node)}, not a section"
        index: Any = int(part) if isinstance(node, list) else part
        if depth == len(parts) - 1:
            node[index] = value
        elif isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        node = node[index]
    return None


def _check(values: dict[str, Any], where: str, faults: list[Fault]) -> Recipe:
    """Validate all fields, then the rules between them. faults: what reading has found already."""
    try:
        recipe = Recipe.model_validate(values)
        faults = [*faults, *field_conflicts(recipe)]
        if not faults:
            return recipe
    except ValidationError as error:
        faults = faults + [fault for detail in error.errors() for fault in _explain(detail, values)]
    order = list(Recipe.model_fields)
    faults.sort(key=lambda fault: order.index(top) if (top := fault[0].split(".")[0]) in order else len(order))
    raise RecipeError(where, list(dict.fromkeys(f"{key}: {message}" for key, message in faults)))


def _explain(detail: Any, values: dict[str, Any]) -> list[Fault]:
    """Return one pydantic error as faults in the words of a recipe."""
    code, got, context = detail["type"], detail["input"], detail.get("ctx", {})
    loc = [part for part in detail["loc"] if part != "[key]"]
    if loc[:1] == ["tune"] and loc[1:2] in (["lora"], ["full"]):
        del loc[1]  # pydantic puts the method of `tune` into the path; the file does not
    key = ".".join(map(str, loc))
    if code == "extra_forbidden":
        return _unknown(loc, got, values)
    if code == "value_error":  # of a validator of ours
        message = str(context["error"])
    elif code == "missing":
        betas = loc[:2] == ["optim", "betas"]
        message = "a list of two numbers is needed" if betas else "missing; it has no default"
    elif code == "union_tag_not_found":
        key, message = "tune.method", "missing; use lora or full"
    elif code == "union_tag_invalid":
        key, message = "tune.method", f"got {format_value(got.get('method'))}; use lora or full"
    elif code == "literal_error":
        choices = context["expected"].replace("'", "").replace("True", "true").replace("False", "false")
        message = f"got {format_value(got)}; use {choices}"
    elif code in ("too_short", "too_long"):
        limit = f"least {context['min_length']}" if code == "too_short" else f"most {context['max_length']}"
        message = f"got {len(got)} entries, expected at {limit}"
    elif code == "invalid_key":
        message = "unknown key; keys of a recipe are words"
    elif got is None and _EXPECTED[code] == "a section of keys":
        message = "got nothing, expected a section of keys; fill it or remove it"
    else:
        message = f"got {format_value(got)}, expected {_EXPECTED[code].format(**context)}"
    return [(key, message)]


def _unknown(loc: list[Any], got: Any, values: dict[str, Any]) -> list[Fault]:
    """Explain an unknown key. The keys of an unknown section are looked up, since they say more than its own name."""
    known, key = _known_keys(Recipe), ".".join(map(str, loc))
    if len(loc) == 2 and loc[0] == "tune" and key in known:
        method = values["tune"]["method"]
        other = "full" if method == "lora" else "lora"
        return [(key, f"not a key of method {method}; remove it, or use method {other}")]
    inner = [f"{key}.{name}" for name in got] if len(loc) == 1 and isinstance(got, dict) else []
    return [(one, _unknown_key_message(one, known)) for one in inner or [key]]


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every dotted key of the recipe; `*` is the index of a list."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        inner = f"{prefix}{name}.*." if get_origin(field.annotation) is list else f"{prefix}{name}."
        for part in _models_in(field.annotation):
            keys += _known_keys(part, inner)
    return list(dict.fromkeys(keys))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _unknown_key_message(key: str, known: list[str]) -> str:
    """Say which of `known` was probably meant, where `*` is the index of a list."""
    *sections, leaf = key.split(".")
    leaf = leaf.lower().replace("-", "_")
    if _SECRET.search(leaf):
        return "unknown key; a recipe holds no secrets, set them in the environment (WANDB_API_KEY)"
    pattern = ".".join("*" if part.isdigit() else part for part in [*sections, leaf])
    section = pattern.rpartition(".")[0]
    fields = _fields_of(section, known)
    meant, note = _OUR_KEYS.get(leaf, ("", ""))
    if section and meant.rpartition(".")[2] in fields:
        meant = f"{section}.{meant.rpartition('.')[2]}".lstrip(".")
    meant = meant or _nearest(pattern, known)
    if not meant or meant == pattern:
        return f"unknown key; known here: {', '.join(fields)}" if fields else "unknown key"
    for index in (part for part in sections if part.isdigit()):
        meant = meant.replace("*", index, 1)
    return f"unknown key; did you mean {meant.replace('*', '0')}{f' ({note})' if note else ''}?"


def _nearest(pattern: str, known: list[str]) -> str:
    """Find a near name in the same section, else the same last part elsewhere, else the nearest full key."""
    section, _, leaf = pattern.rpartition(".")
    namesakes = [key for key in known if key.rpartition(".")[2] == leaf]
    if namesakes and not section:
        return min(namesakes, key=lambda key: key.count("."))
    for sibling in difflib.get_close_matches(leaf, _fields_of(section, known), n=1, cutoff=0.7):
        return f"{section}.{sibling}".lstrip(".")
    near = difflib.get_close_matches(pattern, namesakes or known, n=1, cutoff=0.0 if namesakes else 0.7)
    return near[0] if near else ""


def _fields_of(section: str, known: list[str]) -> list[str]:
    prefix = f"{section}." if section else ""
    return [key.removeprefix(prefix) for key in known if key.startswith(prefix) and "." not in key.removeprefix(prefix)]
