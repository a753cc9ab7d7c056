"""The same few rows in every supported type of file."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROW = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "ok"}]}'
NUM_ROWS = 9


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), (seed, 0, 0)).save(out, "PNG")
    return out.getvalue()


def table(num_rows: int = NUM_ROWS) -> list[dict]:
    return [
        {"question": f"Nr {n}?", "answer": "ü" * n + ".", "image": {"bytes": png(n), "path": None}}
        for n in range(num_rows)
    ]


def talk(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def talks(num_rows: int = NUM_ROWS) -> list[dict]:
    return [{"image": f"{n}.png", "conversations": talk(f"<image>\nNr {n}?", "ü" * n + ".")} for n in range(num_rows)]


def write_tar(file: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(file, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def write_json_feature(file: Path, rows: list[dict]) -> None:
    """Write rows as messages: their content a `Json` feature of `datasets`, their other fields null in every row."""
    text, absent = datasets.Value("string"), datasets.Value("null")
    message = {"role": text, "content": datasets.Json(), "tool_calls": absent, "name": absent}
    found = []
    for number, row in enumerate(rows):
        parts = [{"type": "image", "image": row["image"]}, {"type": "text", "text": f"Nr {number}?"}]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "ü" * number + "."}]
        found.append({"messages": [{**turn, "tool_calls": None, "name": None} for turn in turns]})
    data = datasets.Dataset.from_list(found, features=datasets.Features({"messages": [message]}))
    data.to_parquet(file, batch_size=4)


def write_all(folder: Path) -> dict[str, Path]:
    """Write the same rows to every type of file; return the paths by type."""
    rows = talks()
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    array = json.dumps(rows, indent=1).encode()
    for number in range(NUM_ROWS):
        (folder / f"{number}.png").write_bytes(png(number))
    members = []
    for number, row in enumerate(rows):
        without_image = json.dumps({"conversations": row["conversations"]}).encode()
        members += [(f"a/{number}.png", png(number)), (f"a/{number}.json", without_image)]
    text = datasets.Value("string")
    features = datasets.Features({"question": text, "answer": text, "image": datasets.Image()})
    datasets.Dataset.from_list(table(), features=features).save_to_disk(str(folder / "saved"))
    files = {name: folder / name for name in ("a.jsonl", "a.json", "b.jsonl.gz", "b.jsonl.zst", "c.json.gz", "saved")}
    files["a.jsonl"].write_bytes(lines)
    files["a.json"].write_bytes(array)
    files["b.jsonl.gz"].write_bytes(gzip.compress(lines))
    files["b.jsonl.zst"].write_bytes(pa.compress(lines, codec="zstd", asbytes=True))
    files["c.json.gz"].write_bytes(gzip.compress(array))
    files["a.parquet"] = folder / "a.parquet"
    pq.write_table(pa.Table.from_pylist(table()), files["a.parquet"], row_group_size=4)
    for name in ("d.jsonl", "json.parquet", "a.csv", "b.tsv.gz"):
        files[name] = folder / name
    files["d.jsonl"].write_bytes(array)  # what should be called .json
    write_json_feature(files["json.parquet"], rows)
    cells = [
        ["image", "question", "answer"],
        *([row["image"], f"Nr {n}?", "ü" * n + "."] for n, row in enumerate(rows)),
    ]
    files["a.csv"].write_text("\n".join(",".join(row) for row in cells), encoding="utf-8")
    files["b.tsv.gz"].write_bytes(gzip.compress("\r\n".join("\t".join(row) for row in cells).encode()))
    files["a.tar"] = write_tar(folder / "a.tar", members)
    files["b.tar.gz"] = write_tar(folder / "b.tar.gz", members, "w:gz")
    return files


KINDS = (
    "a.jsonl", "a.json", "b.jsonl.gz", "b.jsonl.zst", "c.json.gz", "d.jsonl", "a.parquet", "json.parquet", "a.csv",
    "b.tsv.gz", "a.tar", "b.tar.gz", "saved",
)  # fmt: skip


def texts(sample) -> list[str]:
    return [message.text for message in sample.messages]
