"""Rows of a few tokens train as they would in a whole embedding, and no other row of it changes."""

import pytest
import torch
import torch.nn.functional as F

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.checkpoint.hf import load_qwen3_vl_model
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.model.lora import merge_lora
from qwen3vl_train.model.new_rows import modules_with_new_rows

NAMES = ("<|box_end|>", "<|box_start|>")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, make_oracle):
    return make_oracle(vision_depth=24, tie=request.param, dialect="published")


@pytest.fixture
def batch(folder) -> PackedBatch:
    """A pack that reads both tokens and has them as labels."""
    asked, answer = "Where? <|box_start|>", "<|box_start|>(1,2),(3,4)<|box_end|>"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return MultimodalCollator.from_pretrained(folder)([{"messages": messages}])


def _with_rows(folder, ids):
    """The model of a folder whose rows of these ids train alone, with the values of the table."""
    model = load_qwen3_vl_model(folder, dtype=torch.float32)
    model.requires_grad_(False)
    model.language_model.add_new_rows(ids)
    with torch.no_grad():
        for _, table in modules_with_new_rows(model):
            table.new_rows.copy_(table.weight[list(table.new_ids)])
    return model


def _ids(folder) -> list[int]:
    added = MultimodalCollator.from_pretrained(folder).tokenizer.added_tokens
    return [token for token, name in added.items() if name in NAMES]


def test_gradients_are_those_of_the_whole_tables(folder, batch):
    ids = _ids(folder)
    assert set(ids) <= set(batch.input_ids.tolist())
    whole, apart = load_qwen3_vl_model(folder, dtype=torch.float32), _with_rows(folder, ids[::-1])
    losses = [model(batch)[0] for model in (whole, apart)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    tables = dict(modules_with_new_rows(apart))
    tied = whole.arch.tie_word_embeddings
    assert list(tables) == ["language_model.model.embed_tokens", *([] if tied else ["language_model.lm_head"])]
    for name, table in tables.items():
        expected = whole.get_submodule(name).weight.grad[sorted(ids)]
        assert expected.any()
        torch.testing.assert_close(table.new_rows.grad, expected, atol=1e-5, rtol=1e-5)
    assert [name for name, p in apart.named_parameters() if p.grad is not None] == [f"{n}.new_rows" for n in tables]


def test_rows_replace_those_of_the_tables_and_can_be_merged(folder, batch):
    model, ids = _with_rows(folder, _ids(folder)), sorted(_ids(folder))
    before = model.language_model.model.embed_tokens.weight.clone()
    with torch.no_grad():
        for _, table in modules_with_new_rows(model):
            table.new_rows.add_(1.0)
    logits = model.logits(batch)
    weight = model.language_model.model.embed_tokens.weight
    assert torch.equal(weight, before)
    merge_lora(model)
    assert not list(modules_with_new_rows(model))
    assert not any(name.endswith("new_rows") for name, _ in model.named_parameters())
    torch.testing.assert_close(model.logits(batch), logits, atol=1e-5, rtol=0)
    changed = (weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == ids
    if model.arch.tie_word_embeddings:
        assert model.language_model.lm_head.weight is weight
        assert torch.equal(F.linear(model.hidden_states(batch), weight), model.logits(batch))
