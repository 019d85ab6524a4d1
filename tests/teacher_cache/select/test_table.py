"""The table of kinds as stage one makes them: complete, and open to a kind of one's own."""

import typing

import pytest
import torch
from torch import Tensor

from shared.cache import open_cache
from shared.targets.spec import TargetKind, TargetSpec
from teacher_cache.select.equal import TopK
from teacher_cache.select.kinds import SELECTORS, largest_classes
from teacher_cache.select.targets import select
from tests.conftest import Capture


def test_every_kind_can_be_made():
    assert set(SELECTORS) == set(typing.get_args(TargetKind))


@pytest.mark.parametrize(
    ("kind", "options", "most"),
    [
        ("topk", {"top_k": 8}, 8),
        ("topk", {"top_k": 900}, 500),
        ("adaptive", {"mean_entries": 4.0}, 255),
        ("sample", {"mean_entries": 4.0}, 255),
        ("dense", {}, 255),
        ("none", {}, 255),
    ],
)
def test_calibration_looks_at_as_many_classes_as_a_position_keeps(kind, options, most):
    found = largest_classes(TargetSpec(kind=kind, num_classes=500, **options))
    assert (found.kind, found.top_k) == ("topk", most)


def test_numbers_are_looked_at_as_they_are():
    spec = TargetSpec(kind="values", num_classes=1)
    assert largest_classes(spec) is spec
    numbers_N1 = torch.tensor([[1.5], [float("nan")]])
    selected = select(numbers_N1, spec)
    assert selected.logprobs[0, 0] == 1.5
    assert selected.bad_N.tolist() == [False, True]


class Runners(TopK):
    """The classes behind the best one: that is left to the tail."""

    def best(self, block, spec) -> tuple[Tensor, Tensor]:
        order = block.logits_NC.argsort(dim=1, descending=True, stable=True)
        ids_NK = order[:, 1 : 1 + spec.num_entries]
        return ids_NK, block.logits_NC.gather(1, ids_NK).double()


def test_a_way_to_choose_of_one_s_own_is_a_class_and_a_line_of_the_table(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
):
    best = open_cache(capture(limit_documents=10, targets="topk", top_k=4))
    monkeypatch.setitem(SELECTORS, "topk", Runners())
    others = open_cache(capture(limit_documents=10, targets="topk", top_k=3))
    for row, other in zip(best, others, strict=True):
        for place in range(len(row.positions)):
            ids, logprobs = row.targets.entries(place)
            behind = ids[logprobs.argsort(descending=True, stable=True)[1:]]
            found, _ = other.targets.entries(place)
            assert set(found.tolist()) <= set(ids.tolist())
            assert len(set(found.tolist()) & set(behind.tolist())) >= 2  # codes may tie
