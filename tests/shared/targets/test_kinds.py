"""What every kind of target keeps to: a new line in the table is tested by being there.

Each runs on random distributions of its own size; the exact codes of each kind are tested beside.
"""

from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from shared.errors import ConfigError, CorruptCache
from shared.format.schema import COLUMN_OF
from shared.strict import build
from shared.targets.base import TargetFields
from shared.targets.kinds import KINDS
from shared.targets.record import ClassRanks, Target
from shared.targets.spec import TargetSpec
from shared.targets.topk import TopK

POSITIONS, CLASSES = 50, 40
NEAR = 0.15  # nats that 7 bits may be off at these distributions, and more than scaling adds

each_kind = pytest.mark.parametrize("name", KINDS)
each_size = pytest.mark.parametrize("value_bits", [7, 8, 16])


def spec_of(name, value_bits=7):
    kind = KINDS[name]
    return TargetSpec(
        kind=name,
        num_classes=1 if kind.numbers else CLASSES,
        top_k=6,
        value_bits=value_bits,
        mean_entries=5.0 if kind.ragged else 0.0,
        threshold=0.02 if kind.ragged else 0.0,
    )


def kept_of(spec, positions=POSITIONS):
    """What stage one hands over: as many of the likeliest classes as the kind keeps."""
    rng = np.random.default_rng(0)
    if spec.numbers:
        return rng.normal(size=positions).astype(np.float32)
    p_PC = np.exp(2 * rng.normal(size=(positions, spec.num_classes)))
    p_PC /= p_PC.sum(axis=1, keepdims=True)
    counts = np.full(positions, spec.num_entries)
    if spec.ragged:
        counts = np.maximum(1, (p_PC >= spec.threshold).sum(axis=1))
    place_PC = np.argsort(np.argsort(-p_PC, axis=1), axis=1)  # 0: the likeliest
    taken_PC = place_PC < counts[:, None]
    left_P = np.where(taken_PC, 0, p_PC).sum(axis=1)
    if spec.sampled or spec.complete:
        left_P[:] = 0
    with np.errstate(divide="ignore"):
        log_tail = np.log(left_P).astype(np.float32)
    ids, logprobs = np.nonzero(taken_PC)[1].astype(np.int32), np.log(p_PC[taken_PC])
    shape = (ids.size,) if spec.ragged else (positions, spec.num_entries)
    return Target(
        ids=ids.reshape(shape),
        logprobs=logprobs.astype(np.float32).reshape(shape),
        log_tail=log_tail,
        counts=counts.astype(np.int32) if spec.ragged else None,
        random_bits=rng.integers(0, 2**64, positions, np.uint64) if spec.sampled else None,
    )


def ranks_of(spec):
    return ClassRanks.from_counts(np.random.default_rng(1).poisson(1.0, spec.num_classes))


def table_of(target, num_classes):
    """ln of the probability or weight of each class, [P, C]; -inf where it is no entry."""
    positions = len(target.log_tail)
    table = np.full((positions, num_classes), -np.inf)
    width = target.ids.shape[-1]
    rows = np.repeat(np.arange(positions), width if target.counts is None else target.counts)
    table[rows, target.ids.reshape(-1)] = target.logprobs.reshape(-1)
    return table


def check_round_trip(spec, positions=POSITIONS):
    kept, ranks = kept_of(spec, positions), ranks_of(spec)
    planes = spec.encode(kept, ranks)
    items = {"position": positions, "entry": 0 if spec.numbers else kept.ids.size}
    assert [(name, plane.size) for name, plane in planes.items()] == [
        (shape.name, items[shape.per] * shape.item_bytes) for shape in spec.plane_shapes
    ]
    for plane in planes.values():
        assert (plane.dtype, plane.ndim) == (np.uint8, 1)
        plane.flags.writeable = False  # as frames.decompress gives them
    found = spec.decode(planes, positions, ranks)
    if spec.numbers:
        np.testing.assert_array_equal(found, kept)
        return
    assert (found.ids.dtype, found.logprobs.dtype) == (np.int32, np.float32)
    assert (found.counts is not None) == spec.ragged
    one, two = table_of(kept, spec.num_classes), table_of(found, spec.num_classes)
    assert ((one == -np.inf) == (two == -np.inf)).all()
    there = one > -np.inf
    np.testing.assert_allclose(two[there], one[there], atol=NEAR)
    if spec.sampled:
        assert (found.log_tail == -np.inf).all()
    else:
        np.testing.assert_allclose(np.exp(two).sum(axis=1) + np.exp(found.log_tail), 1, atol=1e-5)


@each_size
@each_kind
def test_what_is_written_comes_back(name, value_bits):
    spec = spec_of(name, value_bits)
    if spec.has_targets:
        check_round_trip(spec)
        check_round_trip(spec, positions=0)
    else:
        assert list(spec.plane_shapes) == []


@each_size
@each_kind
def test_the_planes_of_a_kind_are_columns_that_a_teacher_says(name, value_bits):
    shapes = spec_of(name, value_bits).plane_shapes
    columns = [shape.name.rpartition(".")[0] for shape in shapes]
    assert all(COLUMN_OF[column].source == "teacher" for column in columns)
    assert all(COLUMN_OF[column].coding is None for column in columns)
    assert len({shape.name for shape in shapes}) == len(shapes)
    per_entry = [index for index, shape in enumerate(shapes) if shape.per == "entry"]
    assert bool(per_entry) == KINDS[name].ragged
    if per_entry:  # how many there are has been read by then
        assert columns.index("target_counts") < per_entry[0]


@each_kind
def test_the_traits_of_a_kind_agree(name):
    kind, spec = KINDS[name], spec_of(name)
    assert kind.has_targets or not (kind.numbers or kind.ragged or kind.sampled or kind.truncated)
    assert kind.distributions == (kind.has_targets and not kind.numbers)
    assert not (kind.sampled and kind.truncated)
    assert not (kind.every_temperature and (kind.sampled or kind.truncated))
    assert (kind.lowest_threshold > 0) == kind.ragged
    assert kind.reads <= {field.name for field in fields(TargetFields)}
    assert ("mean_entries" in kind.reads) == kind.ragged
    assert spec.text.partition(" ")[0] == name
    assert not (spec.complete and (kind.ragged or kind.truncated))
    for trait in ("has_targets", "numbers", "distributions", "ragged", "sampled", "truncated"):
        assert getattr(spec, trait) == getattr(kind, trait)
    assert spec.every_temperature == kind.every_temperature


@each_kind
def test_a_spec_of_each_kind_is_read_from_json_as_it_was_written(name):
    spec = spec_of(name)
    written = asdict(spec) | {"temperatures": []}
    assert build(TargetSpec, written, "here") == spec


@each_kind
def test_too_few_classes_are_refused(name):
    spec = spec_of(name)
    with pytest.raises(ConfigError, match="num_classes"):
        replace(spec, num_classes=KINDS[name].fewest_classes - 1)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.ragged])
def test_a_threshold_below_the_lowest_is_refused(name):
    with pytest.raises(ConfigError, match="threshold"):
        replace(spec_of(name), threshold=KINDS[name].lowest_threshold / 2)


@pytest.mark.parametrize("name", ["unheard-of", 3, ["topk"], None])
def test_an_unknown_kind_is_refused_with_the_names_there_are(name):
    written = asdict(spec_of("topk")) | {"temperatures": [], "kind": name}
    names = "topk, adaptive, sample, dense, values, none"
    with pytest.raises(CorruptCache, match=f"here: kind: found .*, expected one of {names}"):
        build(TargetSpec, written, "here")
    with pytest.raises(ConfigError, match=f"unheard-of: expected one of {names}"):
        TargetSpec(kind="unheard-of", num_classes=40)


class Likeliest(TopK):
    """Keeps one class, however many are asked for."""

    def num_entries(self, spec):
        return 1


def test_a_kind_is_one_object_and_one_line_of_the_table(monkeypatch):
    monkeypatch.setitem(KINDS, "likeliest", Likeliest())
    for value_bits in (7, 8, 16):
        check_round_trip(spec_of("likeliest", value_bits))
    test_the_traits_of_a_kind_agree("likeliest")
    test_a_spec_of_each_kind_is_read_from_json_as_it_was_written("likeliest")
    assert spec_of("likeliest").text == "likeliest 1"


def test_the_kind_stands_first_where_a_spec_is_shown():
    assert next(iter(asdict(spec_of("topk")))) == "kind"
