"""Which module group each parameter belongs to.

One table, used for freezing, learning rates, LoRA targets and reports.
"""

import re

from torch import nn

# Norms go with the part that reads them; the final norm goes with the head.
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
_ANY_GROUP = re.compile("|".join(f"(?P<g{i}>{pattern})" for i, pattern in enumerate(_GROUP_OF_PATTERN)))
_GROUPS = list(_GROUP_OF_PATTERN.values())


def group_of(name: str) -> str:
    """The group of a parameter or module, by its name in our module tree (LoRA parts included).

    A tied head is `text_embed`: it is the embedding's parameter.
    """
    match = _ANY_GROUP.match(name)
    assert match is not None, f"{name} belongs to no module group"
    assert match.lastgroup is not None
    return _GROUPS[int(match.lastgroup[1:])]


def grouped_parameters(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """All parameters by group, each once, in the order of the module tree."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(group_of(name), []).append((name, parameter))
    return groups


def train_only(model: nn.Module, groups: set[str]) -> None:
    """Let exactly the parameters of these groups train.

    Raises ValueError for a tied head named without its embedding.
    """
    present = grouped_parameters(model)
    tied = all(not name.endswith("lm_head.weight") for name, _ in present["lm_head"])
    if tied and ("lm_head" in groups) != ("text_embed" in groups):
        raise ValueError(
            "tune.train: the head of this checkpoint is tied to its embedding, so lm_head and text_embed train "
            f"together; got only {'lm_head' if 'lm_head' in groups else 'text_embed'}, name both or neither"
        )
    for group, parameters in present.items():
        for _, parameter in parameters:
            parameter.requires_grad_(group in groups)
