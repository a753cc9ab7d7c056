"""Where rows come from. A source knows its rows by number, or gives them one after the other; it keeps none of them."""

from qwen3vl_train.data.sources.base import Source, StreamRow, StreamSource
from qwen3vl_train.data.sources.lines import JsonlSource

__all__ = ["JsonlSource", "Source", "StreamRow", "StreamSource"]
