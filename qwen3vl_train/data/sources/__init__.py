"""Where rows come from. A source knows its rows by number, or gives them one after the other; it keeps none of them."""

from qwen3vl_train.data.sources.base import FileSource, Source, StreamRow, StreamSource
from qwen3vl_train.data.sources.jsonl import JsonlSource
from qwen3vl_train.data.sources.open import entry_rules, open_sources, open_stream

__all__ = [
    "FileSource",
    "JsonlSource",
    "Source",
    "StreamRow",
    "StreamSource",
    "entry_rules",
    "open_sources",
    "open_stream",
]
