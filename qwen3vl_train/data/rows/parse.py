"""One row, in whatever shape and from whatever file -> one checked `Sample`, by the rules of its data set."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from qwen3vl_train.data.encode.chat import as_json
from qwen3vl_train.data.errors import MediaFault, RowFault
from qwen3vl_train.data.media.remote import Remote, is_web_address
from qwen3vl_train.data.rows.boxes import NOT_SAID, Convention, write_boxes
from qwen3vl_train.data.rows.formats import READ_COLUMNS, SHAPES, recognise, to_messages
from qwen3vl_train.data.rows.sample import Message, Part, Sample, TextPart, parse_sample

MAX_ROW_BYTES = 256 << 20
"""Of one row in a file, media inside included: it is held in memory a few times over while it is read."""
MAX_TEXT_CHARACTERS = 4_000_000
"""Of all texts of a row, tools and calls of them included. Qwen3-VL knows 262,144 places and four characters make a
token of prose, so this is four times what any pack can hold. See also `LengthRule.admit`.
"""
MAX_MEDIA = 4096
"""Of a row. At 64 tokens, the least that the released checkpoints give an image, more do not fit in 262,144 places."""

Find = Callable[[str], Any]
"""Returns what a name in a row of an archive or a data set stands for: its medium, or a path under media_root. Raises
MediaFault."""


@dataclass(frozen=True)
class RowRules:
    """How the rows of one entry of the recipe are read.

    label: names the data set in sample ids, and so in its own loss curve; None: the file's name. format: a member of
    SHAPES, or auto. columns: our name -> theirs. train_on: all answers, or only the last of each row. allow_urls: media
    at web addresses are downloaded, once when the row is indexed and again whenever it is trained on.
    """

    label: str | None = None
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    train_on: str = "all"
    boxes: Convention = NOT_SAID
    allow_urls: bool = False

    def columns_read(self) -> set[str]:
        """Every column of a typed file that these rules look at."""
        return {*READ_COLUMNS, *self.columns.values()}

    def sample_id(self, file: str, row_number: int) -> str:
        """Name a row: `label:train.jsonl:17`, or `train.jsonl:17` where the file is the label. See `source_of`."""
        file = file.replace(":", "_")
        return f"{file}:{row_number}" if self.label in (None, file) else f"{self.label}:{file}:{row_number}"

    def sample(self, row: Any, sample_id: str, media_root: str | None = None, find: Find | None = None) -> Sample:
        """Return the row as a Sample that has something to learn. Raises RowFault.

        find: where its media are, if not under media_root, which may be a folder or an fsspec URL; see `Find`.
        """
        if not isinstance(row, dict):
            raise RowFault(_no_object(row), kind="wrong_type")
        shape = recognise(row, self.columns) if self.format == "auto" else self.format
        sample = replace(parse_sample(to_messages(row, shape, self.columns), sample_id, media_root), shape=shape)
        _check_size(sample)
        sample = self._with_media(sample, find)
        try:
            sample = write_boxes(sample, row, self.columns, self.boxes)
        except RowFault as fault:
            fault.sample = sample  # what is wrong with a box may be its image
            raise
        if self.train_on == "last":
            sample = replace(sample, messages=_only_last_trained(sample.messages))
        if not any(message.loss_weight > 0 for message in sample.messages):
            raise RowFault(
                "nothing to learn: no assistant message is trained; add an answer or take out loss: false",
                kind="nothing_to_learn",
            )
        return sample

    def _with_media(self, sample: Sample, find: Find | None) -> Sample:
        root = sample.media_root if sample.media_root and "://" in sample.media_root else None

        def place(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(place(item) for item in value)
            if not isinstance(value, str) or value.startswith("data:"):
                return value
            if self.allow_urls and is_web_address(value):
                return Remote(value)
            found = value if find is None else find(value)
            return _under_url(root, found) if root is not None and isinstance(found, str) else found

        if find is None and root is None and not self.allow_urls:
            return sample
        messages = [replace(message, content=_mapped(message.content, place)) for message in sample.messages]
        return replace(sample, messages=tuple(messages), media_root=None if root else sample.media_root)


def _mapped(content: Iterable[Part], place: Callable[[Any], Any]) -> tuple[Part, ...]:
    """Apply `place` to the medium of each part, which stands in a field of the part's own kind: image or video."""
    placed = []
    for part in content:
        names = {"image", "video"} & {known.name for known in fields(part)}
        placed.append(replace(part, **{name: place(getattr(part, name)) for name in names}) if names else part)
    return tuple(placed)


def _under_url(root: str, path: str) -> Remote:
    if "://" in path or path.startswith("/") or ".." in path.replace("\\", "/").split("/") or not path:
        raise MediaFault(f"{path[:200]}: leaves media_root {Remote(root)}; give a path below it", kind="forbidden_path")
    return Remote(f"{root.rstrip('/')}/{path}")


def source_of(sample_id: str) -> str:
    """Return the data set that a sample id names: its label in the recipe, or else its file."""
    return sample_id.split(":", 1)[0]


def decode_row(text: bytes, *, first: bool = False) -> Any:
    """Read one row of JSON. first: a byte order mark may stand before it. Raises RowFault."""
    try:
        return json.loads(text.decode("utf-8-sig" if first else "utf-8").strip())
    except UnicodeDecodeError as error:
        raise RowFault(
            f"not UTF-8 (byte {error.start} of the line); save the file as UTF-8", kind="invalid_json"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RowFault(f"not JSON ({reason}); write one object a line", kind="invalid_json") from None


def shapes_line(name: str, counts: Mapping[str, int]) -> str:
    """Say which shapes the rows of a data set have: "train.jsonl: 7 rows, openai 5, sharegpt 2"."""
    found = ", ".join(f"{shape} {counts[shape]:,}" for shape in SHAPES if counts.get(shape))
    return f"{name}: {sum(counts.values()):,} rows, {found or 'of no known shape'}"


def _no_object(row: Any) -> str:
    if isinstance(row, list) and row and all(isinstance(item, dict) for item in row):
        return "row is a list of rows that another tool packed; give the rows themselves, packing is done here"
    kind = {list: "a list", str: "a string", type(None): "null"}.get(type(row), "no object")
    return f'row is {kind}, not an object; write {{"messages": [...]}}'


def _check_size(sample: Sample) -> None:
    content = [part for message in sample.messages for part in message.content]
    characters = sum(len(part.text) for part in content if isinstance(part, TextPart))
    characters += sum(len(message.reasoning or "") for message in sample.messages)
    characters += sum(len(as_json(tool)) for tool in sample.tools)
    characters += sum(
        len(call.name) + len(call.arguments if isinstance(call.arguments, str) else as_json(call.arguments))
        for message in sample.messages
        for call in message.tool_calls
    )
    if characters > MAX_TEXT_CHARACTERS:
        raise RowFault(
            f"{characters:,} characters of text are more than {MAX_TEXT_CHARACTERS:,}, far beyond any pack; split it",
            kind="too_long",
        )
    media = sum(not isinstance(part, TextPart) for part in content)
    if media > MAX_MEDIA:
        raise RowFault(
            f"{media:,} images and videos are more than {MAX_MEDIA:,}, beyond the model's context; split the row",
            kind="too_long",
        )


def _only_last_trained(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    last = max((place for place, message in enumerate(messages) if message.role == "assistant"), default=-1)
    return tuple(
        message if place == last else replace(message, loss_weight=0.0) for place, message in enumerate(messages)
    )
