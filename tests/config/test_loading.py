from pathlib import Path

import pytest

from qwen3vl_train.config import FullTune, LoraTune, RecipeError, load_recipe, recipe_from_dict
from qwen3vl_train.config.tune_fields import number_of
from qwen3vl_train.config.yaml12 import read_yaml
from tests.helpers.messages import message_of

SMALL = """\
name: small
model: {path: some/model}
tune: {method: lora}
data: {train: [{path: a.jsonl}]}
"""
# Every field that SMALL leaves to its default.
DEFAULTS = """\
name: small
output_dir: runs
model: {path: some/model, revision: null, hub_id: null, dtype: bfloat16, video_markup: bare}
tune:
  {method: lora, rank: 16, alpha: 32, dropout: 0.0, targets: [text_attn, text_mlp], rslora: false, dora: false,
   full: [], new_tokens: null, start_from: null}
data:
  train:
    - {path: a.jsonl, media_root: null, name: null, format: auto, columns: {}, split: null, subset: null,
       max_rows: null, train_on: all, bbox: null, bbox_layout: xyxy, allow_urls: false, allow_private_urls: false,
       weight: 1.0, streaming: false, num_rows: null}
  eval: []
  eval_share: null
  max_tokens_per_pack: 8192
  max_patches_per_pack: null
  max_sequences_per_pack: null
  max_tokens_per_sample: null
  too_long: reject
  max_visual_tokens_per_image: null
  min_visual_tokens_per_image: null
  max_visual_tokens_per_video: null
  max_visual_tokens_per_sample: null
  fps: null
  min_frames: null
  max_frames: null
  max_image_pixels: null
  follow_links: false
  stream_window: 2048
  shuffle: true
  num_workers: 4
  max_rejected_fraction: 0.01
optim:
  {lr: 1e-4, vision_lr: null, merger_lr: null, deepstack_lr: null, lora_b_lr: null,
   betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0, warmup: 0, schedule: cosine, decay_share: 0.2,
   min_lr: 0.0, max_grad_norm: 1.0}
train:
  {num_steps: null, num_epochs: 1, packs_per_step: 8, seed: 0, activation_checkpointing: {vision: none, text: none},
   deterministic: false}
parallel:
  {engine: ddp, timeout_seconds: 1800.0, replicate: 1, shard: null, reduce_dtype: float32, reshard_after_forward: auto,
   cpu_offload: false, zero_stage: 2, deepspeed_config: null, offload_optimizer: false, offload_parameters: false}
checkpoint:
  {every_steps: 200, every_epochs: null, save_last: true, keep_last: 2, keep_every_steps: null, keep_best: null,
   keep_optimizer: all, export_every_steps: null, export_every_epochs: null, resume: auto,
   allow_changes: []}
eval: {every_steps: 200, every_epochs: null}
track: {wandb: null, project: null, run_name: null, entity: null, group: null, tags: null, notes: null}
"""
NOT_A_MAPPING = "not a mapping; a recipe is keys and values, such as name: my-run"


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


def wrong_recipes() -> list:
    """Read the table: lines that join or replace those of SMALL, then the errors as a user sees them."""
    blocks = (Path(__file__).parent / "wrong_recipes.txt").read_text(encoding="utf-8").strip().split("\n\n")
    cases = [(block.split("\n  - ")) for block in blocks]
    return [pytest.param(text, errors, id=text.replace("\n", " ")) for text, *errors in cases]


def test_defaults(write):
    assert (load_recipe(write(SMALL)).to_dict(), []) == read_yaml(DEFAULTS)


def test_message_lists_all_errors_at_once(write):
    path = write(SMALL + "optim: {learning_rate: 1e-4}\ntrain: {packs_per_step: eight}\n")
    assert message_of(ValueError, load_recipe, path) == (
        "bad.yaml: 2 errors\n"
        "  - optim.learning_rate: unknown key; did you mean optim.lr?\n"
        "  - train.packs_per_step: got 'eight', expected an integer"
    )


@pytest.mark.parametrize(("text", "errors"), wrong_recipes())
def test_wrong_recipe_gets_clear_errors(write, text, errors):
    keys = {line.split(":")[0] for line in text.splitlines()}
    kept = [line for line in SMALL.splitlines() if line.split(":")[0] not in keys]
    assert errors_of(write("\n".join([*kept, text, ""]))) == errors


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("{}", [f"{section}: missing; it has no default" for section in ("name", "model", "tune", "data")]),
        ("", [f"empty, {NOT_A_MAPPING}"]),
        ("- a\n", [f"line 1: a list, {NOT_A_MAPPING}"]),
        ("name: a\nmodel: {path: x\n", ["line 3: not YAML: expected ',' or '}', but got '<stream end>'"]),
        ("a: &x 1\nb: *x\n", ["line 2: not YAML: anchors and aliases are not read in a recipe"]),
        ("a: 1\n---\nb: 1\n", ["line 2: not YAML: but found another document"]),
        ("a: !!int x\n", ["line 1: not YAML: bad value (invalid literal for int() with base 10: 'x')"]),
        ("a: \x00", ["not YAML: unacceptable character #x0000: special characters are not allowed"]),
        ("a: " + "[" * 5000, ["not a recipe: nested too deep"]),
        (
            "a: " + "9" * 5000,
            ["line 1: not YAML: bad value (Exceeds the limit (4300 digits) for integer string conversion: value "
             "has 5000 digits; use sys.set_int_max_str_digits() to increase the limit)"],
        ),
        (f"{SMALL}name: other\n", ["name: given twice, on lines 1 and 5; keep one"]),
        (f"{SMALL}optim:\n  lr: 1e-4\n\n  lr: 1e-4\n", ["optim.lr: given twice, on lines 6 and 8; keep one"]),
    ],
    ids=["no keys", "empty", "list", "syntax", "alias", "documents", "tag", "nul", "deep", "digits", "name", "lr"],
)  # fmt: skip
def test_file_that_is_not_a_recipe(write, text, errors):
    assert errors_of(write(text)) == errors


def test_object_tags_run_nothing(write):
    (error,) = errors_of(write("name: !!python/object/apply:os.mkdir [made]\n"))
    assert error.startswith("line 1: not YAML: could not determine a constructor")
    assert not Path("made").exists()


def test_file_that_cannot_be_read(write, tmp_path):
    assert errors_of("none.yaml") == ["cannot be read (No such file or directory); give a recipe file"]
    assert errors_of(str(tmp_path)) == ["cannot be read (Is a directory); give a recipe file"]
    Path("latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert errors_of("latin.yaml") == ["not UTF-8 text; save it as UTF-8"]


def test_learning_rates_of_module_groups(small):
    both = {"method": "full", "train": ["merger", "deepstack"]}
    recipe = small(tune=both, optim={"lr": 1, "merger_lr": 1e-5, "deepstack_lr": 3e-5})
    assert [recipe.optim.lr_of(group) for group in ("merger", "deepstack", "text_attn")] == [1e-5, 3e-5, 1]
    alone = small(tune={"method": "full", "train": ["merger", "vision"]}, optim={"merger_lr": 1e-5, "vision_lr": 2e-5})
    assert alone.optim.lr_of("vision_embed") == 2e-5


@pytest.mark.parametrize(
    ("targets", "groups", "has_patterns"),
    [
        ([r".*visual\..*qkv", "text_mlp"], ("text_mlp",), True),  # a pattern may reach any group: vision_lr is taken
        (["vision", "text"], ("vision_attn", "vision_mlp", "text_attn", "text_mlp"), False),
    ],
)
def test_groups_that_lora_targets_reach(small, targets, groups, has_patterns):
    tune = small(tune={"method": "lora", "targets": targets}, optim={"vision_lr": 1e-5}).tune
    assert isinstance(tune, LoraTune)
    assert (tune.trained_groups(), tune.has_patterns()) == (groups, has_patterns)


@pytest.mark.parametrize(
    ("given", "warmup"),
    [
        ("warmup: 20", 20), ("warmup: 0.03", 0.03), ("warmup: 0", 0), ("warmup: 0.0", 0.0),
        ("warmup_steps: 20", 20),  # as older recipes have it
    ],
)  # fmt: skip
def test_warm_up_is_steps_or_a_share_of_the_run(write, given, warmup):
    optim = load_recipe(write(f"{SMALL}optim: {{{given}}}\n")).optim
    assert (optim.warmup, type(optim.warmup)) == (warmup, type(warmup))
    assert optim.warmup_steps(110) == (4 if warmup == 0.03 else warmup)


@pytest.mark.parametrize(("given", "norm"), [("0", None), ("0.0", None), ("null", None), ("2", 2.0)])
def test_gradients_are_not_clipped_at_0_and_null(write, given, norm):
    assert load_recipe(write(SMALL), [f"optim.max_grad_norm={given}"]).optim.max_grad_norm == norm


def test_overrides(write):
    changes = [
        "optim.lr=2e-5",
        "track.wandb=off",
        "data.train.0.path=b.jsonl",
        "data.eval=[{path: c.jsonl}]",
        "tune={method: full, train: [all]}",
        "train.num_steps=7",
        "train.activation_checkpointing.vision=selective",
    ]
    recipe = load_recipe(write(SMALL), changes)
    assert (recipe.optim.lr, recipe.track.wandb, recipe.train.num_steps) == (2e-5, "off", 7)
    assert (recipe.data.train[0].path, recipe.data.eval[0].path) == ("b.jsonl", "c.jsonl")
    assert recipe.train.activation_checkpointing.model_dump() == {"vision": "selective", "text": "none"}
    assert isinstance(recipe.tune, FullTune)


def test_wrong_overrides_are_errors_like_those_of_the_file(write):
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
        "data.train.3.path: override 'data.train.3.path=x': 3 is not an index of a list of 1; indices start at 0",
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [*((word, (word, word)) for word in ("none", "full", "selective")), ({"text": "full"}, ("none", "full"))],
)
def test_activation_checkpointing_of_both_towers_or_each(small, given, expected):
    found = small(train={"activation_checkpointing": given}).train.activation_checkpointing
    assert (found.vision, found.text) == expected


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
def test_fields_of_an_engine_survive_the_run_folder(small, parallel):
    recipe = small(parallel=parallel)
    assert {name: recipe.to_dict()["parallel"][name] for name in parallel} == parallel
    assert recipe_from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("given", "steps", "epochs"),
    [
        ({}, 200, None),
        ({"every_epochs": 2}, None, 2),
        ({"every_epochs": None}, 200, None),
        ({"every_steps": 50, "every_epochs": 1}, 50, 1),
    ],
    ids=str,
)
def test_epochs_take_the_place_of_the_default_of_steps(small, given, steps, epochs):
    recipe = small(eval=given, checkpoint=given)
    assert (recipe.eval.every_steps, recipe.eval.every_epochs) == (steps, epochs)
    assert (recipe.checkpoint.every_steps, recipe.checkpoint.every_epochs) == (steps, epochs)
    assert recipe_from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(("given", "epochs"), [(3, "3"), (3.0, "3"), (0.5, "0.5")])
def test_epochs_are_whole_or_a_fraction(small, given, epochs):
    assert str(small(train={"num_epochs": given}).train.num_epochs) == epochs


def test_keep_best_names_an_evaluated_held_out_set(small):
    data = {"train": [{"path": "a.jsonl"}], "eval": [{"path": "dir/held.jsonl"}, {"path": "b.jsonl", "name": "other"}]}
    for name in ("held", "other"):
        recipe = small(data=data, checkpoint={"keep_best": name}, eval={"every_steps": 50})
        assert recipe.checkpoint.keep_best == name


def test_rank_and_alpha_by_group(small):
    tune = {"method": "lora", "targets": ["all"], "rank": {"text": 64, "vision": 8, "merger": 4, "deepstack": 2}}
    recipe = small(tune=tune)
    assert [number_of(recipe.tune.rank, group) for group in ("text_mlp", "vision_attn", "deepstack")] == [64, 8, 2]
    assert number_of(recipe.tune.alpha, "text_mlp") == 32
    assert recipe.to_dict()["tune"]["rank"] == tune["rank"]


def test_layers_by_regular_expression(small):
    tune = small(tune={"method": "full", "train": [r"model\.language_model\.layers\.3", "merger"]}).tune
    assert (tune.trained_groups(), tune.has_patterns()) == (("merger",), True)
