"""States of both loaders, saved in the middle of an epoch: every remaining sample once on other ranks, with workers,
several weighted sources and packing; and on the same ranks the identical next pack. Every kind of file as a stream.
"""

import json
from collections import Counter
from itertools import islice

import pytest
import torch

from qwen3vl_train.config.fields import TrainSource
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.packing.index import LengthRule, build_index
from qwen3vl_train.data.packing.loader import TrainLoader
from qwen3vl_train.data.packing.mixture import InOrder, Part
from qwen3vl_train.data.packing.plan import PackLimits
from qwen3vl_train.data.packing.stream import StreamLoader
from qwen3vl_train.data.sources import JsonlSource, open_stream
from tests.helpers import row_files
from tests.helpers.stream_files import names_of, stream_loader, write_folder

WEIGHTS = (1.0, 2.5)


@pytest.fixture(scope="module")
def collator(tiny_folder):
    return MultimodalCollator.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def make(tmp_path_factory, collator):
    """A function: kind of loader, options -> a loader of two epochs: 70 rows of pictures once, 12 of text 2.5 times."""
    folder = write_folder(tmp_path_factory.mktemp("trips") / "rows")
    sources = [JsonlSource(folder / name, folder) for name in ("s.jsonl", "k.jsonl")]
    index = build_index(sources, collator, LengthRule(160))

    def loader(kind, **changes):
        options = {"packs_per_step": 6, **changes}
        if kind == "stream":
            return stream_loader(folder, collator, WEIGHTS, **options)
        options = {"limits": PackLimits(160), "seed": 5, "num_epochs": 2, "window": 40, **options}
        return TrainLoader(list(zip(sources, WEIGHTS, strict=True)), collator, index, **options)

    return loader


def read_back(state):
    return json.loads(json.dumps(state))


def on_ranks(make, kind, world_size, workers, state, num_steps):
    """Run so many steps on so many ranks from a state; returns them rank by rank. All ranks stand alike."""
    ranks = []
    for rank in range(world_size):
        train = make(kind, rank=rank, world_size=world_size, num_workers=workers)
        if state is not None:
            train.load_state_dict(read_back(state))
        ranks.append(list(islice(train, num_steps)))
    for of_step in zip(*ranks, strict=True):
        assert {json.dumps(step.state) for step in of_step} == {json.dumps(of_step[0].state)}
    return ranks


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["indexed", "stream"])
def test_one_rank_then_four_then_two_see_every_sample_of_the_epoch_once(make, kind, workers):
    straight = list(make(kind))
    epoch = [step for step in straight if step.epoch == 0]
    counts = Counter(names_of(epoch))
    assert {counts[f"s.jsonl:{row}"] for row in range(1, 71)} == {1}
    assert {counts[f"k.jsonl:{row}"] for row in range(1, 13)} == {2, 3}
    assert max(len(pack.sample_ids) for step in epoch for pack in step.packs) > 2
    assert len(epoch) >= 5

    seen: Counter[str] = Counter()
    state = None
    for world_size, num_steps in ((1, 2), (4, 2), (2, len(epoch) - 4)):
        ranks = on_ranks(make, kind, world_size, workers, state, num_steps)
        seen += Counter(name for steps in ranks for name in names_of(steps))
        state = ranks[0][-1].state
    assert seen == counts
    # The next epoch begins as it does for a run that never changed.
    (step,) = on_ranks(make, kind, 1, workers, state, 1)[0]
    assert [pack.sample_ids for pack in step.packs] == [pack.sample_ids for pack in straight[len(epoch)].packs]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["indexed", "stream"])
@pytest.mark.parametrize("world_size", [1, 4])
def test_the_same_ranks_go_on_with_the_identical_pack(make, kind, workers, world_size):
    straight = on_ranks(make, kind, world_size, 0, None, 8)
    for stop in (2, 4):
        resumed = on_ranks(make, kind, world_size, workers, straight[0][stop].state, 2)
        for rank in range(world_size):
            for step, wanted in zip(resumed[rank], straight[rank][stop + 1 : stop + 3], strict=True):
                assert (step.state, step.pack_numbers, step.mark) == (wanted.state, wanted.pack_numbers, wanted.mark)
                for pack, same in zip(step.packs, wanted.packs, strict=True):
                    assert pack.sample_ids == same.sample_ids
                    for field in ("input_ids", "labels", "positions", "pixel_values", "grid_thw"):
                        assert torch.equal(getattr(pack, field), getattr(same, field)), field


@pytest.mark.process
@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "b.jsonl.gz", "a.parquet", "a.tar", "b.tar.gz", "saved"])
def test_every_kind_of_file_streams_packs_and_resumes(tmp_path, collator, kind):
    path = row_files.write_all(tmp_path)[kind]

    def loader(**changes):
        part = Part(InOrder(open_stream(TrainSource(path=str(path), streaming=True))), 1.0)
        options = {"packs_per_step": 2, "limits": PackLimits(64), "seed": 0, "num_epochs": 2, "window": 5, **changes}
        return StreamLoader([part], collator, LengthRule(64), **options)

    straight = list(loader())
    wanted = Counter(f"{kind}:{row}" for row in range(1, row_files.NUM_ROWS + 1))
    for epoch in range(2):
        assert Counter(names_of([step for step in straight if step.epoch == epoch])) == wanted
    for stop, workers in ((0, 0), (1, 1), (3, 0)):
        again = loader(num_workers=workers)
        again.load_state_dict(read_back(straight[stop].state))
        rest = list(again)
        assert [step.mark for step in rest] == [step.mark for step in straight[stop + 1 :]]
        for step, same in zip(rest, straight[stop + 1 :], strict=True):
            for pack, wanted_pack in zip(step.packs, same.packs, strict=True):
                assert torch.equal(pack.input_ids, wanted_pack.input_ids)
                assert torch.equal(pack.pixel_values, wanted_pack.pixel_values)
