"""A shard as a function of the manifest and its number: all of it is captured, or nothing.

documents (-> Writer.written) -> build_rows -> cut_blocks -> Engine.capture (forward -> select)
          -> assemble -> encode_block -> ShardWriter.write -> commit
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.cache import committed_shards, read_commits
from shared.errors import DiskFull, NonFiniteTargets, Stopped
from shared.format.blocks import Block
from shared.format.commits import commit_name
from shared.format.manifest import Manifest
from shared.format.schema import ROW_CHUNK_BITS
from shared.format.writer import EncodedBlock, ShardWriter
from shared.progress import Progress, WaitClock
from shared.signals import StopRequest
from shared.storage.base import Storage
from shared.targets.hidden import ChannelScales
from shared.targets.record import ClassRanks
from teacher_cache.engines.base import Engine
from teacher_cache.job.assemble import assemble, cut_blocks
from teacher_cache.job.draft import Draft
from teacher_cache.job.statistics import add, block_sums, encode_and_measure
from teacher_cache.job.workers import Share, my_shards
from teacher_cache.select.window import WindowTargets
from teacher_cache.tasks.rows import TrainingRow

log = logging.getLogger(__name__)

_WINDOW_FORWARDS = (
    16  # forwards whose rows are sorted by length together; more saves little padding
)
_ENCODE_AHEAD = 8  # blocks in the encoder's queue before the teacher waits


Captured = tuple[Block, dict[int, np.ndarray]]  # and what bfloat16 cost its hidden states
Measured = tuple[EncodedBlock, dict[str, float]]  # and how far its hidden states are off


@dataclass(slots=True)
class Job:
    """A published job whose shards can be captured, in any order; `opening.py` makes it."""

    draft: Draft
    storage: Storage
    manifest: Manifest
    cache_id: str
    share: Share
    ranks: ClassRanks
    scales: ChannelScales
    stop: StopRequest
    progress: Progress
    waits: WaitClock
    pool: ThreadPoolExecutor
    bytes_written: int = 0
    tokens_written: int = 0

    @property
    def engine(self) -> Engine | None:
        return self.draft.engine

    def missing(self) -> list[int]:
        """The shards that no process has committed yet."""
        done = set(committed_shards(self.storage))
        return [shard for shard in range(self.manifest.plan.num_shards) if shard not in done]

    def my_shards(self) -> Iterator[int]:
        """The missing shards of this process's share, then whatever is still missing."""
        shards, storage = self.manifest.plan.num_shards, self.storage
        return my_shards(shards, self.share, lambda i: storage.exists(commit_name(i)))

    def capture_shard(self, shard: int) -> None:
        """Runs the teacher over the documents of one shard and commits it; all or nothing."""
        self.check_stop()
        try:
            _capture_shard(self, shard)
        except DiskFull as error:
            raise DiskFull(f"{error} {_still_needed(self)}") from error

    def check_stop(self) -> None:
        """Called between two forwards: a signal drops the shard in work and ends the run."""
        if self.stop.requested:
            raise Stopped(
                f"{self.storage.root}: stopped by a signal. Finished shards are kept; run the same "
                "command again to go on."
            )


def _capture_shard(job: Job, shard: int) -> None:
    statistics: Counter[str] = Counter()
    per_shard = job.manifest.plan.documents_per_shard
    documents = range(shard * per_shard, min((shard + 1) * per_shard, len(job.draft.corpus)))
    with ShardWriter(job.storage, job.manifest, job.cache_id, shard) as writer:
        for encoded, errors in _encoded(job, _blocks(job, documents, statistics)):
            add(statistics, errors)
            with job.waits("disk"):
                job.bytes_written += writer.write(encoded)
            _advance(job, int(encoded.row_tokens.sum()))
        writer.statistics = dict(statistics)
    log.debug("shard %d: %s", shard, "committed" if writer.won else "another process was first")


def _advance(job: Job, tokens: int) -> None:
    job.tokens_written += tokens
    job.progress.advance(
        tokens,
        bytes_per_token=round(job.bytes_written / job.tokens_written, 1),
        waiting=job.waits.text(),
    )


def _blocks(job: Job, documents: range, statistics: Counter[str]) -> Iterator[Captured]:
    """Blocks of a shard in order; the teacher runs over a window of them at a time."""
    read = _documents(job, documents)
    if job.manifest.preprocessing.generation is not None:
        writer = job.draft.writer(job.manifest.plan.forward_tokens)
        read = writer.written(read, statistics, job.check_stop)
    built = job.draft.build_rows(read, statistics)
    window: list[list[TrainingRow]] = []
    tokens = 0
    for block in cut_blocks(built):
        job.check_stop()
        window.append(block)
        tokens += sum(len(row.input_ids) for row in block)
        if tokens >= _WINDOW_FORWARDS * job.manifest.plan.forward_tokens:
            yield from _captured(job, window, statistics)
            window, tokens = [], 0
    if window:
        yield from _captured(job, window, statistics)


def _documents(job: Job, documents: range) -> Iterator[tuple[int, Any]]:
    for start in range(documents.start, documents.stop, 256):
        part = range(start, min(start + 256, documents.stop))
        yield from zip(part, job.draft.corpus.read(part), strict=True)


def _captured(
    job: Job, window: list[list[TrainingRow]], statistics: Counter[str]
) -> Iterator[Captured]:
    """The blocks of a window with the teacher's targets; rows with NaN or infinity left out."""
    flat = [row for block in window for row in block]
    targets, bad = None, set[int]()
    if job.engine is not None:
        targets, bad = _targets_of(job, job.engine, flat, statistics)
    start = 0
    for block in window:
        kept = [index for index in range(start, start + len(block)) if index not in bad]
        if kept:
            assembled = assemble(flat, kept, targets, job.manifest.columns)
            add(statistics, block_sums(assembled, job.manifest.targets))
            yield assembled, {} if targets is None else targets.roundings(kept)
        start += len(block)


def _targets_of(
    job: Job, engine: Engine, rows: list[TrainingRow], statistics: Counter[str]
) -> tuple[WindowTargets, set[int]]:
    """What the teacher says of these rows, and which of them have NaN or infinity somewhere."""
    with job.waits("teacher"):
        targets = engine.capture(rows, job.manifest, job.check_stop)
    bad = targets.bad_rows()
    for index, position in bad.items():
        _report_nonfinite(job, rows[index], position)
    statistics["nonfinite_rows"] += len(bad)
    if targets.forwards_halved:  # absent where all went by the plan
        statistics["forwards_halved"] += targets.forwards_halved
    return targets, set(bad)


def _report_nonfinite(job: Job, row: TrainingRow, position: int) -> None:
    document, chunk = row.row_id >> ROW_CHUNK_BITS, row.row_id & ((1 << ROW_CHUNK_BITS) - 1)
    message = (
        f"the teacher gave NaN or infinity in document {document} of {job.draft.config.corpus}, "
        f"chunk {chunk}, position {position}"
    )
    if job.manifest.nonfinite == "stop":
        raise NonFiniteTargets(
            f"{message}. Nothing of this shard was kept. Try --dtype float32 or bfloat16, or skip "
            "and count such rows with --nonfinite drop."
        )
    log.warning("%s: row dropped", message)


def _encoded(job: Job, blocks: Iterator[Captured]) -> Iterator[Measured]:
    """Blocks encoded in threads, in order, at most a few ahead of the writer."""
    waiting: deque[Future[Measured]] = deque()
    learnt = job.manifest, job.ranks, job.scales
    try:
        for number, (block, rounding) in enumerate(blocks):
            waiting.append(job.pool.submit(encode_and_measure, block, number, *learnt, rounding))
            if len(waiting) >= _ENCODE_AHEAD:
                with job.waits("encode"):
                    encoded = waiting.popleft().result()
                yield encoded
        while waiting:
            with job.waits("encode"):
                encoded = waiting.popleft().result()
            yield encoded
    finally:
        for future in waiting:
            future.cancel()


def _still_needed(job: Job) -> str:
    """How much more disk the missing shards want, by the size of the finished ones."""
    sizes = [commit.num_bytes for commit in read_commits(job.storage, job.manifest, job.cache_id)]
    missing = job.manifest.plan.num_shards - len(sizes)
    if not sizes:
        return "cache-teacher plan says how much the whole cache needs."
    return f"The {missing} missing shards need about {missing * max(sizes) / 2**30:.3f} GiB."
