"""Training and evaluation on caches of every kind, against the teacher itself."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.cache import open_cache
from shared.errors import CacheMismatch
from student_train.evaluate.evaluate import evaluate
from student_train.run_files import kl_of
from student_train.student.build import build_student
from tests.conftest import Capture

ASKED = {"adaptive": {"mean_entries": 12.0}, "sample": {"mean_entries": 12.0}, "dense": {}}


@pytest.fixture(scope="module")
def caches(capture: Capture) -> dict[str, Path]:
    return {kind: capture(targets=kind, **options) for kind, options in ASKED.items()}


def live_kl(student, teacher_dir: Path, cache) -> float:
    """Mean KL(teacher || student) over every position of a cache, float64."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir).double().eval()
    student = student.double().eval()
    total = count = 0
    with torch.no_grad():
        for index in range(len(cache)):
            ids = cache[index].input_ids[None]
            p, q = (m(ids).logits[0, :-1, :300].log_softmax(-1) for m in (teacher, student))
            total += float((p.exp() * (p - q)).sum())
            count += len(p)
    return total / count


@pytest.mark.parametrize("kind", ["sample", "dense"])
def test_kl_is_that_to_the_live_teacher(kind, caches, teacher_dir, student_config_dir):
    """Dense: all but rounding. A sample: the mean over 13,000 positions, drawn ones at random."""
    cache = open_cache(caches[kind])
    student = build_student(str(student_config_dir), cache, seed=0)
    numbers = evaluate(student, cache, batch_tokens=4096)
    assert numbers["targets"] == {"sample": "sample 12", "dense": "dense"}[kind]
    expected = live_kl(student, teacher_dir, cache)
    assert numbers["kl"] == pytest.approx(expected, rel=1e-4 if kind == "dense" else 5e-3)


@pytest.mark.parametrize("kind", list(ASKED))
def test_the_soft_loss_alone_brings_a_student_nearer(kind, caches, train, student_config_dir):
    cache = open_cache(caches[kind])
    untrained = build_student(str(student_config_dir), cache, seed=0)
    before = evaluate(untrained, cache, batch_tokens=4096)
    only_soft = {"soft_weight": 1.0, "hard_weight": 0.0, "max_steps": 40}
    result = train(cache=(caches[kind],), validation_cache=caches[kind], **only_soft)
    assert kl_of(result["validation"]) < 0.8 * kl_of(before)


def test_any_temperature_is_exact_on_a_dense_cache(caches, train):
    result = train(cache=(caches["dense"],), temperature=3.7, hard_weight=0.0)
    assert result["max_steps"] == 6


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ({"soft_loss": "jsd"}, "--soft-loss jsd"),
        ({"tail": "label"}, "--tail label"),
        ({"temperature": 2.0}, "--temperature 2.0"),
    ],
)
def test_what_a_sample_says_nothing_about_is_refused(option, shown, caches, train):
    with pytest.raises(CacheMismatch, match=f"{shown}: .*holds a sample.*Leave the option out"):
        train(cache=(caches["sample"],), **option)


@pytest.mark.parametrize(("kind", "warned"), [("adaptive", True), ("sample", False)])
def test_a_run_on_targets_that_keep_little_is_warned(kind, warned, caches, train, caplog):
    train(cache=(caches[kind],), max_steps=1)
    share = sum(c.statistics["sum_kept_mass"] for c in open_cache(caches["adaptive"]).commits)
    share /= open_cache(caches["adaptive"]).row_positions.sum()
    said = f"its targets keep {100 * share:.0f} % of the teacher's probability at temperature 1"
    assert (said in caplog.text) == warned
