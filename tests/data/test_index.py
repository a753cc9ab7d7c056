import json

import pytest
from PIL import Image

from qwen3vl_train.data.collate import MultimodalCollator
from qwen3vl_train.data.faults import Reject
from qwen3vl_train.data.index import build_index
from qwen3vl_train.data.sources import JsonlSource


@pytest.fixture(scope="module")
def collator(tiny_folder):
    return MultimodalCollator.from_pretrained(tiny_folder)


def row(text="a", image=None, answer="ok"):
    content = [{"type": "text", "text": text}] + ([{"type": "image", "image": image}] if image else [])
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages})


def write(folder, name, rows) -> JsonlSource:
    (folder / name).write_text("\n".join(rows) + "\n")
    return JsonlSource(folder / name, folder)


def test_costs_are_those_of_the_collator_and_rejects_say_why(tmp_path, collator):
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    (tmp_path / "empty.png").write_bytes(b"")
    first = write(tmp_path, "a.jsonl", [row("one"), "{", row(image="a.png")])
    second = write(tmp_path, "b.jsonl", [row(image="empty.png"), row("two " * 30), row("x" * 3000)])
    seen = []
    index = build_index(
        [first, second], collator, max_tokens=400, max_rejected_fraction=0.5, progress=lambda *done: seen.append(done)
    )
    assert seen == [(done, 6) for done in range(1, 7)]
    assert (index.num_rows, index.num_usable) == (6, 3)
    assert index.usable(0).tolist() == [0, 2]
    assert index.usable(1).tolist() == [4]
    assert [index.locate(number) for number in (0, 2, 3, 5)] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    for number in (0, 2, 4):
        place, line = index.locate(number)
        cost = collator.cost([first, second][place].sample(line))
        columns = (index.tokens, index.visual_tokens, index.patches, index.patch_pairs)
        assert tuple(column[number] for column in columns) == cost
    tokens = collator.cost(second.sample(2)).tokens
    assert index.rejects == [
        Reject(f"{tmp_path}/a.jsonl", 2, "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
               "(char 1)); write one object a line"),
        Reject(f"{tmp_path}/b.jsonl", 1, "messages[0].content[1]: image empty.png: is empty (0 bytes); copy the file "
               "again"),
        Reject(f"{tmp_path}/b.jsonl", 3, f"sample of {tokens} tokens (0 visual) is longer than a pack of 400; raise "
               "data.max_tokens_per_pack or lower data.max_visual_tokens_per_image"),
    ]  # fmt: skip


def test_a_sample_as_long_as_a_pack_fits(tmp_path, collator):
    source = write(tmp_path, "a.jsonl", [row("one")])
    tokens = collator.cost(source.sample(0)).tokens
    assert build_index([source], collator, max_tokens=tokens).num_usable == 1
    with pytest.raises(ValueError, match="nothing to learn from"):
        build_index([source], collator, max_tokens=tokens - 1)


def test_too_many_rejected_rows_stop_the_run(tmp_path, collator):
    source = write(tmp_path, "a.jsonl", [row(), "{}", row(), row()])
    assert len(build_index([source], collator, max_tokens=100, max_rejected_fraction=0.25).rejects) == 1
    with pytest.raises(ValueError) as caught:
        build_index([source], collator, max_tokens=100, max_rejected_fraction=0.2)
    assert str(caught.value) == (
        "data: 1 of 4 rows cannot be used, more than data.max_rejected_fraction 0.2; mend them or raise it\n"
        f'  - {tmp_path}/a.jsonl:2: no messages; write {{"messages": [{{"role": ..., "content": ...}}, ...]}}'
    )


def test_data_with_nothing_to_learn_from(tmp_path, collator):
    asked = json.dumps({"messages": [{"role": "user", "content": "a"}]})
    sources = [write(tmp_path, "a.jsonl", [asked] * 5), write(tmp_path, "b.jsonl", [])]
    with pytest.raises(ValueError) as caught:
        build_index(sources, collator, max_tokens=100)
    reason = "nothing to learn: no assistant message is trained; add an answer or take out loss: false"
    assert str(caught.value) == (
        f"{tmp_path}/a.jsonl, {tmp_path}/b.jsonl: nothing to learn from, none of 5 rows can be used; mend the rows"
        + "".join(f"\n  - {tmp_path}/a.jsonl:{line}: {reason}" for line in (1, 2, 3))
    )
    with pytest.raises(
        ValueError, match=r"b\.jsonl: nothing to learn from, none of 0 rows can be used; mend the rows$"
    ):
        build_index(sources[1:], collator, max_tokens=100)


def test_the_digest_follows_the_costs(tmp_path, collator, tiny_folder):
    Image.new("RGB", (512, 512)).save(tmp_path / "a.png")
    source = write(tmp_path, "a.jsonl", [row(image="a.png")])
    small = MultimodalCollator.from_pretrained(tiny_folder, max_visual_tokens_per_image=16)
    digests = [build_index([source], c, max_tokens=1000).digest() for c in (collator, collator, small)]
    assert digests[0] == digests[1] != digests[2]
