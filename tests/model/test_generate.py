"""Greedy generation against `transformers.generate`, and several prompts side by side against each alone."""

from typing import Any

import pytest
import torch

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.model.generate import generate_greedy
from tests.helpers import oracles

NEW_TOKENS = 12
KINDS = ["one_image", "text_only", "many_turns"]


@pytest.fixture
def pair(oracle_folder, ours) -> tuple[Any, Any]:
    """Our model and the stock one, both with a tenth of the embedding.

    What the layers add then outweighs the last token, which a random model with a tied head would repeat for ever: a
    wrong cache or position would not show.
    """
    stock = oracles.oracle(oracle_folder)
    with torch.no_grad():
        for embedding in (ours.language_model.model.embed_tokens, stock.model.language_model.embed_tokens):
            embedding.weight.mul_(0.1)
    return ours, stock


def prompts_of(collate, kinds: list[str]) -> PackedBatch:
    questions = [{"messages": oracles.conversations()[kind]["messages"][:-1]} for kind in kinds]
    return collate.pack([collate.encode(question) for question in questions])


def answer_of_transformers(stock, prompt: PackedBatch, stop_id: int) -> list[int]:
    """The ids that the stock model adds to one prompt, without the one that ends it."""
    inputs = {"input_ids": prompt.input_ids[None], "mm_token_type_ids": prompt.visual_pos_mask[None].int()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if prompt.num_patches:
        pixels = (prompt.pixel_values.float() - 127.5) / 127.5
        both_frames = pixels.view(-1, 3, 1, 256).expand(-1, -1, 2, -1)
        inputs |= {"pixel_values": both_frames.reshape(-1, 1536), "image_grid_thw": prompt.grid_thw}
    made = stock.generate(
        **inputs, max_new_tokens=NEW_TOKENS, eos_token_id=stop_id, pad_token_id=0,
        do_sample=False, temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    answer = made[0, prompt.num_tokens :].tolist()
    return answer[:-1] if answer[-1] == stop_id else answer


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(pair, collate, kind):
    ours, stock = pair
    prompt = collate.prompt(oracles.conversations()[kind]["messages"][:-1])
    unused = ours.arch.text.vocab_size - 1  # a row of the embedding that no text has
    (mine,) = generate_greedy(ours, prompt, max_new_tokens=NEW_TOKENS, stop_ids={unused})
    assert len(mine) == NEW_TOKENS
    assert len(set(mine)) > 2
    assert mine == answer_of_transformers(stock, prompt, unused)
    stop = max(set(mine), key=mine.index)  # the last new one
    (stopped,) = generate_greedy(ours, prompt, max_new_tokens=NEW_TOKENS, stop_ids={stop, unused})
    assert stopped == mine[: mine.index(stop)] == answer_of_transformers(stock, prompt, stop)


def test_prompts_side_by_side_equal_each_alone(pair, collate):
    ours, _ = pair
    pack = prompts_of(collate, [*KINDS, "one_image"])
    alone = [
        generate_greedy(ours, prompts_of(collate, [kind]), max_new_tokens=NEW_TOKENS, stop_ids=set())[0]
        for kind in KINDS
    ]
    together = generate_greedy(ours, pack, max_new_tokens=NEW_TOKENS, stop_ids=set())
    assert together == [*alone, alone[0]]
    # One that stops early leaves the others as they were.
    stop = alone[0][0]
    stopped = generate_greedy(ours, pack, max_new_tokens=NEW_TOKENS, stop_ids={stop})
    assert stopped == [answer[: answer.index(stop)] if stop in answer else answer for answer in together]
    assert stopped[0] == []


def test_no_more_tokens_than_allowed(small, small_collate):
    prompt = small_collate.prompt(oracles.conversations()["text_only"]["messages"][:-1])
    assert [len(answer) for answer in generate_greedy(small, prompt, max_new_tokens=1, stop_ids=set())] == [1]


def test_generation_leaves_the_model_trainable(small, small_collate):
    batch = small_collate([oracles.conversations()["one_image"]])
    before, _ = small(batch)
    generate_greedy(small, batch, max_new_tokens=2, stop_ids=set())
    after, _ = small(batch)
    after.backward()
    assert torch.equal(before, after)
