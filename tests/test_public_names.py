"""What may be secret in names and addresses is not shown."""

import pytest

from qwen3vl_train.public_names import last_part, public_name, public_text, public_values

SHOWN = {
    "a/b@c?d.jsonl": "a/b@c?d.jsonl",
    "s3://bucket/a@b.jsonl": "s3://bucket/a@b.jsonl",
    "hf://datasets/owner/name@main/a.png": "hf://datasets/owner/name@main/a.png",
    "file:///data/a.jsonl": "file:///data/a.jsonl",
    "https://host:8080/a.jsonl": "https://host:8080/a.jsonl",
    "http://[::1]:80/a": "http://[::1]:80/a",
    "s3://user:pw@host/a.jsonl?sig=x&part=1": "s3://***@host/a.jsonl?***",
    "https://ghp_x@host/i@2": "https://***@host/i@2",
    "https://host/a b?sig=x y": "https://host/a b?***",
    "https://host/a#token": "https://host/a#***",
    "https://host/a?": "https://host/a?",
    "https://user:p/w@host/a": "https://***@host/a",
    "https://user:p?w@host/a?x=1": "https://***@host/a?***",
    "https://user:p@w@host/a": "https://***@host/a",
    "https://user:pw": "https://***",
    "https:/user:pw@host/a?x=1": "https:/***@host/a?***",
    "zip://a.png::https://u:pw@host/a.zip?sig=x": "zip://a.png::https://***@host/a.zip?***",
    "data/hf_" + 34 * "a" + "/a.jsonl": "data/***/a.jsonl",
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_name_is_shown_without_secrets(name):
    assert public_name(name) == SHOWN[name]
    assert public_name(SHOWN[name]) == SHOWN[name], "twice is once"


def test_a_message_keeps_all_but_the_secrets():
    text = "a.jsonl:3: image https://u:p@h/a.png?sig=x: 404 (HTTP://h/b?c=d), see 'gs://k@b/c'; why? a:/b@c"
    shown = "a.jsonl:3: image https://***@h/a.png?***: 404 (HTTP://h/b?***), see 'gs://***@b/c'; why? a:/b@c"
    assert public_text(text) == shown
    assert public_text(shown) == shown


def test_values_and_last_parts():
    assert public_values({"a": ["s3://u@h/x", 1], "b": None}) == {"a": ["s3://***@h/x", 1], "b": None}
    assert last_part("https://u:p@h/d/a.jsonl?token=b/c.d") == "a.jsonl"
    assert last_part("data/a?.jsonl") == "a?.jsonl"
    assert last_part("folder/") == "folder"
