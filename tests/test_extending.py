"""One toy of everything that can be added, by the steps of CONTRIBUTING.md, and each runs for real.

A task, a kind of target, an engine, a store and a loss are written here, get their lines in the
tables for the length of one test, and no file of the packages knows of them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared import open_cache
from shared.arrays import Plane, join_planes, split_planes
from shared.cache import Cache
from shared.errors import ConfigError
from shared.options import main
from shared.targets.base import Kind, TargetFields
from shared.targets.kinds import KINDS
from shared.targets.planes import PlaneShape
from shared.targets.record import ClassRanks, Target
from shared.targets.spec import TargetSpec
from shared.tasks import TASKS, Task
from student_train import cli as student_cli
from student_train.config import TrainConfig
from student_train.data.order import Order, OrderSpec
from student_train.data.stream import BatchStream, StreamSpec
from student_train.evaluate.evaluate import evaluate
from student_train.loss.linear import linear_loss
from student_train.loss.rows import ROW_LOSSES, SoftTarget
from student_train.loss.spec import SOFT_LOSSES, LossSpec, SoftLossTraits
from student_train.run.run import run as train_student
from student_train.tasks.language import LanguageTask
from student_train.tasks.table import STUDENT_TASKS
from teacher_cache import cli as teacher_cli
from teacher_cache.config import CaptureConfig
from teacher_cache.engines.table import ENGINES
from teacher_cache.job.run import run as capture_cache
from teacher_cache.select.distributions import Logits
from teacher_cache.select.equal import Equal
from teacher_cache.select.kinds import SELECTORS
from teacher_cache.tasks.base import RowContext
from teacher_cache.tasks.causal import CausalTask
from teacher_cache.tasks.rows import TrainingRow
from teacher_cache.tasks.table import TEACHER_TASKS
from tests.conftest import Capture
from tests.shared.storage.test_stores import MemoryStore
from tests.shared.targets.test_kinds import check_round_trip, spec_of
from tests.teacher_cache.engines.toy import ToyEngine

HALF = 2.0**-11  # relative error of an IEEE half


@pytest.fixture
def run_command():
    """Runs one command in this process, as if it had been typed."""

    def typed(command: Any, *arguments: object) -> None:
        with pytest.raises(SystemExit) as ended:
            main(command, [str(argument) for argument in arguments])
        assert ended.value.code == 0

    return typed


def trained(cache: Path, student: Path, out: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    """What a run of two steps says of its student, and the student as it was saved, in float64."""
    config = TrainConfig(
        student=str(student),
        cache=(cache,),
        validation_cache=cache,
        out=out,
        max_steps=2,
        batch_tokens=1000,
        learning_rate=3e-3,
        device="cpu",
        **options,
    )
    numbers = train_student(config)["validation"]
    return numbers, AutoModelForCausalLM.from_pretrained(out).double().eval()


def logprobs_of(model: Any, cache: Cache) -> Tensor:
    """What a model says at all positions of a cache, float64 [P, C]."""
    found = []
    with torch.no_grad():
        for row in cache:
            logits_TC = model(row.input_ids[None]).logits[0]
            found.append(logits_TC[row.positions].double().log_softmax(dim=-1))
    return torch.cat(found)


def next_tokens(cache: Cache) -> Tensor:
    return torch.cat([row.input_ids[row.positions + 1] for row in cache]).long()


def live(teacher_dir: Path, cache: Cache) -> Tensor:
    return logprobs_of(AutoModelForCausalLM.from_pretrained(teacher_dir).double().eval(), cache)


def mean_kl(teacher_PC: Tensor, student_PC: Tensor) -> float:
    return float((teacher_PC.exp() * (teacher_PC - student_PC)).sum(dim=-1).mean())


# A task ------------------------------------------------------------------------------------------

PREDICTED = 3  # tokens of a row


class BackwardsOpenings(CausalTask):
    """A text from its end to its beginning, of which the first few tokens are predicted."""

    def build_rows(
        self, documents: Iterable[tuple[int, Any]], context: RowContext, counters: Counter[str]
    ) -> Iterator[TrainingRow]:
        for row in super().build_rows(documents, context, counters):
            places = np.arange(min(PREDICTED, len(row.input_ids) - 1), dtype=np.int32)
            yield replace(row, input_ids=row.input_ids[::-1].copy(), supervised=places)

    def stores_positions(self, roles: Any) -> bool:
        return True


class InBits(LanguageTask):
    """Also says its loss in bits."""

    def numbers_of_loss(self, loss: float) -> dict[str, float]:
        return super().numbers_of_loss(loss) | {"bits": loss / math.log(2)}


@pytest.fixture
def toy_task(monkeypatch: pytest.MonkeyPatch) -> str:
    plain = Task(
        "vocabulary", "AutoModelForCausalLM", layout="tokens", ways=(("text",),), labels="next"
    )
    monkeypatch.setitem(TASKS, "backwards-lm", plain)
    monkeypatch.setitem(TEACHER_TASKS, "backwards-lm", BackwardsOpenings("backwards-lm"))
    monkeypatch.setitem(STUDENT_TASKS, "backwards-lm", InBits())
    return "backwards-lm"


def backwards(texts: list[str], tokenizer_dir: Path) -> list[list[int]]:
    """The rows of these texts, from the tokenizer alone."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    whole = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts if text]
    chunks = [ids[start : start + 64] for ids in whole for start in range(0, len(ids), 64)]
    return [chunk[::-1] for chunk in chunks if len(chunk) > 1]


def test_a_task(
    toy_task,
    capture: Capture,
    corpus_file,
    teacher_dir,
    student_config_dir,
    tmp_path: Path,
    run_command,
):
    folder = capture(task=toy_task, targets="dense", limit_documents=60, max_length=64)
    cache = open_cache(folder)
    assert cache.manifest.task == toy_task
    for command in (("verify",), ("inspect",), ("check", "--teacher", teacher_dir)):
        run_command(teacher_cli.app, *command, folder)
    expected = backwards(corpus_file.read_text().splitlines()[:60], teacher_dir)
    assert [row.input_ids.tolist() for row in cache] == expected
    assert [row.positions.tolist() for row in cache] == [[0, 1, 2][: len(e) - 1] for e in expected]

    teacher_PC = live(teacher_dir, cache)
    stored_PC = torch.cat([table_of(row) for row in cache])
    torch.testing.assert_close(stored_PC, teacher_PC, rtol=2 * HALF, atol=1e-4)
    numbers, student = trained(folder, student_config_dir, tmp_path / "run")
    student_PC = logprobs_of(student, cache)
    assert numbers["positions"] == len(student_PC)
    assert numbers["kl"] == pytest.approx(mean_kl(teacher_PC, student_PC), rel=1e-3)
    loss = -student_PC.gather(1, next_tokens(cache)[:, None]).mean().item()
    assert numbers["loss"] == pytest.approx(loss, rel=1e-4)
    assert numbers["bits"] == pytest.approx(loss / math.log(2), rel=1e-4)


def table_of(row: Any) -> Tensor:
    """The log-probabilities of a row that has every class, [P, C]."""
    ids_PC, logprobs_PC = row.targets.ids.long(), row.targets.logprobs.double()
    return torch.empty_like(logprobs_PC).scatter_(1, ids_PC, logprobs_PC)


# A kind of target --------------------------------------------------------------------------------


class Likeliest(Kind[Target]):
    """The likeliest class and its log-probability, as an IEEE half; all others are the tail."""

    truncated = True

    def num_entries(self, spec: TargetFields) -> int:
        return 1

    def plane_shapes(self, spec: TargetFields) -> Sequence[PlaneShape]:
        names = [f"target_{column}.{plane}" for column in ("ids", "codes") for plane in (0, 1)]
        return [PlaneShape(name, "position", 1) for name in names]

    def encode(self, kept: Target, spec: TargetFields, ranks: ClassRanks) -> dict[str, Plane]:
        ranks_P = ranks.ranks[kept.ids[:, 0]]
        halves_P = kept.logprobs[:, 0].astype(np.float16).view(np.uint16)
        planes = [*split_planes(ranks_P, 2), *split_planes(halves_P, 2)]
        names = [shape.name for shape in self.plane_shapes(spec)]
        return {name: plane.reshape(-1) for name, plane in zip(names, planes, strict=True)}

    def decode(
        self, planes: Mapping[str, Plane], num_positions: int, spec: TargetFields, ranks: ClassRanks
    ) -> Target:
        def joined(column: str) -> np.ndarray:
            return join_planes([planes[f"target_{column}.{n}"] for n in (0, 1)], np.uint16)

        ids_P1 = ranks.classes[joined("ids")].astype(np.int32)[:, None]
        logprobs_P1 = joined("codes").view(np.float16).astype(np.float32)[:, None]
        with np.errstate(divide="ignore"):
            log_tail_P = np.log(-np.expm1(logprobs_P1[:, 0]))
        return Target(ids_P1, logprobs_P1, log_tail_P)


class SelectLikeliest(Equal):
    """The first of the largest logits."""

    def best(self, block: Logits, spec: TargetSpec) -> tuple[Tensor, Tensor]:
        ids_N1 = block.logits_NC.argmax(dim=1, keepdim=True)
        return ids_N1, block.logits_NC.gather(1, ids_N1).double()


@pytest.fixture
def toy_kind(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(KINDS, "top1", Likeliest())
    monkeypatch.setitem(SELECTORS, "top1", SelectLikeliest())
    return "top1"


def test_a_kind_of_target(
    toy_kind, corpus_file, teacher_dir, student_config_dir, tmp_path: Path, run_command
):
    check_round_trip(spec_of(toy_kind))
    folder = tmp_path / "cache"
    asked = ("--targets", toy_kind, "--limit-documents", 60, "--max-length", 64, "--device", "cpu")
    common = ("--teacher", teacher_dir, "--corpus", corpus_file, "--out", folder)
    for command in ("plan", "run"):
        run_command(teacher_cli.app, command, *common, *asked)
    for command in ("verify", "inspect"):
        run_command(teacher_cli.app, command, folder)
    run_command(teacher_cli.app, "check", folder, "--teacher", teacher_dir)
    cache = open_cache(folder)
    assert cache.manifest.targets.text == toy_kind

    teacher_PC = live(teacher_dir, cache)
    best_P, ids_P = teacher_PC.max(dim=1)
    assert torch.equal(torch.cat([row.targets.ids for row in cache])[:, 0].long(), ids_P)
    found_P = torch.cat([row.targets.logprobs for row in cache])[:, 0].double()
    torch.testing.assert_close(found_P, best_P, rtol=2 * HALF, atol=1e-5)
    tail_P = torch.cat([row.targets.tail_mass for row in cache]).double()
    torch.testing.assert_close(tail_P, 1 - best_P.exp(), rtol=0, atol=HALF)

    numbers, student = trained(folder, student_config_dir, tmp_path / "run", hard_weight=0.0)
    student_P = logprobs_of(student, cache).gather(1, ids_P[:, None])[:, 0]
    two_cells = [torch.stack([p, torch.log1p(-p.exp())], dim=1) for p in (best_P, student_P)]
    assert numbers["kl_bucketed"] == pytest.approx(mean_kl(*two_cells), rel=2e-3)
    assert numbers["targets"] == toy_kind


# An engine ---------------------------------------------------------------------------------------


def test_an_engine(
    corpus_file, tokenizer_dir, student_config_dir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is a table: the token at a position decides alone what is said of the next one."""
    monkeypatch.setitem(ENGINES, "toy", ToyEngine.load)
    config = CaptureConfig(
        teacher="a table",
        tokenizer=str(tokenizer_dir),
        corpus=str(corpus_file),
        out=tmp_path / "cache",
        targets="dense",
        max_length=64,
        limit_documents=60,
        device="cpu",
    )
    capture_cache(config, load_engine=ENGINES["toy"])
    cache, engine = open_cache(config.out), ToyEngine.load(config, TEACHER_TASKS["causal-lm"])
    assert cache.manifest.teacher == engine.info()
    read_P = torch.cat([row.input_ids[row.positions] for row in cache]).long()
    said_PC = engine.logits_VC.double().log_softmax(dim=-1)[read_P]
    stored_PC = torch.cat([table_of(row) for row in cache])
    torch.testing.assert_close(stored_PC, said_PC, rtol=2 * HALF, atol=1e-4)
    numbers, student = trained(config.out, student_config_dir, tmp_path / "run")
    assert numbers["kl"] == pytest.approx(mean_kl(said_PC, logprobs_of(student, cache)), rel=1e-3)


# A store -----------------------------------------------------------------------------------------


def batches_of(cache: Cache) -> list[dict[str, Tensor]]:
    spec = StreamSpec(hidden_layers=(0,))
    order = Order(cache.block_rows, cache.row_tokens, OrderSpec(batch_tokens=1500, seed=3))
    return list(BatchStream(cache, order, spec, max_steps=6))


def test_a_store(cache_dir, teacher_dir, tmp_path: Path):
    """One of names and bytes: a cache that is put into it is read and trained on as from disk."""
    store = MemoryStore(tmp_path)
    for path in cache_dir.rglob("*"):
        if path.is_file():
            assert store.put_new(path.relative_to(cache_dir).as_posix(), path.read_bytes())
    expected, found = open_cache(cache_dir), open_cache(store)
    assert found.storage is store
    assert found.cache_id == expected.cache_id
    for one, other in zip(batches_of(expected), batches_of(found), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir).eval()
    numbers = [evaluate(teacher, cache, batch_tokens=4096) for cache in (expected, found)]
    assert numbers[0] == numbers[1]
    assert numbers[0]["kl_bucketed"] < 1e-3  # to itself


# A loss of rows ----------------------------------------------------------------------------------


def brier(student_NJ: Tensor, teacher_NJ: Tensor, spec: LossSpec) -> Tensor:
    """The squared difference of the probabilities, summed over the cells."""
    return (student_NJ.exp() - teacher_NJ.exp()).square().sum(dim=-1)


@pytest.fixture
def toy_loss(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(SOFT_LOSSES, "brier", SoftLossTraits(temperature_power=1))
    monkeypatch.setitem(ROW_LOSSES, "brier", brier)
    return "brier"


def brier_of_all_classes(logits_NC: Tensor, ids_NK: Tensor, p_NK: Tensor) -> Tensor:
    """The formula from whole distributions: the last cell is what the entries leave of 1."""
    q_NK = logits_NC.softmax(dim=-1).gather(1, ids_NK)
    entries_N = (q_NK - p_NK).square().sum(dim=-1)
    tails_N = q_NK.sum(dim=-1) - p_NK.sum(dim=-1)
    return (entries_N + tails_N.square()).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient_of_a_row_loss(toy_loss, temperature):
    """Against the plain formula over all 40 classes in float64; chunks of 4 of 11 positions."""
    chance = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance, dtype=torch.float64)

    teacher_NC = (2 * random(11, 40)).log_softmax(dim=-1)
    ids_NK = teacher_NC.topk(5, dim=-1).indices
    log_kept_NK = teacher_NC.gather(1, ids_NK)
    target = SoftTarget(
        ids_NK,
        log_kept_NK,
        torch.log1p(-log_kept_NK.exp().sum(dim=-1)),
        (teacher_NC / temperature).logsumexp(dim=-1),
    )
    inputs = [random(11, 8).requires_grad_(), random(40, 8).requires_grad_()]
    output = linear_loss(
        *inputs,
        None,
        target=target,
        labels_N=None,
        spec=LossSpec(soft_loss=toy_loss, temperature=temperature),
        num_classes=40,
        chunk_rows=4,
    )
    p_NK = (teacher_NC / temperature).softmax(dim=-1).gather(1, ids_NK)
    logits_NC = inputs[0] @ inputs[1].T / temperature
    expected = temperature * brier_of_all_classes(logits_NC, ids_NK, p_NK)
    torch.testing.assert_close(output.soft_sum, expected.detach(), rtol=1e-9, atol=0)
    gradients = torch.autograd.grad(output.loss, inputs)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


def test_a_row_loss(toy_loss, cache_dir, student_config_dir, tmp_path: Path, run_command):
    """Asked for as an option, it trains a student, and another one than the default does."""
    options = ("--soft-loss", toy_loss, "--hard-weight", 0, "--learning-rate", 3e-3)
    common = ("--student", student_config_dir, "--cache", cache_dir, "--device", "cpu")
    out, steps = tmp_path / "brier", ("--max-steps", 2, "--batch-tokens", 1000)
    run_command(student_cli.app, "run", *common, *steps, *options, "--out", out)
    weights = AutoModelForCausalLM.from_pretrained(out).state_dict()
    _, other = trained(cache_dir, student_config_dir, tmp_path / "default", hard_weight=0.0)
    assert all(weight.isfinite().all() for weight in weights.values())
    head = "lm_head.weight"
    assert not torch.allclose(weights[head].double(), other.state_dict()[head], rtol=1e-3)


def test_a_loss_has_a_line_in_both_tables_and_is_unknown_without():
    assert SOFT_LOSSES.keys() == ROW_LOSSES.keys()
    with pytest.raises(ConfigError, match="--soft-loss brier: expected one of forward-kl, "):
        LossSpec(soft_loss="brier")


def test_a_kind_that_is_in_no_table_cannot_be_asked_for(tmp_path: Path):
    with pytest.raises(ConfigError, match="--targets is 'top1', but must be one of auto, topk, "):
        CaptureConfig(teacher="t", corpus="c", out=tmp_path, targets="top1")
