from pathlib import Path

import pytest
import yaml

from qwen3vl_train.config import FullTune, LoraTune, Recipe, RecipeError, load_recipe, recipe_from_dict

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALL = """\
name: small
model: {path: some/model}
tune: {method: lora}
data: {train: [{path: a.jsonl}]}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a recipe into an empty working folder and return its name, so that messages hold no long path."""
    monkeypatch.chdir(tmp_path)

    def write_text(text: str, name: str = "bad.yaml") -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write_text


def errors_of(path: str, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides or [])
    return caught.value.errors


def small(**sections) -> Recipe:
    return recipe_from_dict({**yaml.safe_load(SMALL), **sections})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_has_the_name_of_its_file(path):
    assert load_recipe(path).name == path.stem


def test_recipes_are_shipped():
    assert len(RECIPES) >= 5


def test_defaults(write):
    recipe = load_recipe(write(SMALL))
    assert recipe.to_dict() == {
        "name": "small",
        "output_dir": "runs",
        "model": {"path": "some/model", "dtype": "bfloat16", "video_markup": "bare"},
        "tune": {
            "method": "lora",
            "rank": 16,
            "alpha": 32,
            "dropout": 0.0,
            "targets": ["text_attn", "text_mlp"],
            "rslora": False,
            "dora": False,
        },
        "data": {
            "train": [
                {
                    "path": "a.jsonl",
                    "media_root": None,
                    "name": None,
                    "format": "auto",
                    "columns": {},
                    "split": None,
                    "subset": None,
                    "train_on": "all",
                    "bbox": None,
                    "bbox_layout": "xyxy",
                    "allow_urls": False,
                    "weight": 1.0,
                    "streaming": False,
                    "num_rows": None,
                }
            ],
            "eval": [],
            "max_tokens_per_pack": 8192,
            "max_patches_per_pack": None,
            "max_sequences_per_pack": None,
            "max_tokens_per_sample": None,
            "too_long": "reject",
            "max_visual_tokens_per_image": None,
            "min_visual_tokens_per_image": None,
            "max_visual_tokens_per_video": None,
            "max_visual_tokens_per_sample": None,
            "fps": None,
            "min_frames": None,
            "max_frames": None,
            "stream_window": 2048,
            "num_workers": 4,
            "max_rejected_fraction": 0.01,
        },
        "optim": {
            "lr": 1e-4,
            "vision_lr": None,
            "merger_lr": None,
            "deepstack_lr": None,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": 0.0,
            "warmup_steps": 0,
            "schedule": "cosine",
            "max_grad_norm": 1.0,
        },
        "train": {
            "num_steps": None,
            "num_epochs": 1,
            "packs_per_step": 8,
            "seed": 0,
            "activation_checkpointing": {"vision": "none", "text": "none"},
            "deterministic": False,
        },
        "parallel": {
            "engine": "ddp",
            "timeout_seconds": 1800.0,
            "replicate": 1,
            "shard": None,
            "reduce_dtype": "float32",
            "reshard_after_forward": "auto",
            "cpu_offload": False,
            "zero_stage": 2,
            "deepspeed_config": None,
            "offload_optimizer": False,
            "offload_parameters": False,
        },
        "checkpoint": {
            "every_steps": 200,
            "keep_last": 2,
            "keep_every_steps": None,
            "keep_best": None,
            "export_every_steps": None,
            "resume": "auto",
        },
        "eval": {"every_steps": 200},
        "track": {"wandb": "offline", "project": "qwen3vl"},
    }


def test_the_message_lists_all_errors_at_once(write):
    path = write(SMALL + "optim: {learning_rate: 1e-4}\ntrain: {packs_per_step: eight}\n")
    with pytest.raises(ValueError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        "bad.yaml: 2 errors\n"
        "  - optim.learning_rate: unknown key; did you mean optim.lr?\n"
        "  - train.packs_per_step: got 'eight', expected an integer"
    )


def test_an_empty_mapping_lists_what_is_missing(write):
    assert errors_of(write("{}")) == [
        "name: missing; it has no default",
        "model: missing; it has no default",
        "tune: missing; it has no default",
        "data: missing; it has no default",
    ]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("optim: {lr: '4'}", "optim.lr: got '4', expected a number"),
        ("optim: {lr: true}", "optim.lr: got true, expected a number"),
        ("optim: {lr: 0}", "optim.lr: got 0, expected more than 0.0"),
        ("optim: {lr: .inf}", "optim.lr: got inf, expected a finite number"),
        ("optim: {lr: null}", "optim.lr: got null, expected a number"),
        ("optim: {betas: [0.9]}", "optim.betas.1: a list of two numbers is needed"),
        ("optim: {betas: [0.9, 1.0]}", "optim.betas.1: got 1.0, expected less than 1.0"),
        ("optim: {schedule: cosin}", "optim.schedule: got 'cosin'; use cosine, linear or constant"),
        ("optim: {max_grad_norm: 0}", "optim.max_grad_norm: got 0, expected more than 0.0"),
        ("optim: {warmup_steps: -1}", "optim.warmup_steps: got -1, expected at least 0"),
        ("train: {num_steps: true}", "train.num_steps: got true, expected an integer"),
        ("train: {num_steps: 3.0}", "train.num_steps: got 3.0, expected an integer"),
        ("train: {num_steps: 1_000}", "train.num_steps: got '1_000', expected an integer"),
        ("train: {num_epochs: null}", "train.num_steps: missing, and train.num_epochs is null; give one of them"),
        ("parallel: {engine: fsdp}", "parallel.engine: got 'fsdp'; use single, ddp, fsdp2 or deepspeed"),
        ("parallel: {engine: fsdp2, shard: 0}", "parallel.shard: got 0, expected at least 1"),
        ("parallel: {engine: fsdp2, replicate: 0}", "parallel.replicate: got 0, expected at least 1"),
        ("parallel: {timeout_seconds: 0}", "parallel.timeout_seconds: got 0, expected more than 0.0"),
        (
            "parallel: {engine: fsdp2, reshard_after_forward: never}",
            "parallel.reshard_after_forward: got 'never'; use auto, true or false",
        ),
        (
            "parallel: {engine: fsdp2, reduce_dtype: float16}",
            "parallel.reduce_dtype: got 'float16'; use float32 or bfloat16",
        ),
        ("parallel: {engine: deepspeed, zero_stage: 0}", "parallel.zero_stage: got 0; use 1, 2 or 3"),
        (
            "parallel: {replicate: 2}",
            "parallel.replicate: 2, but parallel.engine is ddp; it is for fsdp2, leave it out",
        ),
        (
            "parallel: {engine: single, shard: 4}",
            "parallel.shard: 4, but parallel.engine is single; it is for fsdp2, leave it out",
        ),
        (
            "parallel: {reduce_dtype: bfloat16}",
            "parallel.reduce_dtype: bfloat16, but parallel.engine is ddp; it is for fsdp2 and deepspeed, leave it out",
        ),
        (
            "parallel: {engine: deepspeed, reshard_after_forward: false}",
            "parallel.reshard_after_forward: false, but parallel.engine is deepspeed; it is for fsdp2, leave it out",
        ),
        (
            "parallel: {engine: deepspeed, cpu_offload: true}",
            "parallel.cpu_offload: true, but parallel.engine is deepspeed; it is for fsdp2, leave it out",
        ),
        (
            "parallel: {engine: fsdp2, zero_stage: 3}",
            "parallel.zero_stage: 3, but parallel.engine is fsdp2; it is for deepspeed, leave it out",
        ),
        (
            "parallel: {deepspeed_config: zero.json}",
            "parallel.deepspeed_config: zero.json, but parallel.engine is ddp; it is for deepspeed, leave it out",
        ),
        (
            "parallel: {engine: fsdp2, offload_optimizer: true}",
            "parallel.offload_optimizer: true, but parallel.engine is fsdp2; it is for deepspeed, leave it out",
        ),
        (
            "parallel: {engine: deepspeed, offload_parameters: true}",
            "parallel.offload_parameters: true, but stage 2 does not cut up parameters; set parallel.zero_stage to 3",
        ),
        (
            "train: {activation_checkpointing: some}",
            "train.activation_checkpointing: got 'some'; use none, full or selective, "
            "or a section with vision and text",
        ),
        (
            "train: {activation_checkpointing: {vision: some}}",
            "train.activation_checkpointing.vision: got 'some'; use none, full or selective",
        ),
        (
            "train: {activation_checkpointing: {vison: full}}",
            "train.activation_checkpointing.vison: unknown key; did you mean train.activation_checkpointing.vision?",
        ),
        (
            "train: {activation_checkpointing: true}",
            "train.activation_checkpointing: got true, expected a section of keys",
        ),
        ("train: {deterministic: 1}", "train.deterministic: got 1, expected true or false"),
        (
            "checkpoint: {keep_every: 5}",
            "checkpoint.keep_every: unknown key; did you mean checkpoint.keep_every_steps?",
        ),
        ("checkpoint: {export_every_steps: 0}", "checkpoint.export_every_steps: got 0, expected at least 1"),
        (
            "checkpoint: {keep_best: held_out}",
            "checkpoint.keep_best: 'held_out' is no held-out set; name a held-out file in data.eval",
        ),
        ("parallel:", "parallel: got nothing, expected a section of keys; fill it or leave it out"),
        ("eval: 5", "eval: got 5, expected a section of keys"),
        ("checkpoint: {keep_last: 0}", "checkpoint.keep_last: got 0, expected at least 1"),
        ("track: {wandb: yes}", "track.wandb: got 'yes'; use offline, online or off"),
        ("track: {project: ''}", "track.project: got '', expected text"),
        (
            "track: {api_key: x}",
            "track.api_key: unknown key; a recipe holds no secrets, set them in the environment (WANDB_API_KEY)",
        ),
        ("optimizer: {learning_rate: 1}", "optimizer.learning_rate: unknown key; did you mean optim.lr?"),
        ("optim: {warmup_step: 1}", "optim.warmup_step: unknown key; did you mean optim.warmup_steps?"),
        ("outputdir: x", "outputdir: unknown key; did you mean output_dir?"),
        ("lr: 1", "lr: unknown key; did you mean optim.lr?"),
        ("epochs: 3", "epochs: unknown key; did you mean train.num_epochs?"),
        ("train: {max_steps: 3}", "train.max_steps: unknown key; did you mean train.num_steps?"),
        (
            "train: {batch_size: 3}",
            "train.batch_size: unknown key; did you mean train.packs_per_step (packs of all ranks together)?",
        ),
        ("cutoff_len: 3", "cutoff_len: unknown key; did you mean data.max_tokens_per_pack?"),
        ("model_name_or_path: x", "model_name_or_path: unknown key; did you mean model.path?"),
        (
            "max_pixels: 3",
            "max_pixels: unknown key; did you mean data.max_visual_tokens_per_image (one token is 32 x 32 pixels)?",
        ),
        (
            "optim: {warmup_ratio: 0.1}",
            "optim.warmup_ratio: unknown key; did you mean optim.warmup_steps (a number of steps)?",
        ),
        ("report_to: wandb", "report_to: unknown key; did you mean track.wandb (offline, online or off)?"),
        (
            "<<: {}",
            "<<: unknown key; known here: name, output_dir, model, tune, data, optim, train, parallel, "
            "checkpoint, eval, track",
        ),
        ("7: 1", "7: unknown key; keys of a recipe are words"),
        ("name: other", "name: given twice, on lines 1 and 5; keep one"),
        ("optim:\n  lr: 1e-4\n\n  lr: 1e-4", "optim.lr: given twice, on lines 6 and 8; keep one"),
    ],
)
def test_a_wrong_line_gets_one_clear_error(write, line, error):
    assert errors_of(write(f"{SMALL}{line}\n")) == [error]


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        (
            "name",
            "../x",
            "name: got '../x'; it becomes a folder: use up to 100 letters, digits, '.', '_' and '-', starting "
            "with a letter or digit",
        ),
        (
            "name",
            "..",
            "name: got '..'; it becomes a folder: use up to 100 letters, digits, '.', '_' and '-', starting "
            "with a letter or digit",
        ),
        ("name", "2024", "name: got 2024, expected text"),
        ("model", "{path: x, dtype: fp16}", "model.dtype: got 'fp16'; use bfloat16 or float32"),
        ("model", "some/model", "model: got 'some/model', expected a section of keys"),
        ("tune", "{rank: 4}", "tune.method: missing; use lora or full"),
        ("tune", "{method: qlora}", "tune.method: got 'qlora'; use lora or full"),
        ("tune", "{method: lora, lora_r: 8}", "tune.lora_r: unknown key; did you mean tune.rank?"),
        ("tune", "{method: lora, target_modules: [x]}", "tune.target_modules: unknown key; did you mean tune.targets?"),
        (
            "tune",
            "{method: lora, train: [text]}",
            "tune.train: not a key of method lora; leave it out, or use method full",
        ),
        ("tune", "{method: lora, targets: []}", "tune.targets: got 0 entries, expected at least 1"),
        (
            "tune",
            "{method: lora, targets: [lm_head]}",
            "tune.targets.0: lm_head takes no LoRA; leave it out, or train it with tune.method full",
        ),
        (
            "tune",
            "{method: lora, targets: [q_proj]}",
            "tune.targets.0: 'q_proj' is not a module group; use vision_attn, vision_mlp, merger, deepstack, "
            "text_attn, text_mlp, vision, text, all (a module name is given as a regular expression, such as "
            "'.*\\.q_proj')",
        ),
        (
            "tune",
            "{method: lora, targets: ['.*(q_proj']}",
            "tune.targets.0: got '.*(q_proj', which is neither a group name nor a valid regular expression "
            "(missing ), unterminated subpattern at position 2)",
        ),
        ("tune", "{method: full}", "tune.train: missing; it has no default"),
        (
            "tune",
            "{method: full, rank: 4, train: [text]}",
            "tune.rank: not a key of method full; leave it out, or use method lora",
        ),
        (
            "tune",
            "{method: full, train: [vison]}",
            "tune.train.0: 'vison' is not a module group; did you mean vision or vision_mlp?",
        ),
        ("data", "{train: []}", "data.train: got 0 entries, expected at least 1"),
        ("data", "{train: {path: a}}", "data.train: got {'path': 'a'}, expected a list"),
        ("data", "{train: [{path: a, weight: 0}]}", "data.train.0.weight: got 0, expected more than 0.0"),
        (
            "data",
            "{train: [{path: a}, {path: b, image_root: c}]}",
            "data.train.1.image_root: unknown key; did you mean data.train.1.media_root?",
        ),
        (
            "data",
            "{train: [{path: a}], eval: [{path: b, media_dir: c}]}",
            "data.eval.0.media_dir: unknown key; did you mean data.eval.0.media_root?",
        ),
        (
            "data",
            "{train: [{path: a}], min_visual_tokens_per_image: 9, max_visual_tokens_per_image: 8}",
            "data.min_visual_tokens_per_image: 9 is more than data.max_visual_tokens_per_image 8; lower it",
        ),
    ],
)
def test_a_wrong_required_section_gets_one_clear_error(write, key, value, error):
    lines = [line for line in SMALL.splitlines() if not line.startswith(f"{key}:")]
    assert errors_of(write("\n".join([*lines, f"{key}: {value}"]))) == [error]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "empty, not a mapping; a recipe is keys and values, such as name: my-run"),
        ("- a\n", "line 1: a list, not a mapping; a recipe is keys and values, such as name: my-run"),
        ("name: a\nmodel: {path: x\n", "line 3: not YAML: expected ',' or '}', but got '<stream end>'"),
        ("a: &x 1\nb: *x\n", "line 2: not YAML: anchors and aliases are not read in a recipe"),
        ("a: 1\n---\nb: 1\n", "line 2: not YAML: but found another document"),
        ("a: !!int x\n", "line 1: not YAML: bad value (invalid literal for int() with base 10: 'x')"),
        (
            "a: " + "9" * 5000,
            "line 1: not YAML: bad value (Exceeds the limit (4300 digits) for integer string conversion: value "
            "has 5000 digits; use sys.set_int_max_str_digits() to increase the limit)",
        ),
        ("a: \x00", "not YAML: unacceptable character #x0000: special characters are not allowed"),
        ("a: " + "[" * 5000, "not a recipe: nested too deep"),
    ],
    ids=["empty", "list", "syntax", "alias", "documents", "tag", "digits", "nul", "deep"],
)  # fmt: skip
def test_what_is_not_a_recipe_at_all_names_file_and_line(write, text, error):
    assert errors_of(write(text)) == [error]


def test_object_tags_run_nothing(write):
    (error,) = errors_of(write("name: !!python/object/apply:os.mkdir [made]\n"))
    assert error.startswith("line 1: not YAML: could not determine a constructor")
    assert not Path("made").exists()


def test_a_file_that_cannot_be_read(write, tmp_path):
    assert errors_of("none.yaml") == ["cannot be read (No such file or directory); give a recipe file"]
    assert errors_of(str(tmp_path)) == ["cannot be read (Is a directory); give a recipe file"]
    Path("latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert errors_of("latin.yaml") == ["not UTF-8 text; save it as UTF-8"]


def test_rules_between_fields_show_beside_other_errors(write):
    path = write(SMALL + "optim: {vision_lr: 1e-5, betas: 3}\ntrain: {num_epochs: null, seed: x}\nepochs: 2\n")
    assert errors_of(path) == [
        "optim.betas: got 3, expected a list of two numbers",
        "optim.vision_lr: set, but tune.targets trains no vision_attn or vision_mlp or vision_embed; "
        "add one there or leave vision_lr out",
        "train.seed: got 'x', expected an integer",
        "train.num_steps: missing, and train.num_epochs is null; give one of them",
        "epochs: unknown key; did you mean train.num_epochs?",
    ]


def test_limits_of_video_are_checked_each_and_against_each_other(write):
    wrong = "fps: 0, min_frames: 1, max_frames: 2.5, max_visual_tokens_per_video: 0, max_visual_tokens_per_sample: -3"
    assert errors_of(write(SMALL.replace("a.jsonl}]", f"a.jsonl}}], {wrong}"))) == [
        "data.max_visual_tokens_per_video: got 0, expected at least 1",
        "data.max_visual_tokens_per_sample: got -3, expected at least 1",
        "data.fps: got 0, expected more than 0.0",
        "data.min_frames: got 1, expected at least 2",
        "data.max_frames: got 2.5, expected an integer",
    ]
    crossed = "min_frames: 9, max_frames: 8, min_visual_tokens_per_image: 70, max_visual_tokens_per_sample: 64"
    assert errors_of(write(SMALL.replace("a.jsonl}]", f"a.jsonl}}], {crossed}"))) == [
        "data.min_visual_tokens_per_image: 70 is more than data.max_visual_tokens_per_sample 64; lower it",
        "data.min_frames: 9 is more than data.max_frames 8; lower it",
    ]
    assert errors_of(write(SMALL.replace("some/model", "some/model, video_markup: both"))) == [
        "model.video_markup: got 'both'; use bare or wrapped"
    ]


def test_a_wrong_target_does_not_blame_the_learning_rates(write):
    path = write(SMALL.replace("lora}", "lora, targets: merger}") + "optim: {merger_lr: 1e-5}\n")
    assert errors_of(path) == ["tune.targets: got 'merger', expected a list"]


def test_a_wrong_value_is_not_also_called_missing(write):
    text = SMALL.replace("lora}", "lora, targets: [merger, deepstack]}") + "optim: {merger_lr: 1e-5, deepstack_lr: x}\n"
    assert errors_of(write(text)) == ["optim.deepstack_lr: got 'x', expected a number"]


def test_the_merger_rate_never_silently_means_the_deepstack_mergers():
    full = {"method": "full", "train": ["merger", "deepstack"]}
    with pytest.raises(RecipeError, match=r"optim.deepstack_lr: missing beside optim.merger_lr 1e-05.*give both"):
        small(tune=full, optim={"merger_lr": 1e-5})
    recipe = small(tune=full, optim={"lr": 1, "merger_lr": 1e-5, "deepstack_lr": 3e-5})
    assert [recipe.optim.lr_of(group) for group in ("merger", "deepstack", "text_attn")] == [1e-5, 3e-5, 1]
    alone = small(tune={"method": "full", "train": ["merger", "vision"]}, optim={"merger_lr": 1e-5, "vision_lr": 2e-5})
    assert alone.optim.lr_of("vision_embed") == 2e-5


def test_a_rate_of_a_group_that_does_not_train_is_an_error():
    with pytest.raises(RecipeError, match=r"optim.deepstack_lr: set, but tune.train trains no deepstack"):
        small(tune={"method": "full", "train": ["merger"]}, optim={"deepstack_lr": 1e-5})


def test_a_pattern_may_train_any_group():
    recipe = small(tune={"method": "lora", "targets": [r".*visual\..*qkv", "text_mlp"]}, optim={"vision_lr": 1e-5})
    assert isinstance(recipe.tune, LoraTune)
    assert recipe.tune.has_patterns()
    assert recipe.tune.trained_groups() == ("text_mlp",)


def test_a_union_as_lora_target_means_its_groups_that_take_lora():
    recipe = small(tune={"method": "lora", "targets": ["vision", "text"]})
    assert isinstance(recipe.tune, LoraTune)
    assert not recipe.tune.has_patterns()
    assert recipe.tune.trained_groups() == ("vision_attn", "vision_mlp", "text_attn", "text_mlp")


def test_overrides(write):
    changes = [
        "optim.lr=2e-5",
        "track.wandb=off",
        "data.train.0.path=b.jsonl",
        "data.eval=[{path: c.jsonl}]",
        "tune={method: full, train: [all]}",
        "train.num_steps=7",
    ]
    recipe = load_recipe(write(SMALL), changes)
    assert (recipe.optim.lr, recipe.track.wandb, recipe.train.num_steps) == (2e-5, "off", 7)
    assert (recipe.data.train[0].path, recipe.data.eval[0].path) == ("b.jsonl", "c.jsonl")
    assert isinstance(recipe.tune, FullTune)


def test_bad_overrides_are_errors_like_those_of_the_file(write):
    wrong = [
        "optim.learning_rate=1",
        "foo",
        "data.train.3.path=x",
        "optim.lr=[",
        "name.x=1",
        "train={seed: 1, seed: 2}",
    ]
    assert errors_of(write(SMALL), wrong) == [
        "name.x: override 'name.x=1': name is 'small', not a section",
        "data.train.3.path: override 'data.train.3.path=x': 3 is no place in a list of 1; places start at 0",
        "optim.lr: override 'optim.lr=[': line 1: not YAML: expected the node content, but found '<stream end>'",
        "optim.learning_rate: unknown key; did you mean optim.lr?",
        "train.seed: given twice, on line 1; keep one",
        "override 'foo': not key=value; write it like optim.lr=2e-5",
    ]


def test_json_loads_with_tabs_and_escapes(write):
    text = (
        '{\n\t"name": "small", "model": {"path": "\\u56fe\\ud83d\\ude00\\/m"},\n'
        '\t"tune":{"method":"lora"}, "data": {"train": [{"path": "a"}]}, "optim": {"lr": 1E-5}\n}'
    )
    recipe = load_recipe(write(text, "small.json"))
    assert (recipe.model.path, recipe.optim.lr) == ("图😀/m", 1e-5)


@pytest.mark.parametrize("word", ["none", "full", "selective"])
def test_one_word_sets_activation_checkpointing_of_both_towers(word):
    kept = small(train={"activation_checkpointing": word}).train.activation_checkpointing
    assert (kept.vision, kept.text) == (word, word)


def test_activation_checkpointing_of_each_tower_apart():
    kept = small(train={"activation_checkpointing": {"text": "full"}}).train.activation_checkpointing
    assert (kept.vision, kept.text) == ("none", "full")
    recipe = load_recipe(RECIPES[0], ["train.activation_checkpointing.vision=selective"])
    assert recipe.train.activation_checkpointing.vision == "selective"


@pytest.mark.parametrize(
    "parallel",
    [
        {"engine": "fsdp2", "replicate": 2, "shard": 4, "reduce_dtype": "bfloat16", "reshard_after_forward": False},
        {"engine": "fsdp2", "cpu_offload": True, "reshard_after_forward": True},
        {"engine": "deepspeed", "zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
        {"engine": "deepspeed", "zero_stage": 1, "reduce_dtype": "bfloat16", "deepspeed_config": "zero.json"},
    ],
    ids=str,
)
def test_fields_of_an_engine_are_taken_with_it_and_survive_the_run_folder(parallel):
    recipe = small(parallel=parallel)
    assert {name: recipe.to_dict()["parallel"][name] for name in parallel} == parallel
    assert recipe_from_dict(recipe.to_dict()) == recipe


def test_the_best_checkpoint_is_judged_by_a_held_out_set_that_is_there():
    data = {"train": [{"path": "a.jsonl"}], "eval": [{"path": "dir/held.jsonl"}, {"path": "b.jsonl", "name": "other"}]}
    for name in ("held", "other"):
        assert small(data=data, checkpoint={"keep_best": name}).checkpoint.keep_best == name
    with pytest.raises(RecipeError, match=r"checkpoint.keep_best: 'b' is no held-out set; use held or other$"):
        small(data=data, checkpoint={"keep_best": "b"})


@pytest.mark.parametrize(("saves", "looks"), [(100, 200), (300, 200), (200, None)])
def test_the_best_checkpoint_is_sought_among_evaluated_ones(saves, looks):
    data = {"train": [{"path": "a.jsonl"}], "eval": [{"path": "held.jsonl"}]}
    checkpoint = {"keep_best": "held", "every_steps": saves}
    with pytest.raises(RecipeError) as caught:
        small(data=data, checkpoint=checkpoint, eval={"every_steps": looks})
    assert caught.value.errors == [
        f"checkpoint.keep_best: checkpoints every {saves} steps are not evaluated, with eval.every_steps "
        f"{looks or 'null'}; make checkpoint.every_steps a multiple of it"
    ]
    small(data=data, checkpoint=checkpoint, eval={"every_steps": 50})


def test_rules_of_the_engine_show_beside_other_errors(write):
    assert errors_of(write(SMALL + "parallel: {engine: ddp, shard: 2}\noptim: {lr: x}\n")) == [
        "optim.lr: got 'x', expected a number",
        "parallel.shard: 2, but parallel.engine is ddp; it is for fsdp2, leave it out",
    ]


@pytest.mark.parametrize(
    ("data", "errors"),
    [
        (
            "{train: [{path: a}], max_tokens_per_sample: 9000}",
            ["data.max_tokens_per_sample: 9000 is more than data.max_tokens_per_pack 8192; lower it"],
        ),
        (
            "{train: [{path: a, streaming: true}]}",
            ["train.num_steps: missing; a source with streaming does not say how long an epoch is"],
        ),
        (
            "{train: [{path: a, num_rows: 5}]}",
            ["data.train.0: num_rows without streaming: the rows of other sources are counted; take it out"],
        ),
        ("{train: [{path: a}], too_long: cut}", ["data.too_long: got 'cut'; use drop, reject or shrink_media"]),
        (
            "{train: [{path: a}], max_patches_per_pack: 0, max_sequences_per_pack: 0, stream_window: 0}",
            [
                "data.max_patches_per_pack: got 0, expected at least 1",
                "data.max_sequences_per_pack: got 0, expected at least 1",
                "data.stream_window: got 0, expected at least 1",
            ],
        ),
    ],
)
def test_budgets_and_streams(write, data, errors):
    assert errors_of(write(f"name: small\nmodel: {{path: x}}\ntune: {{method: lora}}\ndata: {data}\n")) == errors
