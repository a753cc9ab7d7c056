"""The fields of `data` in a recipe, and the types that all sections share."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.functional_validators import AfterValidator, BeforeValidator

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Positive = Annotated[float, Field(gt=0.0, le=1e12)]
Seconds = Annotated[float, Field(gt=0.0, le=1e7)]
Rate = Annotated[float, Field(gt=0.0, le=1000.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Take strict types, no unknown keys, no NaN and no infinity; be frozen: the base of all sections."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            f"got {name[:120]!r}; it becomes a folder: use up to 100 letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        )
    return name


Column = Literal[
    "question", "answer", "system", "reasoning", "image", "video", "boxes", "points", "sample_fps", "start", "end"
]  # fmt: skip


class FixedText(Section):
    """Give every row the same text where it has no column of its own."""

    text: Text


def _check_column(value: Any) -> Any:
    named = isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, str) for v in value))
    fixed = isinstance(value, dict) and value.keys() == {"text"} and isinstance(value["text"], str)
    if not (named or fixed or isinstance(value, FixedText)) or value == "":
        raise ValueError(f"got {value!r}; name a column, or several in a list, or write {{text: ...}} for a fixed text")
    return value


def _check_columns(columns: dict[str, Any]) -> dict[str, Any]:
    for name, given in columns.items():
        if isinstance(given, FixedText) and name not in ("question", "answer", "system"):
            raise ValueError(f"{name} has no fixed text; only question, answer and system have")
        if isinstance(given, list) and name not in ("image", "video"):
            raise ValueError(f"{name} is one column; only image and video may be several")
    return columns


ColumnSource = Annotated[str | list[str] | FixedText, BeforeValidator(_check_column)]
Columns = Annotated[dict[Column, ColumnSource], AfterValidator(_check_columns)]


class RowsSection(Section):
    """Name the rows of one data set and how they are read (docs/rows.md).

    path: a file, a pattern, a folder or an fsspec URL of them (JSON, JSONL, CSV, TSV, Parquet, tar).
    media_root: folder or URL that media paths are relative to; null: the folder of each file.
    name: the name of its loss curve.
    max_rows: use so many of its rows, drawn by train.seed, and no others; of a path of several files, from all of them.
    columns: our name -> the name of the rows' column; of several in order, for images and clips; or a text for all
        rows, as in question: {text: "Describe it."}.
    split, subset: read the path with Hugging Face `datasets` instead, as a folder or a name on the hub.
    bbox, bbox_layout: how the rows' boxes are given.
    allow_urls: download media at web addresses; allow_private_urls: also from this machine and its private network.
    """

    path: Text
    media_root: Text | None = None
    name: Annotated[str, AfterValidator(check_name)] | None = None
    format: Literal["auto", "openai", "sharegpt", "texts", "prompt", "columns"] = "auto"
    columns: Columns = {}
    split: Text | None = None
    subset: Text | None = None
    max_rows: Count | None = None
    train_on: Literal["all", "last"] = "all"
    bbox: Literal["pixel", "unit", "per_mille"] | None = None
    bbox_layout: Literal["xyxy", "xywh"] = "xyxy"
    allow_urls: bool = False
    allow_private_urls: bool = False

    @model_validator(mode="after")
    def _subset_of_split(self) -> "RowsSection":
        if self.subset is not None and self.split is None:
            raise ValueError("subset without split, which says that `datasets` reads the path; add split: train")
        return self

    @model_validator(mode="after")
    def _private_urls_of_urls(self) -> "RowsSection":
        if self.allow_private_urls and not self.allow_urls:
            raise ValueError("allow_private_urls without allow_urls, which permits downloads; add allow_urls: true")
        return self


class EvalSource(RowsSection):
    """Name rows that are held out."""


class TrainSource(RowsSection):
    """Name rows to train on.

    weight: how often it is drawn, relative to its size (1.0: every row once an epoch).
    streaming: rows are read one after the other and never indexed; train.num_steps must then say how long to train.
    num_rows: roughly how many rows a stream has; if every stream gives it, sources are mixed evenly over the epoch.
    """

    weight: Annotated[float, Field(gt=0.0, le=10_000.0)] = 1.0
    streaming: bool = False
    num_rows: Count | None = None

    @model_validator(mode="after")
    def _rows_of_stream(self) -> "TrainSource":
        if self.num_rows is not None and not self.streaming:
            raise ValueError("num_rows without streaming: the rows of other sources are counted; remove it")
        if self.max_rows is not None and self.streaming:
            raise ValueError("max_rows with streaming, which does not count rows; train for fewer train.num_steps")
        return self


class DataSection(Section):
    """Limits and sampling that are null are the checkpoint's own; a limit of a pack that is null is no limit.

    eval_share: this share of the rows of each training entry, at least one, is drawn by train.seed, held out of
        training and evaluated as the set held_out.
    max_tokens_per_sample: null is the limit of a pack.
    too_long: a longer sample is skipped (drop), listed as a fault of the data (reject), or has its media shrunk until
        it fits (shrink_media).
    max_visual_tokens_per_image: a visual token is 32 x 32 pixels of an image, or of two neighbouring frames.
    max_visual_tokens_per_video: bounds the whole clip.
    max_visual_tokens_per_sample: shrinks all images and clips of a sample by the same factor.
    fps, min_frames, max_frames: frames taken a second of a clip, and the least and the most of them.
    max_image_pixels: a larger image or frame is a fault of its row; null is Pillow's own limit, 89 million. Memory and
        time to decode a picture grow with it, whatever it is shrunk to.
    follow_links: follow symbolic links in media_root that lead out of it. The root itself may always be a link.
    stream_window: rows of a stream that are packed together, and held in memory.
    shuffle: false packs rows in their order: one source after the other, or from streams each at its pace. Packs are
        then less full, and the work of ranks less even.
    """

    train: list[TrainSource] = Field(min_length=1)
    eval: list[EvalSource] = []
    eval_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    max_tokens_per_pack: Count = 8192
    max_patches_per_pack: Count | None = None
    max_sequences_per_pack: Count | None = None
    max_tokens_per_sample: Count | None = None
    too_long: Literal["drop", "reject", "shrink_media"] = "reject"
    max_visual_tokens_per_image: Count | None = None
    min_visual_tokens_per_image: Count | None = None
    max_visual_tokens_per_video: Count | None = None
    max_visual_tokens_per_sample: Count | None = None
    fps: Annotated[float, Field(gt=0.0, le=1000.0)] | None = None
    min_frames: Annotated[int, Field(ge=2)] | None = None
    max_frames: Annotated[int, Field(ge=2)] | None = None
    max_image_pixels: Count | None = None
    follow_links: bool = False
    stream_window: Annotated[int, Field(ge=1, le=10_000_000)] = 2048
    shuffle: bool = True
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 4
    max_rejected_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
