"""Names of module groups, for freezing, learning rates, LoRA targets, gradient norms and reports.

`merger` is the main merger alone and `deepstack` the DeepStack mergers alone: neither ever means the other.
"""

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # recipes name groups too, and reading a recipe imports no torch
    from torch import nn

VISION_GROUPS: tuple[str, ...] = ("vision_attn", "vision_mlp", "vision_embed")
_TEXT_GROUPS: tuple[str, ...] = ("text_attn", "text_mlp", "text_embed", "lm_head")
GROUPS: tuple[str, ...] = (*VISION_GROUPS, "merger", "deepstack", *_TEXT_GROUPS)
UNIONS: dict[str, tuple[str, ...]] = {"vision": VISION_GROUPS, "text": _TEXT_GROUPS, "all": GROUPS}
# Embeddings and the head take no LoRA here: adapters are put on linear layers of blocks and mergers.
LORA_GROUPS: tuple[str, ...] = tuple(g for g in GROUPS if g not in ("vision_embed", "text_embed", "lm_head"))


def expand_groups(names: Iterable[str]) -> tuple[str, ...]:
    """Return the groups that names and unions select, each once, in the order of GROUPS.

    ["text_attn", "vision"] -> ("vision_attn", "vision_mlp", "vision_embed", "text_attn")
    Raises ValueError for a name that is neither a group nor a union, with near names.
    """
    wanted: set[str] = set()
    for name in names:
        if not is_group(name):
            raise ValueError(unknown_group(name, (*GROUPS, *UNIONS)))
        wanted.update(UNIONS.get(name, (name,)))
    return tuple(group for group in GROUPS if group in wanted)


def is_group(name: str) -> bool:
    """Return whether this is the name of a group or a union."""
    return name in GROUPS or name in UNIONS


def expand_lora_groups(names: Iterable[str]) -> tuple[str, ...]:
    """Return `expand_groups` without the groups that take no LoRA: `text` -> text_attn, text_mlp."""
    return tuple(group for group in expand_groups(names) if group in LORA_GROUPS)


def unknown_group(name: str, allowed: Iterable[str]) -> str:
    """Return a message that `name` is not one of `allowed`, with the nearest names, or with all of them."""
    allowed = list(allowed)
    near = difflib.get_close_matches(name, allowed, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use {', '.join(allowed)}"
    return f"{name!r} is not a module group; {hint}"


# A norm belongs to the group of the module that reads it; the final norm to that of the head.
_GROUP_OF_PATTERN = {
    r"visual\.vision\.(patch_embed|pos_embed)": "vision_embed",
    r"visual\.vision\.blocks\.\d+\.(norm1|attn)": "vision_attn",
    r"visual\.vision\.blocks\.\d+\.(norm2|mlp)": "vision_mlp",
    r"visual\.vision\.merger": "merger",
    r"visual\.vision\.deepstack_merger_list\.\d+": "deepstack",
    r"language_model\.model\.embed_tokens": "text_embed",
    r"language_model\.model\.layers\.\d+\.(input_layernorm|self_attn)": "text_attn",
    r"language_model\.model\.layers\.\d+\.(post_attention_layernorm|mlp)": "text_mlp",
    r"language_model\.(model\.norm|lm_head)": "lm_head",
}


def group_of(name: str) -> str:
    """Return the group of a parameter or module, by its name in our module tree (adapters included).

    A tied head is `text_embed`: it is the embedding's parameter.
    """
    group = next((group for pattern, group in _GROUP_OF_PATTERN.items() if re.match(pattern, name)), None)
    assert group is not None, f"{name} belongs to no module group"
    return group


def grouped_parameters(model: "nn.Module") -> "dict[str, list[tuple[str, nn.Parameter]]]":
    """Return all parameters by group, each once, in the order of the module tree."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(group_of(name), []).append((name, parameter))
    return groups
