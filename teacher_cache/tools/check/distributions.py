"""Distributions: KL and the best class, between teacher and cache.

Everything is compared over the cells that the cache has: its entries, and one for all other
classes. Of a sample these are the classes kept as they are; what was drawn is drawn again, at the
same offsets.

N positions, C classes, K entries, J = K + 1 cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.cache import Cache
from shared.rows import RowTargets
from shared.targets.ragged import MAX_ENTRIES, drawn_logprob
from shared.targets.spec import TargetSpec
from teacher_cache.engines.batches import forward_batches
from teacher_cache.engines.teacher import Teacher
from teacher_cache.select.ragged import grid_offsets, random_bits
from teacher_cache.select.targets import select
from teacher_cache.tasks.rows import TrainingRow
from teacher_cache.tasks.table import task_of

# The codec alone costs 4e-5 nats on average (benchmarks/README.md); a shift by one position, a
# swapped row or other weights cost whole nats.
_ALLOWED_KL = 1e-3
_ALLOWED_NOISE = 4.0
_ALLOWED_DISAGREEMENT = 0.01
_NEARLY = 0.1  # nats: codes of 7 bits may swap classes that are nearly equal


@dataclass(frozen=True, slots=True)
class Checked:
    """Means over positions. KL in nats over the cells of the cache.

    Agreement of the best class; of a sample the share of its classes that are kept or drawn again.
    """

    rows: int
    positions: int
    kl_live_live: float
    kl_live_cached: float
    worst_kl: float
    agreement_live_live: float
    agreement_live_cached: float
    differences: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """The cache is no further from the teacher than codec and noise explain."""
        kl = self.kl_live_cached <= _ALLOWED_KL + _ALLOWED_NOISE * self.kl_live_live
        floor = self.agreement_live_live - _ALLOWED_DISAGREEMENT
        return kl and self.agreement_live_cached >= floor and not self.differences


def check_distributions(
    cache: Cache,
    teacher: Teacher,
    chosen: Sequence[int],
    rows: Sequence[TrainingRow],
    differences: tuple[str, ...],
) -> Checked:
    """Runs the teacher over `rows`, which are those numbered `chosen`, together and one by one."""
    cached = _cached(cache, chosen)
    batched = _live(teacher, cache, rows, cached.ids)
    sizes = [row.num_positions for row in rows]
    parts = zip(rows, cached.ids.split(sizes), strict=True)
    alone = _joined([_live(teacher, cache, [row], ids) for row, ids in parts])
    kl_live, kl_cached = _kl(batched.cells, alone.cells), _kl(batched.cells, cached.cells)
    live_live, live_cached = _agreement(batched, alone), _agreement_with(cached, batched)
    if cache.manifest.targets.sampled and cache.manifest.origin is None:
        again = _drawn(teacher, cache, rows)
        live_live = _overlap(again, [ids for row in rows for ids in _drawn(teacher, cache, [row])])
        live_cached = _overlap(_entries(cache, chosen), again)
    return Checked(
        rows=len(rows),
        positions=len(cached.ids),
        kl_live_live=float(kl_live.mean()),
        kl_live_cached=float(kl_cached.mean()),
        worst_kl=float(kl_cached.max()),
        agreement_live_live=live_live,
        agreement_live_cached=live_cached,
        differences=differences,
    )


@dataclass(frozen=True, slots=True)
class _Cells:
    """Log-probabilities over the cached entries and the tail."""

    ids: Tensor  # i64 [N, K], negative where a position has fewer entries
    cells: Tensor  # f64 [N, J], -inf in cells that are not there


@dataclass(frozen=True, slots=True)
class _Live(_Cells):
    """These cells as the teacher fills them now, and its most probable class."""

    best: Tensor  # i64 [N]


def _cached(cache: Cache, chosen: Sequence[int]) -> _Cells:
    spec = cache.manifest.targets
    parts = []
    for index in chosen:
        targets = cache[index].targets
        assert targets is not None  # check refuses a cache without
        ids_NK, logprobs_NK = _padded(targets, spec)
        cells = torch.cat([logprobs_NK, targets.tail_mass.double().log()[:, None]], dim=1)
        parts.append(_Cells(ids_NK, cells))
    return _Cells(torch.cat([p.ids for p in parts]), torch.cat([p.cells for p in parts]))


def _padded(targets: RowTargets, spec: TargetSpec) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [N, K], missing and drawn entries as -1 and -inf."""
    ids, logprobs = targets.ids, targets.logprobs.double()
    if spec.sampled:
        drawn = targets.logprobs == float(drawn_logprob(spec))
        ids, logprobs = ids.masked_fill(drawn, -1), logprobs.masked_fill(drawn, -torch.inf)
    if targets.counts is None:
        return ids, logprobs
    there_NK = torch.arange(MAX_ENTRIES) < targets.counts[:, None]
    ids_NK = torch.full(there_NK.shape, -1).masked_scatter(there_NK, ids)
    empty_NK = torch.full(there_NK.shape, -torch.inf, dtype=torch.float64)
    return ids_NK, empty_NK.masked_scatter(there_NK, logprobs)


def _live(teacher: Teacher, cache: Cache, rows: Sequence[TrainingRow], ids_NK: Tensor) -> _Live:
    """What the teacher says now at the positions of these rows, over the same cells."""
    plan, packed = cache.manifest.plan, cache.manifest.preprocessing.pack
    cells_NJ = torch.empty(len(ids_NK), ids_NK.shape[1] + 1, dtype=torch.float64)
    best_N = torch.empty(len(ids_NK), dtype=torch.int64)
    inputs = task_of(cache.manifest).inputs
    for batch in forward_batches(rows, plan.forward_tokens, packed=packed, inputs=inputs):
        output = teacher.forward(batch.inputs, chunk_positions=plan.chunk_positions)
        for part, logits_nV in output.chunks:
            at = batch.window_index[part]
            logp_nC = logits_nV[:, : teacher.num_classes].double().log_softmax(dim=-1).cpu()
            there_nK, ids_nK = ids_NK[at] >= 0, ids_NK[at].clamp(min=0)
            entry_nK = logp_nC.gather(1, ids_nK).masked_fill(~there_nK, -torch.inf)
            rest_nC = logp_nC.exp().scatter_add(1, ids_nK, -entry_nK.exp())
            tail_n1 = rest_nC.clamp(min=0).sum(dim=1, keepdim=True).log()
            if cache.manifest.targets.sampled:
                tail_n1 = torch.full_like(tail_n1, -torch.inf)
            cells_NJ[at] = torch.cat([entry_nK, tail_n1], dim=1)
            best_N[at] = logp_nC.argmax(dim=1)
    return _Live(ids_NK, cells_NJ, best_N)


def _entries(cache: Cache, chosen: Sequence[int]) -> list[Tensor]:
    """The cached classes of each position."""
    found = []
    for index in chosen:
        targets = cache[index].targets
        assert targets is not None  # check refuses a cache without
        found += [targets.entries(place)[0] for place in range(len(targets.tail_mass))]
    return found


def _drawn(teacher: Teacher, cache: Cache, rows: Sequence[TrainingRow]) -> list[Tensor]:
    """The classes of each position that a capture of these rows would keep or draw now."""
    manifest = cache.manifest
    bits_N, plan = random_bits(manifest.seed, rows), manifest.plan
    found: list[Tensor] = [torch.zeros(0, dtype=torch.int64)] * len(bits_N)
    inputs, packed = task_of(manifest).inputs, manifest.preprocessing.pack
    for batch in forward_batches(rows, plan.forward_tokens, packed=packed, inputs=inputs):
        output = teacher.forward(batch.inputs, chunk_positions=plan.chunk_positions)
        for part, logits_nV in output.chunks:
            at = batch.window_index[part]
            offset_n = grid_offsets(bits_N[at.numpy()]).to(logits_nV.device)
            selected = select(logits_nV, manifest.targets, None, offset_n)
            assert selected.counts is not None  # a sample has them
            of_position = selected.ids.cpu().split(selected.counts.tolist())
            for place, ids in zip(at.tolist(), of_position, strict=True):
                found[place] = ids
    return found


def _overlap(some: list[Tensor], others: list[Tensor]) -> float:
    """Share of the classes in `some` that are in `others` at the same position."""
    pairs = zip(some, others, strict=True)
    there = sum(int(torch.isin(ours, theirs).sum()) for ours, theirs in pairs)
    return there / max(1, sum(map(len, some)))


def _joined(parts: list[_Live]) -> _Live:
    return _Live(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.cells for part in parts]),
        torch.cat([part.best for part in parts]),
    )


def _kl(p_NJ: Tensor, q_NJ: Tensor) -> Tensor:
    """Sum of p log(p / q) - p + q of each position in nats: KL(p || q) where both sum to 1.

    A cell with p = 0 counts q.
    """
    floor = torch.finfo(torch.float32).tiny
    terms_NJ = p_NJ.exp() * (p_NJ - q_NJ.clamp_min(np.log(floor)))
    terms_NJ = torch.where(p_NJ == -torch.inf, 0.0, terms_NJ) - p_NJ.exp() + q_NJ.exp()
    return terms_NJ.sum(dim=1)


def _agreement(one: _Live, other: _Live) -> float:
    return float((one.best == other.best).double().mean())


def _agreement_with(cached: _Cells, live: _Live) -> float:
    """Share of positions where the live best class is a best one of the cache, or nearly."""
    entry_NK = cached.cells[:, :-1]
    its_N = entry_NK.masked_fill(cached.ids != live.best[:, None], -torch.inf).amax(dim=1)
    nearly_N = (its_N >= entry_NK.amax(dim=1) - _NEARLY) & (its_N > -torch.inf)
    return float(nearly_N.double().mean())
