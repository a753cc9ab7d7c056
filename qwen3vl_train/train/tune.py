"""What trains: apply `tune` to a model, count what trains, and check gradients after the first step."""

from collections import Counter

from torch import nn

from qwen3vl_train.config import LoraTune, Recipe
from qwen3vl_train.config.rules import learning_rate_conflicts
from qwen3vl_train.config.tune_fields import number_of
from qwen3vl_train.data.encode.tokenizer import new_token_ids
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.tensors import global_shape
from qwen3vl_train.model.lora import AdapterSize, add_lora, lora_modules
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.model.selection import train_whole
from qwen3vl_train.modules import GROUPS, VISION_GROUPS, expand_groups, group_of
from qwen3vl_train.tracking.console import GroupReport
from qwen3vl_train.tracking.metrics import StepTally

VISION_SIDE = {*VISION_GROUPS, "merger", "deepstack"}


def apply_tuning(model: Qwen3VLForConditionalGeneration, recipe: Recipe) -> None:
    """Freeze, unfreeze and add adapters as the recipe says.

    Raises ValueError for a target that matches nothing, and for learning rates of groups that do not train.
    """
    tune = recipe.tune
    if isinstance(tune, LoraTune):
        sizes = _adapter_sizes(model, tune)
        add_lora(model, sizes, dropout=tune.dropout, rslora=tune.rslora, dora=tune.dora)
        if both := [name for name in sizes if group_of(name) in expand_groups(tune.full)]:
            raise ValueError(
                f"tune.full: {group_of(both[0])} trains whole, but tune.targets reaches {both[0]}; use one"
            )
        train_whole(model, tune.full, "tune.full")
        if tune.new_tokens:
            model.language_model.add_new_rows(new_token_ids(recipe.model.path, tune.new_tokens))
    else:
        model.requires_grad_(False)
        train_whole(model, tune.train, "tune.train")
    # Again here: only the model says what regular expressions reach.
    groups = {group_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    for field, what in learning_rate_conflicts(recipe.optim, groups, listed=tune.listed_in()):
        raise ValueError(f"{field}: {what}")


def _adapter_sizes(model: nn.Module, tune: LoraTune) -> dict[str, AdapterSize]:
    sizes: dict[str, AdapterSize] = {}
    for module in lora_modules(model, tune.targets):
        group = group_of(module)
        rank, alpha = number_of(tune.rank, group), number_of(tune.alpha, group)
        if rank is None or alpha is None:
            field = "tune.rank" if rank is None else "tune.alpha"
            raise ValueError(f"{field}: has no number for {group}, of which tune.targets reaches {module}; add one")
        sizes[module] = AdapterSize(rank, alpha)
    return sizes


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


def check_media_reach(model: nn.Module, recipe: Recipe, where: str) -> None:
    """Raise ValueError where only the vision side trains: without an image or clip no gradient would ever reach it.

    where: the data that holds none, as `none of the 4 samples`.
    """
    groups = {group_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if groups <= VISION_SIDE:
        named = ", ".join(group for group in GROUPS if group in groups)
        raise ValueError(
            f"{recipe.tune.listed_in()}: only {named} would train, but {where} "
            "of data.train has an image or clip, so nothing would be learned; add rows with media, or name a text group"
        )


class GradientCheck:
    """Checks once, at the start, that exactly the parameters that should train get gradients.

    The first step with labels is checked: its text side alone if it held no image, and all at the first with an image.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._got_gradient: set[str] = set()
        self._text_checked = self._done = False
        self._steps: list[int] = []  # the first and the last one seen
        self._saw_media = False

    def after_step(self, tally: StepTally, params_with_grad: set[str], ranks: Ranks) -> str | None:
        """Check the parameters that got a gradient on any rank. Returns a line for the user, if there is one.

        Raises RuntimeError that names the tensors at fault. Every rank must call it, with its own params_with_grad.
        """
        with_media = tally.visual_tokens > 0
        self._saw_media = self._saw_media or with_media
        self._steps = [*self._steps[:1], tally.step]
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

    def unreached(self) -> str | None:
        """Return a warning about the groups that no step of this process has reached, the same on every rank."""
        sizes = Counter(group for name in self._trained if (group := group_of(name)) in VISION_SIDE)
        if self._saw_media or not self._steps or not sizes:
            return None
        named = ", ".join(f"{group} ({sizes[group]} tensors)" for group in GROUPS if sizes[group])
        return (
            f"warning: no row of steps {self._steps[0]} to {self._steps[-1]} had an image or clip, so nothing was "
            f"learned by {named}; train them on rows with media, or not at all"
        )
