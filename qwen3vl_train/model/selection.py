"""Which weights train whole: module groups, or regular expressions over names of weights and modules."""

import difflib
import re
from collections.abc import Collection, Sequence

from torch import nn

from qwen3vl_train.model.hf_names import to_huggingface
from qwen3vl_train.model.lora import base_name, is_adapter
from qwen3vl_train.modules import expand_groups, group_of, is_group


def train_whole(model: nn.Module, names: Sequence[str], field: str) -> None:
    """Let the weights train that groups, unions or regular expressions select. field: of the recipe, for messages.

    An expression is matched in full against the Hugging Face names of weights, and of the modules that hold them.
    Raises ValueError for one that matches nothing, and for a tied head named without its embedding.
    """
    groups = set(expand_groups(name for name in names if is_group(name)))
    if names and is_tied(model):
        _check_tied_groups(groups, field)
    parameters = {name: parameter for name, parameter in model.named_parameters() if not is_adapter(name)}
    chosen = {name for name in parameters if group_of(name) in groups}
    for expression in (name for name in names if not is_group(name)):
        pattern = re.compile(expression)
        hits = {name for name in parameters if any(map(pattern.fullmatch, _prefixes(to_huggingface(base_name(name)))))}
        if not hits:
            known = dict.fromkeys(
                prefix for name in parameters for prefix in _prefixes(to_huggingface(base_name(name)))
            )
            near = difflib.get_close_matches(expression, known, n=3, cutoff=0.3)
            raise ValueError(f"{field}: {expression!r} matches no module or weight; near names: {', '.join(near)}")
        chosen |= hits
    for name in chosen:
        parameters[name].requires_grad_(True)


def _prefixes(name: str) -> list[str]:
    """a.b.c -> a, a.b, a.b.c"""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def is_tied(model: nn.Module) -> bool:
    """Return whether the head is the embedding's own parameter."""
    return all(not name.endswith("lm_head.weight") for name, _ in model.named_parameters())


def _check_tied_groups(groups: Collection[str], field: str) -> None:
    """Raise ValueError where one of embedding and tied head is named and the other is not. field: that names them."""
    if ("lm_head" in groups) != ("text_embed" in groups):
        raise ValueError(
            f"{field}: the head of this checkpoint is tied to its embedding, so lm_head and text_embed train "
            f"together; got only {'lm_head' if 'lm_head' in groups else 'text_embed'}, name both or neither"
        )
