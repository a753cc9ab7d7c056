"""The fields of `tune`: what trains."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.functional_validators import AfterValidator, BeforeValidator

from qwen3vl_train.config.data_fields import Section, Text
from qwen3vl_train.config.yaml12 import format_value
from qwen3vl_train.modules import (
    GROUPS,
    LORA_GROUPS,
    UNIONS,
    expand_groups,
    expand_lora_groups,
    is_group,
    unknown_group,
)

# What peft and LLaMA-Factory call every linear layer but the head.
_ALL_LINEAR = ("all-linear", "all_linear")


def _check_group(name: str) -> str:
    expand_groups([name])
    return name


def _check_expression(expression: str) -> str:
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        what = f"got {expression!r}, which is neither a group name nor a valid regular expression ({error})"
        raise ValueError(what) from None
    return expression


def _check_trained(name: str) -> str:
    """Take a bare word as a group name and anything else as a regular expression over names of modules and weights."""
    return _check_group(name) if re.fullmatch(r"\w+", name) else _check_expression(name)


def _check_target(target: str) -> str:
    """Take a bare word as a group name and anything else as a regular expression over module names."""
    if target in LORA_GROUPS or target in UNIONS:
        return target
    if target in GROUPS:
        raise ValueError(f"{target} takes no LoRA; remove it, or train it whole with tune.full")
    if target in _ALL_LINEAR:
        raise ValueError(_instead_of_all_linear(target))
    if re.fullmatch(r"\w+", target):
        expression = f"(a module name is given as a regular expression, such as '.*\\.{target}')"
        raise ValueError(f"{unknown_group(target, (*LORA_GROUPS, *UNIONS))} {expression}")
    return _check_expression(target)


def _instead_of_all_linear(target: str) -> str:
    return (
        f"{target} is here [all], every linear layer of both towers and the mergers, or [text], those of the language "
        "model alone, which is what most tools train with a frozen vision tower"
    )


def _check_targets(targets: Any) -> Any:
    if targets in _ALL_LINEAR:
        raise ValueError(_instead_of_all_linear(targets))
    return targets


def _check_numbers(value: Any) -> Any:
    """Take one number, or numbers by module group."""
    by_group = value if isinstance(value, dict) else {"": value}
    for number in by_group.values():
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"got {format_value(number)}, expected an integer")
        if number < 1:
            raise ValueError(f"got {number}, expected at least 1")
    if not isinstance(value, dict):
        return value
    if not value:
        raise ValueError("got no group; give one number, or a number for each group such as {text: 64, vision: 8}")
    seen: dict[str, str] = {}
    for name in value:
        for group in expand_groups([name]):
            if group in seen:
                raise ValueError(f"{group} has two numbers, as {seen[group]} and as {name}; keep one")
            seen[group] = name
    return value


def _check_new_tokens(value: Any) -> Any:
    named = isinstance(value, list) and value and all(isinstance(name, str) and name for name in value)
    if value is not None and value != "all" and not named:
        raise ValueError(f"got {format_value(value)}, expected all or a list of tokens")
    return value


NumberByGroup = Annotated[int | dict[str, int], BeforeValidator(_check_numbers)]


def number_of(value: int | Mapping[str, int], group: str) -> int | None:
    """Return the number that a field gives a module group; None where it names other groups alone."""
    if isinstance(value, int):
        return value
    return next((number for name, number in value.items() if group in expand_groups([name])), None)


class LoraTune(Section):
    """Train low-rank adapters.

    rank, alpha: one number, or one for each module group, such as {text: 64, vision: 8}.
    targets: group names, or regular expressions matched against whole Hugging Face module names. A union (vision,
        text, all) means those of its groups that take LoRA: linear layers of blocks and mergers, not embeddings and
        head.
    full: groups whose weights train whole beside the adapters (peft's modules_to_save).
    new_tokens: tokens whose rows of the embedding and the head train beside the adapters, and no other row of them; all
        are those of the tokenizer that a released Qwen3-VL does not have.
    start_from: an adapter's folder, or a run, whose weights are the first values; rank, alpha, targets and so on are
        its own where none are given. The optimizer starts anew.
    """

    method: Literal["lora"] = "lora"
    rank: NumberByGroup = 16
    alpha: NumberByGroup = 32
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: Annotated[
        list[Annotated[str, AfterValidator(_check_target)]], Field(min_length=1), BeforeValidator(_check_targets)
    ] = Field(["text_attn", "text_mlp"])
    rslora: bool = False
    dora: bool = False
    full: list[Annotated[str, AfterValidator(_check_group)]] = Field(default_factory=list)
    new_tokens: Annotated[Literal["all"] | list[str] | None, BeforeValidator(_check_new_tokens)] = None
    start_from: Text | None = None

    def adapted_groups(self) -> tuple[str, ...]:
        """Return the groups named as targets. What a regular expression reaches is known only with the model."""
        return expand_lora_groups(target for target in self.targets if is_group(target))

    def trained_groups(self) -> tuple[str, ...]:
        """Return the groups named as targets or as trained whole, and the embedding where rows of it train."""
        rows = ["text_embed"] if self.new_tokens else []
        return expand_groups([*self.adapted_groups(), *self.full, *rows])

    def has_patterns(self) -> bool:
        """Return whether more may train than `trained_groups`: by regular expressions, or as start_from decides."""
        is_open = self.start_from is not None and "targets" not in self.model_fields_set
        return is_open or not all(is_group(target) for target in self.targets)

    def listed_in(self) -> str:
        """Return the fields that name what trains, for messages."""
        return "tune.targets and tune.full" if self.full else "tune.targets"


class FullTune(Section):
    """Train all weights of some modules.

    train: the groups or unions that train, or regular expressions matched against whole Hugging Face names of modules
        or weights, such as 'model\\.language_model\\.layers\\.3[0-5]' for six layers; all others are frozen.
    start_from: a run whose weights are the first values; the optimizer starts anew.
    """

    method: Literal["full"] = "full"
    train: list[Annotated[str, AfterValidator(_check_trained)]] = Field(min_length=1)
    start_from: Text | None = None

    def trained_groups(self) -> tuple[str, ...]:
        """Return the groups that are named. What a regular expression reaches is known only with the model."""
        return expand_groups(name for name in self.train if is_group(name))

    def has_patterns(self) -> bool:
        return not all(is_group(name) for name in self.train)

    def listed_in(self) -> str:
        return "tune.train"


Tune = Annotated[LoraTune | FullTune, Field(discriminator="method")]
