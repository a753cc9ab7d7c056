"""The checkpoint's tokenizer, with one rule of our own: typed text never becomes chat markup."""

import difflib
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, processors

from qwen3vl_train.arch import Qwen3VLArch

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
"""The chat markup. It is written by the template and by media, and typed into a text it stays text."""
RELEASED_TOKENS = frozenset(SPECIAL_TOKENS) | {
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
}  # fmt: skip
"""The added tokens of the released checkpoints: any other was added later, with a new row of the embedding."""

_CACHED_CHARACTERS, _CACHED_TEXTS = 16, 1024
"""Limits on the texts whose token count is cached: role names and line ends are in every sample."""


class ChatTokenizer:
    """Encode plain text, and map the names of special tokens to ids. Can be pickled.

    special_ids: name -> id of SPECIAL_TOKENS.
    added_tokens: id -> name of all other added tokens, special or not (`<|box_start|>`, `<think>`, those of a user).
        They are recognised in text, as transformers does.
    """

    def __init__(self, tokenizer: Tokenizer, where: str = "tokenizer") -> None:
        """Wrap a tokenizer. Raise ValueError that names every special token that is missing or not marked special."""
        added = tokenizer.get_added_tokens_decoder()
        ids = {name: token for name in SPECIAL_TOKENS if (token := tokenizer.token_to_id(name)) is not None}
        missing = [name for name in SPECIAL_TOKENS if name not in ids]
        if missing:
            raise ValueError(f"{where}: no token {', '.join(missing)}; give the tokenizer of a Qwen3-VL checkpoint")
        plain = [name for name, token in ids.items() if token not in added or not added[token].special]
        if plain:
            fault = f"{', '.join(plain)} not marked special, so that typed text would become it"
            raise ValueError(f"{where}: {fault}; set special to true in added_tokens")
        if any(token.special and token.content not in ids for token in added.values()):
            tokenizer = _load(json.loads(tokenizer.to_str()))
        self.special_ids: dict[str, int] = ids
        self.added_tokens = {token: one.content for token, one in added.items() if one.content not in ids}
        self._where, self._tokenizer = where, tokenizer
        self._counts: dict[str, int] = {}
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # "encode as text": what is marked special stays text
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # offsets keep leading blanks

    @classmethod
    def from_pretrained(cls, model_path: str | Path, arch: Qwen3VLArch | None = None) -> "ChatTokenizer":
        """Read `model_path/tokenizer.json`; with arch, check its ids. Raise ValueError."""
        file = Path(model_path) / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{file}: no such file; give the folder of a Qwen3-VL checkpoint with its tokenizer")
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise ValueError(f"{file}: is not a tokenizer (no 'model'); copy the file again")
        try:
            loaded = cls(_load(content), where=str(file))
        except ValueError:
            raise
        except Exception as error:  # tokenizers raises nothing more special; a damaged file KeyError, TypeError, ...
            what = f"cannot be read as a tokenizer ({type(error).__name__}: {str(error)[:200]})"
            raise ValueError(f"{file}: {what}; give the tokenizer of a Qwen3-VL checkpoint") from None
        loaded._check_added(Path(model_path) / "tokenizer_config.json")
        if arch is not None:
            loaded._check_ids(arch)
        return loaded

    @cached_property
    def digest(self) -> str:
        """A hash of the tokenizer."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def _check_ids(self, arch: Qwen3VLArch) -> None:
        """Raise ValueError where config.json and the tokenizer give different ids to the vision tokens."""
        wanted = {
            IMAGE_PAD: arch.image_token_id,
            VIDEO_PAD: arch.video_token_id,
            VISION_START: arch.vision_start_token_id,
            VISION_END: arch.vision_end_token_id,
        }
        mismatches = [
            f"{name} is {self.special_ids[name]}, config.json says {token}"
            for name, token in wanted.items()
            if self.special_ids[name] != token
        ]
        highest = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        if highest >= arch.text.vocab_size:
            mismatches.append(f"its highest id {highest} is outside the model's vocabulary of {arch.text.vocab_size}")
        if mismatches:
            raise ValueError(f"{self._where}: {'; '.join(mismatches)}; use the tokenizer of this checkpoint")

    def _check_added(self, file: Path) -> None:
        """Raise ValueError where tokenizer_config.json lists added tokens that tokenizer.json lacks.

        transformers would add them, and every text that has one would be other tokens there.
        """
        config = read_json(file) if file.is_file() else {}
        listed = config.get("added_tokens_decoder") if isinstance(config, dict) else None
        known = {str(token): name for token, name in self.added_tokens.items()}
        known |= {str(token): name for name, token in self.special_ids.items()}
        for token, entry in (listed if isinstance(listed, dict) else {}).items():
            name = entry.get("content") if isinstance(entry, dict) else None
            if known.get(token) != name:
                what = f"lists {name} as added token {token}, {self._where} {known.get(token, 'none')}"
                raise ValueError(f"{file}: {what}; save the tokenizer again with its save_pretrained")

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and, for each, its (start, end) characters in text. Chat markup stays text."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def count(self, text: str) -> int:
        """Return the number of ids that `encode` gives, in half its time; counts of short texts are cached."""
        found = self._counts.get(text)
        if found is None:
            found = len(self._tokenizer.encode(text, add_special_tokens=False))
            if len(text) <= _CACHED_CHARACTERS and len(self._counts) < _CACHED_TEXTS:
                self._counts[text] = found
        return found

    @cached_property
    def max_token_bytes(self) -> int:
        """The most bytes of text, in Unicode normal form C, that one token decodes to."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)  # byte-level: writes each byte as one letter
        added = [token.content.encode() for token in self._tokenizer.get_added_tokens_decoder().values()]
        return max(map(len, [*vocabulary, *added]))

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids, in Unicode normal form C. skip_special_tokens: without the chat markup."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def __reduce__(self) -> tuple:
        # A pickled Tokenizer loses encode_special_tokens, which __init__ sets again.
        return ChatTokenizer, (self._tokenizer, self._where)


def _load(content: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer of a tokenizer.json in which no more than the chat markup is marked special."""
    added = content.get("added_tokens") or []
    rest = [{**token, "special": token.get("special", False) and token["content"] in SPECIAL_TOKENS} for token in added]
    return Tokenizer.from_str(json.dumps({**content, "added_tokens": rest}))


def new_token_ids(model_path: str | Path, names: Literal["all"] | Sequence[str]) -> list[int]:
    """Return the ids of added tokens by name, in order of their ids; all: of those that no released checkpoint has.

    Raises ValueError for a name that the tokenizer does not have as an added token, and where it has no new one.
    """
    tokenizer = ChatTokenizer.from_pretrained(model_path, Qwen3VLArch.from_pretrained(model_path))
    added = {name: token for token, name in tokenizer.added_tokens.items()} | tokenizer.special_ids
    wanted = [name for name in added if name not in RELEASED_TOKENS] if names == "all" else names
    where, add = f"tune.new_tokens: {model_path}", "add them to its tokenizer with transformers, and save it there"
    if not wanted:
        raise ValueError(f"{where} has no added token that a released Qwen3-VL does not have; {add}")
    if missing := [name for name in wanted if name not in added]:
        near = difflib.get_close_matches(missing[0], added, n=2)
        hint = f" (near: {', '.join(near)})" if near else ""
        raise ValueError(f"{where} has no added token {', '.join(missing[:5])}{hint}; {add}")
    return sorted({added[name] for name in wanted})


def read_json(file: Path) -> Any:
    """Parse a JSON file of a checkpoint. Raise ValueError that names it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); copy the file again") from None
