"""A row of every public data set and format in `public_rows.jsonl` is read as its authors mean it.

Each line of that file has a row in the shape of a published set (`shape_from` names where the shape is published; its
texts are short ones of our own), the keys of the data entry that reads it, the turns as the model has to read them and
the answers that have to be trained. The expected text is rendered by the checkpoint's own template in transformers.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_checkpoint
import yaml
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from qwen3vl_train.config.data_fields import TrainSource
from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.media.image import image_size
from qwen3vl_train.data.rows.sample import ImagePart, VideoPart
from qwen3vl_train.data.sources import open_sources, open_stream
from qwen3vl_train.inspect.as_json import describe_sample
from qwen3vl_train.inspect.samples import token_texts
from tests.helpers.clip_files import write_clip
from tests.helpers.row_files import png

LINES = [json.loads(line) for line in Path(__file__).with_name("public_rows.jsonl").read_text().splitlines()]
TEMPLATE = (tiny_checkpoint.ASSETS / "chat_template_instruct.jinja").read_text()
PICTURE = {"bytes": png(7), "path": None}
READING = ("columns", "format", "bbox", "bbox_layout", "train_on")
"""Keys of an entry that say how its rows are read, whatever file they are in."""
MEDIA_FILE = re.compile(r"(?:<img>)?([\w./-]+\.(?:png|jpe?g|mp4))(?:</img>.*)?", re.DOTALL)


def test_there_are_fifty_public_formats():
    assert len({line["set"] for line in LINES}) == len(LINES) >= 50
    assert all(line["shape_from"] for line in LINES)


def test_docs_have_the_entry_that_reads_each():
    """docs/rows.md names every set, or all formats of one tool, with the keys that its rows are read with here."""
    table = (Path(__file__).parents[3] / "docs" / "rows.md").read_text().partition("| rows of | entry |")[2]
    documented = dict(re.findall(r"^\| (.+?) \| `(.+)` \|$", table, re.MULTILINE))
    covered = set()
    for name, entry in documented.items():
        values = yaml.safe_load(entry)
        TrainSource(**values)
        lines = [line for line in LINES if line["set"] == name or line["set"].startswith((f"{name},", f"{name} "))]
        assert lines, name
        for line in lines:
            assert {key: value for key, value in values.items() if key in READING} == {
                key: value for key, value in line["entry"].items() if key in READING
            }, line["set"]
            covered.add(line["set"])
    assert {line["set"] for line in LINES} - covered == set()


@pytest.mark.parametrize("line", LINES, ids=[line["set"] for line in LINES])
def test_public_row(line, tmp_path, collate):
    row = with_media(line["row"], tmp_path)
    entry = TrainSource(path=write_row(tmp_path, row, line), media_root=str(tmp_path), **line["entry"])
    (source,) = open_sources(entry)
    for sample in (source.sample(0), next(iter(open_stream(entry).rows())).sample):
        if isinstance(sample, RowFault):
            raise sample
        encoded = collate.encode(sample)
        found = describe_sample(sample, encoded, token_texts(encoded.input_ids.tolist(), collate.tokenizer), collate)
        assert found["text"] == expected_text(line["turns"], line.get("tools"))
        assert found["trained"] == [f"{answer}<|im_end|>" for answer in line["trained"]]
        check_details(sample, line)


def check_details(sample, line: dict[str, Any]) -> None:
    """Check what the text does not show: which picture is where, the segment of a clip, what was not used."""
    if "sizes" in line:
        images = [part.image for part in sample.parts if isinstance(part, ImagePart)]
        assert [list(image_size(image, sample.media_root)[::-1]) for image in images] == line["sizes"]
    if "seconds" in line:
        assert [[part.start, part.end] for part in sample.parts if isinstance(part, VideoPart)] == [line["seconds"]]
    if "ignored" in line:
        assert sorted(sample.ignored) == line["ignored"]


def expected_text(turns: list[list[str]], tools: list[Any] | None) -> str:
    """Render turns as transformers does. Their {image} and {video} are media."""
    messages = [{"role": role, "content": list(map(as_part, split_media(text)))} for role, text in turns]
    (text,), _ = render_jinja_template([messages], tools=tools, chat_template=TEMPLATE)
    return text


def split_media(text: str) -> list[str]:
    return [piece for piece in re.split(r"(\{image\}|\{video\})", text) if piece]


def as_part(piece: str) -> dict[str, str]:
    return {"type": piece[1:-1]} if piece in ("{image}", "{video}") else {"type": "text", "text": piece}


def with_media(value: Any, folder: Path) -> Any:
    """Write every media file that a row names, and fill in pictures inside the row."""
    if isinstance(value, dict):
        return {key: with_media(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [with_media(item, folder) for item in value]
    if value == "@png":
        return PICTURE
    if value == "@base64":
        return base64.b64encode(png(7)).decode()
    if isinstance(value, str) and (name := MEDIA_FILE.search(value)) and value[: name.start()] in ("", "Picture 1: "):
        write_medium(folder / name[1])
    return value


def write_medium(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".mp4":
        write_clip(file, 24)
        return
    Image.new("RGB", (320, 320) if file.stem == "small" else (640, 480), (0, 90, 180)).save(file)


def write_row(folder: Path, row: Any, line: dict[str, Any]) -> str:
    if "classes" in line:
        classes = {name: datasets.ClassLabel(names=names) for name, names in line["classes"].items()}
        pictures = {name: datasets.Image() for name, value in row.items() if value == PICTURE}
        rows = datasets.Dataset.from_list([row], features=datasets.Features({**pictures, **classes}))
        rows.to_parquet(folder / "set" / "train-00000-of-00001.parquet")
        return str(folder / "set")
    if line.get("typed"):
        pq.write_table(pa.Table.from_pylist([row]), folder / "train.parquet")
        return str(folder / "train.parquet")
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    return str(folder / "train.jsonl")
