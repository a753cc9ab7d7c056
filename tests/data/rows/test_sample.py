"""Valid rows, and the exact message of every invalid one."""

import json

import pytest

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.parse import RowRules, decode_row, parse_sample
from qwen3vl_train.data.rows.sample import ImagePart, TextPart, ToolCall, VideoPart
from tests.helpers.messages import message_of

ASK = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def parse_row(text, sample_id, media_root):
    return RowRules().sample(decode_row(text.encode()), sample_id, media_root)


def user(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}


def test_row_becomes_a_sample():
    row = {
        "id": 7,
        "tools": [{"type": "function"}],
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "user", "name": "Ann", "content": [{"type": "image", "image": "a.png"}, {"text": "What?"}]},
            {"role": "assistant", "content": "No.", "loss": False},
            {"role": "user", "content": [{"image": "b.png"}, {"type": "image_url", "image_url": {"url": "c.png"}}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "image", "image": "d.png"}]},
            {"role": "assistant", "content": "", "loss_weight": 2},
        ],
    }
    sample = parse_row(json.dumps(row), "train.jsonl:17", "images")
    assert (sample.sample_id, sample.media_root, sample.tools) == ("train.jsonl:17", "images", ({"type": "function"},))
    assert [message.loss_weight for message in sample.messages] == [0, 0, 0, 0, 1, 0, 2]
    assert sample.messages[1].content == (ImagePart("a.png"), TextPart("What?"))
    assert sample.messages[3].content == (ImagePart("b.png"), ImagePart("c.png"))
    assert sample.messages[4].tool_calls == (ToolCall("f", {"x": 1}),)
    assert sample.messages[5].content == (ImagePart("d.png"),)
    assert sample.messages[6].content == ()


def test_columns_filled_with_null_count_as_absent():
    part = {"type": "image", "image": "a.png", "text": None, "video": None}
    sample = parse_sample(user(part, {"type": "text", "text": "?", "image": None}))
    assert sample.messages[0].content == (ImagePart("a.png"), TextPart("?"))
    assert parse_sample({"messages": [{**ASK, "tool_calls": None, "loss_weight": None}], "tools": None}).tools == ()


ROW_FAULTS = {
    '{"messages": [}': "not JSON (Expecting value: line 1 column 15 (char 14)); write one object a line",
    "[" * 100000: "not JSON (nested too deeply); write one object a line",
    "[1]": 'row is a list, not an object; write {"messages": [...]}',
    '"x"': 'row is a string, not an object; write {"messages": [...]}',
    '{"text": 1, "id": 2}': "no messages, no conversations and no answer among its keys (id, text); write "
    '{"messages": [{"role": ..., "content": ...}, ...]} or name its columns under columns',
    '{"messages": "x"}': "messages is a string, not a list; write a list of messages",
    '{"messages": []}': "messages is empty; write at least a question and an answer",
    '{"messages": [7]}': "messages[0] is a number, not an object; write role and content",
    '{"messages": [{"content": "x"}]}': "messages[0]: no role; write one of system, user, assistant, tool",
    '{"messages": [{"role": "narrator", "content": "x"}]}':
        "messages[0]: unknown role 'narrator'; use system, user, assistant, tool",
    '{"messages": [{"role": "user"}]}': "messages[0]: no content; write text or a list of parts",
    '{"messages": [{"role": "user", "content": 5}]}': "messages[0].content is a number; write text or a list of parts",
    '{"messages": [{"role": "user", "content": "x"}]}':
        "nothing to learn: no assistant message is trained; add an answer or remove loss: false",
    '{"messages": [{"role": "user", "content": "\\ud800"}]}':
        "messages[0].content contains half a surrogate pair; write whole characters",
    '{"messages": [{"role": "user", "content": "x"}], "tools": {"a": 1}}':
        "tools is not a list of objects; write OpenAI function descriptions",
    '{"messages": [{"role": "assistant", "content": "GOOD", "content": "BAD"}]}':
        "the key 'content' is in one object twice; keep one of them",
    '{"messages": "[{\\"role\\": \\"user\\", \\"role\\": 1}]"}':
        "messages: the key 'role' is in one object twice; keep one of them",
}  # fmt: skip


@pytest.mark.parametrize("text", ROW_FAULTS, ids=lambda text: text[:40])
def test_faults_of_rows(text):
    assert message_of(RowFault, parse_row, text, "a.jsonl:1", None) == ROW_FAULTS[text]


WEIGHTS = "write 0, or a number from 1e-06 to 1,000,000"
MESSAGE_FAULTS = [
    ({**ANSWER, "los": False}, "messages[1]: unknown key los; did you mean loss?"),
    ({**ANSWER, "reasoning_contents": "x"}, "messages[1]: unknown key reasoning_contents; did you mean "
     "reasoning_content?"),
    ({**ASK, "images": ["a.png"]},
     "messages[1]: images holds a value that a turn of the user does not read; take it out"),
    ({**ANSWER, "refusal": "No."},
     "messages[1]: refusal holds a value that a turn of the assistant does not read; take it out"),
    ({**ANSWER, "weight": 0, "loss_weight": 1}, "messages[1]: loss_weight and weight are both given; keep one of them"),
    ({**ANSWER, "weight": -1}, f"messages[1].weight is -1; {WEIGHTS}"),
    ({**ANSWER, "value": "x"}, "messages[1]: content and value are both given; keep one of them"),
    ({**ASK, "loss": True}, "messages[1]: loss on a user message; only assistant messages are trained"),
    ({**ASK, "loss_weight": 1}, "messages[1]: loss on a user message; only assistant messages are trained"),
    ({**ANSWER, "loss": "no"}, "messages[1].loss is a string; write true or false"),
    ({**ANSWER, "loss": 0}, "messages[1].loss is a number; write true or false"),
    ({**ANSWER, "loss_weight": "2"}, f"messages[1].loss_weight is a string; {WEIGHTS}"),
    ({**ANSWER, "loss_weight": True}, f"messages[1].loss_weight is true or false; {WEIGHTS}"),
    ({**ANSWER, "loss_weight": -0.5}, f"messages[1].loss_weight is -0.5; {WEIGHTS}"),
    ({**ANSWER, "loss_weight": float("nan")}, f"messages[1].loss_weight is nan; {WEIGHTS}"),
    ({**ANSWER, "loss_weight": float("inf")}, f"messages[1].loss_weight is inf; {WEIGHTS}"),
    ({**ANSWER, "loss_weight": 10**400},
     f"messages[1].loss_weight is an integer of 1,329 bits; {WEIGHTS}"),
    ({**ANSWER, "loss_weight": 1e-60}, f"messages[1].loss_weight is 1e-60; {WEIGHTS}"),
    ({**ANSWER, "loss_weight": 1e300}, f"messages[1].loss_weight is 1e+300; {WEIGHTS}"),
    ({**ANSWER, "loss": False, "loss_weight": 2},
     "messages[1]: loss is false but loss_weight is 2; remove one of them"),
    ({**ASK, "tool_calls": [{"name": "f"}]},
     "messages[1]: tool_calls in a user message; only assistant messages call tools"),
    ({**ANSWER, "tool_calls": {"a": 1}}, "messages[1].tool_calls is an object, not a list; write a list of calls"),
    ({**ANSWER, "tool_calls": [{"name": "f"}]},
     'messages[1].tool_calls[0]: no name and arguments; write {"name": ..., "arguments": {...}}'),
    ({**ASK, "reasoning_content": "x"},
     "messages[1]: reasoning_content in a user message; only assistant messages have it"),
    ({"role": "assistant", "content": [{"image": "a.png"}]},
     "messages[1]: the assistant message has an image, which the template drops; move it to a user message"),
    ({"role": "assistant", "content": [{"video": "a.mp4"}]},
     "messages[1]: the assistant message has a video, which the template drops; move it to a user message"),
    ({"role": "system", "content": [{"image": "a.png"}]},
     "messages[1]: the system message has an image, which the template drops; move it to a user message"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "fault"), MESSAGE_FAULTS, ids=lambda value: str(value)[:60])
def test_faults_of_messages(message, fault):
    assert message_of(RowFault, parse_sample, {"messages": [ASK, message]}) == fault


PART_FAULTS = [
    ("x", 'messages[0].content[1] is a string, not an object; write {"type": "text", "text": ...}'),
    ({"type": "audio", "audio": "a.wav"},
     "messages[0].content[1]: unknown content type 'audio'; use text, image or video"),
    ({"caption": "x"}, "messages[0].content[1]: no type; use text, image or video"),
    ({"type": "image"},
     'messages[0].content[1]: no key \'image\' for type \'image\'; write {"type": "image", "image": ...}'),
    ({"type": "text"},
     'messages[0].content[1]: no key \'text\' for type \'text\'; write {"type": "text", "text": ...}'),
    ({"type": "image", "image": "a.png", "max_pixel": 9},
     "messages[0].content[1]: unknown key max_pixel; did you mean max_pixels?"),
    ({"type": "image", "image": "a.png", "fps": 2},
     "messages[0].content[1]: fps holds a value that a part of type image does not read; take it out"),
    ({"type": "image", "image": "a.png", "max_pixels": "many"},
     "messages[0].content[1].max_pixels is 'many'; write a whole number from 1 to 2,147,483,648"),
    ({"type": "image", "image": "a.png", "max_pixels": 9, "min_pixels": 10},
     "messages[0].content[1]: min_pixels 10 is more than max_pixels 9; lower it"),
    ({"type": "image", "image": "a.png", "resized_width": 64},
     "messages[0].content[1]: one of resized_height and resized_width alone; give both or neither"),
    ({"text": "x", "image": "a.png"},
     "messages[0].content[1]: image holds a value that a part of type text does not read; take it out"),
    ({"type": "image", "image": "a.png", "url": "b.png"},
     "messages[0].content[1]: image and url are both given; keep one of them"),
    ({"type": "image", "image": {"width": 64}},
     "messages[0].content[1].image is an object without a path, url, base64 or bytes; write one"),
    ({"type": "text", "text": 5}, "messages[0].content[1].text is a number, not a string; write text"),
    ({"type": "image", "image": 5},
     "messages[0].content[1].image is a number; write a path, a data URI, bytes or a PIL image"),
    ({"type": "image_url", "image_url": 5},
     "messages[0].content[1].image_url is a number; write a path, a data URI, bytes or a PIL image"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "fault"), PART_FAULTS, ids=lambda value: str(value)[:60])
def test_faults_of_parts(part, fault):
    assert message_of(RowFault, parse_sample, user({"text": "a"}, part)) == fault


def test_rows_of_files_need_something_to_learn():
    assert len(parse_sample({"messages": [ASK]}).messages) == 1
    for answer in ({"loss": False}, {"loss_weight": 0}):
        with pytest.raises(RowFault, match=r"^nothing to learn"):
            parse_row(json.dumps({"messages": [ASK, {**ANSWER, **answer}]}), "a", None)


def test_clips_are_files_or_lists_of_frames():
    frames = ["0.png", b"1", "2.png"]
    listed, times = tuple(frames), (0.0, 0.5, 1.0)
    for part, clip in (
        ({"type": "video", "video": "a.mp4"}, VideoPart("a.mp4")),
        ({"video": b"\0"}, VideoPart(b"\0")),
        ({"type": "video", "video": {"bytes": None, "path": "b.mp4"}, "fps": None}, VideoPart("b.mp4")),
        ({"type": "video", "video": frames, "fps": 12}, VideoPart(listed, fps=12.0)),
        ({"video": frames, "sample_fps": 2, "timestamps": None}, VideoPart(listed, timestamps=times)),
        ({"video": frames, "timestamps": [0, 0.5, 0.5]}, VideoPart(listed, timestamps=(0.0, 0.5, 0.5))),
        ({"video": {"frames": frames, "fps": 12, "timestamps": None}}, VideoPart(listed, fps=12.0)),
        ({"type": "video", "video": {"frames": frames}, "sample_fps": 2}, VideoPart(listed, timestamps=times)),
    ):
        assert parse_sample(user(part)).messages[0].content == (clip,)


ONE_OF = 'give one of fps, sample_fps, timestamps, as in {"frames": [...], "fps": 2}'
RATE = "write a number of frames per second, from 0.0001 to 1000"
SECONDS = "write seconds, from 0 to 10,000,000, that never decrease"
CLIP_FAULTS = [
    ({"video": 7}, ".video is a number; write a path, a data URI, bytes or a list of frames"),
    ({"video": "a.mp4", "timestamps": [0, 1]},
     ": timestamps next to a video file, whose header has the times; remove it"),
    ({"video": "a.mp4", "nframes": 2, "fps": 1}, ": fps and nframes are both given; keep one of them"),
    ({"video": "a.mp4", "nframes": 1}, ".nframes is 1; write a whole number from 2 to 2,147,483,648"),
    ({"video": "a.mp4", "total_pixels": 99}, ": total_pixels of one clip is not supported; set "
     "data.max_visual_tokens_per_video in the recipe, for all clips, instead"),
    ({"video": "a.mp4", "video_start": 2, "video_end": 1}, ": starts at 2 s and ends at 1 s; write a later end"),
    ({"video": "a.mp4", "video_start": -1}, ".video_start is -1; write seconds, from 0 to 10,000,000"),
    ({"video": "a.mp4", "start": 1, "video_start": 1}, ": start and video_start are both given; keep one of them"),
    ({"video": ["a", "b"], "fps": 1, "start": 1}, ": start next to a list of frames; list the frames that you mean"),
    ({"video": ["a.png"], "fps": 2}, ".video: 1 frames, a clip needs 2; add frames or give an image"),
    ({"video": ["a.png", 3], "fps": 2}, ".video[1] is a number; write a path, a data URI, bytes or a PIL image"),
    ({"video": ["a", "b"]}, f": a list of frames with no times; {ONE_OF}"),
    ({"video": {"frames": ["a", "b"]}}, f": a list of frames with no times; {ONE_OF}"),
    ({"video": {"frames": ["a", "b"], "fps": 1, "sample_fps": 1}},
     f": a list of frames with fps and sample_fps; {ONE_OF}"),
    ({"video": {"frames": ["a", "b"], "fps": 1}, "fps": 1}, ": fps both in the video and next to it; keep one of them"),
    ({"video": {"frames": "a.mp4"}}, ".video.frames is a string, not a list; write a list of images"),
    ({"video": {"frames": None, "fps": 1}}, ".video.frames is null, not a list; write a list of images"),
    ({"video": ["a", "b"], "fps": 1, "timestamps": [0, 1]}, f": a list of frames with fps and timestamps; {ONE_OF}"),
    ({"video": ["a", "b"], "fps": 0}, f".fps is 0; {RATE}"),
    ({"video": ["a", "b"], "fps": float("inf")}, f".fps is inf; {RATE}"),
    ({"video": ["a", "b"], "sample_fps": 1001}, f".sample_fps is 1001; {RATE}"),
    ({"video": ["a", "b"], "fps": 1e-320}, f".fps is 1e-320; {RATE}"),
    ({"video": ["a", "b"], "sample_fps": 1e-320}, f".sample_fps is 1e-320; {RATE}"),
    ({"video": "a.mp4", "fps": 10**1000}, f".fps is an integer of 3,322 bits; {RATE}"),
    ({"video": "a.mp4", "end": 1e9}, ".end is 1000000000.0; write seconds, from 0 to 10,000,000"),
    ({"video": "a.mp4", "min_pixels": 10**1000},
     ".min_pixels is an integer of 3,322 bits; write a whole number from 1 to 2,147,483,648"),
    ({"video": ["a", "b"], "timestamps": [0, 1.7e9]}, f".timestamps[1] is 1700000000.0; {SECONDS}"),
    ({"video": ["a", "b"], "fps": True}, f".fps is True; {RATE}"),
    ({"video": ["a", "b"], "fps": "two"}, f".fps is 'two'; {RATE}"),
    ({"video": ["a", "b"], "timestamps": [0]}, ".timestamps: 1 times for 2 frames; give one for each frame"),
    ({"video": ["a", "b"], "timestamps": [0, 1, 2]}, ".timestamps: 3 times for 2 frames; give one for each frame"),
    ({"video": ["a", "b"], "timestamps": 3}, ".timestamps is a number; write a list of seconds, one for each frame"),
    ({"video": ["a", "b"], "timestamps": [1, 0.5]}, f".timestamps[1] is 0.5; {SECONDS}"),
    ({"video": ["a", "b"], "timestamps": [-1, 0]}, f".timestamps[0] is -1; {SECONDS}"),
    ({"video": ["a", "b"], "timestamps": [0, float("inf")]}, f".timestamps[1] is inf; {SECONDS}"),
    ({"video": ["a", "b"], "timestamps": [0, 10**400]}, f".timestamps[1] is an integer of 1,329 bits; {SECONDS}"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "fault"), CLIP_FAULTS, ids=lambda value: str(value)[:60])
def test_faults_of_clips(part, fault):
    assert message_of(RowFault, parse_sample, user({"type": "video", **part})) == f"messages[0].content[0]{fault}"
