"""Micro-batches of a cache, in the order of `order.py`, read and decoded in threads.

One thread plans steps, window by window, and collates; a few decode blocks. They read only blocks
with a row that this rank still trains on: nothing before the start step, nothing for other ranks.
In memory are two windows and a bounded queue of micro-batches.
"""

import atexit
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from shared.arrays import ranges
from shared.targets.hidden import num_states
from student_train.data.arrange import SEQUENCES, Arrangement, Columns
from student_train.data.collate import (
    Counts,
    MicroBatch,
    ReadWindow,
    Shape,
    collate,
    columns_of,
    without_rows,
)
from student_train.data.order import Order, Step, split

if TYPE_CHECKING:
    from shared.cache import Cache
    from student_train.data.cache_set import Source

_UNUSED = ("label_logprob", "reference", "reference_bytes")  # no loss needs them
_BLOCKS_PER_JOB = 4  # handing a job to a thread takes 20 us, decoding a block 500


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """What a rank reads. Micro-batch g of a step goes to rank g % world_size."""

    accumulation: int = 1
    world_size: int = 1
    rank: int = 0
    threads: int = 2
    targets: bool = True
    temperature: float = 1.0  # other than 1: adds log_partition_ratio
    hidden_layers: tuple[int, ...] = ()
    hidden_every: int = 1  # the cache has states of every n-th position of a row
    arrangement: Arrangement = SEQUENCES  # of a row, by its task


class BatchStream:
    """Iterates over the micro-batches of this rank, `accumulation` for every step.

    Each iteration begins at the step that `start_step` then returns; that number is the whole state
    of the data. `seconds_waited` is how long consumers have waited so far.
    """

    def __init__(
        self,
        cache: "Cache | Source",
        order: Order,
        spec: StreamSpec,
        *,
        max_steps: int,
        start_step: Callable[[], int] = lambda: 0,
    ) -> None:
        self.cache, self.order, self.spec = cache, order, spec
        self.max_steps, self.start_step = max_steps, start_step
        self.seconds_waited = 0.0

    def __len__(self) -> int:
        return self.max_steps * self.spec.accumulation

    def __iter__(self) -> Iterator[MicroBatch]:
        reader = _Reader(self.cache, self.order, self.spec)
        batches = reader.batches(self.start_step(), self.max_steps)
        with closing(_Background(batches, depth=max(2, self.spec.accumulation))) as background:
            while True:
                began = time.perf_counter()
                batch = background.get()
                self.seconds_waited += time.perf_counter() - began
                if batch is None:
                    return
                yield batch


class _Background:
    """Runs a generator in a thread of its own, at most `depth` items ahead.

    What the generator raises, `get` raises. An iterator that nobody closed must not keep the
    process alive, so the thread is a daemon; and a daemon that is killed inside torch aborts the
    process, so it is stopped at exit.
    """

    def __init__(self, items: Generator[MicroBatch], depth: int) -> None:
        self._items = items
        self._ready: queue.SimpleQueue[MicroBatch | BaseException | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batch-stream", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def get(self) -> MicroBatch | None:
        """The next item, None after the last."""
        item = self._ready.get()
        self._free.release()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stops the thread and the generator, and waits for both."""
        self._stopped.set()
        self._free.release()
        self._thread.join()
        atexit.unregister(self.close)

    def _work(self) -> None:
        try:
            with closing(self._items):
                for item in self._items:
                    self._free.acquire()
                    if self._stopped.is_set():
                        return
                    self._ready.put(item)
        except BaseException as error:  # noqa: BLE001 (the consumer raises it)
            self._ready.put(error)
        else:
            self._ready.put(None)


@dataclass(frozen=True, slots=True)
class _Plan:
    """One step of this rank: the rows of each micro-batch, and the windows they are in."""

    step: Step
    micro_batches: list[tuple[np.ndarray, np.ndarray]]
    counts: Counts

    @property
    def windows(self) -> range:
        return range(int(self.step.windows[0]), int(self.step.windows[-1]) + 1)


class _Reader:
    """Plans, reads and collates; owns the decoding threads and the windows in memory."""

    def __init__(self, cache: "Cache | Source", order: Order, spec: StreamSpec) -> None:
        self.cache, self.order, self.spec = cache, order, spec
        self._row_labels = cache.row_labels
        self._pool = ThreadPoolExecutor(spec.threads, thread_name_prefix="batch-stream-decode")
        self._windows: dict[int, ReadWindow] = {}
        self._unused_memory: list[Columns] = []
        self._jobs: dict[tuple[int, int], Future[None]] = {}  # by window and block
        empty = cache.empty_block(hidden_layers=spec.hidden_layers, targets=spec.targets)
        self._no_rows = columns_of(empty, spec.temperature, spec.arrangement)

    def batches(self, start: int, stop: int) -> Generator[MicroBatch]:
        """Micro-batches of the steps from `start` up to `stop`."""
        try:
            waiting: list[_Plan] = []
            for window, rows, plans in _by_window(self._plans(start, stop)):
                # The first step may be the last that needs the window before: one less in memory.
                yield from self._collate(waiting[:1])
                self._start_reading(window, rows)
                yield from self._collate(waiting[1:])
                waiting = plans
            yield from self._collate(waiting)
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _plans(self, start: int, stop: int) -> Iterator[_Plan]:
        groups = self.spec.world_size * self.spec.accumulation
        for step in islice(self.order.steps(start), max(0, stop - start)):
            parts = split(self.cache.row_tokens[step.rows], groups)
            mine = parts[self.spec.rank :: self.spec.world_size]
            micro_batches = [(step.rows[index], step.windows[index]) for index in mine]
            yield _Plan(step, micro_batches, self._counts(step))

    def _counts(self, step: Step) -> Counts:
        positions = self.cache.row_positions[step.rows]
        return Counts(
            positions=int(positions.sum()),
            labels=int(self._row_labels[step.rows].sum()),
            states=int(num_states(positions, self.spec.hidden_every).sum()),
            rows=int(np.count_nonzero(positions)),
        )

    def _start_reading(self, number: int, rows: np.ndarray) -> None:
        if not len(rows):
            return
        blocks, first_use = np.unique(self._blocks_of(rows), return_index=True)
        starts = self.order.block_starts
        all_rows = ranges(starts[blocks], starts[blocks + 1] - starts[blocks])
        lengths = self.cache.row_tokens[all_rows], self.cache.row_positions[all_rows]
        memory = self._unused_memory.pop() if self._unused_memory else {}
        window = self._windows[number] = ReadWindow(
            all_rows,
            *lengths,
            no_rows=self._no_rows,
            memory=memory,
            hidden_every=self.spec.hidden_every,
        )
        by_use = blocks[np.argsort(first_use)].tolist()
        for begin in range(0, len(by_use), _BLOCKS_PER_JOB):
            some = by_use[begin : begin + _BLOCKS_PER_JOB]
            job = self._pool.submit(self._read, window, some)
            self._jobs |= {(number, block): job for block in some}

    def _read(self, window: ReadWindow, blocks: list[int]) -> None:
        spec, starts = self.spec, self.order.block_starts
        for number in blocks:
            block = self.cache.read_block(
                number,
                hidden_layers=spec.hidden_layers,
                targets=spec.targets,
                skip=_UNUSED,
            )
            first, last = int(starts[number]), int(starts[number + 1])
            columns = columns_of(block, spec.temperature, spec.arrangement)
            window.fill(first, last - first, columns)

    def _collate(self, plans: list[_Plan]) -> Iterator[MicroBatch]:
        shape = Shape(self.spec.arrangement, self.spec.hidden_every)
        for plan in plans:
            counts = plan.counts
            for rows, windows in plan.micro_batches:
                if len(rows):
                    parts = self._parts(rows, windows)
                    yield collate(parts, shape, counts=counts)
                else:
                    yield without_rows(self._no_rows, shape, counts=counts)
            for number in [number for number in self._windows if number < plan.windows[-1]]:
                self._unused_memory.append(self._windows.pop(number).memory)

    def _parts(self, rows: np.ndarray, windows: np.ndarray) -> list[tuple[ReadWindow, np.ndarray]]:
        """The rows by window, once the blocks they are in have been read."""
        parts = []
        for number in np.unique(windows).tolist():
            some = rows[windows == number]
            for block in np.unique(self._blocks_of(some)).tolist():
                if job := self._jobs.pop((number, block), None):
                    job.result()
            parts.append((self._windows[number], some))
        return parts

    def _blocks_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.order.block_starts, rows, side="right") - 1


def _by_window(plans: Iterator[_Plan]) -> Iterator[tuple[int, np.ndarray, list[_Plan]]]:
    """Each window in turn: its rows in order of use, and the steps that end in it.

    A window comes out once a step begins behind it, since none later can need more of its rows.
    """
    rows: dict[int, list[np.ndarray]] = {}
    ending: dict[int, list[_Plan]] = {}
    for plan in plans:
        for number in [number for number in rows if number < plan.windows[0]]:
            yield number, np.concatenate(rows.pop(number)), ending.pop(number)
        for number in plan.windows:
            used = [some[windows == number] for some, windows in plan.micro_batches]
            rows.setdefault(number, []).extend(used)
            ending.setdefault(number, [])
        ending[plan.windows[-1]].append(plan)
    for number, used in rows.items():
        yield number, np.concatenate(used), ending[number]
