import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from qwen3vl_train.batch import IGNORE_LABEL, PackedBatch
from qwen3vl_train.dist.rendezvous import start_ranks
from qwen3vl_train.modules import group_of
from qwen3vl_train.tracking.metrics import StepTally
from qwen3vl_train.train.step import NonFiniteError
from tests.helpers import small_runs
from tests.helpers.messages import message_of
from tests.helpers.ranks import run_ranks
from tests.helpers.small_runs import ONE_IMAGE, TEXT_ONLY, TWO_IMAGES, Trainee


@pytest.fixture(scope="module")
def pack(tiny_folder: Path, task: Path):
    return small_runs.packer(tiny_folder, task)


def test_the_loss_is_the_mean_over_the_labels_of_all_packs(tiny_folder, pack):
    packs = [pack(TEXT_ONLY), pack(TWO_IMAGES, ONE_IMAGE)]
    trainee = Trainee(tiny_folder)
    sums, counts = [], []
    for batch in packs:
        rows = batch.labels != IGNORE_LABEL
        sums.append(F.cross_entropy(trainee.model.logits(batch)[rows], batch.labels[rows], reduction="sum").item())
        counts.append(int(rows.sum()))
    done = trainee.step(packs)
    assert done.loss == pytest.approx(sum(sums) / sum(counts), abs=1e-5)
    # The mean of the packs' means is another number: the test could not distinguish them if the packs were equal.
    assert abs((sums[0] / counts[0] + sums[1] / counts[1]) / 2 - done.loss) > 0.01
    assert (done.label_tokens, done.tokens) == (sum(counts), sum(batch.num_tokens for batch in packs))
    assert (done.visual_tokens, done.patches) == (4 + 4 + 12, 16 + 16 + 48)
    assert done.flops > 0


def test_packs_accumulate_to_one_big_pack(tiny_folder, pack):
    rows = [TEXT_ONLY, TWO_IMAGES, 6, ONE_IMAGE]
    one, two = Trainee(tiny_folder), Trainee(tiny_folder)
    of_one = one.step([pack(*rows)])
    of_parts = two.step([pack(*rows[:1]), pack(*rows[1:2]), pack(*rows[2:])])
    assert of_parts.loss == pytest.approx(of_one.loss, abs=1e-5)
    assert of_parts.grad_norms == pytest.approx(of_one.grad_norms, rel=1e-5)
    got, expected = two.weights(), one.weights()
    # Float32 sums in another order; a step of Adam is up to lr = 1e-3, so a wrong gradient would show a hundredfold.
    assert max((got[name] - expected[name]).abs().max().item() for name in expected) < 1e-5


def test_clipping_scales_all_gradients_to_the_given_norm(tiny_folder, pack):
    trainee = Trainee(tiny_folder)
    done = trainee.step([pack(ONE_IMAGE)], max_grad_norm=0.5)
    assert done.grad_norms["all"] > 1  # as measured, before clipping
    moments = [tensor for name, tensor in trainee.optimizer.state_tensors().items() if name.startswith("exp_avg/")]
    clipped = math.sqrt(sum((moment.double() / 0.1).square().sum().item() for moment in moments))  # 1 - beta1 = 0.1
    assert clipped == pytest.approx(0.5, rel=1e-4)
    groups = [norm for group, norm in done.grad_norms.items() if group != "all"]
    assert done.grad_norms["all"] == pytest.approx(math.sqrt(sum(norm**2 for norm in groups)))


@pytest.mark.parametrize(
    "train", [["merger"], ["deepstack"], ["vision"], ["text_attn"], ["text_mlp"], ["text_embed", "lm_head"]]
)
def test_only_the_named_groups_change(tiny_folder, pack, train):
    trainee = Trainee(tiny_folder, tune={"method": "full", "train": train})
    before = trainee.weights()
    trainee.step([pack(ONE_IMAGE)])
    moved = {name for name, weight in trainee.weights().items() if not torch.equal(weight, before[name])}
    groups = {"vision_attn", "vision_mlp", "vision_embed"} if train == ["vision"] else set(train)
    assert moved == {name for name in before if group_of(name) in groups}


def test_lora_changes_adapters_alone(tiny_folder, pack):
    trainee = Trainee(tiny_folder, tune=small_runs.LORA)
    before = trainee.weights()
    for step in range(2):  # A moves from the second step on: its gradient passes through B, which starts at zero
        trainee.step([pack(ONE_IMAGE)], step=step)
    moved = {name for name, weight in trainee.weights().items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if ".lora_" in name}


def test_a_text_pack_where_only_vision_trains_changes_nothing(tiny_folder, pack):
    trainee = Trainee(tiny_folder, tune={"method": "full", "train": ["merger"]}, optim__weight_decay=0.0)
    before = trainee.weights()
    assert trainee.step([pack(TEXT_ONLY)]).grad_norms["all"] == 0
    assert all(torch.equal(weight, before[name]) for name, weight in trainee.weights().items())


def test_weights_that_no_pack_uses_get_a_zero_gradient(tiny_folder, pack):
    trainee = Trainee(tiny_folder)
    trainee.step([pack(TEXT_ONLY)])
    state = trainee.optimizer.state_tensors()
    vision = [name for name in state if name.startswith("exp_avg/visual.")]
    assert len(vision) == 75
    assert not any(state[name].any() for name in vision)
    assert not any(name.startswith("visual.") for name in trainee.optimizer.params_with_grad)


def test_dropout_depends_on_seed_step_and_pack_number_alone(tiny_folder, pack):
    def loss(packs: list[PackedBatch], numbers: list[int], **options) -> float:
        # The first step makes B other than zero, so that dropout shows in the second.
        trainee = Trainee(tiny_folder, tune=small_runs.LORA)
        trainee.step([pack(ONE_IMAGE)], lr_factor=20.0)
        return trainee.step(packs, numbers, **{"step": 1, **options}).loss

    first, second = pack(ONE_IMAGE), pack(TWO_IMAGES)
    base = loss([first, second], [0, 1])
    assert loss([second, first], [1, 0]) == base
    assert loss([first, second], [1, 0]) != base
    assert loss([first, second], [0, 1], step=2) != base
    assert loss([first, second], [0, 1], seed=1) != base


def _poison(trainee: Trainee) -> None:
    """Whatever passes through the vision tower becomes NaN, with weights that are finite."""
    trainee.model.visual.vision.merger.linear_fc2.register_forward_hook(lambda _, arguments, out: out * math.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_loss_stops_before_any_weight_changes(tiny_folder, pack, dtype):
    trainee = Trainee(tiny_folder, dtype=dtype)
    _poison(trainee)
    before = trainee.weights()
    masters = {name: tensor.clone() for name, tensor in trainee.optimizer.state_tensors().items()}
    message = message_of(NonFiniteError, trainee.step, [pack(TEXT_ONLY), pack(ONE_IMAGE, 6)], step=41)
    assert message.startswith("step 42: loss nan, gradient norm nan (not finite in ")
    assert message.endswith(
        "; no weight was changed. Samples: train.jsonl:1, train.jsonl:7. "
        "Check these rows, lower optim.lr, or start again from the last checkpoint"
    )
    after = trainee.weights()
    assert all(after[name].equal(before[name]) for name in before)
    state = trainee.optimizer.state_tensors()
    assert state.keys() == masters.keys()
    assert all(torch.equal(state[name], masters[name]) for name in state)


def test_a_non_finite_gradient_names_its_group(tiny_folder, pack):
    trainee = Trainee(tiny_folder)
    trainee.model.visual.vision.merger.linear_fc1.weight.register_hook(lambda gradient: gradient * math.inf)
    before = trainee.weights()
    message = message_of(NonFiniteError, trainee.step, [pack(TEXT_ONLY), pack(ONE_IMAGE)])
    assert re.match(r"step 1: loss \d\.\d+, gradient norm (nan|inf) \(not finite in merger\)", message)
    assert "Samples: train.jsonl:5, train.jsonl:1. " in message
    assert all(torch.equal(weight, before[name]) for name, weight in trainee.weights().items())


def test_many_samples_are_counted_not_listed(tiny_folder, pack):
    trainee = Trainee(tiny_folder)
    _poison(trainee)
    batch = replace(pack(ONE_IMAGE), sample_ids=tuple(f"row{number}" for number in range(25)))
    with pytest.raises(NonFiniteError, match=r"row19 and 5 more\. Check"):
        trainee.step([batch])


def _step_on_ranks(rank: int, world_size: int, folder: Path, shares: list[list[PackedBatch]]) -> str:
    trainee = Trainee(folder)
    _poison(trainee)
    before = trainee.weights()
    message = message_of(NonFiniteError, trainee.step, shares[rank], [rank], ranks=start_ranks())
    assert all(weight.equal(before[name]) for name, weight in trainee.weights().items())
    return message


def test_all_ranks_stop_for_a_non_finite_loss_of_one(tiny_folder, pack):
    messages = run_ranks(_step_on_ranks, 2, tiny_folder, [[pack(TEXT_ONLY)], [pack(ONE_IMAGE)]])
    assert messages[0] == messages[1]
    assert "Samples: train.jsonl:1. " in messages[0]


def _share_a_step(rank: int, world_size: int, folder: Path, packs: list[PackedBatch]) -> StepTally:
    """Rank 0 takes all packs."""
    return Trainee(folder).step([] if rank else packs, ranks=start_ranks())


def test_a_rank_without_packs_takes_part_in_the_step(tiny_folder, pack):
    packs = [pack(ONE_IMAGE), pack(TEXT_ONLY)]
    alone = Trainee(tiny_folder).step(packs)
    for of_rank in run_ranks(_share_a_step, 2, tiny_folder, packs):
        assert of_rank == alone
