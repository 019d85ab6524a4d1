"""The arithmetic of benchmarks/fidelity.py, whose numbers decide what the tool's defaults are."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import fidelity_gradient as gradient  # noqa: E402
import fidelity_report as report  # noqa: E402
import fidelity_students as students  # noqa: E402

from shared.cache import open_cache  # noqa: E402
from student_train.data.order import Order, OrderSpec  # noqa: E402
from student_train.data.stream import BatchStream, StreamSpec  # noqa: E402
from student_train.loss.attachment import attach  # noqa: E402
from student_train.student.build import build_student  # noqa: E402

CE, FULL = [5.1, 5.3, 5.0, 5.2, 5.15], [4.9, 5.05, 4.82, 4.97, 4.93]
ARM = [4.95, 5.1, 4.9, 5.0, 5.0]


def test_the_interval_of_the_share_holds_what_a_paired_t_test_does_not_refuse():
    part = [c - a for c, a in zip(CE, ARM, strict=True)]
    whole = [c - f for c, f in zip(CE, FULL, strict=True)]
    middle, low, high = report.share_with_interval(part, whole)
    assert middle == pytest.approx(sum(part) / sum(whole))
    for ratio in (low, high):
        rest = np.array(part) - ratio * np.array(whole)
        t = abs(rest.mean()) / (rest.std(ddof=1) / math.sqrt(5))
        assert t == pytest.approx(2.776, rel=1e-6)
    assert low < middle < high


def test_there_is_no_share_of_a_gain_that_may_be_none():
    assert report.share_with_interval([0.1, 0.2, 0.1], [0.1, -0.1, 0.02]) is None


def test_arms_are_paired_by_seed():
    results = [
        {"arm": arm, "seed": seed, "loss": loss, "kl": 0.1, "agreement": 0.5, "ece": 0.01}
        for arm, losses in (("ce", CE), ("full", FULL), ("x", ARM[:3]))
        for seed, loss in enumerate(losses)
    ]
    line = report.summarise(results[::-1], ["ce", "full", "x"])[2]
    differences = np.array(ARM[:3]) - np.array(CE[:3])
    half = 4.303 * differences.std(ddof=1) / math.sqrt(3)
    assert line["loss_minus_ce"] == pytest.approx([differences.mean(), half], rel=1e-2)
    assert "recovered" in line
    one_seed = report.summarise(results[:1], [results[0]["arm"]])
    assert "NaN" not in json.dumps(one_seed) + report.table(one_seed)
    drawn = report.picture([line], "a <title>")
    assert drawn.startswith("<svg")
    assert "a &lt;title&gt;" in drawn


def test_bias_is_what_does_not_average_out():
    generator = torch.Generator().manual_seed(0)
    bias, S = torch.tensor([[0.3, -0.4]]), 4000
    errors = gradient.Errors(bias)
    for noise in torch.randn(S, 1, 2, generator=generator):
        errors.add(bias + noise, 128)
    found = errors.relative_to(torch.tensor([[2.0, 0.0]]))
    assert found["bias"] == pytest.approx(0.5 / 2, rel=0.1)
    assert found["deviation"] == pytest.approx(math.sqrt(2 / S) / 2, rel=0.1)


def test_the_number_of_draws_by_drawing():
    probs = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.05, 0.05], [0.9, 0.06, 0.01, 0.01, 0.01, 0.01]])
    draws = gradient.draws_for(probs, 3)
    assert draws == students.draws_for(probs, 3.1)
    generator = torch.Generator().manual_seed(0)
    unique = {}
    for number in (draws - 1, draws, draws + 1):
        many = probs.repeat(20_000, 1)
        ids = torch.multinomial(many, number, replacement=True, generator=generator)
        unique[number] = sum(float((ids == c).any(dim=1).sum()) for c in range(6)) / len(many)
    assert min(unique, key=lambda number: abs(unique[number] - 3)) == draws


def test_known_probabilities_stay_and_the_rest_is_spread(tmp_path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    logits = np.sort(rng.normal(size=(128, 300)) * 2)[:, ::-1].astype(np.float32)
    lse = np.log(np.exp(logits).sum(axis=1)).astype(np.float32)
    ids = np.stack([rng.permutation(300) for _ in range(128)]).astype(np.uint32)
    known = {"ids": ids[:, :40].copy(), "logits": logits[:, :40].astype(np.float16), "lse": lse}
    known["next_token"] = ids[:, 0].astype(np.int32)
    save_file(known, tmp_path / "x.safetensors", metadata={"vocab_size": "300"})
    data = gradient.load(tmp_path / "x.safetensors", 128)
    p = data.log_probs(slice(0, 128)).exp()
    torch.testing.assert_close(p.sum(dim=1), torch.ones(128))
    torch.testing.assert_close(p.gather(1, data.ids_NM), data.probs_NM, rtol=2e-3, atol=1e-6)
    logp_nC = p.log()
    for name, goal in (("KL 3", 3.0), ("KL 0.1", 0.1)):
        logq_nC = gradient.students_for(data)[name](slice(0, 128), logp_nC).log_softmax(dim=1)
        kl = (p * (logp_nC - logq_nC)).sum(dim=1).mean()
        assert float(kl) == pytest.approx(goal, rel=0.1)


@pytest.mark.parametrize(("temperature", "hard"), [(1.0, 0.0), (2.0, 0.5)])
def test_full_distillation_is_that_from_a_dense_cache(
    temperature, hard, capture, teacher_dir, student_config_dir
):
    cache = open_cache(capture(targets="dense", limit_documents=60))
    order = Order(cache.block_rows, cache.row_tokens, OrderSpec(batch_tokens=500))
    batch = next(iter(BatchStream(cache, order, StreamSpec(), max_steps=1)))
    teacher, student = (
        build_student(str(teacher_dir), cache, seed=0),
        build_student(str(student_config_dir), cache, seed=3),
    )
    student.eval()  # no dropout
    arm = students.Arm(source="full", temperature=temperature, hard=hard)
    loss = students.full_loss(student, teacher.eval(), batch, arm, 300)
    loss.backward()
    expected = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    attachment = attach(student, students.objective_of(arm, cache))
    cached = student(**batch)["loss"]
    cached.backward()
    attachment.detach()
    torch.testing.assert_close(cached, loss, rtol=1e-3, atol=1e-4)
    for parameter, gradient_ in zip(student.parameters(), expected, strict=True):
        error = (parameter.grad - gradient_).norm() / gradient_.norm()
        assert float(error) < 5e-3


@pytest.mark.slow
def test_a_second_run_trains_nothing_again(corpus_file, tmp_path):
    small = "--classes 300 --length 32 --teacher-width 32 --teacher-layers 1 --teacher-steps 3"
    small += " --student-width 32 --student-layers 1 --steps 3 --batch-tokens 200"
    small += " --held-out-tokens 500 --no-timing --seeds 2 --arms ce full rskd12 sample12"
    command = [sys.executable, ROOT / "benchmarks" / "fidelity.py", *small.split()]
    command += ["--corpus", corpus_file, "--out", tmp_path / "out"]
    printed = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        printed.append((json.loads(done.stdout), (tmp_path / "out" / "results.jsonl").read_bytes()))
    assert printed[0] == printed[1]
    assert [(line["arm"], line["seeds"]) for line in printed[0][0]["arms"]] == [
        (arm, 2) for arm in ("ce", "full", "rskd12", "sample12")
    ]
    refused = subprocess.run([*command, "--steps", "4"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "Name another --out" in refused.stderr
