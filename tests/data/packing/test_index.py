import errno
import json
import os
import shutil

import numpy as np
import pytest
import tiny_checkpoint
from PIL import Image

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.encoder import SampleCost
from qwen3vl_train.data.errors import Reject
from qwen3vl_train.data.packing.index import LengthRule, build_index
from qwen3vl_train.data.packing.index_cache import SourceIndex, load_index, save_index
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources import JsonlSource
from tests.helpers import faults
from tests.helpers.messages import message_of

NO_LIMIT = LengthRule(10**6)
LOWER_IT = "; raise it, lower data.max_visual_tokens_per_image"
RAISE_IT = LOWER_IT + ", or set data.too_long to drop or shrink_media"


def row(text="a", image=None, answer="ok"):
    content = [{"type": "text", "text": text}] + ([{"type": "image", "image": image}] if image else [])
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages})


def write(folder, name, rows, **options) -> JsonlSource:
    (folder / name).write_text("\n".join(rows) + "\n")
    return JsonlSource(folder / name, folder, **options)


def columns(index):
    return [getattr(index, name) for name in SampleCost._fields]


def test_costs_are_those_of_the_collator_and_rejects_say_why(tmp_path, collate):
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    (tmp_path / "empty.png").write_bytes(b"")
    first = write(tmp_path, "a.jsonl", [row("one"), "{", row(image="a.png")])
    second = write(tmp_path, "b.jsonl", [row(image="empty.png"), row("two " * 30), row("x" * 3000)])
    seen = []
    index = build_index([first, second], collate, LengthRule(400), progress=lambda *done: seen.append(done))
    assert seen == [(3, 6), (6, 6)]
    assert (index.num_rows, index.num_usable, index.num_dropped) == (6, 3, 0)
    assert [index.usable(number).tolist() for number in range(2)] == [[0, 2], [4]]
    assert [index.locate(number) for number in (0, 2, 3, 5)] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    for number in (0, 2, 4):
        place, line = index.locate(number)
        cost = collate.cost([first, second][place].sample(line))
        assert tuple(column[number] for column in columns(index)) == cost
    tokens = collate.cost(second.sample(2)).tokens
    assert index.rejects == [
        Reject(f"{tmp_path}/a.jsonl", 2, "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
               "(char 1)); write one object a line", "invalid_json"),
        Reject(f"{tmp_path}/b.jsonl", 1, "messages[0].content[1]: image empty.png: is empty (0 bytes); copy the file "
               "again", "invalid_media"),
        Reject(f"{tmp_path}/b.jsonl", 3, f"sample of {tokens} tokens (0 visual) is longer than "
               "data.max_tokens_per_pack 400" + RAISE_IT, "too_long"),
    ]  # fmt: skip


@pytest.mark.process
def test_processes_change_nothing(tmp_path, collate):
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    rows = [row(f"{number} " * (number % 50), "a.png" if number % 3 else None) for number in range(2100)]
    rows[1500] = "{"
    sources = [write(tmp_path, "a.jsonl", rows[:300]), write(tmp_path, "b.jsonl", rows[300:])]
    alone, together = (build_index(sources, collate, LengthRule(90), num_workers=n) for n in (0, 2))
    assert 0 < alone.num_usable < 2100
    assert (alone.digest(), alone.rejects) == (together.digest(), together.rejects)
    assert np.array_equal(alone.signatures, together.signatures)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_tokens": 30, "field": "data.max_tokens_per_sample"},
         "sample of {tokens} tokens (24 visual) is longer than data.max_tokens_per_sample 30"),
        ({"max_tokens": 99, "max_patches": 90}, "sample of 96 patches is more than data.max_patches_per_pack 90"),
    ],
)  # fmt: skip
def test_samples_that_are_too_long(tmp_path, collate, tiny_folder, limits, reason):
    Image.new("RGB", (192, 128)).save(tmp_path / "a.png")  # 24 visual tokens
    source = write(tmp_path, "a.jsonl", [row(), row(image="a.png")])
    tokens = collate.cost(source.sample(1)).tokens
    rejected = build_index([source], collate, LengthRule(**limits))
    reason = reason.format(tokens=tokens) + RAISE_IT
    assert rejected.rejects == [Reject(source.name, 2, reason, "too_long")]
    assert (rejected.num_usable, rejected.num_dropped) == (1, 0)
    dropped = build_index([source], collate, LengthRule(**limits, too_long="drop"))
    assert (dropped.num_usable, dropped.num_dropped, dropped.rejects) == (1, 1, [])
    shrinks = MultimodalCollator.from_pretrained(
        tiny_folder, shrink_to_tokens=limits["max_tokens"], shrink_to_patches=limits.get("max_patches")
    )
    shrunk = build_index([source], shrinks, LengthRule(**limits, too_long="shrink_media"))
    assert (shrunk.num_usable, shrunk.num_dropped, shrunk.rejects) == (2, 0, [])
    assert shrunk.num_shrunk.tolist() == [0, 1]
    assert shrunk.tokens[1] <= limits["max_tokens"]
    assert 40 <= shrunk.patches[1] <= limits.get("max_patches", 96)
    encoded = shrinks.encode(source.sample(1))
    assert (len(encoded.input_ids), len(encoded.patches)) == (shrunk.tokens[1], shrunk.patches[1])


@pytest.mark.parametrize("too_long", ["drop", "reject", "shrink_media"])
def test_text_that_cannot_fit_is_not_tokenised(tmp_path, collate, too_long):
    longest = collate.tokenizer.max_token_bytes
    source = write(tmp_path, "a.jsonl", [row("\U0001f642" * 200 * longest), row("1 " * 200)])
    faults.refuse_to_tokenize(1000)
    index = build_index([source], collate, LengthRule(190, too_long=too_long))
    assert index.tokens.tolist() == [0, 0]
    assert index.num_dropped == (2 if too_long == "drop" else 0)
    index = build_index([source], collate, LengthRule(450, too_long=too_long))
    assert index.tokens.tolist() == [0, collate.cost(source.sample(1)).tokens]


def test_text_that_cannot_fit_is_rejected_with_its_least_tokens(tmp_path, collate):
    longest = collate.tokenizer.max_token_bytes
    source = write(tmp_path, "a.jsonl", [row("x" * 600 * longest, answer="")])
    faults.refuse_to_tokenize(1000)
    for too_long, what_to_do in (("reject", RAISE_IT), ("shrink_media", LOWER_IT)):
        index = build_index([source], collate, LengthRule(550, too_long=too_long))
        head, _, tail = index.rejects[0].reason.partition("60")
        assert head == "sample of at least "
        assert tail[1:] == " tokens of text is longer than data.max_tokens_per_pack 550" + what_to_do


def test_rows_of_which_the_template_trains_nothing_are_rejected(tmp_path, tiny_folder):
    folder = tmp_path / "thinking"
    tiny_checkpoint.write_tiny_checkpoint(folder, template="thinking")
    thinking = MultimodalCollator.from_pretrained(folder)
    ask, call = {"role": "user", "content": "a"}, {"tool_calls": [{"name": "f", "arguments": {}}]}
    talks = {
        "learns": [ask, {"role": "assistant", "content": "b"}],
        "ends on a question": [ask, {"role": "assistant", "content": "b"}, ask],
        "trains an earlier answer": [ask, {"role": "assistant", "content": "b"}, ask,
                                     {"role": "assistant", "content": "c", "loss": False}],
        "ends on a tool": [ask, {"role": "assistant", "content": "", **call}, {"role": "tool", "content": "d"}],
        "has thought": [ask, {"role": "assistant", "content": "", "reasoning_content": "e", **call},
                        {"role": "tool", "content": "d"}],
    }  # fmt: skip
    source = write(tmp_path, "a.jsonl", [json.dumps({"messages": messages}) for messages in talks.values()])
    index = build_index([source], thinking, NO_LIMIT)
    learns = [thinking([{"messages": messages}]).num_labels > 0 for messages in talks.values()]
    assert (index.tokens > 0).tolist() == learns == [True, False, False, False, True]
    assert {reject.reason for reject in index.rejects} == {
        "nothing to learn: a Thinking checkpoint is trained on answers after the last question, and none there is "
        "trained; end the row with its answer, or take an Instruct checkpoint"
    }
    instruct = build_index([source], MultimodalCollator.from_pretrained(tiny_folder), NO_LIMIT)
    assert (instruct.tokens > 0).tolist() == [True, True, True, True, False]


def test_too_long_text_is_rejected_even_where_media_shrink(tmp_path, tiny_folder):
    Image.new("RGB", (192, 128)).save(tmp_path / "a.png")
    source = write(tmp_path, "a.jsonl", [row("word " * 60), row("word " * 60, image="a.png")])
    collate = MultimodalCollator.from_pretrained(tiny_folder, shrink_to_tokens=50)
    tokens = collate.cost(source.sample(0)).tokens
    index = build_index([source], collate, LengthRule(50, too_long="shrink_media"))
    assert [reject.reason for reject in index.rejects] == [
        f"sample of {tokens} tokens (0 visual) is longer than data.max_tokens_per_pack 50" + LOWER_IT,
        "1 images and clips take at least 1 visual tokens, more than the limit on the whole sample leaves them, 0; "
        "raise it or give fewer",
    ]


def test_a_sample_as_long_as_a_pack_fits(tmp_path, collate):
    source = write(tmp_path, "a.jsonl", [row("one")])
    tokens = collate.cost(source.sample(0)).tokens
    assert build_index([source], collate, LengthRule(tokens)).num_usable == 1
    assert build_index([source], collate, LengthRule(tokens - 1)).num_usable == 0


def test_the_digest_changes_with_the_costs(tmp_path, collate, tiny_folder):
    Image.new("RGB", (512, 512)).save(tmp_path / "a.png")
    source = write(tmp_path, "a.jsonl", [row(image="a.png")])
    small = MultimodalCollator.from_pretrained(tiny_folder, max_visual_tokens_per_image=16)
    digests = [build_index([source], c, NO_LIMIT).digest() for c in (collate, collate, small)]
    assert digests[0] == digests[1] != digests[2]


@pytest.fixture
def counted(tmp_path, collate):
    """A source of six rows, an index kept in a folder, and a function: build -> (index, rows that were scanned)."""
    for name in "abc":
        Image.new("RGB", (96, 64)).save(tmp_path / f"{name}.png")
    rows = [row("one"), row(image="a.png"), "{", row(image="b.png"), row(image="gone.png"), row(image="c.png")]

    def build(changed_rows=None, collate=collate, rule=NO_LIMIT, root=tmp_path, **options):
        write(tmp_path, "a.jsonl", changed_rows or rows)
        source = JsonlSource(tmp_path / "a.jsonl", root, **options)
        scanned = [0]
        cache, note = tmp_path / "cache", lambda done, total: scanned.append(done)
        return build_index([source], collate, rule, cache_folder=cache, progress=note), max(scanned)

    return build


def same(one, other):
    arrays = ([*columns(index), index.signatures] for index in (one, other))
    return (one.rejects, one.num_dropped) == (other.rejects, other.num_dropped) and all(map(np.array_equal, *arrays))


def test_an_index_is_used_again_as_long_as_nothing_changed(counted, tmp_path, tiny_folder):
    first, scanned = counted()
    again, scanned_again = counted()
    assert (scanned, scanned_again) == (6, 0)
    assert same(first, again)
    changes = (
        {"collate": MultimodalCollator.from_pretrained(tiny_folder, max_visual_tokens_per_image=16)},
        {"rule": LengthRule(10**6, too_long="drop")},
        {"rules": RowRules(train_on="last")},
        {"changed_rows": [row("two")]},
    )
    for change in changes:
        assert counted(**change)[1] > 0, change
        assert counted(**change)[1] == 0, change
    assert len(list((tmp_path / "cache").iterdir())) == 1 + len(changes)


def test_only_rows_whose_media_changed_are_scanned_again(counted, tmp_path):
    first, _ = counted()
    Image.new("RGB", (192, 64)).save(tmp_path / "b.png")
    (tmp_path / "c.png").unlink()
    second, scanned = counted()
    assert scanned == 2
    assert second.tokens[3] > first.tokens[3]
    assert second.tokens[5] == 0
    assert [reject.row for reject in second.rejects] == [3, 5, 6]
    for name in ("gone.png", "c.png"):
        Image.new("RGB", (96, 64)).save(tmp_path / name)
    third, scanned = counted()
    assert scanned == 2
    assert [reject.row for reject in third.rejects] == [3]
    shutil.rmtree(tmp_path / "cache")
    fresh, scanned = counted()
    assert scanned == 6
    assert same(third, fresh)
    assert counted()[1] == 0


def test_rows_of_unfetched_media_are_scanned_again(counted, tmp_path, bucket):
    faults.set_download_limits(pauses=())
    picture = (tmp_path / "a.png").read_bytes()
    asks = {"question": "<image>?", "answer": "<box>", "bbox": "unit"}
    boxed = {**asks, "boxes": [[0, 0, 9, 9]]}
    rows = [row("text"), *(row(image=name) for name in ("a.png", "late.png", "page.png"))]
    rows += map(json.dumps, ({**asks, "answer": "ok", "image": "late.png"},
                             {**boxed, "bbox": "pixel", "image": "late.png"},
                             {**boxed, "bbox": "pixel", "image": "page.png"}, {**boxed, "image": "a.png"}))  # fmt: skip
    bucket.pipe({"/bucket/a.png": picture, "/bucket/page.png": b"<html>Please sign in</html>"})
    remote = {"changed_rows": [*rows, "{"], "root": "memory://bucket"}
    first, scanned = counted(**remote)
    assert first.tokens.astype(bool).tolist() == [True, True] + [False] * 7
    again, scanned_again = counted(**remote)
    assert (scanned, scanned_again) == (9, 5)
    assert same(first, again)
    bucket.pipe({"/bucket/late.png": picture, "/bucket/page.png": picture})
    third, scanned = counted(**remote)
    assert scanned == 5
    assert third.tokens.astype(bool).tolist() == [True] * 7 + [False] * 2
    assert counted(**remote)[1] == 0


@pytest.mark.parametrize(("module", "call"), [(Image, "open"), (os, "stat")], ids=["open", "stat"])
def test_rows_whose_disk_failed_are_scanned_again(counted, tmp_path, monkeypatch, module, call):
    whole, asked = getattr(module, call), []

    def fail(file, *arguments, **options):
        if str(file).endswith("b.png") and not asked:
            asked.append(file)
            raise OSError(errno.EIO, "Input/output error")
        return whole(file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, call, fail)
        first, _ = counted()
    assert [reject.reason for reject in first.rejects if reject.row == 4] == [
        "messages[0].content[1]: image b.png: cannot be read (Input/output error); check disk and permissions"
    ]
    again, scanned = counted()
    assert scanned == 1
    assert [reject.row for reject in again.rejects] == [3, 5]
    assert counted()[1] == 0


def test_a_fault_of_a_box_goes_with_its_image(counted, tmp_path):
    asks = {"question": "?", "answer": "<box>", "bbox": "pixel", "boxes": [[0, 0, 150, 9]]}
    rows = [json.dumps({**asks, "image": image}) for image in ("a.png", "gone.png")] + ["{"]
    assert [reject.row for reject in counted(rows)[0].rejects] == [1, 2, 3]
    assert counted(rows)[1] == 0
    for name in ("a", "gone"):
        Image.new("RGB", (192, 64)).save(tmp_path / f"{name}.png")
    fixed, scanned = counted(rows)
    assert scanned == 2
    assert [reject.row for reject in fixed.rejects] == [3]


def test_rows_of_a_file_changed_meanwhile_are_scanned_again(tmp_path, collate):
    source = write(tmp_path, "a.jsonl", [row(), "{"])
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    index = build_index([source], collate, NO_LIMIT, cache_folder=tmp_path / "cache")
    assert len(index.rejects) == 2
    again = JsonlSource(tmp_path / "a.jsonl", tmp_path)
    index = build_index([again], collate, NO_LIMIT, cache_folder=tmp_path / "cache")
    assert [reject.row for reject in index.rejects] == [2]


def test_two_processes_of_one_id_keep_one_index(tmp_path):
    index = SourceIndex.join([])
    faults.after_index_arrays(lambda: save_index(tmp_path, {}, index))  # another one writes the same file meanwhile
    save_index(tmp_path, {}, index)
    assert load_index(tmp_path, {}, 0) is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_damage_in_the_directory_of_a_cache_file_raises_nothing(tmp_path):
    index = SourceIndex.join([])
    save_index(tmp_path, {}, index)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    assert load_index(tmp_path, {}, 0) is not None
    for position in range(content.index(b"PK\x01\x02"), len(content)):  # no checksum there: method, flags, versions
        for bit in (1, 4, 32):
            file.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
            load_index(tmp_path, {}, 0)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other"])
def test_a_damaged_cache_is_rebuilt(counted, tmp_path, damage):
    first, _ = counted()
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    if damage == "flipped":
        # A flipped bit anywhere is either found by a checksum, or lies where it changes nothing.
        for position in range(0, len(whole), 97):
            file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
            assert same(counted()[0], first), position
            file.write_bytes(whole)
        return
    file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "other": b"no archive at all"}[damage])
    again, scanned = counted()
    assert scanned == 6
    assert same(first, again)
    assert counted()[1] == 0


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path, collate):
    (tmp_path / "cache").write_text("a file")
    source = write(tmp_path, "a.jsonl", [row()])
    assert message_of(ValueError, build_index, [source], collate, NO_LIMIT, cache_folder=tmp_path / "cache") == (
        f"{tmp_path}/cache: the index of the data cannot be kept there (File exists); free space or set "
        "QWEN3VL_TRAIN_CACHE to another folder"
    )
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "cache"]
