"""Build packs from the rows that a plan puts into them, in worker processes or in this one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.encoder import EncodedSample
from qwen3vl_train.data.errors import LAST_RESORT, Reject, RowFault
from qwen3vl_train.data.packing.index import Index
from qwen3vl_train.data.packing.plan import FamilyCosts, PackLimits, pack_in_order
from qwen3vl_train.data.packing.shared_memory import SharedMemoryPack
from qwen3vl_train.data.packing.workers import in_workers
from qwen3vl_train.data.rows.media_files import local_files, media_signature
from qwen3vl_train.data.rows.sample import Sample
from qwen3vl_train.data.sources import Source


class ScannedRow(NamedTuple):
    """A row, and what the scan found of it."""

    sample: Sample | RowFault
    file: str
    number: int  # its line or row number in the file, for messages
    tokens: int  # 0 where this rank did not scan it
    signature: int  # see `media_signature`


class PackResult(NamedTuple):
    """The result of building one planned pack; pack is None where none of its rows can be used."""

    pack: PackedBatch | None
    rejected: list[Reject]


class ReadIndexedRow(NamedTuple):
    """Read rows of an index by their numbers."""

    sources: Sequence[Source]
    index: Index

    def __call__(self, number: int) -> ScannedRow:
        source_number, row = self.index.locate(number)
        source = self.sources[source_number]
        try:
            sample = source.sample(row)
        except RowFault as fault:
            sample = fault
        tokens, signature = int(self.index.tokens[number]), int(self.index.signatures[number])
        return ScannedRow(sample, source.name, source.row_number(row), tokens, signature)


Families = Sequence[Sequence[Any]]
"""The rows of each family of a pack, in the form that the producer of the plan gave them."""


class PackBuilder(NamedTuple):
    """Build packs from the families of a plan; sent to worker processes."""

    read_row: Callable[[Any], ScannedRow]  # see `WindowProducer.read_row`
    collator: MultimodalCollator

    def __call__(self, families: Families) -> PackResult:
        encoded: list[EncodedSample] = []
        rejected: list[Reject] = []
        for row in map(self.read_row, chain.from_iterable(families)):
            try:
                with LAST_RESORT:
                    encoded.append(self._encode(row))
            except RowFault as fault:
                rejected.append(Reject.from_fault(row.file, row.number, fault))
        return PackResult(self.collator.pack(encoded) if encoded else None, rejected)

    def _encode(self, row: ScannedRow) -> EncodedSample:
        """Encode a row. Raises RowFault, also where the row or its media are not as they were when it was scanned."""
        if isinstance(row.sample, RowFault):
            raise row.sample
        if media_signature(row.sample) != row.signature:
            paths = local_files(row.sample)
            named = ", ".join(paths[:3]) + (f" or {len(paths) - 3} more" if len(paths) > 3 else "")
            raise RowFault(
                f"size or time of {named} is not what it was when the row was scanned; the row is skipped, start again "
                "to train on it as it is now",
                kind="changed",
            )
        encoded = self.collator.encode(row.sample)
        if (found := encoded.input_ids.numel()) != row.tokens:
            raise RowFault(
                f"sample has {found} tokens but had {row.tokens} when it was scanned; its row or its media changed "
                "since, start again",
                kind="changed",
            )
        if not encoded.label_rows.numel():
            fault = "nothing to learn: none of its tokens is trained; write an answer, or remove the row"
            raise RowFault(fault, kind="nothing_to_learn")
        return encoded


def build_packs(
    build: PackBuilder, planned: Iterable[Families], num_workers: int, *, pin_memory: bool = False
) -> Iterator[PackResult]:
    """Yield what `build` makes of each planned pack, in order, see `in_workers`; packs come through shared memory."""
    if not num_workers:
        for result in map(build, planned):
            yield result._replace(pack=result.pack.pin_memory()) if pin_memory and result.pack else result
        return
    for shared, rejected in in_workers(partial(_build_shared, build), planned, num_workers, pin_memory=pin_memory):
        yield PackResult(shared.unpack() if shared else None, rejected)


def _build_shared(build: PackBuilder, families: Families) -> tuple[SharedMemoryPack | None, list[Reject]]:
    pack, rejected = build(families)
    return SharedMemoryPack.from_pack(pack) if pack else None, rejected


def eval_packs(
    source: Source,
    collator: MultimodalCollator,
    index: Index,
    *,
    limits: PackLimits,
    data_rank: int = 0,
    data_world_size: int = 1,
    num_workers: int = 0,
) -> Iterator[PackResult]:
    """Yield the packs of an evaluation file in its order, every usable row once; ranks take packs in turn.

    index: of this source alone. Ranks may get different numbers of packs.
    """
    rows = index.usable(0)
    costs = FamilyCosts.from_rows(index.tokens[rows], index.patches[rows], index.tokens[rows])
    packs = [[(number,) for number in rows[pack].tolist()] for pack in pack_in_order(costs, limits)]
    build = PackBuilder(ReadIndexedRow([source], index), collator)
    yield from build_packs(build, packs[data_rank::data_world_size], num_workers)
