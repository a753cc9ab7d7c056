import os
import time

import pytest
import torch

from tests.helpers import marks, oracles
from tests.helpers.ranks import RankFailure, run_ranks


def _own_rank(rank: int, world_size: int, offset: int) -> tuple[int, int, str]:
    return rank + offset, world_size, os.environ["RANK"]


def test_results_come_in_order_of_rank():
    assert run_ranks(_own_rank, 2, 10) == [(10, 2, "0"), (11, 2, "1")]


def _fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("the reason")
    torch.distributed.barrier()


def test_the_rank_that_fails_first_is_reported():
    with pytest.raises(RankFailure, match=r"(?s)rank 1 failed:.*_fail_on_one.*KeyError: 'the reason'"):
        run_ranks(_fail_on_one, 2)


def _die(rank: int, world_size: int) -> None:
    os._exit(3)


def test_a_rank_that_dies_is_reported():
    with pytest.raises(RankFailure, match="rank 0 died without a word, exit code 3"):
        run_ranks(_die, 1)


def _hang_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(9000)


def test_a_rank_that_hangs_is_stopped_and_its_stack_shown():
    with pytest.raises(RankFailure, match=r"(?s)not done after 6 seconds.*rank 1 was at.*_hang_on_one"):
        run_ranks(_hang_on_one, 2, timeout=6)


def test_an_unmarked_test_that_starts_a_process_fails():
    os.system("true")
    with pytest.raises(AssertionError, match=r"that_starts_a_process_fails starts a process .*; mark it `process`"):
        marks.check()  # as after every test


def test_marks_follow_what_a_test_names():
    assert marks.marks_of(test_results_come_in_order_of_rank) == {"ranks"}
    assert marks.marks_of(_own_rank) == set()


def test_pictures_and_conversations_are_the_same_on_every_call():
    first = oracles.sample_images()
    oracles.draw_images.cache_clear()
    second = oracles.sample_images()
    assert all(image.tobytes() == second[name].tobytes() for name, image in first.items())
    assert {image.mode for image in first.values()} == {"RGB", "L", "1", "P", "RGBA", "LA"}
    counts = {
        name: len(list(oracles.images_of(sample["messages"]))) for name, sample in oracles.conversations().items()
    }
    many = {"several_sizes": 3, "many_turns": 3, "modes": 4}
    assert counts == {"one_image": 1, "text_only": 0, "system": 1, "extreme_aspect": 1, **many}


def test_random_weights_hide_no_mistake():
    model, again = (torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)) for _ in range(2))
    oracles.randomise(model, seed=1)
    oracles.randomise(again, seed=1)
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        assert parameter.std() > 0.01, name
