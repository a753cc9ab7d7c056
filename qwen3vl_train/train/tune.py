"""What trains: apply `tune` to a model, say what it did, and check after the first step that it is true."""

from torch import nn

from qwen3vl_train.config import LoraTune, OptimSection, Recipe
from qwen3vl_train.dist.ranks import Ranks, seed_everything
from qwen3vl_train.dist.tensors import global_shape
from qwen3vl_train.model.hf_names import to_huggingface
from qwen3vl_train.model.lora import add_lora, lora_modules
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.modules import GROUPS, VISION_GROUPS, group_of, train_only
from qwen3vl_train.tracking.console import GroupReport

SEEN_WITH_MEDIA = {*VISION_GROUPS, "merger", "deepstack"}


def apply_tuning(model: Qwen3VLForConditionalGeneration, recipe: Recipe) -> None:
    """Freeze, unfreeze, add adapters and switch on activation checkpointing as the recipe says.

    Adapter weights start from the recipe's seed, alike on every rank. Raises ValueError for a target that matches
    nothing.
    """
    tune = recipe.tune
    if isinstance(tune, LoraTune):
        modules = lora_modules(model, tune.targets, to_huggingface)
        seed_everything(recipe.train.seed)
        add_lora(
            model, modules, rank=tune.rank, alpha=tune.alpha, dropout=tune.dropout, rslora=tune.rslora, dora=tune.dora
        )
        check_rates({group_of(module) for module in modules}, recipe.optim)
    else:
        train_only(model, set(tune.trained_groups()))
    checkpointing = recipe.train.activation_checkpointing
    for block in model.visual.vision.blocks:
        block.checkpointing = checkpointing.vision  # type: ignore[assignment]
    for layer in model.language_model.model.layers:
        layer.checkpointing = checkpointing.text  # type: ignore[assignment]


def check_rates(trained_groups: set[str], optim: OptimSection) -> None:
    """The recipe's rules for learning rates, once the model says what regular expressions reach. Raises ValueError."""
    if optim.merger_lr is not None and optim.deepstack_lr is None and "deepstack" in trained_groups:
        raise ValueError(
            f"optim.deepstack_lr: missing beside optim.merger_lr {optim.merger_lr:g}, which is for the main merger "
            "alone; give both"
        )
    owners = {"vision_lr": VISION_GROUPS, "merger_lr": ("merger",), "deepstack_lr": ("deepstack",)}
    for field, groups in owners.items():
        if getattr(optim, field) is not None and not trained_groups & set(groups):
            raise ValueError(f"optim.{field}: set, but tune.targets reaches no {' or '.join(groups)}; leave it out")


def report_groups(model: nn.Module, recipe: Recipe) -> list[GroupReport]:
    """Count tensors and parameters by group, in the order of GROUPS; groups that hold nothing are left out."""
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(group_of(name), []).append(parameter)
    reports = []
    for group in GROUPS:
        parameters = members.get(group, [])
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if parameters:
            reports.append(
                GroupReport(
                    group=group,
                    num_tensors=len(parameters),
                    num_parameters=sum(global_shape(parameter).numel() for parameter in parameters),
                    num_trained_tensors=len(trained),
                    num_trained_parameters=sum(global_shape(parameter).numel() for parameter in trained),
                    lr=recipe.optim.lr_of(group) if trained else 0.0,
                )
            )
    return reports


class GradientCheck:
    """Checks once, at the start, that exactly the parameters meant to train get gradients.

    The first step decides. Where it held no image, the vision side cannot have been reached: the text side is judged
    alone, and the whole at the first step with an image.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._touched: set[str] = set()
        self._text_judged = self._done = False

    def after_step(
        self, step: int, touched: set[str], *, with_labels: bool, with_media: bool, ranks: Ranks
    ) -> str | None:
        """Judge the names that backward touched on this rank, together with those of all others.

        with_labels, with_media: whether the packs of any rank held some. Returns what to tell the user, if anything.
        Raises RuntimeError that names the tensors at fault. Every rank must call it.
        """
        if self._done or not with_labels or (self._text_judged and not with_media):
            return None
        # The optimizer has taken the gradients of what trains: one that is still there belongs to something frozen.
        left_over = {name for name, parameter in self._model.named_parameters() if parameter.grad is not None}
        self._touched.update(name for names in ranks.gather(sorted(touched | left_over)) for name in names)
        self._text_judged, self._done = True, with_media
        wanted = self._trained if with_media else {n for n in self._trained if group_of(n) not in SEEN_WITH_MEDIA}
        missing, unexpected = sorted(wanted - self._touched), sorted(self._touched - self._trained)
        faults = []
        if missing:
            faults.append(f"{len(missing)} tensors that should train got no gradient: {', '.join(missing[:5])}")
        if unexpected:
            faults.append(f"{len(unexpected)} frozen tensors got one: {', '.join(unexpected[:5])}")
        if faults:
            raise RuntimeError(
                f"gradient check, step {step}: {'; '.join(faults)}; a fault of the model code, please report it"
            )
        kind = "trained tensors" if with_media else "trained text tensors (no image yet)"
        return f"gradient check, step {step}: all {len(wanted)} {kind} got a gradient, nothing else did"
