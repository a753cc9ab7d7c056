"""Rows as public data sets and other trainers write them, each with what the model is to read.

A row's meaning is written as one line a turn: role, text with one mark for each medium, and whether it is trained.
"""

import json

import pytest

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.boxes import Convention
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.rows.sample import ImagePart, PixelLimits, TextPart, ToolCall, VideoPart
from tests.helpers.messages import message_of


def read(row, **rules):
    return RowRules(**rules).sample(row, "a.jsonl:1")


def turns(row, **rules):
    """Return "role: text", with [a.png] for a medium and * for a turn that is trained."""

    def show(part):
        return part.text if isinstance(part, TextPart) else f"[{getattr(part, 'image', getattr(part, 'video', None))}]"

    return [
        f"{message.role}{'*' * (message.loss_weight > 0)}: {''.join(map(show, message.content))}"
        for message in read(row, **rules).messages
    ]


WHAT = ["user: [a.png]What?", "assistant*: Red."]
HI = ["user: Hi", "assistant*: Hello"]


def typed(*parts, answer="Red."):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]}


def part(**keys):
    return typed({"type": "image", **keys}, {"type": "text", "text": "What?"})


ROWS = {
    "part with path": (part(path="a.png"), WHAT),
    "part with url": (part(url="a.png"), WHAT),
    "part with value": (typed({"type": "image_url", "value": "a.png"}, {"type": "text", "value": "What?"}), WHAT),
    "struct with sizes": (part(image={"path": "a.png", "width": 64, "height": 48}), WHAT),
    "url and detail": (typed({"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}, {"text": "What?"}),
                       WHAT),
    "responses api": (typed({"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "What?"},
                            answer=[{"type": "output_text", "text": "Red."}]), WHAT),
    "index of the part": ({"images": ["a.png"], **typed({"type": "image", "index": 0, "text": None},
                                                        {"type": "text", "index": None, "text": "What?"})}, WHAT),
    "empty other keys": (typed({"type": "image", "image": "a.png", "text": ""},
                               {"type": "text", "text": "What?", "image": ""}), WHAT),
    "system beside": ({"system": "Short.", **part(image="a.png")}, ["system: Short.", *WHAT]),
    "texts": ({"images": ["a.png"], "texts": [{"user": "What?", "assistant": "Red.", "source": "made"},
                                              {"user": "Sure?", "assistant": "Yes."}]},
              [*WHAT, "user: Sure?", "assistant*: Yes."]),
    "texts without images": ({"images": [], "texts": [{"user": "Hi", "assistant": "Hello"}]}, HI),
    "prompt as text": ({"prompt": "What?", "completion": "Red.", "images": ["a.png"]}, WHAT),
    "prompt as messages": ({"prompt": [{"role": "user", "content": "What?"}], "images": ["a.png"],
                            "completion": [{"role": "assistant", "content": "Red."}]}, WHAT),
    "prompt in typed parts": ({"prompt": [{"role": "user", "content": [{"type": "image"}, {"text": "What?"}]}],
                               "completion": [{"role": "assistant", "content": [{"text": "Red."}]}],
                               "images": ["a.png"]}, WHAT),
    "answers in the prompt": ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                                          {"role": "user", "content": "c"}], "completion": "d"},
                              ["user: a", "assistant: b", "user: c", "assistant*: d"]),
    "image mark of a video": ({"video": "v.mp4", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                                   {"from": "gpt", "value": "Red."}]},
                              ["user: [v.mp4]What?", "assistant*: Red."]),
    "alpaca": ({"instruction": "Translate.", "input": "a cat", "output": "un chat", "history": [["Hi", "Hello"]]},
               [*HI, "user: Translate.\na cat", "assistant*: un chat"]),
    "alpaca with an image": ({"instruction": "What?", "input": "", "output": "Red.", "images": ["a.png"]}, WHAT),
    "query and response": ({"query": "<image>What?", "response": "Red.", "images": ["a.png"], "history": None}, WHAT),
    "list of answers": ({"image": "a.png", "question": "What?", "answers": ["Red.", "red"]}, WHAT),
    "empty answer": ({"question": "Hi", "answer": ""}, ["user: Hi", "assistant*: "]),
    "number as answer": ({"question": "1 + 1?", "answer": 2}, ["user: 1 + 1?", "assistant*: 2"]),
    "fraction as answer": ({"question": "1 / 2?", "answer": 0.5}, ["user: 1 / 2?", "assistant*: 0.5"]),
    "foreign keys of turns": ({"conversations": [{"from": "human", "value": "Hi", "recipient": "all"},
                                                 {"from": "gpt", "value": "Hello", "end_turn": True}]}, HI),
    "list of messages": ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], HI),
    "messages as JSON": ({"messages": json.dumps([
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])}, HI),
    "parts as JSON": ({"images": ["a.png"], "messages": [
        {"role": "user", "content": '[{"type": "image"}, {"type": "text", "text": "What?"}]'},
        {"role": "assistant", "content": "Red."}]}, WHAT),
    "media as JSON": ({"images": '["a.png"]', "question": "What?", "answer": "Red."}, WHAT),
    "developer": ({"messages": [{"role": "developer", "content": "Short."}, {"role": "user", "content": "Hi"},
                                {"role": "assistant", "content": "Hello"}]}, ["system: Short.", *HI]),
    "roles in capitals": ({"messages": [{"role": "User", "content": "Hi"}, {"role": "Assistant", "content": "Hello"}]},
                          HI),
    "roles of sharegpt": ({"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Hello"}]}, HI),
    "speakers with content": ({"conversations": [{"from": "user", "content": "Hi"},
                                                 {"role": "assistant", "value": "Hello"}]}, HI),
    "pairs": ({"conversations": [{"human": "Hi", "assistant": "Hello"}]}, HI),
    "weights": ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a", "weight": 0},
                              {"role": "user", "content": "Hi"},
                              {"role": "assistant", "content": "Hello", "weight": 1, "refusal": None,
                               "annotations": []}]}, ["user: Hi", "assistant: a", *HI]),
    "empty images": ({"images": ["", None], **typed({"type": "text", "text": "Hi"}, answer="Hello")}, HI),
    "image that is NaN": ({"image": float("nan"), "question": "Hi", "answer": "Hello"}, HI),
    "empty struct": ({"image": {"bytes": None, "path": None}, "question": "Hi", "answer": "Hello"}, HI),
    "mark of InternVL": (typed({"type": "image_url", "image_url": {"url": "a.png", "image_wh": [64, 48]}},
                               {"type": "text", "text": "<IMG_CONTEXT>\nWhat?"}), WHAT),
    "mark moves the image": (typed({"type": "image", "image": "a.png"}, {"type": "text", "text": "Is [IMG] red?"}),
                             ["user: Is [a.png] red?", "assistant*: Red."]),
    "mark with a path": ({"conversations": [{"from": "user", "value": "Picture 1: <img>a.png</img>\nWhat?"},
                                            {"from": "assistant", "value": "Red."}]},
                         ["user: Picture 1: [a.png]What?", "assistant*: Red."]),
    "marks with numbers": ({"images": ["a.png", "b.png"], "question": "Is <image 2> like <image 1>?", "answer": "No."},
                           ["user: Is [b.png] like [a.png]?", "assistant*: No."]),
    "images by their marks": ({"image": {"<image_00>": "a.png", "<image_01>": "b.png"}, "conversations": [
        {"role": "user", "content": "Is <image_01> like <image_00>?"}, {"role": "assistant", "content": "No."}]},
        ["user: Is [b.png] like [a.png]?", "assistant*: No."]),
    "prompt beside messages": ({"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"},
                                                             {"role": "assistant", "content": "Hello"}]}, HI),
    "foreign mark and a list": ({"images": ["a.png"], "question": "<|image_1|>\nWhat?", "answer": "Red."}, WHAT),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_other_tools_are_read(name):
    row, expected = ROWS[name]
    assert turns(row) == expected


def test_fixed_texts_and_several_columns():
    row = {"picture": "a.png", "text": "Red."}
    rules = {"columns": {"image": "picture", "answer": "text"}, "texts": {"question": "What?", "system": "Short."}}
    assert turns(row, **rules) == ["system: Short.", *WHAT]
    several = {"first": "a.png", "second": None, "third": "b.png", "question": "What?", "answer": "Red."}
    assert turns(several, columns={"image": ("first", "second", "third")})[0] == "user: [a.png][b.png]What?"
    click = {"image": "a.png", "instruction": "Press OK", "bbox": [250, 250, 750, 750], "bbox_unit": 1}
    rules = RowRules(columns={"boxes": "bbox", "question": "instruction"}, texts={"answer": "<box>"},
                     boxes=Convention("per_mille"))  # fmt: skip
    assert rules.sample(click, "a:1").messages[1].text == "[250, 250, 750, 750]"


def test_anthropic_blocks_are_calls_results_and_reasoning():
    row = {
        "system": [{"type": "text", "text": "Be brief."}],
        "tools": [{"name": "zoom", "description": "Zoom.", "input_schema": {"type": "object"}}],
        "messages": [
            {"role": "user", "content": [
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}},
                {"type": "text", "text": "What?", "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "Red."},
                {"type": "tool_use", "id": "t1", "name": "zoom", "input": {"x": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "done"},
                                         {"type": "text", "text": "And?"}]},
            {"role": "assistant", "content": "Done."},
        ],
    }  # fmt: skip
    sample = read(row)
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "tool", "user", "assistant"]
    assert sample.messages[1].content == (ImagePart("data:;base64,QUJD"), TextPart("What?"))
    assert (sample.messages[2].tool_calls, sample.messages[2].reasoning) == ((ToolCall("zoom", {"x": 1}),), "Hm.")
    assert [message.text for message in sample.messages[3:]] == ["done", "And?", "Done."]
    function = {"name": "zoom", "description": "Zoom.", "parameters": {"type": "object"}}
    assert sample.tools == ({"type": "function", "function": function},)
    assert sample.ignored == ("part.cache_control",)


def test_calls_of_every_dialect():
    call = {"name": "f", "arguments": {"x": 1}}
    for turn in (
        {"role": "tool_call", "content": json.dumps(call)},
        {"role": "function_call", "content": json.dumps([call])},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": call}]},
    ):
        row = {"messages": [{"role": "user", "content": "Hi"}, turn, {"role": "tool_response", "content": "1"}]}
        sample = read(row)
        assert [message.role for message in sample.messages] == ["user", "assistant", "tool"]
        assert sample.messages[1].tool_calls == (ToolCall("f", {"x": 1}),)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [
        {"name": "f", "arguments": '{"b": 1, "a":2}'}]}]}  # fmt: skip
    assert read(row).messages[1].tool_calls == (ToolCall("f", '{"b": 1, "a":2}'),)
    assert read({"functions": [{"name": "f"}], **row}).tools == ({"type": "function", "function": {"name": "f"}},)


LIMITS = {"min_pixels": 3136, "max_pixels": "50176"}


def test_parts_carry_limits_rates_and_segments():
    def only(**keys):
        return read(typed({"type": keys.pop("kind", "video"), **keys}, answer="x")).messages[0].content[0]

    assert only(kind="image", image="a.png", **LIMITS) == ImagePart("a.png", PixelLimits(3136, 50176))
    assert only(kind="image", image="a.png", resized_height=64, resized_width=96).limits == PixelLimits(
        height=64, width=96
    )
    assert only(kind="video_url", video_url={"url": "v.mp4"}) == VideoPart("v.mp4")
    assert only(video="v.mp4", fps=2.0, max_pixels=99) == VideoPart("v.mp4", target_fps=2, limits=PixelLimits(None, 99))
    assert only(video="v.mp4", nframes="8") == VideoPart("v.mp4", num_frames=8)
    assert only(video="v.mp4", video_start=0.5, video_end="1.5") == VideoPart("v.mp4", start=0.5, end=1.5)
    assert only(video=["a", "b"], sample_fps="1") == VideoPart(("a", "b"), timestamps=(0.0, 1.0))
    assert only(video="frames", sample_fps=2) == VideoPart("frames", sample_fps=2)


def test_columns_beside_a_clip_belong_to_it():
    asked = {"question": "What?", "answer": "Red."}
    row = {"video": "v.mp4", "start": 0.5, "end": 1.0, **asked}
    assert read(row).messages[0].content[0] == VideoPart("v.mp4", start=0.5, end=1.0)
    renamed = read({"video": "v.mp4", "from_s": 1, **asked}, columns={"start": "from_s"})
    assert renamed.messages[0].content[0] == VideoPart("v.mp4", start=1.0)
    cut = read({"video": "v.mp4", "segment": [1, 2.5], **asked})
    assert cut.messages[0].content[0] == VideoPart("v.mp4", start=1.0, end=2.5)
    frames = {"video": ["0.png", "1.png"], "sample_fps": 2, **asked}
    assert read(frames).messages[0].content[0] == VideoPart(("0.png", "1.png"), timestamps=(0.0, 0.5))
    rate_of_the_file = read({"video": "v.mp4", "fps": 30, "start": None, **asked})
    assert (rate_of_the_file.messages[0].content[0], rate_of_the_file.ignored) == (VideoPart("v.mp4"), ("row.fps",))
    assert read({"start": 3, **asked}).ignored == ("row.start",)


def test_what_nothing_reads_is_named_once():
    turns = [{"from": "human", "value": "a", "end_turn": False}, {"from": "gpt", "value": "b", "end_turn": True}]
    row = {"id": 7, "score": 0.5, "empty": None, "conversations": turns}
    assert read(row).ignored == ("turn.end_turn", "row.id", "row.score")
    assert read({"question": "a", "answers": ["b", "c"]}).ignored == ("row.answers[1:]",)


def test_a_given_format_makes_others_metadata():
    row = {**typed({"text": "Hi"}, answer="Hello"), "context": "p", "answer": "x", "input": "y"}
    assert turns(row, format="openai") == HI
    assert read(row, format="openai").ignored == ("row.context", "row.answer", "row.input")


UNREAD = "holds a value that is not read in this row; take it out, or set format to the one that is meant"
PAIRS = "preference pairs are not trained here; give rows of questions and answers"
FOREIGN = "is the mark of another model family, and the row has no image for it; list one image for each mark, or take"
ASKED = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
FAULTS = [
    ({**ASKED, "input": "x"}, f"input {UNREAD}"),
    ({**ASKED, "history": [["a", "b"]]}, f"history {UNREAD}"),
    ({**ASKED, "answer": "x"}, f"answer {UNREAD}"),
    ({"question": "Which?", "choices": ["a", "b"], "answer": 0}, f"choices {UNREAD}"),
    ({**ASKED, "audios": ["a.wav"]}, f"audios {UNREAD}"),
    ({**ASKED, "rejected": "x"}, f"rejected holds a value that is not read in this row; {PAIRS}"),
    ({"system": "a", "messages": [{"role": "system", "content": "b"}, *ASKED["messages"]]},
     "system is given beside the turns and as one of them; keep one of them"),
    ({"question": "a", "instruction": "b", "answer": "c"}, "question and instruction are both given; keep one of them"),
    ({"question": "a", "answer": "b", "history": [["c"]]}, "history is not a list of [question, answer]; write pairs"),
    ({"question": "a", "answer": "b", "input": 5}, "input is a number, not a string; write text"),
    ({"images": ["a.png"], "texts": ["b"]},
     'texts is not a list of questions and answers; write [{"user": ..., "assistant": ...}]'),
    ({"question": "What?", "answer": "Red.", "image_path": "a.png"},
     "image_path holds a picture or a clip that nothing reads; name it, columns: {image: image_path}, or remove it"),
    (typed({"type": "text", "text": "What is <IMG_CONTEXT>?"}),
     f"messages[0].content[1]: <IMG_CONTEXT> {FOREIGN} the mark out"),
    ({"question": "<|image|>What?", "answer": "x"}, f"question.content[0]: <|image|> {FOREIGN} the mark out"),
    ({"images": ["a.png", "b.png"], "question": "<image 1> or <image 1>?", "answer": "x"},
     "question.content[2]: image 1 has two placeholders; the model sees each image once"),
    ({"videos": ["a.mp4", "b.mp4"], "start": 1, "question": "What?", "answer": "x"},
     "start and end beside 2 clips; write them into the part of the clip that they mean"),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [
        {"name": "f", "arguments": ""}]}]}, "messages[1].tool_calls[0].arguments is not JSON (Expecting value: line 1 "
     "column 1 (char 0)); write it as JSON"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"},
                                                {"type": "tool_result", "content": "1"}]}]},
     "messages[0].content[1]: a tool_result after other parts, before which it is read; split the turn"),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "tool_call", "content": "{}", "tool_calls": [
        {"name": "f", "arguments": {}}]}]},
     "messages[1]: a turn of tool_call has its call as content, and tool_calls beside it; keep one of them"),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [
        {"type": "tool_use", "name": "f", "input": {}}, {"type": "text", "text": "x"}]}]},
     "messages[1].content[1]: a part after a call, which the template writes before it; split the turn"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "fault"), FAULTS, ids=lambda value: str(value)[:60])
def test_faults(row, fault):
    assert message_of(RowFault, read, row) == fault
