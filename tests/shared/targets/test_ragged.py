"""The ragged codec against slow float64 formulas written from its description, one position each.

A position is a dict from class to probability in float64, and the mass of its tail.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.errors import CorruptCache
from shared.format.reader import empty_block
from shared.targets.ragged import MIN_SPACING, drawn_logprob
from shared.targets.record import Target
from shared.targets.spec import TargetSpec
from teacher_cache.select.targets import select
from tests.shared.format.test_shards import CLASSES, RANKS, cache_manifest
from tests.shared.targets.test_fixed import FLOAT32_SUM, LARGE, TAIL_STEP, ranks_of

M = {7: 127, 8: 255}
BEYOND = math.exp(-3)  # of the spacing: the smallest largest class that a sample keeps as it is


def spec_of(kind, num_classes=300, threshold=0.01, value_bits=7):
    return TargetSpec(
        kind=kind,
        num_classes=num_classes,
        value_bits=value_bits,
        mean_entries=8.0,
        threshold=threshold,
    )


@dataclass
class Position:
    """What a teacher says, in float64. `drawn` classes have the spacing as their weight."""

    kept: dict[int, float]
    tail: float = 0.0
    drawn: tuple[int, ...] = ()


def target_of(positions, spec, bits=None):
    """As stage one hands it over: float32, entries in no particular order."""
    drawn = drawn_logprob(spec)
    entries = [
        [
            *((i, np.float32(math.log(p))) for i, p in one.kept.items()),
            *((i, drawn) for i in one.drawn),
        ]
        for one in positions
    ]
    flat = [pair for pairs in entries for pair in pairs]
    with np.errstate(divide="ignore"):
        # A tail near 1 is what the entries leave, as the sum over the other classes gives it.
        tails = [
            math.log1p(-sum(one.kept.values())) if one.tail > 0.5 else one.tail for one in positions
        ]
        log_tail = [t if t < 0 else float(np.log(t)) for t in tails]
    return Target(
        ids=np.array([i for i, _ in flat], np.int32),
        logprobs=np.array([lp for _, lp in flat], np.float32),
        log_tail=np.array(log_tail, np.float32),
        counts=np.array([len(pairs) for pairs in entries], np.int32),
        random_bits=bits,
    )


def random_bits(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)


def encode(target, spec):
    """The planes, which are those that plane_shapes says."""
    planes = spec.encode(target, ranks_of(spec.num_classes))
    sizes = {"position": len(target.counts), "entry": len(target.ids)}
    expected = [(shape.name, sizes[shape.per]) for shape in spec.plane_shapes]
    assert [(name, plane.size) for name, plane in planes.items()] == expected
    for plane in planes.values():
        assert (plane.dtype, plane.ndim) == (np.uint8, 1)
        plane.flags.writeable = False  # as frames.decompress gives them
    return planes


def round_trip(target, spec):
    """Log-probability of each class at each position, by ascending rank; and the tails."""
    ranks = ranks_of(spec.num_classes)
    found = spec.decode(encode(target, spec), len(target.counts), ranks)
    assert (found.ids.dtype, found.logprobs.dtype) == (np.int32, np.float32)
    assert (found.log_tail.dtype, found.counts.dtype) == (np.float32, np.int32)
    assert found.counts.tolist() == target.counts.tolist()
    ends = np.cumsum(found.counts)
    rows = []
    parts = (np.split(values, ends)[:-1] for values in (found.ids, found.logprobs))
    for ids, logprobs in zip(*parts, strict=True):
        assert (np.diff(ranks.ranks[ids].astype(np.int64)) > 0).all()
        rows.append(dict(zip(ids.tolist(), logprobs.astype(np.float64).tolist(), strict=True)))
    return rows, found.log_tail.astype(np.float64)


# Adaptive ---------------------------------------------------------------------------------------


def check_adaptive(positions, spec):
    """Ids exactly; values as the description says; sums; the KL that the rounding allows."""
    rows, log_tail = round_trip(target_of(positions, spec), spec)
    R = -math.log(spec.threshold)
    for one, found, log_rest in zip(positions, rows, log_tail, strict=True):
        assert found.keys() == one.kept.keys()
        kept, rest = math.fsum(map(math.exp, found.values())), math.exp(log_rest)
        assert kept + rest == pytest.approx(1, abs=FLOAT32_SUM)

        drops = {i: -math.log(p) for i, p in one.kept.items()}
        if spec.value_bits == 16:
            off = {i: d * 2**-11 + 2**-24 for i, d in drops.items()}
            coded = {i: float(np.float16(np.float32(d))) for i, d in drops.items()}
            sure = False  # float32 to half rounds ties away from what float64 would
        else:
            levels = M[spec.value_bits]
            places = {i: levels * math.sqrt(d / R) for i, d in drops.items()}
            off = {i: R * (x / levels**2 + 1 / (4 * levels**2)) for i, x in places.items()}
            coded = {i: R * (min(round(x), levels) / levels) ** 2 for i, x in places.items()}
            sure = all(abs(x % 1 - 0.5) > 1e-3 for x in places.values())
        slack = 4e-7 * (16 + max(drops.values()))  # float32: logarithms, a root, products, the sum
        total = math.log(math.fsum(math.exp(-c) for c in coded.values()))
        if sure:
            for i, lp in found.items():
                assert lp - math.log(kept) == pytest.approx(-coded[i] - total, abs=slack)

        if one.tail == 0:
            assert log_rest == -math.inf
        else:
            ratio = math.log(one.tail / math.fsum(one.kept.values()))
            assert log_rest - math.log(kept) == pytest.approx(
                np.clip(ratio, -14, 17), abs=TAIL_STEP / 2 + 4e-6
            )
        # Let each log-probability be off by at most d before scaling. By Hoeffding's lemma the KL
        # among the entries is at most d**2 / 2, and that of kept against tail t**2 / 8, t the error
        # of ln(tail / kept). A tail below e**-14 is written as that: 1e-6.
        largest = max(off.values()) if len(found) > 1 else 0.0
        kl = math.fsum(p * (math.log(p) - found[i]) for i, p in one.kept.items())
        if one.tail:
            kl += one.tail * (math.log(one.tail) - log_rest)
        assert kl <= largest**2 / 2 + (TAIL_STEP / 2) ** 2 / 8 + 1e-6 + FLOAT32_SUM + slack


def adaptive_position(rng, spec, *, most, tail, scale, ties):
    """Up to `most` entries of the threshold and more; one only where the tail leaves no room."""
    room = max(1, math.floor(0.999 * (1 - tail) / spec.threshold))
    count = min(most, spec.num_classes, room, 255)
    ids = rng.choice(spec.num_classes, count, replace=False)
    ids[:1] = rng.choice([ids[0], *({0, spec.num_classes - 1} - set(ids.tolist()))])
    logits = np.where(rng.random(count) < ties, 0.0, scale * rng.normal(size=count))
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    left = 1 - tail - count * spec.threshold
    p = spec.threshold + left * shares if left > 0 else (1 - tail) * shares
    return Position(dict(zip(ids.tolist(), p.tolist(), strict=True)), tail)


AROUND = [b + d for b in (2**8, 2**16, 2**17, 2**23) for d in (-1, 0, 1)] + [2**24 - 1]
CLASS_COUNTS = st.one_of(st.integers(2, 300), st.integers(2, 2**18), st.sampled_from(AROUND))
TAILS = st.one_of(
    st.sampled_from([0.0, 1e-6, 1e-4, 0.5, 0.9, 0.999, 1 - 1e-6]),
    st.floats(math.log(1e-6), 0, exclude_max=True).map(lambda x: min(math.exp(x), 1 - 1e-6)),
)


@st.composite
def adaptive_cases(draw):
    spec = spec_of(
        "adaptive",
        draw(CLASS_COUNTS),
        draw(st.sampled_from([1e-9, 1e-6, 1e-4, 1 / 254, 0.02, 0.3, 0.9])),
        draw(st.sampled_from([7, 8, 16])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    positions = [
        adaptive_position(
            rng,
            spec,
            most=draw(st.sampled_from([1, 2, 3, 12, 60, 255])),
            tail=draw(TAILS),
            scale=draw(st.sampled_from([0.0, 1e-3, 1.0, 3.0, 10.0])),
            ties=draw(st.sampled_from([0.0, 0.3, 1.0])),
        )
        for _ in range(draw(st.integers(0, 4)))
    ]
    return positions, spec


@settings(deadline=None, max_examples=200)
@given(adaptive_cases())
def test_adaptive_within_the_stated_bounds(case):
    check_adaptive(*case)


@pytest.mark.parametrize("value_bits", [7, 8, 16])
@pytest.mark.parametrize("num_classes", [2, 3, *AROUND])
def test_ids_survive_at_every_width_of_planes(num_classes, value_bits):
    spec = spec_of("adaptive", num_classes, 1e-4, value_bits)
    rng = np.random.default_rng(num_classes)
    check_adaptive(
        [
            adaptive_position(rng, spec, most=most, tail=0.1, scale=2.0, ties=0.1)
            for most in (1, 255, 2, 9)
        ],
        spec,
    )
    assert len(spec.plane_shapes) - len(spec_of("adaptive", 2, 1e-4, value_bits).plane_shapes) == (
        (num_classes > 2**8) + (num_classes > 2**16)
    )


def test_a_flat_teacher_keeps_its_small_kept_mass():
    """One class far below the threshold: its p is what the tail leaves, whatever the code says."""
    spec = spec_of("adaptive", 151_936, 0.01)
    p = 1 / 151_936
    rows, _ = round_trip(target_of([Position({7: p}, 1 - p)], spec), spec)
    assert rows[0][7] == pytest.approx(math.log(p), abs=TAIL_STEP)


@pytest.mark.parametrize("value_bits", [7, 8, 16])
def test_a_position_of_little_mass_stands_beside_others_of_much(value_bits):
    """Masses are differences of one sum over all positions, which must not round what it adds."""
    spec = spec_of("adaptive", 300, 1e-9, value_bits)
    much, little = Position({0: 0.6, 1: 0.3}, 0.1), Position({5: 1e-9, 9: 2e-9})
    check_adaptive([*[much] * 500, little, *[much] * 500, little], spec)


def test_255_entries_of_probability_1_are_summed_up():
    """No distribution, but all that code 0 can add up to."""
    everything = Position(dict.fromkeys(range(255), 1.0))
    rows, _ = round_trip(target_of([everything] * 3, spec_of("adaptive")), spec_of("adaptive"))
    for row in rows:
        assert list(row.values()) == pytest.approx([-math.log(255)] * 255, abs=1e-6)


# Sample -----------------------------------------------------------------------------------------


def neighbours(p, spec):
    """Weights that a kept entry of this probability may be read as: the two codes around it."""
    drop, R = -math.log(p), 3 - math.log(spec.threshold)
    if spec.value_bits == 16:
        half = np.float16(drop)
        near = [np.nextafter(half, np.float16(0)), half, np.nextafter(half, np.float16(np.inf))]
        grid = [float(value) for value in near]
    else:
        steps = M[spec.value_bits] - 1
        place = math.sqrt(drop / R) * steps
        grid = [
            R * (j / steps) ** 2
            for j in range(max(0, int(place) - 1), min(int(place) + 3, steps + 1))
        ]
    high = max((d for d in grid if d <= drop * (1 + 1e-9) + 1e-12), default=grid[0])
    low = min((d for d in grid if d > high), default=high)
    return math.exp(-high), math.exp(-low)


def check_sample(positions, spec, seed=0):
    """Ids exactly, drawn entries exactly, kept ones with one of their two codes; the same twice."""
    bits = random_bits(len(positions), seed)
    target = target_of(positions, spec, bits)
    rows, log_tail = round_trip(target, spec)
    assert (log_tail == -math.inf).all()
    drawn = float(np.float32(math.log(spec.threshold)))
    for one, found in zip(positions, rows, strict=True):
        assert found.keys() == one.kept.keys() | set(one.drawn)
        assert all(found[i] == drawn for i in one.drawn)
        for i, p in one.kept.items():
            lower_drop, higher_drop = (-math.log(w) for w in neighbours(float(np.float32(p)), spec))
            off = min(abs(-found[i] - lower_drop), abs(-found[i] - higher_drop))
            step = higher_drop - lower_drop
            edge = min(abs(-math.log(p) - lower_drop), abs(-math.log(p) - higher_drop))
            assert off <= 1e-6 * (1 + lower_drop) or (edge < 1e-6 and off <= 2 * step)
    assert {n: p.tobytes() for n, p in encode(target, spec).items()} == {
        n: p.tobytes() for n, p in encode(target_of(positions, spec, bits), spec).items()
    }


def sample_position(rng, spec, *, most, flat):
    """Some classes of the spacing and more, or the largest up to 3 nats below it; some drawn."""
    c = spec.threshold
    count = min(most, spec.num_classes, 255)
    ids = rng.choice(spec.num_classes, count, replace=False)
    if flat:
        kept = {int(ids[0]): c * math.exp(-rng.uniform(0, 2.999))}
    else:
        number = rng.integers(0, min(count, math.floor(0.999 / c)) + 1)
        shares = rng.dirichlet(np.ones(number)) if number else np.zeros(0)
        p = c + (1 - number * c) * shares * rng.random()
        kept = dict(zip(ids[:number].tolist(), p.tolist(), strict=True))
    drawn = tuple(ids[len(kept) :].tolist())
    return Position(kept, 0.0, drawn)


@st.composite
def sample_cases(draw):
    spec = spec_of(
        "sample",
        draw(CLASS_COUNTS),
        draw(st.sampled_from([MIN_SPACING, 0.01, 0.05, 0.3, 0.9])),
        draw(st.sampled_from([7, 8, 16])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    positions = [
        sample_position(
            rng, spec, most=draw(st.sampled_from([1, 2, 3, 12, 60, 255])), flat=draw(st.booleans())
        )
        for _ in range(draw(st.integers(0, 4)))
    ]
    return positions, spec, draw(st.integers(0, 2**32 - 1))


@settings(deadline=None, max_examples=200)
@given(sample_cases())
def test_a_sample_within_the_stated_bounds(case):
    check_sample(*case)


@pytest.mark.parametrize("value_bits", [7, 8, 16])
@pytest.mark.parametrize("num_classes", [2, 3, *AROUND])
def test_sampled_ids_survive_at_every_width_of_planes(num_classes, value_bits):
    spec = spec_of("sample", num_classes, MIN_SPACING, value_bits)
    rng = np.random.default_rng(num_classes)
    positions = [sample_position(rng, spec, most=m, flat=m == 2) for m in (1, 255, 2, 9)]
    check_sample(positions, spec)


@pytest.mark.parametrize("value_bits", [7, 8, 16])
@pytest.mark.parametrize("threshold", [MIN_SPACING, 0.05])
def test_the_mean_over_many_roundings_is_the_probability(value_bits, threshold):
    """20,000 roundings of each: within 5 standard errors, of values that lie between two codes."""
    spec, count = spec_of("sample", 300, threshold, value_bits), 20_000
    p = {1: 0.4321, 2: 0.21, 250: threshold * 1.7, 299: threshold * 1.0001}
    one = Position(p, 0.0, (4,))
    target = target_of([one] * count, spec, random_bits(count))
    found = spec.decode(encode(target, spec), count, ranks_of(300))
    weights = np.exp(found.logprobs.astype(np.float64))
    for i, truth in p.items():
        values = weights[found.ids == i]
        high, low = neighbours(truth, spec)
        assert len(values) == count
        assert len(set(values.tolist())) == 2
        error = math.sqrt((high - truth) * (truth - low) / count)
        assert values.mean() == pytest.approx(truth, abs=5 * error + 1e-7 * truth)


@pytest.mark.parametrize("value_bits", [7, 8, 16])
@pytest.mark.parametrize("nats", [0.001, 1.0, 2.0, 2.999])
def test_the_largest_class_below_the_spacing_is_kept_as_it_is(nats, value_bits):
    spec, count = spec_of("sample", 5000, 0.02, value_bits), 20_000
    p = 0.02 * math.exp(-nats)
    target = target_of([Position({4999: p}, 0.0, (0, 17))] * count, spec, random_bits(count, 1))
    found = spec.decode(encode(target, spec), count, ranks_of(5000))
    values = np.exp(found.logprobs[found.ids == 4999].astype(np.float64))
    high, low = neighbours(p, spec)
    error = math.sqrt((high - p) * (p - low) / count)
    assert values.mean() == pytest.approx(p, abs=5 * error + 1e-6 * p)
    assert low > 0.02 * BEYOND * 0.99


def test_two_entries_of_a_position_are_rounded_independently():
    """Equal probabilities and equal random bits: only the class differs."""
    spec, count = spec_of("sample", 300, 0.02), 4000
    target = target_of([Position({1: 0.3, 2: 0.3})] * count, spec, random_bits(count))
    found = spec.decode(encode(target, spec), count, ranks_of(300)).logprobs
    first, second = (found.reshape(-1, 2) == found.max()).T
    share = first.mean() * second.mean()
    assert (first & second).mean() == pytest.approx(share, abs=5 * math.sqrt(0.25 / count))


def test_other_random_bits_round_otherwise():
    spec = spec_of("sample", 300, 0.02)
    positions = [Position({1: 0.3, 2: 0.2})] * 50
    one, other = (
        encode(target_of(positions, spec, random_bits(50, seed)), spec) for seed in (1, 2)
    )
    assert one["target_codes.0"].tobytes() != other["target_codes.0"].tobytes()
    assert one["target_ids.0"].tobytes() == other["target_ids.0"].tobytes()


@pytest.mark.parametrize("value_bits", [7, 8, 16])
@pytest.mark.parametrize("threshold", [MIN_SPACING, 0.05, 0.9])
def test_what_was_read_and_is_written_again_is_the_same_bytes(value_bits, threshold):
    """Weights of a sample are on a code already: no random bits can move them."""
    spec, rng = spec_of("sample", 300, threshold, value_bits), np.random.default_rng(0)
    positions = [sample_position(rng, spec, most=200, flat=i % 3 == 0) for i in range(200)]
    planes = encode(target_of(positions, spec, random_bits(200)), spec)
    found = spec.decode(planes, 200, ranks_of(300))
    for bits in (np.zeros(200, np.uint64), random_bits(200, 5)):
        found.random_bits = bits
        again = encode(found, spec)
        assert {n: p.tobytes() for n, p in again.items()} == {
            n: p.tobytes() for n, p in planes.items()
        }


def zipf(exponent):
    """1,000 classes in no order of their probability."""
    p_C = np.arange(1, 1001) ** -exponent
    return np.random.default_rng(0).permutation(p_C / p_C.sum())


@pytest.mark.parametrize("value_bits", [7, 8, 16])
@pytest.mark.parametrize(("exponent", "most"), [(1.5, 0.65), (1.1, 0.85)])
def test_drill_b10_two_thousand_draws_of_one_distribution(exponent, most, value_bits):
    """Through selection and codec, against sampling with replacement (RS-KD, ACL 2025).

    RS-KD draws n classes of p and gives each its share of the draws: its variance is p (1 - p) / n,
    and it keeps sum 1 - (1 - p)**n classes on average; n is the number that keeps as many here.
    What is gained comes from the classes above the spacing, so the flatter p, the less.
    """
    c, draws, p_C = 0.02, 2000, zipf(exponent)
    spec, bits = spec_of("sample", len(p_C), c, value_bits), random_bits(draws)
    found = decoded_sample(p_C, spec, bits)
    weights_NC = np.zeros((draws, len(p_C)))
    entries = np.repeat(np.arange(draws), found.counts), found.ids
    weights_NC[entries] = np.exp(found.logprobs.astype(np.float64))

    likely_C, variance_C = p_C >= c, p_C * (c - p_C)
    pairs = [neighbours(p, spec) for p in p_C[likely_C]]
    variance_C[likely_C] = [
        (high - p) * (p - low) for (high, low), p in zip(pairs, p_C[likely_C], strict=True)
    ]
    error_C = np.abs(weights_NC.mean(axis=0) - p_C)
    assert (error_C <= 4 * np.sqrt(variance_C / draws) + 1e-7).all()

    drawn_N = c * (weights_NC[:, ~likely_C] > 0).sum(axis=1)
    assert np.abs(p_C[likely_C].sum() + drawn_N - 1).max() <= c
    rounding = sum(high - low for high, low in pairs)
    assert np.abs(weights_NC.sum(axis=1) - 1).max() <= c + rounding

    kept = found.counts.mean()
    n = next(n for n in range(1, 1000) if (1 - (1 - p_C) ** n).sum() >= kept)
    with_replacement = math.sqrt((p_C * (1 - p_C)).sum() / n)
    deviation = math.sqrt(((weights_NC - p_C) ** 2).sum(axis=1).mean())
    assert deviation <= most * with_replacement


def decoded_sample(p_C, spec, bits):
    """A sample of p for each of `bits`, whose highest 53 place the grid as stage one does."""
    offset_N = torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)
    logits_NC = torch.from_numpy(np.log(p_C)).float().expand(len(bits), -1)
    selected = select(logits_NC, spec, offset_N=offset_N)
    target = Target(
        selected.ids.numpy().astype(np.int32),
        selected.logprobs.numpy(),
        np.full(len(bits), -np.inf, np.float32),
        selected.counts.numpy().astype(np.int32),
        bits,
    )
    return spec.decode(encode(target, spec), len(bits), ranks_of(len(p_C)))


# Both -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adaptive", "sample"])
def test_a_decoded_target_outlives_the_next_ones_and_those_of_other_threads(kind):
    """Decoding works in memory that it keeps; nothing that is handed out may lie in it."""
    spec, rng = spec_of(kind, 5000), np.random.default_rng(0)
    planes = []
    for positions in (400, 100, 300, 200) * 5:
        counts = rng.integers(20, 60, positions).astype(np.int32)
        ids = np.concatenate([rng.choice(5000, count, replace=False) for count in counts])
        logprobs = rng.uniform(math.log(0.01), 0, ids.size).astype(np.float32)
        tails = np.full(positions, -1.0, np.float32)
        target = Target(ids.astype(np.int32), logprobs, tails, counts, random_bits(positions))
        planes.append(encode(target, spec))

    def decode(each):
        return spec.decode(each, each["target_counts.0"].size, ranks_of(5000))

    def content(target):
        parts = (target.ids, target.logprobs, target.log_tail, target.counts)
        return [part.tobytes() for part in parts]

    alone = [content(decode(each)) for each in planes]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(decode, planes))
    assert [content(target) for target in together] == alone


# What is refused --------------------------------------------------------------------------------


def two_positions(kind):
    spec = spec_of(kind, 50)
    positions = [Position({3: 0.5, 7: 0.3}, 0.2), Position({49: 0.9, 0: 0.05, 1: 0.04}, 0.01)]
    return target_of(positions, spec, random_bits(2)), spec


def changed(name, index, value):
    return lambda target: getattr(target, name).__setitem__(index, value)


def without(name):
    return lambda target: setattr(target, name, None)


def with_counts(*counts):
    return lambda target: setattr(target, "counts", np.array(counts, np.int32))


@pytest.mark.parametrize("kind", ["adaptive", "sample"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("counts"), r"target: ids \(5,\), logprobs \(5,\), expected \[entries\]"),
        (with_counts(2, 2), r"target: ids \(5,\), logprobs \(5,\), expected \[entries\]"),
        (with_counts(0, 5), r"target: found 0 to 5 entries, expected 1\.\.255"),
        (with_counts(-1, 6), r"target: found -1 to 6 entries, expected 1\.\.255"),
        (changed("ids", 1, 50), "target: ids beyond the 50 classes"),
        (changed("ids", 4, -1), "target: ids beyond the 50 classes"),
        (changed("ids", 1, 3), "target: a class appears twice in one position"),
        (changed("logprobs", 2, np.nan), "target: NaN, or an entry with probability 0"),
        (changed("logprobs", 0, -np.inf), "target: NaN, or an entry with probability 0"),
        (changed("log_tail", 1, np.nan), "target: NaN, or an entry with probability 0"),
    ],
)
def test_a_target_that_is_none_is_refused(kind, change, message):
    target, spec = two_positions(kind)
    change(target)
    with pytest.raises(ValueError, match=message):
        spec.encode(target, ranks_of(50))


def test_a_position_of_256_entries_is_refused():
    spec = spec_of("adaptive", 300)
    target = target_of([Position(dict.fromkeys(range(256), 1 / 300), 44 / 300)], spec)
    with pytest.raises(ValueError, match=r"found 256 to 256 entries, expected 1\.\.255"):
        spec.encode(target, ranks_of(300))


def test_a_sample_without_random_bits_is_refused():
    target, spec = two_positions("sample")
    target.random_bits = None
    with pytest.raises(ValueError, match="a sample is rounded at random and needs random_bits"):
        spec.encode(target, ranks_of(50))


def test_the_same_class_in_two_positions_is_none_twice():
    spec = spec_of("adaptive", 50)
    check_adaptive(
        [Position({0: 0.9}, 0.1), Position({0: 0.8}, 0.2), Position({0: 0.1, 1: 0.9})], spec
    )


@pytest.mark.parametrize("kind", ["adaptive", "sample"])
@pytest.mark.parametrize(
    ("value_bits", "plane", "value", "message"),
    [
        (7, "target_counts.0", [0, 5], "target_counts: found a position without any class"),
        (7, "target_ids.0", [255, 0, 0, 0, 0], "target_ids: found rank 255, expected below 50"),
        (7, "target_ids.0", [40, 10, 0, 0, 0], "target_ids: found rank 50, expected below 50"),
        (7, "target_ids.0", [0, 0, 20, 20, 10], "target_ids: found rank 50, expected below 50"),
        (16, "target_codes.1", [0, 0, 0, 0x7E, 0], "target_codes: found 0x7e.., expected an IEEE"),
        (16, "target_codes.1", [0x80, 0, 0, 0, 0], "target_codes: found 0x80.., expected an IEEE"),
    ],
)
def test_planes_that_no_encoder_makes_are_refused(kind, value_bits, plane, value, message):
    target, _ = two_positions(kind)
    spec = spec_of(kind, 50, value_bits=value_bits)
    planes = encode(target, spec) | {plane: np.array(value, np.uint8)}
    with pytest.raises(CorruptCache, match=message):
        spec.decode(planes, 2, ranks_of(50))


def test_a_rank_beyond_every_class_is_refused_and_does_not_wrap():
    """255 gaps of the largest size add up to nearly 2**32, which is negative as int32."""
    spec = spec_of("adaptive", 2**24 - 1)
    planes = {
        shape.name: np.full(255 if shape.per == "entry" else 1, 255, np.uint8)
        for shape in spec.plane_shapes
    }
    with pytest.raises(CorruptCache, match="target_ids: found rank"):
        spec.decode(planes, 1, ranks_of(2**24 - 1))


def test_the_drawn_code_is_no_code_of_adaptive():
    target, _ = two_positions("adaptive")
    spec = spec_of("adaptive", 50, value_bits=16)
    planes = encode(target, spec)
    planes |= {f"target_codes.{n}": np.full(5, 255, np.uint8) for n in range(2)}
    with pytest.raises(CorruptCache, match="found 0xffff"):
        spec.decode(planes, 2, ranks_of(50))


def test_adaptive_entries_of_probability_0_leave_no_class():
    target, _ = two_positions("adaptive")
    spec = spec_of("adaptive", 50, value_bits=16)
    planes = encode(target, spec)
    planes |= {
        "target_codes.0": np.zeros(5, np.uint8),
        "target_codes.1": np.full(5, 0x7C, np.uint8),
    }
    with pytest.raises(CorruptCache, match="target_codes: found a position without any class"):
        spec.decode(planes, 2, ranks_of(50))


@pytest.mark.parametrize("kind", ["adaptive", "sample"])
@pytest.mark.parametrize("code", [128, 200, 255])
def test_codes_that_no_encoder_makes_have_a_value_all_the_same(kind, code):
    """They go on along the curve, so that no byte of this plane can be anything but a number."""
    target, spec = two_positions(kind)
    planes = encode(target, spec) | {"target_codes.0": np.full(5, code, np.uint8)}
    found = spec.decode(planes, 2, ranks_of(50))
    assert np.isfinite(found.logprobs).all()
    if kind == "sample":
        R = 3 - math.log(spec.threshold)
        assert found.logprobs == pytest.approx(-R * ((code - 1) / 126) ** 2, rel=1e-6)


@pytest.mark.parametrize("value_bits", [7, 8, 16])
@pytest.mark.parametrize("kind", ["topk", "adaptive", "sample", "dense"])
def test_a_block_without_positions_has_the_types_of_any_other(kind, value_bits):
    spec = spec_of(kind, CLASSES, value_bits=value_bits)
    manifest = cache_manifest(targets=spec)
    target = empty_block(manifest, RANKS, hidden_layers=(), targets=True).target
    shape = (0,) if spec.ragged else (0, spec.num_entries)
    assert target.ids.shape == target.logprobs.shape == shape
    assert (target.ids.dtype, target.logprobs.dtype) == (np.int32, np.float32)
    assert (target.log_tail.shape, target.log_tail.dtype) == ((0,), np.float32)
    assert (target.counts is not None) == spec.ragged
    target.random_bits = np.zeros(0, np.uint64)
    planes = spec.encode(target, RANKS)
    assert list(planes) == [shape.name for shape in spec.plane_shapes]
    assert not any(plane.size for plane in planes.values())


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
@example(0)
def test_order_of_the_entries_does_not_matter(seed):
    """For a sample too: what is rounded up depends on the class, not on its place."""
    rng = np.random.default_rng(seed)
    for kind, make in (("adaptive", adaptive_position), ("sample", sample_position)):
        spec = spec_of(kind, 5000)
        options = (
            {"tail": 0.1, "scale": 2.0, "ties": 0.1} if kind == "adaptive" else {"flat": False}
        )
        target = target_of([make(rng, spec, most=20, **options)], spec, random_bits(1, seed))
        order = rng.permutation(len(target.ids))
        other = Target(
            target.ids[order],
            target.logprobs[order],
            target.log_tail,
            target.counts,
            target.random_bits,
        )
        one, two = encode(target, spec), encode(other, spec)
        assert {n: p.tobytes() for n, p in one.items()} == {n: p.tobytes() for n, p in two.items()}


def test_positions_at_other_places_are_the_same_targets():
    target, spec = two_positions("sample")
    swapped = target.at(np.array([1, 0]))
    rows, _ = round_trip(target, spec)
    assert round_trip(swapped, spec)[0] == rows[::-1]
    assert round_trip(swapped.at(np.array([1, 0])), spec)[0] == rows


def test_the_planes_of_each_kind():
    names = {
        kind: [shape.name for shape in spec_of(kind, 70_000, value_bits=bits).plane_shapes]
        for kind, bits in (("adaptive", 7), ("sample", 16))
    }
    ids = [f"target_ids.{n}" for n in range(3)]
    assert names["adaptive"] == [
        *("target_counts.0", *ids, "target_codes.0", "target_tail.0", "target_tail.1"),
    ]
    assert names["sample"] == ["target_counts.0", *ids, "target_codes.0", "target_codes.1"]
    assert LARGE[-1] in AROUND
