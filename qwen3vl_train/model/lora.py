"""LoRA on our module tree, through peft: which modules it adapts, and merging it into a plain model.

References: Hu et al., "LoRA" (2021); rsLoRA, Kalajdzievski (2023); DoRA, Liu et al. (2024).
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from qwen3vl_train.model.hf_names import to_huggingface
from qwen3vl_train.model.new_rows import is_new_rows, modules_with_new_rows
from qwen3vl_train.modules import LORA_GROUPS, expand_lora_groups, group_of, is_group

ADAPTER = "default"


def lora_modules(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the names (ours) of the linear modules that the targets select.

    Targets are group names, or regular expressions matched in full against Hugging Face module names. Raises ValueError
    for one that matches nothing, or something that takes no adapter: an adapter on the patch embedding or the head,
    which are applied as plain products of their weights, would never be used.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    eligible = [name for name in linears if group_of(name) in LORA_GROUPS]
    leaves = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    chosen: set[str] = set()
    for target in targets:
        if is_group(target):
            groups = expand_lora_groups([target])
            chosen.update(name for name in eligible if group_of(name) in groups)
            continue
        pattern = re.compile(target)
        hits = [name for name in leaves if pattern.fullmatch(to_huggingface(name))]
        if not hits:
            names = [to_huggingface(name) for name in eligible]
            near = difflib.get_close_matches(target, [*LORA_GROUPS, *names], n=3, cutoff=0.3)
            raise ValueError(f"tune.targets: {target!r} matches no module; near names: {', '.join(near) or names[0]}")
        if wrong := [to_huggingface(name) for name in hits if name not in eligible]:
            raise ValueError(
                f"tune.targets: {target!r} matches {wrong[0]}, which takes no adapter; "
                f"only linear layers of {', '.join(LORA_GROUPS)} do"
            )
        chosen.update(hits)
    return [name for name in eligible if name in chosen]


class AdapterSize(NamedTuple):
    rank: int
    alpha: int


def add_lora(model: nn.Module, sizes: Mapping[str, AdapterSize], *, dropout: float, rslora: bool, dora: bool) -> None:
    """Freeze the model and put an adapter on each named linear module. B starts at zero: the function is unchanged.

    sizes: by names of modules (ours). On a model on the meta device the adapters are there too;
    `train.build.build_model` gives them their values.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    rank, alpha = next(iter(sizes.values()))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={re.escape(name): size.rank for name, size in sizes.items()},
        alpha_pattern={re.escape(name): size.alpha for name, size in sizes.items()},
        lora_dropout=dropout,
        target_modules=list(sizes),
        use_rslora=rslora,
        use_dora=dora,
        bias="none",
    )
    on_meta = next(model.parameters()).is_meta
    inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=on_meta)
    adapted = {name: AdapterSize(m.r[ADAPTER], m.lora_alpha[ADAPTER]) for name, m in lora_layers(model)}
    assert adapted == sizes, f"peft adapted {len(adapted)} modules, {len(sizes)} were named, or in other sizes"


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every module with an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def base_name(name: str) -> str:
    """Return the name that a parameter has without adapters: peft moves an adapted module's own weights one deeper."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Return whether a parameter is beside the base weights and not one of them: of an adapter, or rows of tokens."""
    return ".lora_" in name or is_new_rows(name)


def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its base weight, restore the plain linear modules, and write rows of tokens into theirs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    for _, table in list(modules_with_new_rows(model)):
        table.merge_new_rows()
