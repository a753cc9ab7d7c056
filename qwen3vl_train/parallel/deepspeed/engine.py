"""DeepSpeed's ZeRO 1, 2 and 3 with the interface of the other engines.

Reference: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020).
"""

import os
import warnings
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from qwen3vl_train.config import OptimSection
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.tensors import full_tensor, shard_rows
from qwen3vl_train.model.new_rows import modules_with_new_rows
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.parallel.deepspeed.internals import partitions_of
from qwen3vl_train.parallel.mesh import ensure_group
from qwen3vl_train.parallel.optim import MOMENTS, build_adamw, create_state


def start_deepspeed(ranks: Ranks) -> None:
    """Import DeepSpeed, or raise ValueError, and let it run over the process group; one process gets its own group."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # DeepSpeed reads its device from there
    try:
        import deepspeed.ops
    except ImportError:
        what = "deepspeed is not installed; pip install 'qwen3vl_train[deepspeed]' or take another engine"
        raise ValueError(f"parallel.engine: {what}") from None
    # Without it the first collective on a CPU compiles an operator for a minute; gloo gives the same numbers.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ensure_group(ranks)
    deepspeed.init_distributed()
    # DeepSpeed calls torch's collectives by names that torch has replaced.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def _register_external_parameters(model: Qwen3VLForConditionalGeneration) -> None:
    """Register with DeepSpeed which modules use parameters of others, so that these are gathered with their own.

    DeepSpeed would discover them at their first use; but a pack without images reaches the position table on another
    path than one with images, and ranks that gather in different orders wait for each other forever.
    """
    from deepspeed.runtime.zero import register_external_parameter

    vision = model.visual.vision
    for module, parameter in (
        (model, model.language_model.lm_head.weight),  # the loss multiplies by it without calling the head
        (vision, vision.pos_embed.weight),
        (vision.patch_embed, vision.patch_embed.proj.weight),
        (vision.patch_embed, vision.patch_embed.proj.bias),
    ):
        register_external_parameter(module, parameter)
    for _, table in modules_with_new_rows(model):
        register_external_parameter(model, table.new_rows)


class ZeroAdamW:
    """AdamW under DeepSpeed: float32 masters, moments and gradients partitioned over ranks; in stage 3 the model too.

    Gradients are sums over all ranks, in float32; their norms are computed and they are clipped before DeepSpeed's
    step, whose own averaging, loss scaling and clipping are off, so that updates are those of the other engines.

    model: in stage 3 filled by `fill_partitioned`. config: of `deepspeed_config`.
    """

    lockstep = True

    def __init__(
        self, model: Qwen3VLForConditionalGeneration, optim: OptimSection, config: dict[str, Any], ranks: Ranks
    ) -> None:
        import deepspeed

        self.ranks = ranks
        self.host_mesh = init_device_mesh("cpu", (ranks.world_size,))
        self.params_with_grad: set[str] = set()
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.adamw = build_adamw(self.trained.items(), optim)
        with redirect_stdout(StringIO()):  # the bfloat16 optimizer of stage 1 prints the memory in use, line after line
            self.engine = deepspeed.initialize(model=model, optimizer=self.adamw, config=config)[0]
        if config["zero_optimization"]["stage"] == 3:
            _register_external_parameters(model)
        model.always_run_vision = True  # every rank reduces the gradients of the vision side in every pass
        self.zero: Any = self.engine.optimizer
        self.partitions = partitions_of(self.zero)
        # Stage 3 divides the sum over ranks by their number, in float32.
        self.averaged_over = ranks.world_size if config["zero_optimization"]["stage"] == 3 else 1
        create_state(self.adamw, self.partitions.masters)
        self.partitions.link_moments()
        for name, parameter in self.trained.items():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self.params_with_grad.add(name))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # What DeepSpeed does around a forward pass through its engine; ours goes through the model itself.
        self.zero.clear_backward_seen_flag()
        self.zero.backward_prologue()
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    @torch.no_grad()
    def gradient_norms(self) -> dict[str, float]:
        names = list(dict.fromkeys(group["group"] for group in self.adamw.param_groups))
        squares = torch.zeros(len(names), dtype=torch.float64, device=self.ranks.device)
        for number, gradients in zip(self.partitions.groups, self.partitions.gradients(), strict=True):
            group = names.index(self.adamw.param_groups[number]["group"])
            for gradient in gradients:
                gradient.mul_(self.averaged_over)
                squares[group] += gradient.square().sum(dtype=torch.float64).to(squares.device)
        dist.all_reduce(squares)  # the partitions of all ranks do not overlap
        return {"all": squares.sum().sqrt().item(), **dict(zip(names, squares.sqrt().tolist(), strict=True))}

    @torch.no_grad()
    def step(self, factor: float, clip: float) -> None:
        if clip != 1.0:
            for gradients in self.partitions.gradients():
                for gradient in gradients:
                    gradient.mul_(clip)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.engine.step()
        if not self.engine.was_step_applied():
            raise RuntimeError("DeepSpeed skipped a step: its own norm of the gradients is not finite; lower optim.lr")

    def discard(self) -> None:
        self.partitions.discard()

    def state_tensors(self) -> dict[str, Tensor]:
        """Gather tensors by name, one at a time; each rank keeps its rows of them, on the CPU.

        DeepSpeed's own checkpoint is bound to its stage and number of ranks; in this form a run resumes with any engine
        on any number of ranks. It costs one gather of 12 bytes a trained parameter, the memory of the largest tensor
        in float32 on the device, and a rank's share of the 12 bytes on its host.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trained.items():
            for part in ("weight", *MOMENTS):
                if part == "weight":
                    values = safe_get_full_fp32_param(parameter)
                else:
                    values = safe_get_full_optimizer_state(parameter, part)
                assert values is not None, f"{name}: trained, but DeepSpeed does not know it"
                tensors[f"{part}/{name}"] = shard_rows(values, self.host_mesh)
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor], num_updates: int) -> None:
        for name, parameter in self.trained.items():
            for part in ("weight", *MOMENTS):
                self.partitions.set_part(parameter, part, full_tensor(tensors[f"{part}/{name}"]))
        for master in self.partitions.masters:
            self.adamw.state[master]["step"].fill_(float(num_updates))
        self.partitions.round_into_model()
