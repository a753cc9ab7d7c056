"""LoRA on our module tree, through peft: which modules it adapts, and merging it into a plain model.

References: Hu et al., "LoRA" (2021); rsLoRA, Kalajdzievski (2023); DoRA, Liu et al. (2024).
"""

import difflib
import re
from collections.abc import Sequence

from torch import Tensor, nn

from qwen3vl_train.model.hf_names import to_huggingface
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


def add_lora(
    model: nn.Module, modules: list[str], *, rank: int, alpha: float, dropout: float, rslora: bool, dora: bool
) -> None:
    """Freeze the model and put an adapter on each named linear module. B starts at zero: the function is unchanged.

    On a model on the meta device the adapters are there too; `train.build.build_model` gives them their values.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft's hint says int; it only ever divides by it
        lora_dropout=dropout,
        target_modules=modules,
        use_rslora=rslora,
        use_dora=dora,
        bias="none",
    )
    on_meta = next(model.parameters()).is_meta
    inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=on_meta)
    adapted = {name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert adapted == set(modules), f"peft adapted {len(adapted)} modules, {len(modules)} were named"


def base_name(name: str) -> str:
    """Return the name that a parameter has without adapters: peft moves an adapted module's own weights one deeper."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter under the names that `PeftModel.from_pretrained` reads on the stock model."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        module, found, part = name.partition(".lora_")
        if found:
            # peft's files name DoRA's vector itself, its model a weight inside of it.
            kind = part.replace(f".{ADAPTER}", "", 1).replace("magnitude_vector.weight", "magnitude_vector")
            tensors[f"base_model.model.{to_huggingface(module)}.lora_{kind}"] = parameter.detach()
    return tensors


def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its base weight and restore the plain linear modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
