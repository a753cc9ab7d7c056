"""The one set of names for parts of the model, for freezing, learning rates, LoRA targets, gradient norms and reports.

`merger` is the main merger alone and `deepstack` the DeepStack mergers alone: neither ever means the other.
"""

import difflib
from collections.abc import Iterable

GROUPS: tuple[str, ...] = (
    "vision_attn",
    "vision_mlp",
    "vision_embed",
    "merger",
    "deepstack",
    "text_attn",
    "text_mlp",
    "text_embed",
    "lm_head",
)

VISION_GROUPS: tuple[str, ...] = ("vision_attn", "vision_mlp", "vision_embed")

UNIONS: dict[str, tuple[str, ...]] = {
    "vision": VISION_GROUPS,
    "text": ("text_attn", "text_mlp", "text_embed", "lm_head"),
    "all": GROUPS,
}

# Embeddings and the head take no LoRA here: adapters go on the linear layers of blocks and mergers.
LORA_GROUPS: tuple[str, ...] = tuple(g for g in GROUPS if g not in ("vision_embed", "text_embed", "lm_head"))


def expand_groups(names: Iterable[str]) -> tuple[str, ...]:
    """Replace unions by their groups; each group once, in the order of GROUPS.

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
    """Whether this is the name of a group or a union."""
    return name in GROUPS or name in UNIONS


def expand_lora_groups(names: Iterable[str]) -> tuple[str, ...]:
    """`expand_groups`, without the groups that take no LoRA: `text` -> text_attn, text_mlp."""
    return tuple(group for group in expand_groups(names) if group in LORA_GROUPS)


def unknown_group(name: str, allowed: Iterable[str]) -> str:
    """Say that `name` is not one of `allowed`, with the nearest names, or all of them when none is near."""
    allowed = list(allowed)
    near = difflib.get_close_matches(name, allowed, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use {', '.join(allowed)}"
    return f"{name!r} is not a module group; {hint}"
