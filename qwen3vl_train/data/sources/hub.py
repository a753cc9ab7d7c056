"""Data sets of Hugging Face `datasets`: saved on disk, in a folder it can read, or by their name on the hub."""

import os
from collections.abc import Iterator
from typing import Any

from qwen3vl_train.data.media.remote import Remote
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources.base import FileSource, RawRow

_HUB = "hf://"
_ARCHIVES = ("zip://", "tar://", "gzip://", "bz2://", "xz://", "zstd://", "lz4://")


def find_on_hub(path: str) -> str | Remote:
    """Return what a path in a data set stands for.

    A data set that is streamed from the hub leaves its pictures there: `hf://datasets/owner/name@main/a.png`, or
    `zip://a.png::hf://...` in an archive. Other paths are looked for under media_root.
    """
    *inner, outer = path.split("::")
    stored = outer.startswith(_HUB) and all(part.startswith(_ARCHIVES) for part in inner)
    return Remote(path) if stored else path


def is_saved_dataset(path: str) -> bool:
    """Say whether a folder was written by `save_to_disk`."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def load_rows(path: str, split: str | None, subset: str | None, *, streaming: bool) -> Any:
    """Open a data set without downloading more of it than that takes. Raises ValueError that says why it cannot be."""
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
        return datasets.load_dataset(path, subset, split=split, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        where = path if os.path.isdir(path) else f"{path} (no folder here, so a name on the Hugging Face hub)"
        raise ValueError(f"{where}: {str(error)[:500]}") from None


class HubSource(FileSource):
    """A map-style data set: Arrow files mapped into memory. Pictures are left encoded, as bytes or paths."""

    def __init__(
        self,
        path: str,
        media_root: str | None = None,
        rules: RowRules | None = None,
        *,
        split: str | None = None,
        subset: str | None = None,
    ) -> None:
        """Raises ValueError when it cannot be opened."""
        super().__init__(path, media_root, rules)
        rows = load_rows(path, split, subset, streaming=False)
        self._fingerprint = {"rows": len(rows), "fingerprint": rows._fingerprint}
        kept = [name for name in rows.column_names if name in self.rules.columns_read()]
        if not kept:
            raise ValueError(
                f"{path}: has the columns {', '.join(rows.column_names[:20])}, and none that rows are made from; "
                "name them under columns"
            )
        # As Arrow tables: the python form would decode every picture and clip of a row.
        self._rows = rows.select_columns(kept).with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def raw(self, row: int) -> RawRow:
        """Return row 0..len-1 unchecked. Raises RowFault for values that Python has no form of."""
        from qwen3vl_train.data.sources.parquet import as_python

        return RawRow(as_python(self._rows[row]), row + 1, {}, find_on_hub)

    def row_number(self, row: int) -> int:
        return row + 1

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of rows and the fingerprint that `datasets` keeps of files and operations."""
        return dict(self._fingerprint)


def stream_hub(rows: Any, state: dict[str, Any] | None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield (row, state behind it) of an iterable data set; the state is its own, as JSON."""
    if state is not None:
        rows.load_state_dict(state)
    for row in rows:
        yield row, rows.state_dict()
