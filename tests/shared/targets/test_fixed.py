"""The kinds `topk` and `dense` against slow float64 formulas, written from their descriptions."""

import math
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError, CorruptCache
from shared.targets.fixed import RANGES
from shared.targets.record import ClassRanks, Target
from shared.targets.spec import TargetSpec

TAIL_STEP = 31 / 65_534  # nats of ln(tail / kept)
FLOAT32_SUM = 2e-6  # 256 terms of 2**-24, and log-probabilities down to -17 rounded at 2**-24
LARGE = [2**23 - 1, 2**23, 2**23 + 1, 2**24 - 1]


IDENTITY = np.arange(LARGE[-1], dtype=np.uint32)


@lru_cache
def ranks_of(num_classes):
    if num_classes > 2**18:  # a 16-million-element permutation takes seconds to build
        return ClassRanks(IDENTITY[:num_classes], IDENTITY[:num_classes])
    return ClassRanks.from_counts(np.random.default_rng(num_classes).poisson(1.0, num_classes))


def make_target(rng, positions, spec, *, scale=3.0, ties=0.0, missing=0.0):
    """Random entries over distinct classes; the tail has what is left of a softmax."""
    classes, entries = spec.num_classes, spec.num_entries
    ids = np.empty((positions, entries), np.int32)
    for row in ids:
        row[:] = rng.choice(classes, entries, replace=False)
        ends = [c for c in (0, classes - 1) if c not in row]
        row[: len(ends)] = ends[:entries]
    logits = scale * rng.normal(size=(positions, entries))
    logits = np.where(rng.random(logits.shape) < ties, 1.5, logits)
    logits[:, 1:][rng.random((positions, entries - 1)) < missing] = -np.inf
    logits -= logits.max(axis=1, keepdims=True)
    full = (logits == -np.inf).any(axis=1) | (entries == classes)
    rest = np.where(full, 0, np.exp(rng.uniform(-20, 20, positions)))
    total = np.exp(logits).sum(axis=1) + rest
    with np.errstate(divide="ignore"):
        log_tail = np.log(rest) - np.log(total)
    logprobs = logits - np.log(total)[:, None]
    return Target(ids, logprobs.astype(np.float32), log_tail.astype(np.float32))


def plane_sizes(spec, positions):
    """Bytes of every plane of a kind whose positions all have the same number of entries."""
    return {shape.name: shape.item_bytes * positions for shape in spec.plane_shapes}


def round_trip(target, spec):
    ranks = ranks_of(spec.num_classes)
    planes = spec.encode(target, ranks)
    sizes = {name: plane.size for name, plane in planes.items()}
    assert list(sizes.items()) == list(plane_sizes(spec, len(target.ids)).items())
    assert all(plane.dtype == np.uint8 and plane.ndim == 1 for plane in planes.values())
    for plane in planes.values():
        plane.flags.writeable = False  # as frames.decompress gives them
    return spec.decode(planes, len(target.ids), ranks)


def reference_drops(logprobs, value_bits):
    """How far each entry lies below the likeliest after rounding, and by how much it may be off."""
    drops = max(logprobs) - np.asarray(logprobs, np.float64)
    finite = [d for d in drops if d <= RANGES[-1]]
    if value_bits == 16:
        return np.where(drops <= 3922, drops, np.inf), [2**-11 * d + 2**-24 for d in drops]
    coded = next(float(step) for step in RANGES if step >= np.float32(max(finite)))
    levels = {7: 127, 8: 254}[value_bits]
    rounded, bounds = [], []
    for drop in drops:
        root = math.sqrt(drop / coded) if 0 < drop <= coded else 0.0
        exact = coded * (round(levels * root) / levels) ** 2
        rounded.append(exact if drop <= RANGES[-1] else math.inf)
        bounds.append(coded * (root / levels + 1 / (4 * levels**2)))
    return np.array(rounded), bounds


def check_round_trip(target, spec):
    """Ids exactly; values, tail and sum within their stated bounds, -inf as -inf."""
    found = round_trip(target, spec)
    ranks = ranks_of(spec.num_classes).ranks
    assert (found.ids.dtype, found.logprobs.dtype) == (np.int32, np.float32)
    assert found.counts is None
    for row in range(len(target.ids)):
        order = np.argsort(ranks[target.ids[row]])
        assert found.ids[row].tolist() == target.ids[row][order].tolist()
        truth = target.logprobs[row][order].astype(np.float64)
        values = found.logprobs[row].astype(np.float64)
        kept, tail = math.fsum(np.exp(values)), math.exp(found.log_tail[row])
        assert kept + tail == pytest.approx(1, abs=FLOAT32_SUM)

        missing = truth < truth.max() - RANGES[-1]
        assert ((values == -np.inf) == missing).all()
        drops = truth.max() - truth
        rounded, bounds = reference_drops(truth, spec.value_bits)
        decoded = (values - values.max())[~missing]
        slack = 4e-7 * (16 + drops)  # float32: subtractions, square root, products, the last sum
        assert (np.abs(-decoded - drops[~missing]) <= (bounds + slack)[~missing]).all()
        if spec.value_bits != 16 and drops.max() < 100:  # rounding as described, but for near ties
            off = np.abs(-decoded - rounded[~missing]) > slack[~missing]
            assert off.mean() <= 0.02

        true_tail = float(target.log_tail[row])
        if true_tail == -np.inf or missing.any() or spec.num_entries == spec.num_classes:
            assert found.log_tail[row] == -np.inf
        else:
            ratio = true_tail - math.log(math.fsum(np.exp(truth)))
            off = abs(float(found.log_tail[row]) - math.log(kept) - np.clip(ratio, -14, 17))
            assert off <= TAIL_STEP / 2 + 4e-6


@st.composite
def cases(draw):
    around = [b + d for b in (256, 2**16, 2**17) for d in (-1, 0, 1)]
    num_classes = draw(
        st.one_of(st.integers(2, 300), st.integers(2, 2**18), st.sampled_from(around + LARGE))
    )
    spec = TargetSpec(
        kind="topk",
        num_classes=num_classes,
        top_k=draw(st.integers(1, 256)),
        value_bits=draw(st.sampled_from([7, 8, 16])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    target = make_target(
        rng,
        draw(st.integers(0, 4)),
        spec,
        scale=draw(st.sampled_from([0.0, 1e-42, 1e-3, 1.0, 3.0, 10.0, 300.0])),
        ties=draw(st.sampled_from([0.0, 0.3, 1.0])),
        missing=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
    )
    return target, spec


@settings(deadline=None, max_examples=200)
@given(cases())
def test_round_trip_within_the_stated_bounds(case):
    check_round_trip(*case)


@pytest.mark.parametrize("value_bits", [7, 8, 16])
@pytest.mark.parametrize("num_classes", [2, 255, 256, 257, 2**16, 2**16 + 1, 2**17, *LARGE])
def test_ids_survive_at_every_width_of_planes_and_sort_keys(num_classes, value_bits):
    spec = TargetSpec(kind="topk", num_classes=num_classes, top_k=9, value_bits=value_bits)
    check_round_trip(make_target(np.random.default_rng(0), 3, spec), spec)


@settings(deadline=None)
@given(st.integers(2, 256), st.sampled_from([7, 8, 16]), st.integers(0, 2**32 - 1))
@example(256, 7, 0)
def test_keeping_every_class_leaves_no_tail_whatever_rounding_said(num_classes, bits, seed):
    spec = TargetSpec(kind="topk", num_classes=num_classes, top_k=300, value_bits=bits)
    target = make_target(np.random.default_rng(seed), 2, spec)
    target.log_tail[:] = -16  # what 1 - sum p gives in float32 may not be 0
    assert (round_trip(target, spec).log_tail == -np.inf).all()


@pytest.mark.parametrize("value_bits", [7, 8, 16])
def test_a_class_without_probability_decodes_to_probability_0_and_ends_the_tail(value_bits):
    spec = TargetSpec(kind="topk", num_classes=100, top_k=4, value_bits=value_bits)
    with np.errstate(divide="ignore"):
        logprobs = np.log([[0.5, 0.3, 0.2, 0], [1, 0, 0, 0], [0.4, 0.3, 0.2, 0.05]])
    target = Target(
        np.array([[9, 3, 50, 99], [0, 1, 2, 3], [5, 6, 7, 8]], np.int32),
        logprobs.astype(np.float32),
        np.log(np.array([1e-7, 1e-7, 0.05], np.float32)),
    )
    found = round_trip(target, spec)
    rows = zip(found.ids, np.exp(found.logprobs), strict=True)
    probs = [dict(zip(ids, values, strict=True)) for ids, values in rows]
    assert probs[0][99] == probs[1][1] == probs[1][2] == probs[1][3] == 0
    assert probs[1][0] == 1
    assert sum(probs[0].values()) == pytest.approx(1, abs=FLOAT32_SUM)
    assert found.log_tail.tolist()[:2] == [-np.inf, -np.inf]
    assert found.log_tail[2] == pytest.approx(math.log(0.05), abs=TAIL_STEP)
    assert round_trip(found, spec).logprobs == pytest.approx(found.logprobs, abs=1e-3)


@pytest.mark.parametrize("value_bits", [7, 8])
def test_equal_values_are_exact_and_warn_about_nothing(value_bits):
    spec = TargetSpec(kind="topk", num_classes=1000, top_k=5, value_bits=value_bits)
    target = make_target(np.random.default_rng(0), 3, spec, scale=0.0)
    with np.errstate(all="raise"):
        found = round_trip(target, spec)
    assert (found.logprobs == found.logprobs[:, :1]).all()


def test_a_flat_teacher_keeps_its_small_kept_mass():
    """One class of 151,936: a tail of 1 - 6.6e-6, which as a float32 says 1 % less about p."""
    spec = TargetSpec(kind="topk", num_classes=151_936, top_k=1)
    log_p = -math.log(151_936)
    log_tail = np.array([math.log1p(-math.exp(log_p))], np.float32)
    target = Target(np.array([[7]], np.int32), np.array([[log_p]], np.float32), log_tail)
    assert round_trip(target, spec).logprobs[0, 0] == pytest.approx(log_p, abs=TAIL_STEP)


def test_order_of_the_entries_does_not_matter():
    spec = TargetSpec(kind="topk", num_classes=5000, top_k=40)
    target = make_target(np.random.default_rng(0), 3, spec)
    shuffled = Target(target.ids[:, ::-1], target.logprobs[:, ::-1], target.log_tail)
    first = spec.encode(target, ranks_of(5000))
    second = spec.encode(shuffled, ranks_of(5000))
    assert {name: plane.tobytes() for name, plane in first.items()} == {
        name: plane.tobytes() for name, plane in second.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.logprobs.__setitem__((1, 2), np.nan), "target 1: NaN"),
        (lambda t: t.logprobs.__setitem__(2, -np.inf), "target 2: .* no class with probability"),
        (lambda t: t.log_tail.__setitem__(0, np.nan), "target 0: NaN"),
        (lambda t: t.ids.__setitem__((0, 0), 50), "beyond the 50 classes"),
        (lambda t: t.ids.__setitem__((0, 0), -1), "beyond the 50 classes"),
        (lambda t: t.ids.__setitem__((1, 0), t.ids[1, 1]), "appears twice"),
    ],
)
def test_a_target_that_is_none_is_refused(change, message):
    spec = TargetSpec(kind="topk", num_classes=50, top_k=4)
    target = make_target(np.random.default_rng(0), 3, spec)
    change(target)
    with pytest.raises(ValueError, match=message):
        spec.encode(target, ranks_of(50))


def test_ranks_beyond_the_classes_are_refused():
    spec = TargetSpec(kind="topk", num_classes=200, top_k=2)
    planes = {name: np.zeros(size, np.uint8) for name, size in plane_sizes(spec, 1).items()}
    planes["target_ids.0"][:] = [150, 50]
    with pytest.raises(CorruptCache, match="found rank 200, expected below 200"):
        spec.decode(planes, 1, ranks_of(200))


def test_often_kept_classes_come_first_and_ties_go_to_the_smaller():
    ranks = ClassRanks.from_counts(np.array([0, 5, 2, 5, 0]))
    assert ranks.classes.tolist() == [1, 3, 2, 0, 4]
    assert ranks.ranks.tolist() == [3, 0, 2, 1, 4]
    assert ClassRanks.from_classes(ranks.classes).ranks.tolist() == ranks.ranks.tolist()


@pytest.mark.parametrize("classes", [[0, 0, 1], [1, 2, 3], [-1, 0, 1]])
def test_ranks_that_are_no_permutation_are_refused(classes):
    with pytest.raises(ValueError, match="exactly once"):
        ClassRanks.from_classes(np.array(classes))


def test_plane_sizes_name_the_columns_of_each_kind():
    spec = TargetSpec(kind="topk", num_classes=151_936, top_k=64)
    assert plane_sizes(spec, 10) == {
        "target_ids.0": 640,
        "target_ids.1": 640,
        "target_ids.2": 640,
        "target_codes.0": 640,
        "target_range.0": 10,
        "target_tail.0": 10,
        "target_tail.1": 10,
    }
    half = TargetSpec(kind="topk", num_classes=200, top_k=300, value_bits=16)
    assert list(plane_sizes(half, 1)) == [
        "target_ids.0",
        "target_codes.0",
        "target_codes.1",
        "target_tail.0",
        "target_tail.1",
    ]
    assert plane_sizes(half, 3)["target_codes.1"] == 600
    assert plane_sizes(TargetSpec(kind="none", num_classes=200), 10) == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "dense", "num_classes": 2**14 + 1},
        {"num_classes": 1},
        {"top_k": 0},
        {"value_bits": 6},
        {"temperatures": (1.0,)},
        {"temperatures": (-2.0,)},
        {"temperatures": (4.0, 2.0)},
        {"temperatures": (2.0, 2.0)},
    ],
)
def test_a_wrong_spec_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).replace("kind", "targets")):
        TargetSpec(**{"kind": "topk", "num_classes": 100} | wrong)
