"""Data sets of Hugging Face `datasets`: saved on disk, in a folder it can read, or by their name on the hub."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from qwen3vl_train.data.media.remote import Remote
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources.arrow import Convert, row_converter
from qwen3vl_train.data.sources.base import FileSource, RawRow, known_columns
from qwen3vl_train.data.sources.parquet import row_to_python

_HUB = "hf://"
_ARCHIVES = ("zip://", "tar://", "gzip://", "bz2://", "xz://", "zstd://", "lz4://")


def resolve_hub_path(path: str) -> str | Remote:
    """Return the medium of a path in a data set.

    A data set that is streamed from the hub leaves its pictures there: `hf://datasets/owner/name@main/a.png`, or
    `zip://a.png::hf://...` in an archive. Other paths are looked for under media_root.
    """
    *inner, outer = path.split("::")
    on_hub = outer.startswith(_HUB) and all(part.startswith(_ARCHIVES) for part in inner)
    return Remote(path) if on_hub else path


def is_saved_dataset(path: str) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def load_rows(path: str, split: str | None, subset: str | None, *, streaming: bool) -> Any:
    """Open a data set without downloading more of it than needed. Raise ValueError with the reason it cannot be."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if is_saved_dataset(path):
            found = datasets.load_from_disk(path)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise ValueError(f"no split {split!r} among {', '.join(map(str, found))}; set split to one of them")
                found = found[split]
            return found.to_iterable_dataset() if streaming else found
        found: Any = datasets.load_dataset(path, subset, split=split, streaming=streaming)
        if found.info.builder_name == "csv":  # which takes 007 for a number, and "None" for no text
            text = datasets.Features(dict.fromkeys(found.column_names, datasets.Value("string")))
            options: dict[str, Any] = {"features": text, "keep_default_na": False, "na_values": [""]}
            found = datasets.load_dataset(path, subset, split=split, streaming=streaming, **options)
        return found
    except (OSError, ValueError, DatasetsError) as error:
        where = path if os.path.isdir(path) else f"{path} (no folder here, so a name on the Hugging Face hub)"
        raise ValueError(f"{where}: {str(error)[:500]}") from None


@contextlib.contextmanager
def reading_on(name: str, rows: int) -> Iterator[None]:
    """Turn what reading a data set after so many rows raises into a ValueError that names it."""
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError, pa.ArrowException) as error:
        fault = f"cannot be read after row {rows} ({str(error)[:300]}); read its files by their path, without split"
        raise ValueError(f"{name}: {fault}") from None


class HubSource(FileSource):
    """A map-style data set: memory-mapped Arrow files. Pictures stay encoded, as bytes or paths."""

    def __init__(self, path: str, media_root: str, rules: RowRules, split: str | None, subset: str | None) -> None:
        self.split, self.subset = split, subset
        super().__init__(path, media_root, rules)

    def _open(self) -> dict[str, Any]:
        rows = load_rows(self.name, self.split, self.subset, streaming=False)
        kept, ignored = known_columns(rows.column_names, self.rules, self.name)
        self.ignored_columns = tuple(ignored)
        # As Arrow tables: the Python format would decode every picture and clip of a row.
        self._rows = rows.select_columns(kept).with_format("arrow")
        self._convert: Convert | None = None
        return {"rows": len(rows), "fingerprint": rows._fingerprint}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_convert": None}

    def __len__(self) -> int:
        return len(self._rows)

    def raw(self, row: int) -> RawRow:
        if self._convert is None:
            self._convert = row_converter(self._rows.features.arrow_schema, self.rules)
        return RawRow(row_to_python(self._rows[row], self._convert), row + 1, {}, resolve_hub_path)
