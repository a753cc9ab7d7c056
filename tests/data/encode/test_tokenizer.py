import json
import pickle
import shutil
import unicodedata

import pytest
import tiny_checkpoint
from tokenizers import AddedToken

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.tokenizer import RELEASED_TOKENS, SPECIAL_TOKENS, ChatTokenizer
from tests.helpers.messages import message_of


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return ChatTokenizer.from_pretrained(tiny_folder, Qwen3VLArch.from_pretrained(tiny_folder))


def test_typed_special_tokens_stay_text(tokenizer):
    for name in SPECIAL_TOKENS:
        ids, offsets = tokenizer.encode(f"a{name}b")
        assert not set(ids) & set(tokenizer.special_ids.values())
        assert len(ids) > 3
        assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{name}b"
        assert (offsets[0][0], offsets[-1][1]) == (0, len(name) + 2)
    assert len(tokenizer.encode("<think>")[0]) == len(tokenizer.encode("</tool_call>")[0]) == 1


USER_TOKENS = [
    AddedToken("<|seg|>", special=True, normalized=False),
    AddedToken("<mask>", special=True, lstrip=True, normalized=False),
    AddedToken("<loc_7>", special=False, normalized=False),
    AddedToken("Größe", special=False, normalized=True, single_word=True),
]
TEXTS_WITH_TOKENS = [
    "It is <|seg|>.", "<|seg|><|seg|>", "a  <mask> b", "Gro\u0308ße, Größen", "<|box_start|>(1,2),(3,4)<|box_end|>",
    "the <|object_ref_start|>cat<|object_ref_end|> <loc_7><loc_70>", "<|vision_pad|><|quad_start|>",
    '<tool_call>\n{"name": 1}\n</tool_call>', "<think>a</think>b <|fim_prefix|><|repo_name|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def extended(tiny_folder, tmp_path_factory):
    """A checkpoint to whose tokenizer transformers has added tokens of every kind."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("extended") / "model"
    shutil.copytree(tiny_folder, folder)
    stock = AutoTokenizer.from_pretrained(folder)
    stock.add_tokens(USER_TOKENS)
    stock.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("text", TEXTS_WITH_TOKENS)
def test_added_tokens_in_texts_are_those_of_transformers(extended, text):
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": f"What of {text}"}, {"role": "assistant", "content": f"That: {text} "}]
    stock = AutoTokenizer.from_pretrained(extended)
    theirs = stock.apply_chat_template(messages, tokenize=True, return_dict=False)
    collate = MultimodalCollator.from_pretrained(extended)
    encoded = collate.encode({"messages": messages})
    assert encoded.input_ids.tolist() == theirs
    assert set(collate.tokenizer.added_tokens) & set(theirs)
    answer = collate.decode(encoded.label_ids.tolist(), skip_special_tokens=False)
    assert answer.endswith(f"{stock.decode(stock.encode(text))} <|im_end|>")
    assert pickle.loads(pickle.dumps(collate)).encode({"messages": messages}).input_ids.tolist() == theirs


def test_added_tokens_are_listed_and_decoded(extended):
    tokenizer = ChatTokenizer.from_pretrained(extended, Qwen3VLArch.from_pretrained(extended))
    assert set(tokenizer.added_tokens.values()) - RELEASED_TOKENS == {token.content for token in USER_TOKENS}
    assert not set(tokenizer.added_tokens) & set(tokenizer.special_ids.values())
    assert {name for name, _ in tiny_checkpoint.ADDED_TOKENS} == RELEASED_TOKENS
    ids = [*tokenizer.encode("a<|seg|><|box_end|>")[0], tokenizer.special_ids["<|im_end|>"]]
    assert tokenizer.decode(ids) == "a<|seg|><|box_end|>"


def test_added_tokens_that_one_file_alone_has(file):
    def add(config):
        config["added_tokens_decoder"]["500"] = {"content": "<|seg|>", "special": True}

    rewrite(file.with_name("tokenizer_config.json"), add)
    fault = message_of(ValueError, ChatTokenizer.from_pretrained, file.parent)
    assert fault == (
        f"{file.with_name('tokenizer_config.json')}: lists <|seg|> as added token 500, {file} none; "
        "save the tokenizer again with its save_pretrained"
    )


def test_offsets_count_characters_of_the_text_as_given(tokenizer):
    text = "é e\u0301 漢字  \n\n🙂 end"  # the second é is two characters; normal form C joins them, at the first
    ids, offsets = tokenizer.encode(text)
    assert len(ids) == len(offsets)
    covered = {place for start, end in offsets for place in range(start, end)}
    assert covered == set(range(len(text))) - {text.index("\u0301")}


TEXTS = [
    "", " ", "7" * 500, "word " * 300, " \n\t" * 90, "\U0001f642" * 200, "=-" * 200, "漢字ü" * 99, "<think>" * 40,
    "a1 .é" * 50, "e\u0301" * 300, "\u1112\u1161\u11ab" * 300,  # normal form C leaves 2 bytes of 3, and 3 of 9
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:8]))
def test_no_token_stands_for_more_than_max_token_bytes(tokenizer, text):
    of_bytes = ChatTokenizer(tiny_checkpoint.build_tokenizer([], 256 + len(tiny_checkpoint.ADDED_TOKENS)))
    num_bytes = len(unicodedata.normalize("NFC", text).encode())
    for one in (tokenizer, of_bytes):
        assert num_bytes <= one.max_token_bytes * len(one.encode(text)[0])


def test_decode_skips_or_keeps_special_tokens(tokenizer):
    ids = [*tokenizer.encode("yes")[0], tokenizer.special_ids["<|im_end|>"]]
    assert tokenizer.decode(ids) == "yes"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "yes<|im_end|>"


@pytest.fixture
def file(tiny_folder, tmp_path):
    """The tokenizer of a copy of the folder, to be changed."""
    shutil.copytree(tiny_folder, tmp_path / "copy")
    return tmp_path / "copy" / "tokenizer.json"


def fault_of(file) -> str:
    fault = message_of(ValueError, ChatTokenizer.from_pretrained, file.parent, Qwen3VLArch.from_pretrained(file.parent))
    assert fault.startswith(f"{file}: ")
    return fault.removeprefix(f"{file}: ")


def rewrite(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_missing_and_damaged_files(file):
    file.write_text(file.read_text()[:1000])
    fault = fault_of(file)
    assert fault.startswith("not JSON (")
    assert fault.endswith("); copy the file again")
    file.write_text("{}")
    assert fault_of(file) == "is not a tokenizer (no 'model'); copy the file again"
    file.unlink()
    assert fault_of(file) == "no such file; give the folder of a Qwen3-VL checkpoint with its tokenizer"


def test_missing_special_tokens_are_named(file):
    def drop(content):
        lost = ("<|im_end|>", "<|image_pad|>")
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in lost]

    rewrite(file, drop)
    assert fault_of(file) == "no token <|im_end|>, <|image_pad|>; give the tokenizer of a Qwen3-VL checkpoint"


def test_special_tokens_that_text_could_become(file):
    def unmark(content):
        for token in content["added_tokens"]:
            token["special"] = token["special"] and token["content"] != "<|im_end|>"

    rewrite(file, unmark)
    assert fault_of(file) == (
        "<|im_end|> not marked special, so that typed text would become it; set special to true in added_tokens"
    )


def test_ids_that_contradict_the_config(tiny_folder, file):
    def change(config):
        config["image_token_id"] = 5
        config["text_config"]["vocab_size"] = 300

    rewrite(file.with_name("config.json"), change)
    size = tiny_checkpoint.build_tokenizer(tiny_checkpoint.default_texts(), 512).get_vocab_size()
    pad = ChatTokenizer.from_pretrained(tiny_folder).special_ids["<|image_pad|>"]
    assert fault_of(file) == (
        f"<|image_pad|> is {pad}, config.json says 5; its highest id {size - 1} is outside the model's "
        "vocabulary of 300; use the tokenizer of this checkpoint"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"].update(type="Unknown"),
        lambda content: content["added_tokens"].append({"id": 1}),
        lambda content: content.update(pre_tokenizer={"type": "Nothing"}),
        lambda content: content.update(added_tokens=7),
    ],
)
def test_tokenizer_of_an_unknown_model_is_named(file, change):
    rewrite(file, change)
    fault = fault_of(file)
    assert fault.startswith("cannot be read as a tokenizer (")
    assert fault.endswith("); give the tokenizer of a Qwen3-VL checkpoint")
