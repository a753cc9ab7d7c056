import json
from collections import Counter
from itertools import islice

import pytest

from qwen3vl_train.data.packing.mixture import InOrder, Mixture, Numbered, Part
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources import JsonlSource
from qwen3vl_train.data.sources.streams import FileStream


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """A function: (name, rows, num_rows) -> a stream of so many rows; and one of the same rows, known by number."""
    folder = tmp_path_factory.mktemp("mixture")

    def write(name, num_rows):
        answer = {"role": "assistant", "content": "x"}
        rows = [[{"role": "user", "content": f"{name}{number}"}, answer] for number in range(num_rows)]
        file = folder / f"{name}-{num_rows}.jsonl"
        file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
        return str(file)

    def stream(name, num_rows, known=None):
        path = write(name, num_rows)
        return InOrder(FileStream(path, [path], None, RowRules()), known)

    return stream, lambda name, num_rows: Numbered(JsonlSource(write(name, num_rows)))


def texts(mixture, cursor):
    return [row.sample.messages[0].text for _, row in mixture.rows(cursor)]


def test_an_epoch_holds_every_row_as_often_as_its_weight_says(readers):
    stream, shuffled = readers
    mixture = Mixture([Part(stream("a", 20), 2.0), Part(shuffled("b", 200), 0.25), Part(shuffled("c", 7), 1.0)], seed=4)
    epochs = [texts(mixture, mixture.start(epoch)) for epoch in range(2)]
    drawn = []
    for rows in epochs:
        counts = Counter(rows)
        chosen = {row: counts.pop(row) for row in list(counts) if row[0] == "b"}
        assert counts == {f"a{row}": 2 for row in range(20)} | {f"c{row}": 1 for row in range(7)}
        assert set(chosen.values()) == {1}
        assert 30 <= len(chosen) <= 70  # 50 +- 20 is more than three standard deviations
        drawn.append(set(chosen))
        assert [row for row in rows if row[0] == "a"] == [f"a{row}" for row in range(20)] * 2
    assert drawn[0] != drawn[1]
    orders = [[row for row in rows if row[0] == "c"] for rows in epochs]
    assert orders[0] != orders[1]


def test_known_lengths_are_mixed_evenly_unknown_ones_by_weight(readers):
    stream, shuffled = readers
    known = Mixture([Part(stream("a", 90, 90), 1.0), Part(shuffled("b", 30), 1.0)], seed=0)
    rows = texts(known, known.start())
    for start in range(0, 120, 12):
        assert Counter(row[0] for row in rows[start : start + 12]) == {"a": 9, "b": 3}
    unknown = Mixture([Part(stream("a", 90), 2.0), Part(shuffled("b", 30), 1.0)], seed=0)
    rows = texts(unknown, unknown.start())
    assert Counter(row[0] for row in rows[:60]) == {"a": 40, "b": 20}
    assert {row[0] for row in rows[90:]} == {"a"}
    assert len(rows) == 210


@pytest.mark.parametrize("place", [0, 1, 17, 100, -2])
def test_a_mixture_resumes_after_any_row(readers, place):
    stream, shuffled = readers
    parts = [Part(stream("a", 40), 1.5), Part(shuffled("b", 30), 2.5), Part(stream("c", 40), 0.5)]
    mixture = Mixture(parts, seed=1)
    whole = list(mixture.rows(mixture.start(3)))
    place %= len(whole)
    cursor = json.loads(json.dumps(whole[place][0]))
    assert [row for _, row in Mixture(parts, seed=1).rows(cursor)] == [row for _, row in whole[place + 1 :]]


def test_faults_of_rows_keep_their_position(tmp_path):
    file = tmp_path / "a.jsonl"
    good = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]}'
    file.write_text(f"{good}\n{{\n{good}\n")
    for reader in (InOrder(FileStream(str(file), [str(file)], None, RowRules())), Numbered(JsonlSource(file))):
        mixture = Mixture([Part(reader, 1.0)], seed=0)
        rows = sorted(islice((row for _, row in mixture.rows(mixture.start())), 5), key=lambda row: row.row_number)
        assert [isinstance(row.sample, ValueError) for row in rows] == [False, True, False]
        assert [(row.file, row.row_number) for row in rows] == [(str(file), number) for number in (1, 2, 3)]
