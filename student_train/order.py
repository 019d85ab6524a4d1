"""Which rows form which optimiser step: a pure function of (lengths in the commits, seed, step).

An epoch permutes the blocks of the whole cache. Every 64 permuted blocks are a window, and rows
are permuted inside it, so that a block is decoded once per epoch and few are in memory. Steps are
cut from the sequence of all rows by a token budget; they may reach over the end of a window or of
an epoch. No data is read: the lengths of the rows are enough.

R rows. Windows are counted over all epochs: window w is in epoch w // windows_per_epoch.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from shared.arrays import ranges

_CHUNK = 1 << 16  # rows ordered in one go: a temporary of half a megabyte stays in the CPU's cache
_ROUNDS = 4  # two for each half; fewer leave neighbours together (Luby and Rackoff 1988)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderSpec:
    """`batch_tokens` is the budget of an optimiser step, over all ranks and micro-batches."""

    batch_tokens: int
    seed: int = 0
    window_blocks: int = 64
    shuffle: bool = True  # False: the natural order, for evaluation
    epochs: int | None = None  # None: without end; else the last step may be short

    def __post_init__(self) -> None:
        epochs = 1 if self.epochs is None else self.epochs
        if min(self.batch_tokens, self.window_blocks, epochs) < 1:
            raise ValueError(f"batch_tokens, window_blocks and epochs must be at least 1: {self}")


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one optimiser step, in order, and the window each of them is in; i64 [R]."""

    number: int
    rows: np.ndarray
    windows: np.ndarray


class Order:
    """The steps over a cache with `block_rows` [blocks] and `row_tokens` [rows].

    A step takes rows until the next one would exceed the budget, and at least one. Finding a step
    walks the lengths of all rows before it, once: what the walk found is kept for every chunk of
    windows.
    """

    def __init__(self, block_rows: np.ndarray, row_tokens: np.ndarray, spec: OrderSpec) -> None:
        if int(block_rows.sum()) != len(row_tokens) or not len(row_tokens):
            raise ValueError(
                f"blocks with {int(block_rows.sum())} rows in all, but the lengths of "
                f"{len(row_tokens)} rows: expected equal numbers, at least 1"
            )
        self.spec = spec
        self.block_starts = np.concatenate([[0], np.cumsum(block_rows, dtype=np.int64)])
        self.row_tokens = row_tokens
        self.windows_per_epoch = -(-len(block_rows) // spec.window_blocks)
        self._chunk_windows = max(1, _CHUNK * self.windows_per_epoch // len(row_tokens))
        self._chunks_per_epoch = -(-self.windows_per_epoch // self._chunk_windows)
        self._end = None if spec.epochs is None else spec.epochs * self._chunks_per_epoch
        # Before each chunk: how many steps have started, and the tokens of the one still open.
        # The very first row starts a step, as if an open one were over-full.
        self._marks = {0: (0, spec.batch_tokens + 1)}

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Steps from number `start` on; without end, unless the spec names a number of epochs."""
        first = self._chunk_of(start)
        number = self._marks[first][0] - 1
        pieces: list[tuple[np.ndarray, np.ndarray]] = []
        for chunk in count(first) if self._end is None else range(first, self._end):
            rows, windows = self._rows(chunk)
            begin = 0
            for cut in self._cut(chunk, rows):
                pieces.append((rows[begin:cut], windows[begin:cut]))
                if number >= start:
                    yield _step(number, pieces)
                pieces, number, begin = [], number + 1, cut
            pieces.append((rows[begin:], windows[begin:]))
        if number >= start:
            yield _step(number, pieces)

    def steps_for_epochs(self, epochs: int) -> int:
        """Steps that start within the first `epochs` epochs."""
        last = epochs * self._chunks_per_epoch
        self._walk_to(last)
        return self._marks[last][0]

    def _chunk_of(self, step: int) -> int:
        """The chunk in which a step starts, or the last chunk where there is no such step."""
        known = len(self._marks) - 1
        while self._marks[known][0] <= step and (self._end is None or known < self._end):
            known += 1
            self._walk_to(known)
        after = bisect.bisect_right(range(known), step, key=lambda chunk: self._marks[chunk][0])
        return max(after - 1, 0)

    def _walk_to(self, chunk: int) -> None:
        for before in range(len(self._marks) - 1, chunk):
            self._cut(before, self._rows(before)[0])

    def _cut(self, chunk: int, rows: np.ndarray) -> list[int]:
        """Offsets in the chunk at which a step starts; marks the next chunk."""
        started, spent = self._marks[chunk]
        cuts, spent = _cut(self.row_tokens[rows], spent, self.spec.batch_tokens)
        self._marks[chunk + 1] = (started + len(cuts), spent)
        return cuts

    def _rows(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a chunk of windows in the order they are trained on, and their windows."""
        epoch, part = divmod(chunk, self._chunks_per_epoch)
        size, first = self.spec.window_blocks, part * self._chunk_windows
        last = min(first + self._chunk_windows, self.windows_per_epoch)
        num_blocks = len(self.block_starts) - 1
        blocks = np.arange(first * size, min(last * size, num_blocks))
        if self.spec.shuffle:
            blocks = permute(blocks, num_blocks, _mix(self.spec.seed, 2 * epoch))
        starts = self.block_starts[blocks]
        block_rows = self.block_starts[blocks + 1] - starts
        rows = ranges(starts, block_rows)
        window_rows = np.add.reduceat(block_rows, np.arange(0, len(blocks), size))
        if self.spec.shuffle:
            rows = rows[_inside_windows(window_rows, _mix(self.spec.seed, 2 * epoch + 1))]
        windows = np.arange(first, last) + epoch * self.windows_per_epoch
        return rows, np.repeat(windows, window_rows)


def split(row_tokens: np.ndarray, groups: int) -> list[np.ndarray]:
    """Cuts the rows of a step into micro-batches; returns the indices [R] of each group's rows.

    Rows are sorted by length, longest first (equal lengths in order), and cut into consecutive
    groups so that the largest padded size, rows times longest row, is as small as it can be. Where
    there is too little for all groups the last ones are empty.
    """
    order = np.argsort(-row_tokens.astype(np.int64), kind="stable")
    lengths = row_tokens[order].tolist()
    if not lengths:
        return [order] * groups
    low = max(lengths[0], -(-sum(lengths) // groups))
    high = lengths[0] * -(-len(lengths) // groups)
    while low < high:
        middle = (low + high) // 2
        if len(_fill(lengths, middle)) <= groups:
            high = middle
        else:
            low = middle + 1
    ends = _fill(lengths, low)
    return np.split(order, ends[:-1]) + [order[:0]] * (groups - len(ends))


def accumulation_for(batch_tokens: int, micro_batch_tokens: int, world_size: int) -> int:
    """Micro-batches per rank and step. `micro_batch_tokens` is met on average, padding excluded."""
    return max(1, -(-batch_tokens // (micro_batch_tokens * world_size)))


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a permutation of [0, n) chosen by `key` takes each index; i64, any shape.

    A Feistel network over the next power of two, walked until it lands below n. Its values are
    fixed for ever by a test: a run that is resumed in five years sees the same rows.
    """
    low_bits = (n - 1).bit_length() - (n - 1).bit_length() // 2
    high_bits = (n - 1).bit_length() // 2
    keys = [np.uint64(_mix(key, round_)) for round_ in range(_ROUNDS)]
    flat = index.reshape(-1).astype(np.uint64)
    for begin in range(0, len(flat), _CHUNK):
        part = flat[begin : begin + _CHUNK]
        part[:] = _feistel(part, low_bits, high_bits, keys)
        outside = np.flatnonzero(part >= n)
        while len(outside):
            walked = _feistel(part[outside], low_bits, high_bits, keys)
            part[outside] = walked
            outside = outside[walked >= n]
    return flat.astype(np.int64).reshape(index.shape)


def _step(number: int, pieces: list[tuple[np.ndarray, np.ndarray]]) -> Step:
    rows, windows = zip(*pieces, strict=True)
    return Step(number, np.concatenate(rows), np.concatenate(windows))


def _cut(tokens: np.ndarray, spent: int, budget: int) -> tuple[list[int], int]:
    """Where steps start among rows of these lengths, and the tokens in the step left open.

    `spent` tokens are in the step that is open before the first row.
    """
    ends = np.cumsum(tokens, dtype=np.int64).data  # bisect on it takes 0.6 us a step
    start, cuts = bisect.bisect_right(ends, budget - spent), []
    while start < len(ends):
        cuts.append(start)
        full = (ends[start - 1] if start else 0) + budget
        start = max(bisect.bisect_right(ends, full, start), start + 1)
    before = ends[cuts[-1] - 1] if cuts and cuts[-1] else 0
    return cuts, ends[-1] - before + (0 if cuts else spent)


def _inside_windows(window_rows: np.ndarray, key: int) -> np.ndarray:
    """A permutation inside each window. Windows of one size share it: blocks are random already."""
    permutations = {n: permute(np.arange(n), n, key) for n in set(window_rows.tolist())}
    starts = np.cumsum(window_rows) - window_rows
    inside = np.concatenate([permutations[n] for n in window_rows.tolist()])
    return inside + np.repeat(starts, window_rows)


def _fill(lengths: list[int], capacity: int) -> list[int]:
    """Ends of the groups when each takes as many rows as fit; `lengths` descend."""
    ends = [0]
    while ends[-1] < len(lengths):
        ends.append(min(ends[-1] + capacity // lengths[ends[-1]], len(lengths)))
    return ends[1:]


def _feistel(index: np.ndarray, low_bits: int, high_bits: int, keys: list[np.uint64]) -> np.ndarray:
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << high_bits) - 1)
    high, low = index >> np.uint64(low_bits), index & low_mask
    word, scratch = np.empty_like(high), np.empty_like(high)
    for round_, key in enumerate(keys):
        source, target, mask = (high, low, low_mask) if round_ % 2 == 0 else (low, high, high_mask)
        _scramble(np.bitwise_xor(source, key, out=word), scratch)
        word &= mask
        target ^= word
    high <<= np.uint64(low_bits)
    high |= low
    return high


def _scramble(words: np.ndarray, scratch: np.ndarray) -> None:
    """The output function of splitmix64 (Steele, Lea and Flood 2014), in place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words ^= np.right_shift(words, np.uint64(shift), out=scratch)
        words *= np.uint64(factor)
    words ^= np.right_shift(words, np.uint64(31), out=scratch)


def _mix(key: int, number: int) -> int:
    """The number-th output of splitmix64 seeded with `key`: a key for each pair."""
    word = np.array([(key + (number + 1) * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)], np.uint64)
    _scramble(word, np.empty_like(word))
    return int(word[0])
