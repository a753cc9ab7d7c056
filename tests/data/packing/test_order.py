"""Rows in the order of their files, and where an epoch ends."""

import pytest

from qwen3vl_train.data.packing.plan import PackLimits
from tests.helpers import loaders
from tests.helpers.loaders import NUM_ROWS, contents_of, make_loader, names_of


@pytest.mark.parametrize("kind", loaders.KINDS)
def test_rows_keep_the_order_of_their_files(folder, collate, kind):
    options = {"num_steps": 12, "num_epochs": None}
    steps = list(make_loader(kind, folder, collate, shuffle=False, **options))
    names = names_of(steps)
    of_an_epoch = [f"{file}:{row}" for file, count in NUM_ROWS.items() for row in range(1, count + 1)]
    if kind == "indexed":  # one file after the other
        assert names == (of_an_epoch * 3)[: len(names)]
    else:  # the streams at their paces, each in its order
        first = names[: len(of_an_epoch)]
        for file in NUM_ROWS:
            assert [name for name in first if name.startswith(file)] == [n for n in of_an_epoch if n.startswith(file)]
    assert len(names) > len(of_an_epoch)
    shuffled = list(make_loader(kind, folder, collate, **options))
    assert names_of(shuffled)[:20] != names[:20]


@pytest.mark.parametrize("kind", loaders.KINDS)
def test_packs_in_order_keep_within_all_limits(folder, collate, kind):
    limits = PackLimits(loaders.MAX_TOKENS, patches=64, sequences=4)
    for step in make_loader(kind, folder, collate, shuffle=False, limits=limits, num_epochs=1):
        for pack in step.packs:
            assert pack.num_tokens <= limits.tokens
            assert pack.num_patches <= 64
            assert len(pack.sample_ids) <= 4


@pytest.mark.parametrize("kind", loaders.KINDS)
def test_rows_in_order_resume_exactly(folder, collate, kind):
    straight = list(make_loader(kind, folder, collate, shuffle=False))
    for stop in (0, 2, len(straight) - 2):
        resumed = make_loader(kind, folder, collate, shuffle=False)
        resumed.load_state_dict(straight[stop].state)
        assert contents_of(resumed) == contents_of(straight[stop + 1 :])


def test_a_position_of_shuffled_rows_is_not_taken_for_one_in_order(folder, collate):
    state = next(iter(make_loader("indexed", folder, collate))).state
    with pytest.raises(ValueError, match=r"^resume: shuffle \(None then, False now\) changed since the checkpoint"):
        make_loader("indexed", folder, collate, shuffle=False).load_state_dict(state)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", loaders.KINDS)
def test_the_last_step_of_an_epoch_says_so(folder, collate, kind, shuffle):
    for packs_per_step in (1, 5):  # with one, no step is short
        steps = list(make_loader(kind, folder, collate, shuffle=shuffle, packs_per_step=packs_per_step))
        epochs = [step.epoch for step in steps]
        last = [step != following for step, following in zip(epochs, [*epochs[1:], 2], strict=True)]
        assert [step.ends_epoch for step in steps] == last
        assert sum(last) == 2


@pytest.mark.parametrize(("num_epochs", "expected"), [(0.5, 0.5), (1.5, 1.5), (0.001, 0)])
def test_a_fraction_of_an_epoch_ends_at_the_nearest_step(folder, collate, num_epochs, expected):
    whole = list(make_loader("indexed", folder, collate, num_epochs=2))
    length = sum(step.epoch == 0 for step in whole)
    of_second = sum(step.epoch == 1 for step in whole)
    steps = max(1, round(length * min(1, expected)) + round(of_second * max(0, expected - 1)))
    loader = make_loader("indexed", folder, collate, num_epochs=num_epochs)
    done = list(loader)
    assert loader.num_steps == len(done) == steps
    assert contents_of(done)[0][1] == contents_of(whole)[0][1]
    resumed = make_loader("indexed", folder, collate, num_epochs=num_epochs)
    resumed.load_state_dict(done[0].state)
    assert contents_of(resumed) == contents_of(done[1:])


def test_a_stream_has_no_fraction_of_an_epoch(folder, collate):
    with pytest.raises(ValueError, match=r"num_epochs is 0\.5 .* a stream does not say how long an epoch is"):
        make_loader("streamed", folder, collate, num_epochs=0.5)
