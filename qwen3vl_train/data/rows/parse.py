"""One row, in any format and from any file -> one checked `Sample`, by the rules of its data set."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qwen3vl_train.data.errors import MediaFault, RowFault
from qwen3vl_train.data.media.paths import LinkedRoot, is_base64
from qwen3vl_train.data.media.remote import ANY_HOST, Remote, is_web_address, web_host
from qwen3vl_train.data.rows.boxes import NO_CONVENTION, Convention, fill_boxes, fill_objects
from qwen3vl_train.data.rows.formats import (
    FORMATS,
    READ_COLUMNS,
    Columns,
    Row,
    RowReader,
    detect_format,
    metadata_of,
)
from qwen3vl_train.data.rows.keys import Keys
from qwen3vl_train.data.rows.media_files import media_of
from qwen3vl_train.data.rows.messages import read_tools, read_turns
from qwen3vl_train.data.rows.placeholders import place_media
from qwen3vl_train.data.rows.sample import ImagePart, Part, Sample, TextPart, VideoPart
from qwen3vl_train.data.rows.turns import read_all_turns
from qwen3vl_train.data.rows.values import decode_json, to_json, wrong_type

MAX_ROW_BYTES = 256 << 20
"""Of one row in a file, media inside included: several copies of it are in memory while it is read."""
MAX_TEXT_CHARACTERS = 4_000_000
"""Of all texts of a row, its tools and calls included. Qwen3-VL has 262,144 positions and four characters make a token
of prose, so this is four times what any pack can hold. See also `LengthRule.admit`."""
MAX_MEDIA = 4096
"""Of a row. At 64 tokens, the fewest that the released checkpoints give an image, more exceed 262,144 positions."""

ResolveMedium = Callable[[str], Any]
"""Return the medium that a row of an archive or a data set names, or a path under media_root. Raise MediaFault."""


@dataclass(frozen=True)
class RowRules:
    """How the rows of one entry of the recipe are read.

    label: name of the data set in sample ids, and so of its own loss curve; None: the file's name.
    format: a member of FORMATS, or auto.
    columns: our name -> theirs; for images and videos it may be several.
    texts: our name -> a text that takes the place of a column: the same question for every picture.
    train_on: all answers of a row, or only the last.
    boxes: the convention of boxes where a row states none.
    follow_links: links in media_root are followed wherever they lead.
    allow_urls: media at web addresses are downloaded, when the row is indexed and again whenever it is trained on.
    allow_private_urls: also from loopback, link-local and private addresses, which only media_root may have otherwise.
    """

    label: str | None = None
    format: str = "auto"
    columns: Columns = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    train_on: str = "all"
    boxes: Convention = NO_CONVENTION
    allow_urls: bool = False
    follow_links: bool = False
    allow_private_urls: bool = False

    def columns_read(self) -> set[str]:
        """Return every column of a typed file that these rules read."""
        given = (names if not isinstance(names, str) else (names,) for names in self.columns.values())
        return {*READ_COLUMNS, *(name for names in given for name in names)}

    def sample_id(self, file: str, row_number: int) -> str:
        """Name a row: `label:train.jsonl:17`, or `train.jsonl:17` where the file is the label. See `dataset_of`."""
        file = file.replace(":", "_")
        return f"{file}:{row_number}" if self.label in (None, file) else f"{self.label}:{file}:{row_number}"

    def sample(
        self, row: Any, sample_id: str, media_root: str | None = None, resolve: ResolveMedium | None = None
    ) -> Sample:
        """Return the row as a Sample that trains something. media_root: a folder or an fsspec URL. Raise RowFault."""
        if isinstance(row, list) and row and all(isinstance(item, dict) for item in row):
            if not any(key in row[0] for key in ("role", "from")):
                fault = "row is a list of rows that another tool packed; give the rows themselves, packing is done here"
                raise RowFault(fault, kind="wrong_type")
            row = {"messages": row}
        if not isinstance(row, dict):
            what = {list: "a list", str: "a string", type(None): "null"}.get(type(row), "a value")
            raise RowFault(f'row is {what}, not an object; write {{"messages": [...]}}', kind="wrong_type")
        read = read_row(row, self.columns, self.texts, self.format)
        if media_root is not None and self.follow_links:
            media_root = LinkedRoot(media_root)
        sample = replace(read, sample_id=sample_id, media_root=media_root)
        _check_size(sample)
        sample = self._resolve_media(sample, resolve)
        try:
            sample = fill_objects(fill_boxes(sample, row, self.columns, self.boxes), row)
        except RowFault as fault:
            fault.sample = sample  # what is wrong with a box may be its image
            raise
        if self.train_on == "last":
            last = next((message for message in reversed(sample.messages) if message.role == "assistant"), None)
            weighted = (turn if turn is last else replace(turn, loss_weight=0.0) for turn in sample.messages)
            sample = replace(sample, messages=tuple(weighted))
        if not any(message.loss_weight > 0 for message in sample.messages):
            fault = "nothing to learn: no assistant message is trained; add an answer or remove loss: false"
            raise RowFault(fault, kind="nothing_to_learn")
        return sample

    def _resolve_media(self, sample: Sample, resolve: ResolveMedium | None) -> Sample:
        root = sample.media_root if sample.media_root and "://" in sample.media_root else None
        if resolve is None and root is None and not self.allow_urls:
            return sample
        private_host = ANY_HOST if self.allow_private_urls else web_host(root)

        def resolved(medium: Any) -> Any:
            if isinstance(medium, tuple):
                return tuple(map(resolved, medium))
            if not isinstance(medium, str) or medium.startswith("data:") or is_base64(medium):
                return medium
            if self.allow_urls and is_web_address(medium):
                return Remote(medium, private_host)
            found = medium if resolve is None else resolve(medium)
            return _join_url(root, found, private_host) if root is not None and isinstance(found, str) else found

        def resolved_part(part: Part) -> Part:
            if isinstance(part, ImagePart):
                return replace(part, image=resolved(part.image))
            return replace(part, video=resolved(part.video)) if isinstance(part, VideoPart) else part

        messages = [replace(message, content=tuple(map(resolved_part, message.content))) for message in sample.messages]
        return replace(sample, messages=tuple(messages), media_root=None if root else sample.media_root)


def read_row(row: Row, columns: Columns, texts: Mapping[str, str], row_format: str = "auto") -> Sample:
    """Read a row of any format as a Sample without boxes.

    columns: our name -> theirs.
    texts: our name -> the fixed text that every row has there.
    Raise RowFault, also when placeholders and media differ in number.

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]} -> a message of the user
    with the image a.png and the text "What?", ...
    """
    reader = RowReader(row, columns, texts)
    found = detect_format(row, columns, texts) if row_format == "auto" else row_format
    turns = read_all_turns(reader, found)
    listed = reader.listed_media()
    turns = place_media(turns, listed, found in ("columns", "texts", "prompt"), reader.ignored)
    tools = read_tools(reader.keys)
    sample = Sample(tuple(turn.message() for turn in turns), tools, row_format=found)
    ignored = reader.ignored + metadata_of(reader.close(row_format), row, list(media_of(sample)))
    return replace(sample, ignored=tuple(dict.fromkeys(ignored))) if ignored else sample


def parse_sample(row: Any, sample_id: str = "sample", media_root: str | None = None) -> Sample:
    """Turn `{"messages": [...], "tools": [...]}` into a Sample; other keys of the row are ignored. Raise RowFault.

    Every medium is in a typed part; a text is a text. The answer may be missing.
    """
    if not isinstance(row, dict):
        raise wrong_type("row", row, ', not an object; write {"messages": [...]}')
    turns = read_turns(row.get("messages"), "messages", [])
    return Sample(tuple(turn.message() for turn in turns), read_tools(Keys(row)), sample_id, media_root)


def _join_url(root: str, path: str, private_host: str | None) -> Remote:
    if "://" in path or path.startswith("/") or ".." in path.replace("\\", "/").split("/") or not path:
        fault = f"{path[:200]}: is outside media_root {Remote(root)}; give a path below it"
        raise MediaFault(fault, kind="forbidden_path")
    return Remote(f"{root.rstrip('/')}/{path}", private_host)


def dataset_of(sample_id: str) -> str:
    """Return the data set of a sample id: its label in the recipe, or else its file."""
    return sample_id.split(":", 1)[0]


def decode_row(text: bytes, *, first: bool = False) -> Any:
    """Parse one row of JSON. first: a byte order mark may precede it. Raise RowFault."""
    try:
        return decode_json(text.decode("utf-8-sig" if first else "utf-8").strip())
    except RowFault:
        raise
    except UnicodeDecodeError as error:
        fault = f"not UTF-8 (byte {error.start} of the line); save the file as UTF-8"
        raise RowFault(fault, kind="invalid_json") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RowFault(f"not JSON ({reason}); write one object a line", kind="invalid_json") from None


def format_counts(name: str, counts: Mapping[str, int]) -> str:
    """Describe the formats of a data set's rows: "train.jsonl: 7 rows, openai 5, sharegpt 2"."""
    found = ", ".join(f"{known} {counts[known]:,}" for known in FORMATS if counts.get(known))
    return f"{name}: {sum(counts.values()):,} rows, {found or 'of no known format'}"


def _check_size(sample: Sample) -> None:
    texts = [part.text for part in sample.parts if isinstance(part, TextPart)]
    texts += [message.reasoning or "" for message in sample.messages] + [to_json(tool) for tool in sample.tools]
    for call in (call for message in sample.messages for call in message.tool_calls):
        texts += [call.name, call.arguments if isinstance(call.arguments, str) else to_json(call.arguments)]
    if (characters := sum(map(len, texts))) > MAX_TEXT_CHARACTERS:
        limit = f"{MAX_TEXT_CHARACTERS:,}, far beyond any pack; split it"
        raise RowFault(f"{characters:,} characters of text are more than {limit}", kind="too_long")
    num_media = sum(not isinstance(part, TextPart) for part in sample.parts)
    if num_media > MAX_MEDIA:
        limit = f"{MAX_MEDIA:,}, beyond the model's context; split the row"
        raise RowFault(f"{num_media:,} images and videos are more than {limit}", kind="too_long")
