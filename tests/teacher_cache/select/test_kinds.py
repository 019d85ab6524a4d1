"""Every kind of target through the whole of stage one, and back, against the live teacher."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.cache import Cache, open_cache
from shared.models.tokenizer import load_cached_tokenizer
from shared.targets.ragged import drawn_logprob
from teacher_cache.config import InspectConfig
from teacher_cache.tools.inspect import inspect
from tests.conftest import Capture


@pytest.fixture(scope="module")
def small(capture: Capture):
    def make(kind: str, **options: object) -> Cache:
        asked = {"mean_entries": 6.0} if kind in ("adaptive", "sample") else {}
        return open_cache(capture(targets=kind, limit_documents=40, **asked | options))

    return make


@pytest.fixture(scope="module")
def live(teacher_dir: Path):
    """Log-probabilities of the teacher at the positions of a row, float64 [P, C]."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir).double().eval()

    def logprobs(input_ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return teacher(input_ids[None]).logits[0, :-1].log_softmax(dim=-1)

    return logprobs


def rows_of(row):
    """Class -> log-probability at each position of a cached row."""
    counts = row.targets.counts
    if counts is None:
        pairs = zip(row.targets.ids, row.targets.logprobs, strict=True)
    else:
        sizes = counts.tolist()
        pairs = zip(row.targets.ids.split(sizes), row.targets.logprobs.split(sizes), strict=True)
    return [dict(zip(ids.tolist(), logs.tolist(), strict=True)) for ids, logs in pairs]


def test_adaptive_holds_what_the_teacher_says(small, live):
    cache = small("adaptive")
    spec, entries, kl, positions = cache.manifest.targets, 0, 0.0, 0
    for index in range(len(cache)):
        row = cache[index]
        for truth_C, found, tail in zip(
            live(row.input_ids), rows_of(row), row.targets.tail_mass, strict=True
        ):
            edge, best = math.log(spec.threshold), {int(truth_C.argmax())}
            sure = {i for i, lp in enumerate(truth_C.tolist()) if lp >= edge + 1e-5}
            near = {i for i, lp in enumerate(truth_C.tolist()) if lp >= edge - 1e-5}
            assert sure | best <= found.keys() <= near | best
            rest = 1 - sum(truth_C[i].exp().item() for i in found)
            kl += sum(truth_C[i].exp().item() * (truth_C[i].item() - lp) for i, lp in found.items())
            kl += rest * math.log(rest / tail.item()) if rest > 1e-6 else 0.0
            total = sum(map(math.exp, found.values())) + tail.item()
            assert total == pytest.approx(1, abs=2e-6)
            entries, positions = entries + len(found), positions + 1
    assert kl / positions < 1e-4
    assert entries / positions == pytest.approx(6, rel=0.1)  # calibrated on these very documents


def test_sample_holds_likely_classes_as_they_are_and_draws_the_rest(small, live):
    cache = small("sample")
    spec, entries, positions = cache.manifest.targets, 0, 0
    drawn = float(drawn_logprob(spec))
    squares = 0.0
    for index in range(len(cache)):
        row = cache[index]
        assert (row.targets.tail_mass == 0).all()
        for truth_C, found in zip(live(row.input_ids), rows_of(row), strict=True):
            for i, lp in enumerate(truth_C.tolist()):
                if lp >= math.log(spec.threshold) + 1e-5:
                    assert found[i] == pytest.approx(lp, abs=0.2)
            for i, lp in found.items():
                assert lp == drawn or truth_C[i] >= math.log(spec.threshold) - 3.1
            total = sum(map(math.exp, found.values()))
            assert abs(total - 1) <= spec.threshold + 0.02
            squares += (total - 1) ** 2
            entries, positions = entries + len(found), positions + 1
    assert entries / positions == pytest.approx(6, rel=0.1)
    assert math.sqrt(squares / positions) < spec.threshold


def test_other_seeds_draw_other_classes_and_the_same_seed_the_same(small):
    one, same, other = small("sample"), small("sample"), small("sample", seed=1)
    ids = [torch.cat([cache[i].targets.ids for i in range(10)]) for cache in (one, same, other)]
    assert one.cache_id == same.cache_id
    assert torch.equal(ids[0], ids[1])
    assert ids[0].shape != ids[2].shape or not torch.equal(ids[0], ids[2])


def test_dense_holds_everything(small, live):
    cache = small("dense")
    row = cache[3]
    assert row.targets.ids.shape == (len(row.positions), 300)
    torch.testing.assert_close(
        row.targets.logprobs.double(), live(row.input_ids), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("kind", ["adaptive", "sample", "dense"])
def test_inspect_shows_the_best_classes_of_each_position(small, kind):
    cache = small(kind)
    shown = inspect(InspectConfig(cache=cache.storage.root, rows=1))["rows_shown"][0]
    row, tokenizer = cache[0], load_cached_tokenizer(cache.storage)
    for place, found in enumerate(shown["positions"]):
        ids, logprobs = row.targets.entries(place)
        best = logprobs.max().exp().item()
        texts = {tokenizer.decode([i]) for i in ids.tolist()}
        assert found["teacher"][0]["p"] == pytest.approx(best, abs=1e-4)
        assert {entry["token"] for entry in found["teacher"]} <= texts
    assert shown["positions"]
