"""AdamW over float32 master weights, learning rates by module group, and the schedule.

Reference: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen3vl_train.config import OptimSection
from qwen3vl_train.model.groups import group_of

# Every trained tensor's state on disk: the float32 weight and the two moments.
STATE_PARTS = ("weight", "exp_avg", "exp_avg_sq")


def lr_factor(step: int, *, num_steps: int, warmup_steps: int, schedule: str) -> float:
    """What the peak learning rate is multiplied with at a step, 0 <= step < num_steps.

    Warm-up rises linearly to 1, reached at step `warmup_steps`; cosine and linear then fall towards 0, which they would
    reach at `num_steps`, one past the last step: no step is wasted on a rate of zero.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress


@dataclass(frozen=True)
class Trained:
    """One trained tensor: the model's parameter, its group, and the float32 weight that the optimizer moves."""

    name: str
    group: str
    parameter: nn.Parameter
    master: nn.Parameter


class MasterAdamW:
    """AdamW that moves float32 masters of the trained parameters, whatever dtype the model computes in.

    bfloat16 has 8 bits of mantissa: an update below 1/256 of a weight would vanish if added to it directly. So
    gradients are summed and applied in float32, and the model's weights are the masters rounded. A float32 parameter is
    its own master. Weight decay acts on matrices only, not on norms and biases. A parameter that no pack touched has a
    gradient of zero, so that a step means the same on any number of ranks.
    """

    def __init__(self, model: nn.Module, optim: OptimSection) -> None:
        self.optim = optim
        self.trained: list[Trained] = []
        self.touched: set[str] = set()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                master = parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
                self.trained.append(Trained(name, group_of(name), parameter, master))
                parameter.register_post_accumulate_grad_hook(self._collector(name, master))
        if not self.trained:
            raise ValueError("tune: nothing trains; name at least one module group or LoRA target")
        self.adamw = torch.optim.AdamW(self._groups(), lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)

    def _collector(self, name: str, master: nn.Parameter):
        def collect(parameter: Tensor) -> None:
            self.touched.add(name)
            if parameter is not master:
                assert parameter.grad is not None
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

        return collect

    def _groups(self) -> list[dict]:
        by_setting: dict[tuple[str, float], list[nn.Parameter]] = {}
        for item in self.trained:
            decay = self.optim.weight_decay if item.master.ndim >= 2 else 0.0
            by_setting.setdefault((item.group, decay), []).append(item.master)
        return [
            {"params": params, "peak_lr": self.optim.lr_of(group), "weight_decay": decay}
            for (group, decay), params in by_setting.items()
        ]

    def gradients(self) -> list[Tensor]:
        """The float32 gradients of all trained tensors, in order; zeros where no pack touched one."""
        for item in self.trained:
            if item.master.grad is None:
                item.master.grad = torch.zeros_like(item.master)
        return [item.master.grad for item in self.trained if item.master.grad is not None]

    def group_norms(self) -> dict[str, float]:
        """Gradient norm of each module group; 'all' is the global norm."""
        squares: dict[str, Tensor] = {}
        for item, gradient in zip(self.trained, self.gradients(), strict=True):
            square = gradient.square().sum(dtype=torch.float64)
            squares[item.group] = squares[item.group] + square if item.group in squares else square
        norms = {group: square.sqrt().item() for group, square in squares.items()}
        return {"all": math.sqrt(sum(norm**2 for norm in norms.values())), **norms}

    @torch.no_grad()
    def step(self, factor: float, clip: float) -> None:
        """Scale all gradients by `clip`, move the masters at `factor` times their peak rates, round them into the
        model.
        """
        if clip != 1.0:
            for gradient in self.gradients():
                gradient.mul_(clip)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.adamw.step()
        for item in self.trained:
            if item.parameter is not item.master:
                item.parameter.copy_(item.master)
            item.master.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights and moments by `part/name`, float32; the moments exist after the first step."""
        tensors = {}
        for item in self.trained:
            state = self.adamw.state.get(item.master, {})
            tensors[f"weight/{item.name}"] = item.master.detach()
            tensors |= {f"{part}/{item.name}": state[part] for part in STATE_PARTS[1:] if part in state}
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor], num_updates: int) -> None:
        """Take over what `state_tensors` gave after `num_updates` steps.

        Raises ValueError for names or shapes that differ.
        """
        wanted = {f"{part}/{item.name}": item.master.shape for item in self.trained for part in STATE_PARTS}
        wrong = sorted(set(wanted) ^ set(tensors)) or [
            name for name, shape in wanted.items() if tensors[name].shape != shape
        ]
        if wrong:
            raise ValueError(f"checkpoint: holds another set of trained tensors, e.g. {wrong[0]}; was `tune` changed?")
        for item in self.trained:
            item.master.copy_(tensors[f"weight/{item.name}"])
            item.parameter.copy_(item.master)
            self.adamw.state[item.master] = {
                "step": torch.tensor(float(num_updates), device=item.master.device),
                **{part: tensors[f"{part}/{item.name}"].to(item.master.device, copy=True) for part in STATE_PARTS[1:]},
            }
