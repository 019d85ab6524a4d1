"""Stage one on one screen: a shard as a function of (manifest, i), and the run around it.

documents (-> Writer.written) -> build_rows -> capture_window (Teacher.forward -> select)
          -> encode_block -> ShardWriter.write -> commit
"""

import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.cache import channel_scales, class_ranks, committed_shards, read_commits
from shared.errors import DiskFull, NonFiniteTargets, Stopped, TeacherCacheError
from shared.format.blocks import Block
from shared.format.commits import commit_name
from shared.format.manifest import Manifest
from shared.format.schema import MIN_BLOCK_POSITIONS, ROW_CHUNK_BITS
from shared.format.writer import EncodedBlock, ShardWriter
from shared.options import write_resolved
from shared.progress import Progress, WaitClock
from shared.signals import StopRequest, stop_on_signals
from shared.storage import LocalStorage, Storage
from shared.targets.hidden import ChannelScales
from shared.targets.record import ClassRanks
from teacher_cache.config import CaptureConfig
from teacher_cache.engines.teacher import Teacher
from teacher_cache.finished import finished_as_asked
from teacher_cache.job.calibrate import publish_or_adopt
from teacher_cache.job.capture import WindowTargets, capture_window
from teacher_cache.job.draft import Draft, resolve
from teacher_cache.job.statistics import add, block_sums, encode_and_measure
from teacher_cache.job.workers import Share, my_shards, run_local_processes, share_of
from teacher_cache.tasks.rows import Row

log = logging.getLogger(__name__)

_WINDOW_FORWARDS = (
    16  # forwards whose rows are sorted by length together; more saves little padding
)
_ENCODE_AHEAD = 8  # blocks in the encoder's queue before the teacher waits


Captured = tuple[Block, dict[int, np.ndarray]]  # and what bfloat16 cost its hidden states
Measured = tuple[EncodedBlock, dict[str, float]]  # and how far its hidden states are off


@dataclass(slots=True)
class Job:
    """A published job: everything that a shard is a function of, and who is looking."""

    draft: Draft
    storage: Storage
    manifest: Manifest
    cache_id: str
    ranks: ClassRanks
    scales: ChannelScales
    stop: StopRequest
    progress: Progress
    waits: WaitClock
    pool: ThreadPoolExecutor
    bytes_written: int = 0
    tokens_written: int = 0

    @property
    def teacher(self) -> Teacher | None:
        return self.draft.teacher

    def check_stop(self) -> None:
        """Called between two forwards: a signal drops the shard in work and ends the run."""
        if self.stop.requested:
            raise Stopped(
                f"{self.storage.root}: stopped by a signal. Finished shards are kept; run the same "
                "command again to go on."
            )


def run(config: CaptureConfig) -> None:
    """Captures this process's share of the cache, then whatever is still missing."""
    with stop_on_signals() as stop:
        run_stoppable(config, stop)


def run_stoppable(config: CaptureConfig, stop: StopRequest) -> None:
    """As `run`, with the caller's handlers, which may outlive it; a signal raises `Stopped`."""
    share = share_of(config.worker, os.environ)
    count = _local_processes(config, share)
    if count > 1:
        _run_many(config, share, count, stop)
        return
    storage = LocalStorage(config.out)
    if (finished := finished_as_asked(config, storage)) is not None:
        publish_or_adopt(finished, storage)
        _record(config, storage, share)
        shards = len(committed_shards(storage))
        log.info("%s: %d of %d shards done", storage.root, shards, shards)
        return
    draft = resolve(config)
    manifest, cache_id = publish_or_adopt(draft, storage)
    torch.set_num_threads(manifest.plan.cpu_threads)  # on a CPU it decides the last bits
    _record(config, storage, share)
    shards = manifest.plan.num_shards
    with (
        Progress("cache-teacher", total=_tokens_left(storage, manifest, share)) as progress,
        ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode") as pool,
    ):
        ranks = class_ranks(storage, manifest)
        scales, waits = channel_scales(storage, manifest), WaitClock()
        job = Job(draft, storage, manifest, cache_id, ranks, scales, stop, progress, waits, pool)
        for shard in my_shards(shards, share, lambda i: storage.exists(commit_name(i))):
            job.check_stop()
            try:
                capture_shard(job, shard)
            except DiskFull as error:
                raise DiskFull(f"{error} {_still_needed(job)}") from error
    log.info("%s: %d of %d shards done", storage.root, len(committed_shards(storage)), shards)


def capture_shard(job: Job, shard: int) -> None:
    """Runs the teacher over the documents of one shard and commits it; all or nothing."""
    statistics: Counter[str] = Counter()
    per_shard = job.manifest.plan.documents_per_shard
    documents = range(shard * per_shard, min((shard + 1) * per_shard, len(job.draft.corpus)))
    with ShardWriter(job.storage, job.manifest, job.cache_id, shard) as writer:
        for encoded, errors in _encoded(job, _blocks(job, documents, statistics)):
            add(statistics, errors)
            with job.waits("disk"):
                job.bytes_written += writer.write(encoded)
            tokens = int(encoded.row_tokens.sum())
            job.tokens_written += tokens
            job.progress.advance(
                tokens,
                bytes_per_token=round(job.bytes_written / job.tokens_written, 1),
                waiting=job.waits.text(),
            )
        writer.statistics = dict(statistics)
    log.debug("shard %d: %s", shard, "committed" if writer.won else "another process was first")


def _blocks(job: Job, documents: range, statistics: Counter[str]) -> Iterator[Captured]:
    """Blocks of a shard in order; the teacher runs over a window of them at a time."""
    read = _documents(job, documents)
    if job.manifest.preprocessing.generation is not None:
        writer = job.draft.writer(job.manifest.plan.forward_tokens)
        read = writer.written(read, statistics, job.check_stop)
    built = job.draft.build_rows(read, statistics)
    window: list[list[Row]] = []
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


def cut_blocks(built: Iterator[Row]) -> Iterator[list[Row]]:
    """Consecutive rows, together MIN_BLOCK_POSITIONS; the last block of a shard may be less."""
    block: list[Row] = []
    positions = 0
    for row in built:
        block.append(row)
        positions += row.num_positions
        if positions >= MIN_BLOCK_POSITIONS:
            yield block
            block, positions = [], 0
    if block:
        yield block


def _captured(job: Job, window: list[list[Row]], statistics: Counter[str]) -> Iterator[Captured]:
    """The blocks of a window with the teacher's targets; rows with NaN or infinity left out."""
    flat = [row for block in window for row in block]
    targets: WindowTargets | None = None
    bad: dict[int, int] = {}
    if job.teacher is not None:
        with job.waits("teacher"):
            targets = capture_window(job.teacher, job.manifest, flat, job.check_stop)
        bad = targets.bad_rows()
        for index, position in bad.items():
            _report_nonfinite(job, flat[index], position)
        statistics["nonfinite_rows"] += len(bad)
        if targets.forwards_halved:  # absent where all went by the plan
            statistics["forwards_halved"] += targets.forwards_halved
    start = 0
    for block in window:
        kept = [index for index in range(start, start + len(block)) if index not in bad]
        if kept:
            assembled = assemble(flat, kept, targets, job.manifest.columns)
            add(statistics, block_sums(assembled, job.manifest.targets))
            yield assembled, {} if targets is None else targets.roundings(kept)
        start += len(block)


def _report_nonfinite(job: Job, row: Row, position: int) -> None:
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


def assemble(
    window: Sequence[Row],
    kept: Sequence[int],
    targets: WindowTargets | None,
    columns: Sequence[str],
) -> Block:
    """The rows `kept` of a window as a block with these columns, and with their targets."""
    chosen = [window[index] for index in kept]
    labels = _joined([row.labels for row in chosen if row.labels is not None])
    of_values = "label_values" in columns
    block = Block(
        row_ids=np.array([row.row_id for row in chosen], np.uint64),
        num_tokens=np.array([len(row.input_ids) for row in chosen], np.int32),
        num_positions=np.array([row.num_positions for row in chosen], np.int32),
        input_ids=np.concatenate([row.input_ids for row in chosen]),
        positions=np.concatenate([row.positions() for row in chosen]).astype(np.int32),
        labels=None if of_values else labels,
        label_values=labels if of_values else None,
        token_type_ids=_joined([_types(row) for row in chosen]),
    )
    if "reference" in columns:
        texts = [json.dumps(row.reference, ensure_ascii=False).encode() for row in chosen]
        block.reference = np.frombuffer(b"".join(texts), np.uint8)
        block.reference_bytes = np.array([len(text) for text in texts], np.int32)
    if "segments" in columns:
        block.segments = np.array([size for row in chosen for size in row.segments], np.int32)
        block.num_segments = np.array([len(row.segments) for row in chosen], np.int32)
    if targets is not None:
        targets.fill(block, kept)
    if "label_logprob" not in columns:  # of no label there is none
        block.label_logprob = None
    return block


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray | None:
    return np.concatenate(parts) if parts else None


def _types(row: Row) -> np.ndarray:
    """Of a row of one text they are all 0; written only where the cache has pairs."""
    return np.zeros_like(row.input_ids) if row.token_type_ids is None else row.token_type_ids


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


def _tokens_left(storage: Storage, manifest: Manifest, share: Share) -> int:
    """Of this process's share of the shards, as calibration estimated them."""
    plan = manifest.plan
    left = plan.num_shards - len(committed_shards(storage))
    return round(plan.estimated_tokens * left / plan.num_shards / share.world)


def _local_processes(config: CaptureConfig, share: Share) -> int:
    if config.processes != "auto":
        return config.processes
    return torch.cuda.device_count() if share.world == 1 and config.device == "auto" else 1


def _run_many(config: CaptureConfig, share: Share, count: int, stop: StopRequest) -> None:
    folder = Path(config.out) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"processes-{os.getpid()}.yaml"
    write_resolved(config, file)
    own_gpus = torch.cuda.device_count() >= count
    code = run_local_processes(file, count, one_gpu_each=own_gpus, stop=stop, share=share)
    if code == 75:
        raise Stopped(f"{config.out}: stopped by a signal. Run the same command again to go on.")
    if code != 0:
        raise TeacherCacheError(
            f"{config.out}: one of {count} processes failed (see its message above). Finished "
            "shards are kept; run the same command again to go on."
        )


def _record(config: CaptureConfig, storage: LocalStorage, share: Share) -> None:
    """The resolved config of this process, for the user; never read by stage two."""
    folder = storage.root / "runs"
    folder.mkdir(exist_ok=True)
    write_resolved(config, folder / f"worker-{share.rank}-of-{share.world}.yaml")
