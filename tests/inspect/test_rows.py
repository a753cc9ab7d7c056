"""What a row says: its trained tokens, its sizes, what looks wrong in it."""

from dataclasses import replace

import pytest

from qwen3vl_train.data.rows.parse import parse_sample
from qwen3vl_train.inspect.boxes import BoxEvidence
from qwen3vl_train.inspect.rows import read_row
from tests.helpers.small_runs import picture, row


@pytest.fixture(scope="module")
def thinking(collate):
    return replace(collate, dialect="thinking")


def facts_of(raw, collate):
    sample = parse_sample(raw)
    return read_row(sample, collate.cost(sample).visual_tokens, collate)


def test_counts_the_tokens_that_encoding_labels(collate):
    image = picture(90, 70, 0)
    raw = row("What?", "Ein Würfel.", [image])
    raw["messages"] += [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "So.", "loss": False}]
    facts = facts_of(raw, collate)
    assert facts.label_tokens == collate.encode(raw).label_ids.numel()
    assert (facts.turns, facts.sizes, facts.videos) == (2, [(70, 90)], 0)


@pytest.mark.parametrize(
    ("question", "answer", "checks"),
    [
        ("plain", "text", set()),
        ("a <|video_pad|>", "x", {"special_token"}),
        ("a <|object_ref_start|> b", "x", {"added_token"}),
        ("a <|seg_1|> b", "x", {"unknown_token"}),
        ("a b", "<|fim_pad|>x <|im_end|> <|seg|>", {"added_token", "special_token", "unknown_token"}),
        ("a < | b | >", "x", set()),
        ("<video> what?", "x", {"media_mark"}),
        ("what?", "<image_2>", {"foreign_mark"}),
        ("what?", "<video_2>", {"media_mark"}),
        ("if a<imaginary> b", "x", set()),
        ("what?", "  \n", {"empty_answer"}),
        ("what?", "<think>\na\n</think>\n\nb", {"reasoning_on_instruct"}),
        ("no picture: [1, 2, 3, 4000]", "x", set()),
    ],
)
def test_failed_text_checks(collate, question, answer, checks):
    assert facts_of(row(question, answer), collate).failed_checks == checks


def test_added_tokens_are_counted_in_texts_alone(collate):
    raw = row("<|box_start|>a<|box_end|>, <|box_start|>b", "c")
    call = {"role": "assistant", "content": "d", "tool_calls": [{"name": "f", "arguments": {}}]}
    raw["messages"] += [{"role": "user", "content": "e"}, call]
    assert facts_of(raw, collate).added_tokens == {"<|box_end|>": 1, "<|box_start|>": 2}


def test_thinking_template_wants_reasoning(thinking):
    assert facts_of(row("a", "b"), thinking).failed_checks == {"no_reasoning"}
    assert facts_of(row("a", "<think>\nc\n</think>\n\nb"), thinking).failed_checks == set()
    two = row("a", "<think>\nc\n</think>\n\nb")
    two["messages"] += row("d", "<think>\ne\n</think>\n\nf")["messages"]
    assert facts_of(two, thinking).failed_checks == {"answers_left_out"}


@pytest.mark.parametrize(
    ("size", "checks"), [((160, 128), set()), ((480, 320), {"shrunk"}), ((12, 12), {"enlarged"}), ((64, 64), set())]
)
def test_image_sizes_far_from_the_limits(collate, size, checks):
    assert facts_of(row("What?", "That.", [picture(*size, 0)]), collate).failed_checks == checks


def test_boxes_are_judged_by_the_size_of_the_only_image(collate):
    small, large = picture(200, 100, 0), picture(1600, 1200, 0)
    box = "[10, 20, 190, 90]"
    assert facts_of(row("Where?", box, [small]), collate).boxes == BoxEvidence(None, in_pixels=True)
    assert facts_of(row("Where?", box, [large]), collate).boxes == BoxEvidence(None, furthest=pytest.approx(303.2))
    assert facts_of(row("Where?", box, [small, small]), collate).boxes == BoxEvidence(None)
    assert facts_of(row("Where?", "there", [small]), collate).boxes is None
    assert facts_of(row("Where?", box), collate).boxes is None
    odd = facts_of(row("Where?", "[10, 20, 1900, 90]", [small]), collate)
    assert (odd.boxes, odd.failed_checks) == (BoxEvidence("boxes_pixel"), {"boxes_pixel"})


def test_key_differs_with_text_turns_and_sizes(collate):
    one, same_size, other_size = picture(64, 64, 1), picture(64, 64, 2), picture(64, 96, 1)
    base = row("a", "b", [one])
    keys = [
        facts_of(raw, collate).key
        for raw in (base, row("a", "c", [one]), row("ab", "", [one]), row("a", "b", [other_size]), row("a", "b"))
    ]
    assert len(set(keys)) == len(keys)
    assert facts_of(row("a", "b", [same_size]), collate).key == keys[0]  # content is compared later, where keys agree
