"""Which rows form which optimiser step: a pure function of (lengths in the commits, seed, step).

An epoch permutes the blocks of the whole cache. Every 64 permuted blocks are a window, and rows
are permuted inside it, so that a block is decoded once per epoch and few are in memory. Steps are
cut from the sequence of all rows by a token budget; they may reach over the end of a window or of
an epoch. No data is read: the lengths of the rows are enough.

With weighted parts (several caches, each with its share) every part is an endless sequence of
tokens of its own: its blocks in a permutation, then in another one, and so on. A window takes from
each part the blocks that begin in the next `weight * v` tokens of its sequence, with one v for all
windows and parts, so that the shares of tokens are as asked in every window, up to a block of each
part. An epoch ends when every part has been read through: the one with most tokens per weight
exactly once, the others more than once. v is the largest for which an epoch is a whole number of
windows of at most `window_blocks` blocks on average.

R rows. Windows are counted over all epochs: window w is in epoch w // windows_per_epoch.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
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
class Part:
    """Consecutive blocks of a set, all those of one cache, and the weight of their tokens."""

    blocks: int
    weight: float

    def __post_init__(self) -> None:
        if self.blocks < 1 or not 0 < self.weight < math.inf:
            raise ValueError(f"{self}: expected at least one block and a weight above 0")


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one optimiser step, in order, and the window each of them is in; i64 [R]."""

    number: int
    rows: np.ndarray
    windows: np.ndarray


class Order:
    """The steps over a cache with `block_rows` [blocks] and `row_tokens` [rows].

    Without `parts` all blocks are one set; with them they are mixed by weight.

    A step takes rows until the next one would exceed the budget, and at least one. Finding a step
    walks the lengths of all rows before it, once: what the walk found is kept for every chunk of
    windows.
    """

    def __init__(
        self,
        block_rows: np.ndarray,
        row_tokens: np.ndarray,
        spec: OrderSpec,
        parts: Sequence[Part] = (),
    ) -> None:
        if int(block_rows.sum()) != len(row_tokens) or not len(row_tokens):
            raise ValueError(
                f"blocks with {int(block_rows.sum())} rows in all, but the lengths of "
                f"{len(row_tokens)} rows: expected equal numbers, at least 1"
            )
        self.spec = spec
        self.block_starts = np.concatenate([[0], np.cumsum(block_rows, dtype=np.int64)])
        self.row_tokens = row_tokens
        self._mixture = _Mixture(self.block_starts, row_tokens, spec, parts) if parts else None
        epoch_rows = float(len(row_tokens))
        self.windows_per_epoch = -(-len(block_rows) // spec.window_blocks)
        if self._mixture is not None:
            epoch_rows = self._mixture.rows_per_epoch
            self.windows_per_epoch = self._mixture.windows_per_epoch
        self._chunk_windows = max(1, int(_CHUNK * self.windows_per_epoch // epoch_rows))
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
        first = part * self._chunk_windows
        last = min(first + self._chunk_windows, self.windows_per_epoch)
        windows = np.arange(first, last) + epoch * self.windows_per_epoch
        if self._mixture is None:
            blocks, window_blocks = self._blocks(epoch, first, last)
        else:
            blocks, window_blocks = self._mixture.blocks(int(windows[0]), len(windows))
        starts = self.block_starts[blocks]
        block_rows = self.block_starts[blocks + 1] - starts
        rows = ranges(starts, block_rows)
        ends = np.concatenate([[0], np.cumsum(block_rows)])[np.cumsum(window_blocks)]
        window_rows = np.diff(ends, prepend=0)
        if self.spec.shuffle:
            rows = rows[_inside_windows(window_rows, _mix(self.spec.seed, 2 * epoch + 1))]
        return rows, np.repeat(windows, window_rows)

    def _blocks(self, epoch: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of windows `first` to `last` of an epoch, and how many are in each."""
        size, num_blocks = self.spec.window_blocks, len(self.block_starts) - 1
        blocks = np.arange(first * size, min(last * size, num_blocks))
        if self.spec.shuffle:
            blocks = permute(blocks, num_blocks, _mix(self.spec.seed, 2 * epoch))
        return blocks, np.diff(np.append(np.arange(0, len(blocks), size), len(blocks)))


class _Mixture:
    """Which blocks of each part are in which window. Exact: fractions and whole numbers only."""

    def __init__(
        self,
        block_starts: np.ndarray,
        row_tokens: np.ndarray,
        spec: OrderSpec,
        parts: Sequence[Part],
    ) -> None:
        firsts = np.cumsum([0, *(part.blocks for part in parts)])
        if firsts[-1] != len(block_starts) - 1:
            raise ValueError(f"parts of {firsts[-1]} blocks, but there are {len(block_starts) - 1}")
        token_ends = np.concatenate([[0], np.cumsum(row_tokens, dtype=np.int64)])[block_starts]
        self.spec, self._firsts = spec, firsts.tolist()
        self._block_tokens = np.split(np.diff(token_ends), firsts[1:-1])
        totals = [int(tokens.sum()) for tokens in self._block_tokens]
        if min(totals) < 1:
            raise ValueError(f"parts of {totals} tokens: expected at least 1 in each")
        weights = [Fraction(part.weight) for part in parts]
        longest = max(total / weight for total, weight in zip(totals, weights, strict=True))
        passes = [longest * weight / n for n, weight in zip(totals, weights, strict=True)]
        blocks = sum(part.blocks * each for part, each in zip(parts, passes, strict=True))
        part_rows = np.diff(block_starts[firsts]).tolist()
        self.rows_per_epoch = float(sum(n * p for n, p in zip(part_rows, passes, strict=True)))
        self.windows_per_epoch = math.ceil(blocks / spec.window_blocks)
        # Tokens that a window takes from each part.
        self._quotas = [weight * longest / self.windows_per_epoch for weight in weights]
        self._pass_starts: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}  # the last, by part

    def blocks(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of `count` windows from window `first` on, and how many are in each."""
        found = [self._of_part(part, first, count) for part in range(len(self._quotas))]
        blocks, windows = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        by_window = np.argsort(windows, kind="stable")
        return blocks[by_window], np.bincount(windows, minlength=count)

    def _of_part(self, part: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """A part's blocks in the windows, and the window of each, counted from `first`."""
        quota, total = self._quotas[part], int(self._block_tokens[part].sum())
        # A block that begins at token t is in the window with begin <= t < next begin.
        begins = np.array([math.ceil(quota * (first + n)) for n in range(count + 1)], np.int64)
        passes = range(int(begins[0]) // total, max(0, int(begins[-1]) - 1) // total + 1)
        pieces = [self._pass(part, number) for number in passes]
        blocks = np.concatenate([piece for piece, _ in pieces])
        at = np.concatenate([s + n * total for n, (_, s) in zip(passes, pieces, strict=True)])
        window = np.searchsorted(begins, at, side="right") - 1
        inside = (window >= 0) & (window < count)
        return blocks[inside], window[inside]

    def _pass(self, part: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """All blocks of a part as its pass `number` orders them, and at which token each begins."""
        known = self._pass_starts.get(part)
        if known is not None and known[0] == number:
            return known[1:]
        tokens = self._block_tokens[part]
        order = np.arange(len(tokens))
        if self.spec.shuffle:
            order = permute(order, len(tokens), _mix(_mix(self.spec.seed, 2 * number), part))
        starts = np.cumsum(tokens[order]) - tokens[order]
        self._pass_starts[part] = number, order + self._firsts[part], starts
        return self._pass_starts[part][1:]


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
    if not len(tokens):
        return [], spent
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
