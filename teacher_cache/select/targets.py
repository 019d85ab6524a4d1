"""Turns a teacher's logits into targets: the classes to keep, and a few sums over all classes.

Plain torch, any device, any float dtype in, every sum accumulated in float32; the caller's logits
are never written to. On a CPU no bit depends on how the positions were cut into chunks.

N positions, V logit width, C classes (the first C columns), K entries of each or E of all
positions, G groups of 64 classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.targets.sample import drawn_logprob
from shared.targets.spec import TargetSpec
from teacher_cache.select.ragged_entries import GROUP, BlockWeights, Entries, choose

BLOCK_BYTES = 4 << 20  # of float32 logits in work at once on a CPU; 0.5 to 32 MiB tried
# Of the groups that the first of two stages may choose: above it one stage is faster on a CPU, at
# 640 to 32,000 classes alike. At half of the groups one takes a third longer, below that twice.
TWO_STAGES_SHARE = 0.75
SUM_PARTS = 8  # a sum over classes is cut in 8, so one row alone is added up like a row among many
LOG2_E = float(torch.tensor(math.log2(math.e), dtype=torch.float32))  # exactly what kernels use
NO_CLASS = torch.iinfo(torch.int64).min  # sorts below the key of every class


@dataclass(slots=True)
class Selected:
    """Targets of N positions at T = 1; of a row marked in `bad_N` only the ids are valid."""

    ids: Tensor  # int64 [N, K], best first; of a ragged kind [E], by position and class
    logprobs: Tensor  # float32, the same shape, over all C classes; of a drawn entry its weight's
    counts: Tensor | None  # int64 [N], entries of each position of a ragged kind
    log_tail: Tensor  # float32 [N], ln of the mass of all other classes, -inf where it is 0
    entropy: Tensor  # float32 [N], nats, over all C classes
    log_partition: Tensor  # float32 [N], logsumexp of the logits
    bad_N: Tensor  # bool [N]: NaN or +inf among the logits, or no finite class
    label_logprob: Tensor | None  # float32 [N], NaN where the label is negative: no label
    log_partition_ratio: dict[float, Tensor]  # T -> float32 [N], logsumexp(logprobs of all C / T)


def select(
    logits_NV: Tensor,
    spec: TargetSpec,
    labels_N: Tensor | None = None,
    offset_N: Tensor | None = None,
) -> Selected:
    """The classes that `spec` keeps of each position.

    Of `topk` exactly the best ones: larger logit first, then smaller id. `sample` needs offset_N,
    float64 in [0, 1), that says where each position's grid begins. Minus infinity is a legal logit
    (a masked class) and becomes an entry only where a topk has fewer finite classes, or all are
    kept. Columns at or beyond C do not exist for any result.
    """
    if logits_NV.shape[1] < spec.num_classes:
        raise ValueError(
            f"logits have {logits_NV.shape[1]} columns, the targets {spec.num_classes} classes"
        )
    logits_NC = logits_NV[:, : spec.num_classes]
    areas = _WorkAreas.for_logits(logits_NC)
    maxima_NG = _group_maxima(logits_NC, areas)
    maximum_N = maxima_NG.amax(dim=1).float()
    bad_N = ~maximum_N.isfinite()
    shift_N = torch.where(bad_N, 0.0, maximum_N * LOG2_E)
    kept, sums = _kept_and_sums(logits_NC, spec, maxima_NG, shift_N, bad_N, offset_N, areas)

    # float64 from here on: a few numbers per position, each rounded once when it is stored
    mass_N = kept.sum(torch.exp2(kept.values * LOG2_E - kept.spread(shift_N))) + sums.tail_N
    log_mass_N = mass_N.log()
    log_partition_N = shift_N.double() / LOG2_E + log_mass_N
    label_logprob = None
    if labels_N is not None:
        label_logprob = (_label_values(logits_NC, labels_N) - log_partition_N).float()
    logprobs = (kept.values - kept.spread(log_partition_N)).float()
    if kept.drawn is not None:
        logprobs.masked_fill_(kept.drawn, float(drawn_logprob(spec)))
    return Selected(
        ids=kept.ids,
        logprobs=logprobs,
        counts=kept.counts,
        log_tail=(sums.tail_N.log() - log_mass_N).float(),
        entropy=(log_mass_N - sums.moment_N / LOG2_E / mass_N).clamp_(min=0.0).float(),
        log_partition=log_partition_N.float(),
        bad_N=bad_N,
        label_logprob=label_logprob,
        log_partition_ratio={
            temperature: (sum_N.log() - log_mass_N / temperature).float()
            for temperature, sum_N in sums.tempered_N.items()
        },
    )


def values_of(numbers_N1: Tensor) -> Selected:
    """The outputs of a regression: one entry for each position, `logprobs` being the number."""
    values_N1 = numbers_N1.float()
    nothing_N = torch.zeros_like(values_N1[:, 0])
    return Selected(
        ids=torch.zeros_like(values_N1, dtype=torch.long),
        logprobs=values_N1,
        counts=None,
        log_tail=nothing_N,
        entropy=nothing_N,
        log_partition=nothing_N,
        bad_N=~values_N1[:, 0].isfinite(),
        label_logprob=None,
        log_partition_ratio={},
    )


@dataclass(slots=True)
class _Kept:
    """The entries: [N, K], or [E] with the position of each."""

    ids: Tensor
    values: Tensor  # float64, logits
    rows: Tensor | None = None  # int64 [E]
    counts: Tensor | None = None  # int64 [N]
    drawn: Tensor | None = None  # bool [E]

    def spread(self, of_position_N: Tensor) -> Tensor:
        """What holds for a position at each of its entries."""
        return of_position_N[:, None] if self.rows is None else of_position_N[self.rows]

    def sum(self, of_entry: Tensor) -> Tensor:
        """Sums over the entries of each position, [N]."""
        if self.counts is None:
            return of_entry.sum(dim=1)
        return torch.segment_reduce(of_entry, "sum", lengths=self.counts, unsafe=True)


def _kept_and_sums(
    logits_NC: Tensor,
    spec: TargetSpec,
    maxima_NG: Tensor,
    shift_N: Tensor,
    bad_N: Tensor,
    offset_N: Tensor | None,
    areas: "_WorkAreas",
) -> "tuple[_Kept, _ClassSums]":
    """The entries of each position, and the sums over classes, whose tail leaves them out.

    Which classes are above a threshold is only known once a position's weights are summed, so a
    ragged kind chooses block by block, while the weights are at hand.
    """
    if not spec.ragged:
        ids_NK, values_NK = _best(logits_NC, maxima_NG, spec)

        def leave_out(block: slice, weights_NC: Tensor) -> None:
            weights_NC.scatter_(1, ids_NK[block], 0.0)

        sums = _sum_classes(logits_NC, shift_N, leave_out, spec.temperatures, areas)
        return _Kept(ids_NK, values_NK), sums
    none = torch.zeros(0, dtype=torch.long, device=logits_NC.device)
    found = [Entries(none, none, none.bool())]

    def choose_and_leave_out(block: slice, weights_NC: Tensor) -> None:
        maxima = torch.exp2(maxima_NG[block].float() * LOG2_E - shift_N[block, None])
        mass = _row_sums(areas.weights[: len(weights_NC)], torch.sum)
        weights = BlockWeights(weights_NC, mass, maxima, bad_N[block])
        entries = choose(weights, spec, None if offset_N is None else offset_N[block])
        weights_NC[entries.rows, entries.ids] = 0.0
        found.append(Entries(entries.rows + block.start, entries.ids, entries.drawn))

    sums = _sum_classes(logits_NC, shift_N, choose_and_leave_out, spec.temperatures, areas)
    rows = torch.cat([entries.rows for entries in found])
    ids = torch.cat([entries.ids for entries in found])
    drawn = torch.cat([entries.drawn for entries in found])
    counts = torch.bincount(rows, minlength=len(logits_NC))
    return _Kept(ids, logits_NC[rows, ids].double(), rows, counts, drawn), sums


def _best(logits_NC: Tensor, maxima_NG: Tensor, spec: TargetSpec) -> tuple[Tensor, Tensor]:
    """Ids and float64 logits of the entries, the same number at every position."""
    if spec.kind == "dense":
        every_C = torch.arange(spec.num_classes, device=logits_NC.device)
        return every_C.expand(logits_NC.shape), logits_NC.double()
    return _top_k(logits_NC, maxima_NG, spec.num_entries)


@dataclass(slots=True)
class _WorkAreas:
    """The blocks a CPU works in, and float32 areas of one block's size that every block reuses."""

    blocks: list[slice]
    scaled: Tensor  # [rows, width >= C]; columns beyond C stay 0
    weights: Tensor  # the same

    @classmethod
    def for_logits(cls, logits_NC: Tensor) -> "_WorkAreas":
        num_rows, num_classes = logits_NC.shape
        width = math.ceil(num_classes / SUM_PARTS) * SUM_PARTS
        rows = max(num_rows, 1)
        if logits_NC.device.type == "cpu":
            rows = min(rows, max(1, BLOCK_BYTES // (4 * width)))
        blocks = [slice(i, min(i + rows, num_rows)) for i in range(0, num_rows, rows)]
        areas = logits_NC.new_empty((2, rows, width), dtype=torch.float32)
        areas[:, :, num_classes:] = 0.0
        return cls(blocks, areas[0], areas[1])


@dataclass(slots=True)
class _ClassSums:
    """Float64 [N] sums over the classes, of w = 2^scaled and scaled = LOG2_E * logit - shift."""

    tail_N: Tensor  # of w over the classes that are not entries
    moment_N: Tensor  # of w * scaled
    tempered_N: dict[float, Tensor]  # T -> of w^(1/T)


def _sum_classes(
    logits_NC: Tensor,
    shift_N: Tensor,
    leave_out: Callable[[slice, Tensor], None],
    temperatures: tuple[float, ...],
    areas: _WorkAreas,
) -> _ClassSums:
    """`leave_out` zeroes the weights of entries, so the tail is no difference of near-equals.

    Powers of 2 because exp2 takes a third of exp's time on a CPU.
    """
    num_rows, num_classes = logits_NC.shape
    sums = logits_NC.new_empty((2 + len(temperatures), num_rows), dtype=torch.float64)
    for block in areas.blocks:
        block_NC = _float32_on_cpu(logits_NC[block], areas)
        scaled, weights = areas.scaled[: len(block_NC)], areas.weights[: len(block_NC)]
        scaled_NC, weights_NC = scaled[:, :num_classes], weights[:, :num_classes]
        torch.add(-shift_N[block, None], block_NC, alpha=LOG2_E, out=scaled_NC)
        for row, temperature in enumerate(temperatures, start=2):
            torch.mul(scaled_NC, 1 / temperature, out=weights_NC).exp2_()
            sums[row, block] = _row_sums(weights, torch.sum)
        torch.exp2(scaled_NC, out=weights_NC)
        torch.mul(scaled_NC, weights_NC, out=scaled_NC)
        sums[1, block] = _row_sums(scaled, torch.nansum)  # NaN: a masked class, -inf * 0
        leave_out(block, weights_NC)
        sums[0, block] = _row_sums(weights, torch.sum)
    return _ClassSums(sums[0], sums[1], dict(zip(temperatures, sums[2:], strict=True)))


def _row_sums(area_NC: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """Sums over the classes in float32; in parts, so one row alone is added up as among many."""
    return reduce(area_NC.unflatten(1, (SUM_PARTS, -1)), dim=2).sum(dim=1)


def _float32_on_cpu(block_NC: Tensor, areas: _WorkAreas) -> Tensor:
    """A CPU reduces half types 7x slower than it converts them."""
    if block_NC.device.type != "cpu" or block_NC.dtype == torch.float32:
        return block_NC
    return areas.scaled[: len(block_NC), : block_NC.shape[1]].copy_(block_NC)


def _group_maxima(logits_NC: Tensor, areas: _WorkAreas) -> Tensor:
    """The largest logit of each 64 consecutive classes, the last group may be smaller: [N, G]."""
    num_rows, num_classes = logits_NC.shape
    whole = num_classes // GROUP
    maxima_NG = logits_NC.new_empty(num_rows, math.ceil(num_classes / GROUP))
    for block in areas.blocks:
        block_NC = _float32_on_cpu(logits_NC[block], areas)
        groups_NGM = block_NC[:, : whole * GROUP].unflatten(1, (whole, GROUP))
        maxima_NG[block, :whole] = groups_NGM.amax(dim=2)
        if num_classes % GROUP:
            maxima_NG[block, whole] = block_NC[:, whole * GROUP :].amax(dim=1)
    return maxima_NG


def _top_k(logits_NC: Tensor, maxima_NG: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and float64 logits of the k best classes, best first.

    Proof that two stages are exact: order classes by (larger logit, smaller id) and groups of
    consecutive classes by their best class, which is (larger maximum, smaller group); were one of
    the k best in a group outside the k best groups, each of those k groups would hold a better one.
    """
    num_classes, num_groups = logits_NC.shape[1], maxima_NG.shape[1]
    candidates_NM = torch.arange(num_classes, device=logits_NC.device).expand_as(logits_NC)
    if k <= TWO_STAGES_SHARE * num_groups:
        groups_NG = torch.arange(num_groups, device=logits_NC.device)
        best_NK = _keys(maxima_NG, groups_NG).topk(k, dim=1, sorted=False).indices
        lanes = torch.arange(GROUP, device=logits_NC.device)
        candidates_NM = (best_NK[:, :, None] * GROUP + lanes).flatten(1)
    inside_NM = candidates_NM < num_classes
    values_NM = logits_NC.gather(1, candidates_NM.clamp(max=num_classes - 1))
    keys_NM = torch.where(inside_NM, _keys(values_NM, candidates_NM), NO_CLASS)
    places_NK = keys_NM.topk(k, dim=1).indices
    return candidates_NM.gather(1, places_NK), values_NM.gather(1, places_NK).double()


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """Unique int64 keys: the order of (larger value, smaller id); ids below 2^32.

    The bits of a float32, as an integer, already ascend for positive numbers; flipping all but the
    sign of negative ones makes them ascend too. Adding 0 turns -0 into +0, which it equals.
    """
    bits = (values.float() + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) - ids


def _label_values(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Float64 logit of each label; NaN for a negative label, -inf for one that is no class."""
    num_classes = logits_NC.shape[1]
    values_N = logits_NC.gather(1, labels_N.clamp(0, num_classes - 1)[:, None])[:, 0].double()
    values_N = values_N.masked_fill(labels_N >= num_classes, -math.inf)
    return values_N.masked_fill(labels_N < 0, math.nan)
