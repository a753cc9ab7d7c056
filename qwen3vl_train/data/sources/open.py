"""Open the sources of an entry under data.train or data.eval."""

import os

from qwen3vl_train.config.data_fields import EvalSource, FixedText, TrainSource
from qwen3vl_train.data.rows.boxes import Convention
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources.base import FileSource, StreamSource, check_media_root
from qwen3vl_train.data.sources.delimited import DELIMITERS, CsvSource
from qwen3vl_train.data.sources.files import find_files, folder_of, is_url, suffix_of
from qwen3vl_train.data.sources.hub import HubSource, is_saved_dataset
from qwen3vl_train.data.sources.jsonl import JsonlSource
from qwen3vl_train.data.sources.parquet import ParquetSource
from qwen3vl_train.data.sources.streams import FileStream, HubStream
from qwen3vl_train.data.sources.tar import TarSource
from qwen3vl_train.public_names import last_part

SUFFIXES = (".jsonl", ".json", ".parquet", ".tar", *DELIMITERS)
"""Of the files that a folder or a pattern finds; all but Parquet may be followed by .gz, .zst or .zstd. CSV and TSV
files are often lists of something else: they are read where there are no others."""

Entry = TrainSource | EvalSource


def entry_rules(entry: Entry, follow_links: bool = False) -> RowRules:
    """Return the rules for the rows of an entry. Their label is its name, or the last part of its path."""
    return RowRules(
        label=entry.name or last_part(entry.path).replace(":", "_"),
        format=entry.format,
        columns={name: given for name, given in entry.columns.items() if not isinstance(given, FixedText)},
        texts={name: given.text for name, given in entry.columns.items() if isinstance(given, FixedText)},
        train_on=entry.train_on,
        boxes=Convention(entry.bbox, entry.bbox_layout),
        allow_urls=entry.allow_urls,
        follow_links=follow_links,
        allow_private_urls=entry.allow_private_urls,
    )


def open_sources(entry: Entry, follow_links: bool = False) -> list[FileSource]:
    """Open every file of an entry, one source each. Raise ValueError for what cannot be read.

    Media are looked for in media_root, or else in the folder of each file, and nowhere outside. With `split`, or for a
    folder that `datasets` saved, the path is read by `datasets`.
    """
    rules = entry_rules(entry, follow_links)
    if _is_dataset(entry):
        return [HubSource(entry.path, _hub_root(entry), rules, entry.split, entry.subset)]
    return [_open(path, entry.media_root or folder_of(path), rules) for path in _find_files(entry, rules)]


def open_stream(entry: Entry, follow_links: bool = False) -> StreamSource:
    """Open an entry as a stream over all of its files. Raise ValueError for what cannot be read."""
    rules = entry_rules(entry, follow_links)
    if _is_dataset(entry):
        return HubStream(entry.path, _hub_root(entry), rules, entry.split, entry.subset)
    return FileStream(entry.path, _find_files(entry, rules), entry.media_root, rules)


def _open(path: str, media_root: str, rules: RowRules) -> FileSource:
    if suffix_of(path) == ".tar":
        return TarSource(path, None, rules)  # the media of a shard are in it
    if suffix_of(path) == ".parquet":
        return ParquetSource(path, media_root, rules)
    return (CsvSource if suffix_of(path) in DELIMITERS else JsonlSource)(path, media_root, rules)


def _find_files(entry: Entry, rules: RowRules) -> list[str]:
    root = entry.media_root or folder_of(entry.path)
    if is_url(root) and suffix_of(entry.path) != ".tar":
        check_media_root(entry.path, root, rules)  # before any file of the entry is requested
    files = find_files(entry.path, SUFFIXES)
    return [file for file in files if suffix_of(file) not in DELIMITERS] or files


def _is_dataset(entry: Entry) -> bool:
    return entry.split is not None or is_saved_dataset(entry.path)


def _hub_root(entry: Entry) -> str:
    """Return the media_root of a data set: pictures given as paths are in its folder, if it has one."""
    return entry.media_root or (entry.path if os.path.isdir(entry.path) else ".")
