"""Readers of files. A source reads rows by index, or one after the other; it keeps none of them in memory."""

from qwen3vl_train.data.sources.base import FileSource, Source, StreamRow, StreamSource
from qwen3vl_train.data.sources.jsonl import JsonlSource
from qwen3vl_train.data.sources.open import entry_rules, open_sources, open_stream

__all__ = [
    "FileSource", "JsonlSource", "Source", "StreamRow", "StreamSource", "entry_rules", "open_sources", "open_stream",
]  # fmt: skip
