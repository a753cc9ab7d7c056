from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.data import ragged
from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.data.packing.plan import (
    CostModel,
    FamilyCosts,
    PackLimits,
    PlanHash,
    arrange,
    plan_figures,
    plan_packs,
    random_stream,
    share,
)
from tests.helpers.messages import message_of

SAMPLES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 50)), min_size=1, max_size=150)
LIMITS = st.builds(PackLimits, st.just(100), st.none() | st.integers(50, 90), st.none() | st.integers(1, 6))


def columns(samples):
    tokens, patches = np.array(samples).T
    return tokens, patches, CostModel().work(tokens, patches, patches * patches)


@settings(max_examples=200, deadline=None)
@given(samples=SAMPLES, limits=LIMITS)
def test_plan_holds_every_sample_once_within_every_limit(samples, limits):
    tokens, patches, work = columns(samples)
    costs = FamilyCosts.from_rows(tokens, patches, work)
    packs = plan_packs(costs, limits)
    assert Counter(index for pack in packs for index in pack) == Counter(range(len(samples)))
    for pack in packs:
        assert pack == sorted(pack)
        assert tokens[pack].sum() <= 100
        assert limits.patches is None or patches[pack].sum() <= limits.patches
        assert limits.sequences is None or len(pack) <= limits.sequences
    assert plan_packs(costs, limits) == packs


def test_best_fit_by_hand():
    tokens = np.array([50, 70, 30, 20, 40, 60, 30])
    costs = FamilyCosts.from_rows(tokens, np.zeros_like(tokens), tokens)
    # 70, 60 and 50 open packs; 40 fills up 60, the first 30 fills up 70, the second 30 and 20 fill up 50.
    assert sorted(plan_packs(costs, PackLimits(100))) == [[0, 3, 6], [1, 2], [4, 5]]
    # With room for two, nothing goes to 50 and the second 30.
    assert sorted(map(len, plan_packs(costs, PackLimits(100, sequences=2)))) == [1, 2, 2, 2]
    # A sample of many patches and few tokens is not put where the patches no longer fit.
    few, many = np.array([50, 50, 50, 50]), np.array([30, 30, 0, 0])
    packs = plan_packs(FamilyCosts.from_rows(few, many, few), PackLimits(100, patches=40))
    assert packs in ([[0, 2], [1, 3]], [[0, 3], [1, 2]])


def test_family_of_several_sequences_lies_in_one_pack():
    tokens = np.array([60, 40, 40])
    costs = FamilyCosts.from_rows(tokens, np.zeros_like(tokens), tokens)._replace(num_sequences=np.array([2, 1, 2]))
    assert sorted(plan_packs(costs, PackLimits(100))) == [[0, 1], [2]]
    assert sorted(plan_packs(costs, PackLimits(100, sequences=3))) == [[0, 1], [2]]
    assert sorted(plan_packs(costs, PackLimits(100, sequences=2))) == [[0], [1], [2]]


def test_pack_left_nearly_empty_is_topped_up():
    tokens = np.array([50] * 10 + [2] * 60)  # best fit: five packs of 110, one of 70
    packs = plan_packs(FamilyCosts.from_rows(tokens, np.zeros_like(tokens), tokens), PackLimits(110))
    loads = [int(tokens[pack].sum()) for pack in packs]
    assert sorted(loads) == [100, 104, 104, 104, 104, 104]


@pytest.mark.parametrize(("tokens", "patches"), [(0, 0), (101, 4), (5, 44)])
def test_samples_that_cannot_be_packed_are_named(tokens, patches):
    costs = FamilyCosts.from_rows(np.array([5, tokens]), np.array([0, patches]), np.array([1, 1]))
    assert message_of(ValueError, plan_packs, costs, PackLimits(100, patches=40)) == (
        f"plan: sample 1 has {tokens} tokens and {patches} patches, a pack takes 1 to 100 tokens and 40 patches; "
        "remove it"
    )


@settings(max_examples=200, deadline=None)
@given(
    work=st.lists(st.integers(1, 1000), max_size=80), per_step=st.integers(1, 9), carry_over=st.integers(0, 8),
    seed=st.integers(0, 2**40),
)  # fmt: skip
def test_arranged_packs_of_a_step_are_neighbours_in_work(work, per_step, carry_over, seed):
    carry_over = min(carry_over, per_step - 1)
    order = arrange(work, packs_per_step=per_step, carry_over=carry_over, seed=(seed, 1))
    assert sorted(order) == list(range(len(work)))
    assert arrange(work, packs_per_step=per_step, carry_over=carry_over, seed=(seed, 1)) == order
    full = order[carry_over : carry_over + (max(0, len(work) - carry_over)) // per_step * per_step]
    by_work = sorted(work, reverse=True)
    for start in range(0, len(full), per_step):
        of_step = sorted((work[index] for index in full[start : start + per_step]), reverse=True)
        # Neighbours but for the few packs of middling work that go to steps of two windows.
        between = [value for value in by_work if of_step[-1] < value < of_step[0]]
        assert len(between) <= per_step + carry_over + per_step
    singles = [work[index] for index in order[:carry_over] + order[carry_over + len(full) :]]
    if singles and full:
        rank_of = [by_work.index(value) for value in (min(singles), max(singles))]
        assert rank_of[0] <= (len(work) + len(singles)) / 2 + 1


def test_another_seed_gives_another_order_of_the_same_steps():
    work = random_stream(0).randint(1, 1000, 64).tolist()
    one, two = (arrange(work, packs_per_step=8, carry_over=0, seed=(seed,)) for seed in (1, 2))
    assert one != two
    steps_one, steps_two = ({tuple(o[start : start + 8]) for start in range(0, 64, 8)} for o in (one, two))
    assert steps_one == steps_two


@pytest.mark.parametrize(("window", "least"), [(10_000, 0.985), (2048, 0.97)])
@pytest.mark.parametrize("limits", [PackLimits(8192), PackLimits(8192, patches=32768, sequences=64)])
def test_packs_of_ragged_rows_are_full_and_ranks_even(window, least, limits):
    tokens, patches, pairs = ragged(10_000)
    work = CostModel().work(tokens, patches, pairs)
    filled: list[int] = []
    works: list[int] = []
    for start in range(0, 10_000, window):
        rows = slice(start, start + window)
        packs = plan_packs(FamilyCosts.from_rows(tokens[rows], patches[rows], work[rows]), limits)
        loads = [int(work[rows][pack].sum()) for pack in packs]
        for number in arrange(loads, packs_per_step=8, carry_over=-len(works) % 8, seed=(0, start)):
            filled.append(int(tokens[rows][packs[number]].sum()))
            works.append(loads[number])
    figures = plan_figures(filled, works, max_tokens=8192, packs_per_step=8, world_size=8)
    assert figures.fill >= least
    assert 1 <= figures.balance <= 1.05


def test_plan_figures_by_hand():
    # Two whole steps of two ranks: loads 3 and 1, then 2 and 2; the last, short step does not count for balance.
    figures = plan_figures([8, 4, 6, 6, 4], [3, 1, 2, 2, 9], max_tokens=8, packs_per_step=2, world_size=2)
    assert figures == (28 / 40, 5 / 4, 1.5)
    assert plan_figures([4], [1], max_tokens=8, packs_per_step=2, world_size=2) == (0.5, 1.0, 1.0)


def test_random_stream_is_frozen():
    # A resumed run depends on these numbers: they may never change.
    assert random_stream((1, 2, 3)).permutation(8).tolist() == [0, 4, 5, 7, 2, 3, 1, 6]
    assert random_stream(-1).permutation(8).tolist() == random_stream(2**32 - 1).permutation(8).tolist()


@settings(max_examples=150, deadline=None)
@given(work=st.lists(st.integers(1, 10**6), max_size=40), world_size=st.integers(1, 9))
def test_shares_hold_every_pack_once_and_differ_by_one(work, world_size):
    shares = share(work, world_size)
    assert len(shares) == world_size
    assert sorted(number for numbers in shares for number in numbers) == list(range(len(work)))
    counts = [len(numbers) for numbers in shares]
    assert max(counts) - min(counts) <= 1
    assert all(numbers == sorted(numbers) for numbers in shares)


def test_shares_are_even():
    work = random_stream(0).randint(800, 1200, 64)
    loads = [work[numbers].sum() for numbers in share(work.tolist(), 8)]
    assert max(loads) / np.mean(loads) < 1.05
    assert share([1, 1, 5, 5], 2) in ([[0, 2], [1, 3]], [[1, 2], [0, 3]])


def test_work_grows_with_the_square_of_lengths_and_is_whole():
    model = CostModel()

    def work(tokens, patches, pairs):
        return int(model.work(np.array(tokens), np.array(patches), np.array(pairs)).sum())

    assert work([4000], [0], [0]) > work([2000, 2000], [0, 0], [0, 0]) > 4000
    assert work([10], [4096], [4096**2]) > work([10], [4096], [2 * 2048**2]) > work([10], [0], [0])
    assert model.work(np.array([3]), np.array([1]), np.array([1])).dtype == np.int64


def test_cost_ratios_of_a_model_by_hand(make_oracle):
    arch = Qwen3VLArch.from_pretrained(make_oracle(vision_depth=24, tie=True, dialect="published"))
    text, vision = arch.text, arch.vision
    attention = text.hidden_size * text.head_dim * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
    layer = attention + 3 * text.hidden_size * text.intermediate_size
    token = 3 * 2 * text.num_hidden_layers * layer
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    mergers = 4 * (4 * vision.hidden_size) * (4 * vision.hidden_size + text.hidden_size) / 4
    patch = 3 * 2 * (vision.patch_dim * vision.hidden_size + vision.depth * block + mergers)
    model = CostModel.from_arch(arch)
    assert model.token == 1.0
    assert model.patch == pytest.approx(patch / token)
    assert model.patch_pair == pytest.approx(3 * 4 * vision.hidden_size * vision.depth / token)
    pairs = 3 * 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    assert model.token_pair == pytest.approx(pairs / token)
    frozen = CostModel.from_arch(arch, text_passes=2, vision_passes=1)
    assert frozen.patch == pytest.approx(model.patch / 2)
    # Attention's own products always pay three passes where a gradient passes.
    assert frozen.token_pair == pytest.approx(model.token_pair * 3 / 2)


def test_plan_hash_follows_position_and_rows_exactly():
    plan_hash = PlanHash.from_plan({"epoch": 0, "done": 3}, [[1, 2], [3]])
    assert plan_hash == PlanHash.from_plan({"done": 3, "epoch": 0}, [[1, 2], [3]])
    moved = PlanHash.from_plan({"done": 4, "epoch": 0}, [[1, 2], [3]])
    assert (moved.position != plan_hash.position, moved.packs) == (True, plan_hash.packs)
    for rows in ([[1, 2, 3]], [[2, 1], [3]], [[3], [1, 2]], [[1, 2], [4]]):
        other = PlanHash.from_plan({"epoch": 0, "done": 3}, rows)
        assert other.position == plan_hash.position
        assert other.packs != plan_hash.packs
        assert other.combined() != plan_hash.combined()
    assert int(float(plan_hash.combined())) == plan_hash.combined() < 2**48
