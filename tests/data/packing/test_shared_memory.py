"""Packs through shared memory: the same bits, one file descriptor each, whatever is in them."""

from dataclasses import fields

import pytest
import torch

from qwen3vl_train.batch import PackedBatch, Segments, VisionIndex
from qwen3vl_train.data.packing.shared_memory import SharedMemoryPack
from qwen3vl_train.data.packing.workers import from_worker, in_workers
from tests.helpers import oracles
from tests.helpers.messages import message_of


@pytest.fixture(scope="module")
def packs(collate):
    """One pack with pictures and weights, one of text alone."""
    image = oracles.sample_images()["wide"]
    asked = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}
    answer = {"role": "assistant", "content": "That.", "loss_weight": 0.5}
    seen = {"messages": [asked, answer]}
    read = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    return [collate([seen, read, seen]), collate([read])]


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other)
    elif isinstance(one, PackedBatch | Segments | VisionIndex):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    else:
        assert one == other


def test_a_pack_from_a_worker_holds_one_block_of_shared_memory(packs):
    """And so one file descriptor: torch opens one for each storage that comes from another process."""
    results = in_workers(SharedMemoryPack.from_pack, packs * 3, 2)
    for number, shared in enumerate(results):
        pack = shared.unpack()
        assert_same(pack, packs[number % len(packs)])
        storages: set[int] = set()
        pack._apply(lambda tensor, seen=storages: seen.add(tensor.untyped_storage().data_ptr()) or tensor)
        assert storages == {shared.block.untyped_storage().data_ptr()}
        assert shared.block.is_shared()


def refuse(number):
    if number == 3:
        raise ValueError("row 3: is odd; make it even")
    return -number


def count_down(number):
    while number:
        yield number
        number -= 1
    raise ValueError("nothing is left; start higher")


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_faults_as_they_were_raised(workers):
    assert list(in_workers(refuse, iter([5, 1, 4, 2]), workers)) == [-5, -1, -4, -2]
    results = in_workers(refuse, range(9), workers)
    assert [next(results) for _ in range(3)] == [0, -1, -2]
    assert message_of(ValueError, next, results) == "row 3: is odd; make it even"


@pytest.mark.parametrize("in_process", [True, False])
def test_a_stream_from_a_worker_ends_with_its_fault(in_process):
    results = from_worker(count_down, 3, in_process=in_process)
    assert [next(results) for _ in range(3)] == [3, 2, 1]
    assert message_of(ValueError, next, results) == "nothing is left; start higher"


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_leave_the_random_stream_of_torch_alone(workers):
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    list(in_workers(refuse, [1, 2], workers))
    list(zip(range(2), from_worker(count_down, 3, in_process=not workers), strict=False))
    assert torch.equal(torch.rand(2), wanted)
