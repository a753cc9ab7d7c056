"""The index of all rows: their costs, found once before training from text and media headers, and the rejects."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from qwen3vl_train.data.encode.chat import Text
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.encoder import SampleCost, is_trained
from qwen3vl_train.data.errors import LAST_RESORT, MediaFault, Reject, RowFault
from qwen3vl_train.data.packing.index_cache import RowReject, SourceIndex, load_index, save_index
from qwen3vl_train.data.packing.workers import in_workers
from qwen3vl_train.data.rows.formats import FORMATS
from qwen3vl_train.data.rows.media_files import is_fetched, local_files
from qwen3vl_train.data.rows.sample import Sample
from qwen3vl_train.data.signatures import read_signatures
from qwen3vl_train.data.sources import Source
from qwen3vl_train.public_names import public_name

_ROWS_PER_CHUNK = 256
_WORTH_PROCESSES = 2000
"""Rows that take about as long to scan as a few processes take to start."""


class LengthRule(NamedTuple):
    """What happens to a sample that is too long.

    too_long: drop skips the sample, reject lists it as a fault of the data. shrink_media: the collator shrinks media;
        what is too long nevertheless is rejected.
    """

    max_tokens: int  # of a sample
    field: str = "data.max_tokens_per_pack"  # of the recipe, which sets max_tokens
    max_patches: int | None = None  # of a pack
    too_long: Literal["drop", "reject", "shrink_media"] = "reject"

    def admit(self, sample: Sample, collator: MultimodalCollator) -> SampleCost | None:
        """Return the cost of a sample, None where it is dropped. Decodes no pixels.

        Raises RowFault, also where the template trains nothing of the sample.
        """
        with LAST_RESORT:
            return self._admit(sample, collator)

    def _admit(self, sample: Sample, collator: MultimodalCollator) -> SampleCost | None:
        pieces = collator.render(sample)
        if not is_trained(pieces):
            raise RowFault(
                "nothing to learn: a Thinking checkpoint is trained on answers after the last question, and none "
                "there is trained; end the row with its answer, or take an Instruct checkpoint",
                kind="nothing_to_learn",
            )
        # Tokenising millions of characters only to skip them would take seconds and gigabytes.
        text = unicodedata.normalize("NFC", "".join(piece.text for piece in pieces if isinstance(piece, Text)))
        least = -(-len(text.encode()) // collator.tokenizer.max_token_bytes)
        if least > self.max_tokens:
            return self._too_long(f"at least {least} tokens of text is longer than {self.field} {self.max_tokens}")
        cost = collator.cost_of(pieces, sample.media_root)
        if cost.tokens > self.max_tokens:
            visual = f"({cost.visual_tokens} visual)"
            return self._too_long(f"{cost.tokens} tokens {visual} is longer than {self.field} {self.max_tokens}")
        if self.max_patches is not None and cost.patches > self.max_patches:
            return self._too_long(f"{cost.patches} patches is more than data.max_patches_per_pack {self.max_patches}")
        return cost

    def _too_long(self, what: str) -> None:
        if self.too_long == "drop":
            return
        others = "" if self.too_long == "shrink_media" else ", or set data.too_long to drop or shrink_media"
        raise RowFault(f"sample of {what}; raise it, lower data.max_visual_tokens_per_image{others}", kind="too_long")


@dataclass
class Index:
    """The rows of all sources under consecutive numbers: source s has rows starts[s] .. starts[s+1]-1.

    tokens, visual_tokens, patches, patch_pairs, num_shrunk: int64 (rows,), all 0 where the row is not used.
    """

    starts: np.ndarray
    tokens: np.ndarray
    visual_tokens: np.ndarray
    patches: np.ndarray
    patch_pairs: np.ndarray
    num_shrunk: np.ndarray
    signatures: np.ndarray  # int64 (rows,), a hash of the signatures of the row's media files
    formats: np.ndarray  # int8 (rows,), see `SourceIndex`
    rejects: list[Reject]
    num_dropped: int  # as too long

    @classmethod
    def from_sources(cls, names: Sequence[str], parts: Sequence[SourceIndex]) -> "Index":
        """Concatenate the indexes of all sources. names: of the sources."""
        joined = SourceIndex.join(parts)
        return cls(
            np.cumsum([0, *(part.num_rows for part in parts)], dtype=np.int64),
            *joined.costs,
            signatures=joined.row_signatures(),
            formats=joined.formats,
            rejects=[
                Reject(public_name(name), reject.number, reject.reason, reject.kind)
                for name, part in zip(names, parts, strict=True)
                for reject in part.rejects
            ],
            num_dropped=int(joined.dropped.sum()),
        )

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @property
    def num_usable(self) -> int:
        return int(np.count_nonzero(self.tokens))

    def usable(self, source: int) -> np.ndarray:
        """Return the numbers of the usable rows of one source, ascending."""
        start, end = self.starts[source], self.starts[source + 1]
        return start + np.flatnonzero(self.tokens[start:end])

    def count_formats(self, source: int) -> Counter[str]:
        """Return how many rows of one source have each format, without those that could not be read."""
        found = self.formats[self.starts[source] : self.starts[source + 1]]
        return Counter({name: int((found == number).sum()) for number, name in enumerate(FORMATS)})

    def locate(self, number: int) -> tuple[int, int]:
        """Return (source, row of that source) of a row number."""
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        return source, int(number - self.starts[source])

    def digest(self) -> str:
        """Return a hash over all costs: it changes with the data, the template and the budgets."""
        digest = hashlib.sha256(self.starts.tobytes())
        for name in SampleCost._fields:
            digest.update(getattr(self, name).tobytes())
        return digest.hexdigest()


def build_index(
    sources: Sequence[Source],
    collator: MultimodalCollator,
    rule: LengthRule,
    *,
    num_workers: int = 0,
    cache_folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Find the cost of every row of every source; what cannot be used goes to `Index.rejects`.

    Faults of the rows raise nothing here: see `RejectLedger.check`.

    cache_folder: where indexes are kept. The index of a source whose content, template and budgets have not changed is
        read from there, and only rows whose media files changed, or whose fault was transient, are scanned again.
    progress: called with (rows scanned, rows to scan).
    """
    # All that the costs of a source follow from, except its media files.
    keys = [
        {
            "rows": source.fingerprint(),
            "media_root": source.media_root,
            "rules": repr(source.rules),
            "encoder": collator.fingerprint(),
            "length": list(rule),
            "name": source.name,
        }
        for source in sources
    ]
    parts = [
        load_index(cache_folder, key, len(source)) if cache_folder else None
        for source, key in zip(sources, keys, strict=True)
    ]
    wanted = [
        np.arange(len(source)) if part is None else part.rows_to_scan()
        for source, part in zip(sources, parts, strict=True)
    ]
    chunks = [
        (number, rows[start : start + _ROWS_PER_CHUNK])
        for number, rows in enumerate(wanted)
        for start in range(0, len(rows), _ROWS_PER_CHUNK)
    ]
    done, total = 0, sum(map(len, wanted))
    scan = partial(_scan_rows, sources, collator, rule)
    scanned: list[list[SourceIndex]] = [[] for _ in sources]
    results = in_workers(scan, chunks, num_workers if total >= _WORTH_PROCESSES else 0)
    for (number, rows), found in zip(chunks, results, strict=True):
        scanned[number].append(found)
        done += len(rows)
        if progress is not None:
            progress(done, total)
    for number, (part, rows) in enumerate(zip(parts, wanted, strict=True)):
        if part is None or len(rows):
            fresh = SourceIndex.join(scanned[number])
            parts[number] = fresh = fresh if part is None else part.with_rows(rows, fresh)
            if cache_folder:
                save_index(cache_folder, keys[number], fresh)
    return Index.from_sources([source.name for source in sources], [part for part in parts if part is not None])


def _scan_rows(
    sources: Sequence[Source], collator: MultimodalCollator, rule: LengthRule, chunk: tuple[int, np.ndarray]
) -> SourceIndex:
    """Scan some rows of one source. chunk: the index of the source, and the rows."""
    source, rows = sources[chunk[0]], chunk[1]
    costs = np.zeros((len(SampleCost._fields), len(rows)), dtype=np.int64)
    dropped = np.zeros(len(rows), dtype=bool)
    formats = np.full(len(rows), -1, dtype=np.int8)
    num_files = np.zeros(len(rows), dtype=np.int64)
    files: list[str] = []
    rejects: list[RowReject] = []
    for at, row in enumerate(rows.tolist()):
        sample = None
        try:
            sample = source.sample(row)
            cost = rule.admit(sample, collator)
            dropped[at] = cost is None
            costs[:, at] = 0 if cost is None else cost
        except RowFault as fault:
            sample = sample or fault.sample
            # A server may send a page of errors today and the image tomorrow.
            fetched = isinstance(fault, MediaFault) and sample is not None and is_fetched(sample)
            rejects.append(RowReject(at, source.row_number(row), str(fault), fault.kind, fault.transient or fetched))
        if sample is not None:
            formats[at] = FORMATS.index(sample.row_format)
            of_row = local_files(sample)
            num_files[at] = len(of_row)
            files += of_row
    return SourceIndex(costs, dropped, formats, rejects, files, num_files, read_signatures(files))
