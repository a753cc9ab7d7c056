"""AdamW over float32 master weights, with learning rates by module group.

Reference: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from qwen3vl_train.config import OptimSection
from qwen3vl_train.dist.tensors import global_shape, to_local
from qwen3vl_train.modules import group_of

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainedTensor:
    """One trained tensor: the model's parameter, its module group, and the float32 weight that AdamW updates."""

    name: str
    group: str
    parameter: nn.Parameter
    master: nn.Parameter


class GradientSync(Protocol):
    """How an engine sums gradients over ranks. lockstep: all ranks must run the same number of passes in a step."""

    lockstep: bool

    def sum_gradients(self, gradients: list[Tensor]) -> None: ...

    def sum_squares(self, squares: Tensor) -> Tensor: ...


class TrainEngine(Protocol):
    """What the training step and the checkpoint need of an engine: its backward pass, its optimizer and its state.

    params_with_grad: names of the parameters that got a gradient on this rank. lockstep: see GradientSync.
    """

    params_with_grad: set[str]
    lockstep: bool

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one pack; last: of this step on this rank."""
        ...

    def gradient_norms(self) -> dict[str, float]:
        """Sum the gradients of the step over all ranks. Returns their norms by module group, and 'all'."""
        ...

    def step(self, factor: float, clip: float) -> None:
        """Scale the gradients by clip and update the weights at factor times their peak learning rates."""
        ...

    def discard(self) -> None:
        """Drop the gradients of the step; no weight changes."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Return what trains in the form of checkpoints: float32 `weight/`, `exp_avg/` and `exp_avg_sq/` by our names.

        Tensors may be sharded (DTensor), and may or may not be copies. Every rank must call it. To load, write into
        them in place and pass them to `load_state_dict`.
        """
        ...

    def load_state_dict(self, tensors: dict[str, Tensor], num_updates: int) -> None:
        """Take over tensors of `state_tensors` that were written into, as the state after num_updates steps."""
        ...


class MasterAdamW:
    """AdamW that updates float32 masters of the trained parameters, whatever dtype the model computes in.

    bfloat16 has 8 bits of mantissa: an update below 1/256 of a weight would vanish if added to it directly. So
    gradients are summed and applied in float32, and the model's weights are the rounded masters. A float32 parameter is
    its own master. Weight decay acts on matrices only, not on norms and biases. A parameter that no pack reached has a
    gradient of zero, so that a step means the same on any number of ranks.
    """

    def __init__(self, model: nn.Module, optim: OptimSection, sync: GradientSync) -> None:
        self.sync, self.lockstep = sync, sync.lockstep
        self.trained: list[TrainedTensor] = []
        self.params_with_grad: set[str] = set()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                master = parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
                self.trained.append(TrainedTensor(name, group_of(name), parameter, master))
                parameter.register_post_accumulate_grad_hook(self._collector(name, master))
        self.adamw = build_adamw([(item.name, item.master) for item in self.trained], optim)
        create_state(self.adamw, [item.master for item in self.trained])

    def _collector(self, name: str, master: nn.Parameter):
        def collect(parameter: Tensor) -> None:
            self.params_with_grad.add(name)
            if parameter is not master:
                assert parameter.grad is not None
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

        return collect

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def _gradients(self) -> list[Tensor]:
        """Return the float32 gradients of all trained tensors, in order; zeros where no pack reached one."""
        for item in self.trained:
            if item.master.grad is None:
                item.master.grad = torch.zeros_like(item.master)
        return [item.master.grad for item in self.trained if item.master.grad is not None]

    def gradient_norms(self) -> dict[str, float]:
        gradients = self._gradients()
        self.sync.sum_gradients(gradients)
        groups = list(dict.fromkeys(item.group for item in self.trained))
        squares = torch.zeros(len(groups), dtype=torch.float64, device=gradients[0].device)
        for item, gradient in zip(self.trained, gradients, strict=True):
            squares[groups.index(item.group)] += to_local(gradient).square().sum(dtype=torch.float64)
        squares = self.sync.sum_squares(squares)
        return {"all": squares.sum().sqrt().item(), **dict(zip(groups, squares.sqrt().tolist(), strict=True))}

    @torch.no_grad()
    def step(self, factor: float, clip: float) -> None:
        if clip != 1.0:
            for gradient in self._gradients():
                gradient.mul_(clip)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.adamw.step()
        self._round_into_model()
        self.discard()

    def discard(self) -> None:
        for item in self.trained:
            item.master.grad = None

    def _round_into_model(self) -> None:
        for item in self.trained:
            if item.parameter is not item.master:
                item.parameter.copy_(item.master)

    def state_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for item in self.trained:
            tensors[f"weight/{item.name}"] = item.master.detach()
            tensors |= {f"{part}/{item.name}": self.adamw.state[item.master][part] for part in MOMENTS}
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor], num_updates: int) -> None:
        for item in self.trained:
            self.adamw.state[item.master]["step"].fill_(float(num_updates))
        self._round_into_model()


def build_adamw(members: Iterable[tuple[str, nn.Parameter]], optim: OptimSection) -> torch.optim.AdamW:
    """Return AdamW over (name, parameter) pairs, in groups by module group, rate and decay; only matrices decay.

    Raises ValueError where nothing trains.
    """
    by_setting: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter in members:
        decay = optim.weight_decay if len(global_shape(parameter)) >= 2 else 0.0
        group = group_of(name)
        rate = optim.lr_of(group, is_lora_b=".lora_B." in name)
        by_setting.setdefault((group, rate, decay), []).append(parameter)
    if not by_setting:
        raise ValueError("tune: nothing trains; name at least one module group or LoRA target")
    groups = [
        {"params": params, "group": group, "peak_lr": rate, "lr": rate, "weight_decay": decay}
        for (group, rate, decay), params in by_setting.items()
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def create_state(adamw: torch.optim.AdamW, masters: Iterable[Tensor]) -> None:
    """Create the state as AdamW would in its first step, so that a checkpoint can be read into it before."""
    for master in masters:
        step = torch.zeros((), dtype=torch.float32, device=master.device)
        adamw.state[master] = {"step": step, **{part: torch.zeros_like(master) for part in MOMENTS}}
