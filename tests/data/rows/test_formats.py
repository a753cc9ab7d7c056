"""Every format of row gives the same messages; placeholders and media must agree in number."""

import json

import pytest

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.parse import RowRules, dataset_of, format_counts
from qwen3vl_train.data.rows.sample import ImagePart, TextPart, ToolCall, VideoPart
from tests.helpers.messages import message_of

WHAT = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]


def read(row, **rules):
    return RowRules(**rules).sample(row, "a.jsonl:1")


def talk(*values):
    return [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]


def question(row, **rules):
    """Return the parts of the first message: paths of images, and texts in brackets."""
    parts = read(row, **rules).messages[0].content
    return [part.image if isinstance(part, ImagePart) else [part.text] for part in parts]


MARKS = {
    "<image>\nWhat?": ["a", ["What?"]],
    "What?\n<image>": [["What?"], "a"],
    "<image> \n\n What?": ["a", ["What?"]],
    "What \n <image>": [["What"], "a"],
    "Is <image> red?": [["Is "], "a", [" red?"]],
    "<image>": ["a"],
    "Read:\n<image>\nand say.\n": [["Read:"], "a", ["and say.\n"]],
    "  <image>": [["  "], "a"],
}


@pytest.mark.parametrize("text", MARKS)
def test_line_breaks_next_to_a_placeholder_are_removed(text):
    assert question({"image": "a", "conversations": talk(text, "ok")}) == MARKS[text]


def test_media_fill_placeholders_in_order_over_all_turns():
    turns = talk("<image>\n<video>\n<image>\nOne?", "1", "Two? <image>", "2")
    first, _, third, _ = read({"images": ["a", "b", "c"], "video": "v.mp4", "conversations": turns}).messages
    assert first.content == (ImagePart("a"), VideoPart("v.mp4"), ImagePart("b"), TextPart("One?"))
    assert third.content == (TextPart("Two? "), ImagePart("c"))


def test_qwens_own_json_uses_its_data_path():
    row = {"image": "demo/1.jpg", "conversations": WHAT, "data_path": "/data/coco"}
    sample = read(row)
    assert sample.row_format == "sharegpt"
    assert sample.messages[0].content == (ImagePart("/data/coco/demo/1.jpg"), TextPart("What?"))
    assert read({**row, "data_path": ""}).messages[0].content[0] == ImagePart("demo/1.jpg")
    assert read({**row, "image": "data:image/png;base64,xx"}).messages[0].content[0].image.startswith("data:")


def test_placeholders_in_answers_and_systems_are_text():
    row = {"image": "a", "system": "A <video> mark", "conversations": talk("<image>\nWhat?", "An <image> mark")}
    assert [message.text for message in read(row).messages] == ["A <video> mark", "What?", "An <image> mark"]


def asked(*contents):
    answered = [({"role": "user", "content": content}, {"role": "assistant", "content": "x"}) for content in contents]
    return {"messages": [message for pair in answered for message in pair]}


def test_placeholders_in_typed_parts_without_media_are_text():
    tag = {"type": "text", "text": "What is an <image> tag?"}
    assert question(asked([tag])) == [["What is an <image> tag?"]]
    assert question({**asked([tag]), "images": [], "videos": None}) == [["What is an <image> tag?"]]
    own = asked([{"type": "image", "image": "a"}, tag], "And a <video> tag?")
    assert question(own) == ["a", ["What is an <image> tag?"]]
    assert read(own).messages[2].content == (TextPart("And a <video> tag?"),)
    assert question({**asked([tag]), "images": ["a"]}) == [["What is an "], "a", [" tag?"]]
    turn = {"from": "human", "value": [tag]}
    assert question({"conversations": [turn, {"from": "gpt", "value": "x"}]}) == [["What is an <image> tag?"]]


def test_messages_with_listed_media():
    parts = asked([{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}])
    assert question({"images": ["a", "b"], **parts}) == ["a", ["and"], "b"]
    assert question({"images": ["a"], **asked("<image>What?")}) == ["a", ["What?"]]


def test_frame_lists_with_times_work_in_every_format(tmp_path):
    clips = [{"frames": ["a", "b", "c"], "sample_fps": 2, "fps": None}, "v.mp4",
             {"frames": [{"bytes": b"x", "path": None}, "d"], "timestamps": [0, 3]}]  # fmt: skip
    found = [VideoPart(("a", "b", "c"), timestamps=(0.0, 0.5, 1.0)), VideoPart("v.mp4"),
             VideoPart((b"x", "d"), timestamps=(0.0, 3.0))]  # fmt: skip
    marks = "<video><video><video>What?"
    for row in (
        {"videos": clips, "conversations": talk(marks, "x")},
        {"videos": clips, "question": "What?", "answer": "x"},
        {"video": clips, **asked(marks)},
        {"videos": clips, **asked([*[{"type": "video"}] * 3, {"text": "What?"}])},
    ):
        assert read(row).messages[0].content == (*found, TextPart("What?"))
    one = {"video": {"frames": ["a", "b"], "fps": 8}, "data_path": "/clips", "conversations": talk("<video>", "x")}
    assert read(one).messages[0].content == (VideoPart(("/clips/a", "/clips/b"), fps=8.0),)
    assert message_of(RowFault, read, {"videos": [["a", "b"]], "conversations": talk("<video>", "x")}) == (
        "conversations[0].content[0]: a list of frames with no times; give one of fps, sample_fps, timestamps, as in "
        '{"frames": [...], "fps": 2}'
    )


def test_columns():
    assert question({"question": "What?", "answer": "A cat.", "image": "a"}) == ["a", ["What?"]]
    assert question({"question": "Left <image> or right <image>?", "answer": "x", "image": ["a", "b"]}) == [
        ["Left "], "a", [" or right "], "b", ["?"],
    ]  # fmt: skip
    names = {"question": "q", "answer": "a", "image": "pic", "system": "role", "reasoning": "why"}
    sample = read({"q": "What?", "a": "A cat.", "pic": "x", "role": "Be brief.", "why": "fur"}, columns=names)
    assert [message.role for message in sample.messages] == ["system", "user", "assistant"]
    assert sample.messages[2].reasoning == "fur"
    assert question({"jpg": "a", "txt": "A cat."}, columns={"image": "jpg", "answer": "txt"}) == ["a"]


def test_tools_system_and_observations_of_sharegpt():
    row = {
        "system": "Be brief.",
        "tools": '[{"type": "function"}]',
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "Rain.", "loss_weight": 2},
        ],
    }
    sample = read(row)
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert sample.messages[2].tool_calls == (ToolCall("f", {"x": 1}),)
    assert sample.messages[4].loss_weight == 2
    assert sample.tools == ({"type": "function"},)


def test_only_the_last_answer_is_trained():
    row = {"conversations": talk("a", "b", "c", "d")}
    assert [message.loss_weight for message in read(row).messages] == [0, 1, 0, 1]
    assert [message.loss_weight for message in read(row, train_on="last").messages] == [0, 0, 0, 1]
    row["conversations"][3]["loss"] = False
    with pytest.raises(RowFault, match=r"^nothing to learn"):
        read(row, train_on="last")


def test_given_format_is_not_detected():
    both = {**asked("a"), "conversations": WHAT, "image": "x", "question": "q", "answer": "y"}
    with pytest.raises(RowFault, match="1 image but 0 <image> placeholders"):
        read(both)
    assert read(both, format="sharegpt").messages[1].text == "A cat."
    assert read(both, format="columns").messages[1].text == "y"


LIST_THEM = "list one image for each, or write typed parts, in which a text is a text"
PUT_ONE = "placeholders in the questions; put one placeholder where each image belongs"
NONE_LISTED = f"0 images but 1 <image> placeholder in the questions; {LIST_THEM}"
OWN = "the parts contain 1 of their own: list no others, or leave parts without media for them"
FAULTS = [
    ({"image": "a", "conversations": talk("What?", "x")}, f"1 image but 0 <image> {PUT_ONE}"),
    ({"image": ["a", "b"], "conversations": talk("<image><image><image>", "x")}, f"2 images but 3 <image> {PUT_ONE}"),
    ({"image": "a", "conversations": talk("<image><video>", "x")},
     f"0 videos but 1 <video> placeholder in the questions; {LIST_THEM.replace('image', 'video')}"),
    (asked([{"type": "image"}]), "0 images but 1 <image> placeholder in the questions; list one image for each part "
     "without its own, or write it into the part"),
    ({"conversations": talk("<image>\nWhat?", "x")}, NONE_LISTED),
    ({"image": [], "conversations": talk("<image>\n<image>\nWhat?", "x")},
     f"0 images but 2 <image> placeholders in the questions; {LIST_THEM}"),
    ({"video": "v.mp4", "conversations": talk("<image>What?<video>", "x")}, NONE_LISTED),
    ({"question": "<video>What?", "answer": "x"},
     f"0 videos but 1 <video> placeholder in the questions; {LIST_THEM.replace('image', 'video')}"),
    ({"question": "<image> What?", "answer": "x", "image": ["a", "b"]},
     "2 images but 1 <image> placeholder in the questions; put one placeholder where each image belongs"),
    (asked("<image> What?"), NONE_LISTED),
    ({**asked("What?"), "images": ["a"]}, f"1 image but 0 <image> {PUT_ONE}"),
    ({**asked([{"type": "image", "image": "mine"}]), "images": ["a"]},
     f"1 image but 0 <image> placeholders in the questions; {OWN}"),
    ({**asked([{"type": "image", "image": "mine"}]), "videos": ["a", "b"]},
     f"2 videos but 0 <video> placeholders in the questions; {OWN}"),
    ({**asked([{"type": "image", "image": "mine"}, {"type": "image"}]), "images": ["a", "b"]},
     f"2 images but 1 <image> placeholder in the questions; {OWN}"),
    ({**asked([{"type": "image", "text": ""}, {"type": "image"}]), "images": ["a"]},
     f"1 image but 2 <image> {PUT_ONE}"),
    ({"image": "a", "images": ["b"], "conversations": WHAT}, "image and images are both given; keep one of them"),
    ({"conversations": "hi"}, "conversations is a string, not a list; write a list of turns"),
    ({"conversations": [7]}, "conversations[0] is a number, not an object; write role and content"),
    ({"conversations": [{"value": "x"}]}, "conversations[0]: no role; write one of system, user, assistant, tool"),
    ({"conversations": [{"from": "human", "value": 5}]},
     "conversations[0].value is a number; write text or a list of parts"),
    ({"conversations": [{"from": "function_call", "value": "{"}]}, "conversations[0].value is not JSON (Expecting "
     "property name enclosed in double quotes: line 1 column 2 (char 1)); write it as JSON"),
    ({"conversations": WHAT, "image": "a", "data_path": 5}, "data_path is not a path; write a folder"),
    ({"question": 5, "answer": "x"}, "column question is not text; name the question's column"),
    ({"answer": "x"}, "neither a question nor an image; give a question"),
    ({"question": "a", "answer": True}, "answer.content is true or false; write text or a list of parts"),
    ({"conversations": talk("a", "b"), "tools": "[{"}, "tools is not JSON (Expecting property name enclosed in double "
     "quotes: line 1 column 3 (char 2)); write it as JSON"),
    ({"text": "x"}, "no messages, no conversations and no answer among its keys (text); write "
     '{"messages": [{"role": ..., "content": ...}, ...]} or name its columns under columns'),
    ([{"image": "a", "conversations": WHAT}],
     "row is a list of rows that another tool packed; give the rows themselves, packing is done here"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "fault"), FAULTS, ids=lambda value: str(value)[:60])
def test_faults(row, fault):
    assert message_of(RowFault, read, row) == fault


def test_rows_far_beyond_any_pack_are_rejected():
    assert message_of(RowFault, read, {"conversations": talk("word " * 5_000_000, "x")}) == (
        "25,000,001 characters of text are more than 4,000,000, far beyond any pack; split it"
    )
    many = {"images": ["a.png"] * 10_000, "conversations": talk("<image>" * 10_000, "x")}
    fault = "10,000 images and videos are more than 4,096, beyond the model's context; split the row"
    assert message_of(RowFault, read, many) == fault


LONG = "x" * 4_000_000


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"description": LONG}]},
        {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"x": LONG}})},
        {"from": "gpt", "value": "b", "tool_calls": [{"name": "f", "arguments": json.dumps(LONG)}]},
        {"from": "gpt", "value": "b", "reasoning_content": LONG},
    ],
    ids=["tools", "call", "call as text", "reasoning"],
)
def test_tools_calls_and_reasoning_count_as_text(more):
    too_long = r"^4,000,0[0-9]{2} characters of text are more than 4,000,000, far beyond any pack"
    with pytest.raises(RowFault, match=too_long):
        read({"conversations": [talk("a")[0], more]} if "from" in more else {"conversations": talk("a", "b"), **more})


def test_tools_that_are_not_json():
    tower = {}
    for _ in range(100):
        tower = {"a": tower}
    for tools, fault in (
        ([{"a": b"x"}], "tools cannot be written as JSON (Object of type bytes is not JSON serializable); write text "
         "and numbers"),
        ([tower], "tools is nested more than 64 deep; flatten it"),
    ):  # fmt: skip
        assert message_of(RowFault, read, {**asked("a"), "tools": tools}) == fault


def test_sample_ids_carry_the_name_of_the_data_set():
    named, alone = RowRules(label="llava"), RowRules(label="train.jsonl")
    assert named.sample_id("part-01.jsonl", 7) == "llava:part-01.jsonl:7"
    assert alone.sample_id("train.jsonl", 7) == "train.jsonl:7"
    assert RowRules().sample_id("a:b.jsonl", 7) == "a_b.jsonl:7"
    assert [dataset_of(name) for name in ("llava:part-01.jsonl:7", "train.jsonl:7")] == ["llava", "train.jsonl"]


def test_formats_of_a_mixed_file_are_counted():
    assert format_counts("a.jsonl", {"openai": 1200, "columns": 3}) == "a.jsonl: 1,203 rows, openai 1,200, columns 3"
    assert format_counts("a.jsonl", {}) == "a.jsonl: 0 rows, of no known format"
