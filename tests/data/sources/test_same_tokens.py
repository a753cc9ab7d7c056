"""The same rows in every type of file and every format give the same tokens, labels, positions and patches."""

import pytest
import torch

from qwen3vl_train.config.data_fields import TrainSource
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources import open_sources, open_stream
from tests.helpers.row_files import KINDS, NUM_ROWS, png, table, talk


@pytest.fixture(scope="module")
def reference(collate):
    """Encoded straight from messages, the format that other tests compare with transformers."""
    return [collate.encode({"messages": [
        {"role": "user", "content": [{"type": "image", "image": png(n)}, {"type": "text", "text": f"Nr {n}?"}]},
        {"role": "assistant", "content": "ü" * n + "."}]}) for n in range(NUM_ROWS)]  # fmt: skip


def assert_same(encoded, expected):
    assert (encoded.slices, encoded.grids) == (expected.slices, expected.grids)
    for name in ("input_ids", "label_rows", "label_ids", "label_weights", "positions", "patches"):
        assert torch.equal(getattr(encoded, name), getattr(expected, name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_file_types_give_the_same_tokens(files, kind, collate, reference):
    entry = TrainSource(path=str(files[kind]))
    (source,) = open_sources(entry)
    for row, (expected, streamed) in enumerate(zip(reference, open_stream(entry).rows(), strict=True)):
        assert_same(collate.encode(source.sample(row)), expected)
        assert_same(collate.encode(streamed.sample), expected)
        assert collate.cost(source.sample(row)).tokens == expected.input_ids.numel()


def row_formats(number: int) -> dict[str, dict]:
    """One row in every format, the image as bytes."""
    cell = table()[number]
    image, question, answer = cell["image"]["bytes"], cell["question"], cell["answer"]
    parts = [{"type": "image", "text": None}, {"type": "text", "text": question, "image": None}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    marked = [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]
    return {
        "columns": cell,
        "messages with images apart": {"messages": turns, "images": [image]},
        "messages with marks": {"messages": marked, "images": [{"bytes": image, "path": "x.png"}]},
        "messages of typed columns": {"messages": [
            {**turns[0], "content": [{**parts[0], "image": {"bytes": image, "path": None}}, parts[1]], "loss": None},
            {**turns[1], "tool_calls": None}], "tools": None},
        "llava": {"image": image, "conversations": talk(f"<image>\n{question}", answer), "id": "7"},
        "sharegpt with roles": {"image": [image], "conversations": marked},
    }  # fmt: skip


@pytest.mark.parametrize("row_format", list(row_formats(0)))
def test_row_formats_give_the_same_tokens(row_format, collate, reference):
    for number, expected in enumerate(reference):
        assert_same(collate.encode(RowRules().sample(row_formats(number)[row_format], "a:1")), expected)
