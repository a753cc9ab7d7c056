"""What trains: apply `tune` to a model, count what trains, and check gradients after the first step."""

from torch import nn

from qwen3vl_train.config import LoraTune, Recipe
from qwen3vl_train.config.rules import learning_rate_conflicts
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.tensors import global_shape
from qwen3vl_train.model.lora import add_lora, lora_modules
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.modules import GROUPS, VISION_GROUPS, group_of, train_only
from qwen3vl_train.tracking.console import GroupReport
from qwen3vl_train.tracking.metrics import StepTally

VISION_SIDE = {*VISION_GROUPS, "merger", "deepstack"}


def apply_tuning(model: Qwen3VLForConditionalGeneration, recipe: Recipe) -> None:
    """Freeze, unfreeze and add adapters as the recipe says.

    Raises ValueError for a target that matches nothing, and for learning rates of groups that do not train.
    """
    tune = recipe.tune
    if not isinstance(tune, LoraTune):
        train_only(model, set(tune.trained_groups()))
        return
    modules = lora_modules(model, tune.targets)
    add_lora(model, modules, rank=tune.rank, alpha=tune.alpha, dropout=tune.dropout, rslora=tune.rslora, dora=tune.dora)
    # Again here: only the model says what regular expressions reach.
    groups = {group_of(module) for module in modules}
    for field, what in learning_rate_conflicts(recipe.optim, groups, listed="tune.targets"):
        raise ValueError(f"{field}: {what}")


def report_groups(model: nn.Module, recipe: Recipe) -> list[GroupReport]:
    """Count tensors and parameters by group, in the order of GROUPS; empty groups are skipped."""
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(group_of(name), []).append(parameter)
    reports = []
    for group in (group for group in GROUPS if group in members):
        sizes = [global_shape(parameter).numel() for parameter in members[group]]
        trained = [global_shape(parameter).numel() for parameter in members[group] if parameter.requires_grad]
        lr = recipe.optim.lr_of(group) if trained else 0.0
        reports.append(GroupReport(group, len(sizes), sum(sizes), len(trained), sum(trained), lr))
    return reports


class GradientCheck:
    """Checks once, at the start, that exactly the parameters that should train get gradients.

    The first step with labels is checked: its text side alone if it held no image, and all at the first with an image.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._got_gradient: set[str] = set()
        self._text_checked = self._done = False

    def after_step(self, tally: StepTally, params_with_grad: set[str], ranks: Ranks) -> str | None:
        """Check the parameters that got a gradient on any rank. Returns a line for the user, if there is one.

        Raises RuntimeError that names the tensors at fault. Every rank must call it, with its own params_with_grad.
        """
        with_media = tally.visual_tokens > 0
        if self._done or not tally.label_tokens or (self._text_checked and not with_media):
            return None
        # The optimizer has dropped the gradients of what trains: one that is left belongs to something frozen.
        left_over = {name for name, parameter in self._model.named_parameters() if parameter.grad is not None}
        self._got_gradient.update(*ranks.gather(params_with_grad | left_over))
        self._text_checked, self._done = True, with_media
        wanted = self._trained if with_media else {n for n in self._trained if group_of(n) not in VISION_SIDE}
        missing, unexpected = sorted(wanted - self._got_gradient), sorted(self._got_gradient - self._trained)
        check, faults = f"gradient check, step {tally.step}", []
        if missing:
            faults.append(f"{len(missing)} tensors that should train got no gradient: {', '.join(missing[:5])}")
        if unexpected:
            faults.append(f"{len(unexpected)} frozen tensors got one: {', '.join(unexpected[:5])}")
        if faults:
            raise RuntimeError(f"{check}: {'; '.join(faults)}; a fault of the model code, please report it")
        which = "trained tensors" if with_media else "trained text tensors (no image yet)"
        return f"{check}: all {len(wanted)} {which} got a gradient, nothing else did"
