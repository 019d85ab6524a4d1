"""Students of every kind of target beside plain text and full distillation: what is trained.

One arm is one way to train; arms of one seed start from the same weights and see the same batches.
Everything is written to a folder and made once: texts, tokenizer, teacher, caches, the teacher's
held-out distributions. `fidelity.py` decides what is run and reads the results.

B rows, T tokens, N positions of a batch, C classes, S draws.
"""

import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from shared.cache import Cache, open_cache
from shared.errors import TeacherCacheError
from student_train.config import TrainConfig
from student_train.data.order import Order, OrderSpec
from student_train.data.stream import BatchStream, StreamSpec
from student_train.loss.attachment import attach
from student_train.loss.objective import Objective
from student_train.loss.spec import LossSpec, Tail
from student_train.run.run import run as train_run
from student_train.student.build import build_student
from teacher_cache.config import CaptureConfig
from teacher_cache.job.run import run as capture_run
from teacher_cache.tools.inspect import summary

PIECE_CHARACTERS = 2000  # of a document: paragraphs of one chapter, so many of them
PUBLISHED_BYTES = 3  # of a unique id of RS-KD: 17 bits of id, 7 of count
HELD_OUT_TOKENS = 4096  # of one forward of an evaluation
BINS = 15  # of the calibration error

Source = Literal["text", "cache", "full", "rskd"]
Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What has to be equal for two results to be compared."""

    classes: int = 4096
    length: int = 128
    teacher_width: int = 192
    teacher_layers: int = 4
    teacher_steps: int = 1000
    teacher_rate: float = 3e-3
    student_width: int = 96
    student_layers: int = 2
    batch_tokens: int = 1024
    steps: int = 500
    learning_rate: float = 3e-3
    held_out_tokens: int = 20_000
    pretrain_steps: int = 0  # plain cross-entropy on other text before the first step
    tuning_rate: float = 1e-3  # learning rate after that


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to train: on text, from a cache, or with the teacher in the loop."""

    source: Source = "cache"
    cache: str = "topk32"  # whose rows are read; all caches hold the same ones
    tail: Tail = "bucket"
    soft: float = 1.0
    hard: float = 0.0
    temperature: float = 1.0


ARMS: dict[str, Arm] = {
    "ce": Arm(source="text", cache="sample12", soft=0.0, hard=1.0),
    "full": Arm(source="full", cache="sample12"),
    "full+hard0.5": Arm(source="full", hard=0.5),
    "top12-renorm": Arm(cache="topk12", tail="renormalise"),
    "topk32-bucket": Arm(),
    "topk32-bucket+hard0.5": Arm(hard=0.5),
    "topk32-label": Arm(tail="label"),
    "adaptive16-bucket": Arm(cache="adaptive16"),
    "adaptive16-bucket+hard0.5": Arm(cache="adaptive16", hard=0.5),
    "adaptive16-label": Arm(cache="adaptive16", tail="label"),
    "rskd12": Arm(source="rskd"),
    "sample12": Arm(cache="sample12"),
    "sample16": Arm(cache="sample16"),
    "sample32": Arm(cache="sample32"),
    "sample12+hard0.5": Arm(cache="sample12", hard=0.5),
    "full@T2": Arm(source="full", temperature=2.0),
    "topk32-bucket@T2": Arm(temperature=2.0),
    "topk32-bucket+hard0.5@T2": Arm(hard=0.5, temperature=2.0),
    "adaptive16-bucket@T2": Arm(cache="adaptive16", temperature=2.0),
    "adaptive16-bucket+hard0.5@T2": Arm(cache="adaptive16", hard=0.5, temperature=2.0),
}
CACHES: dict[str, dict[str, Any]] = {
    "topk12": {"targets": "topk", "top_k": 12},
    "topk32": {"targets": "topk", "top_k": 32, "temperature": (2.0,)},
    "adaptive16": {"targets": "adaptive", "mean_entries": 16.0, "temperature": (2.0,)},
    "sample12": {"targets": "sample", "mean_entries": 12.0},
    "sample16": {"targets": "sample", "mean_entries": 16.0},
    "sample32": {"targets": "sample", "mean_entries": 32.0},
}


# ---- what is made once


def prepare(corpus: list[Path], out: Path, sizes: Sizes, arms: list[str]) -> None:
    """Texts, tokenizer, teacher and the caches of these arms; what is there already is kept."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer").exists():
        write_texts(corpus, out, sizes)
        make_tokenizer(out, sizes.classes)
    for name, width, layers in (
        ("teacher-config", sizes.teacher_width, sizes.teacher_layers),
        ("student-config", sizes.student_width, sizes.student_layers),
    ):
        make_config(out / name, width, layers, sizes)
    for name in ("teacher", "held-out"):
        labels_only = {"targets": "none", "tokenizer": str(out / "tokenizer")}
        capture(out, f"labels-{name}", f"{name}.txt", sizes, labels_only)
    train_run(
        TrainConfig(
            student=str(out / "teacher-config"),
            cache=(out / "labels-teacher",),
            out=out / "teacher",
            validation_cache=out / "labels-held-out",
            soft_weight=0.0,
            hard_weight=1.0,
            max_steps=sizes.teacher_steps,
            batch_tokens=2048,
            learning_rate=sizes.teacher_rate,
            weight_decay=0.1,
            eval_every=100,
            save_every=100,
            settings=("adam_beta2=0.98",),
        )
    )
    needed = sorted({ARMS[arm].cache for arm in arms})
    for name in needed:
        options = {"teacher": str(out / "teacher"), **CACHES[name]}
        capture(out, name, "student.txt", sizes, options)
    check_same_rows([open_cache(out / name) for name in needed])
    if not (out / "held-out.npy").exists():
        write_held_out(out)


def write_texts(corpus: list[Path], out: Path, sizes: Sizes) -> None:
    """Three files without a common document: the teacher's text, the students', the held-out.

    The students get no more than they can read (at about 4 characters a token), and no more than
    two fifths.
    """
    pieces = [piece for path in sorted(corpus) for piece in cut(path.read_text(encoding="utf-8"))]
    random.Random(0).shuffle(pieces)
    total = sum(map(len, pieces))
    held_out = min(sizes.held_out_tokens * 4, total // 5)
    students = min(round(sizes.steps * sizes.batch_tokens * 4 * 1.3), total * 2 // 5)
    ends = (("held-out", held_out), ("student", held_out + students), ("teacher", total + 1))
    done, rest = 0, iter(pieces)
    for name, end in ends:
        mine = []
        while done < end and (piece := next(rest, None)) is not None:
            mine.append(piece)
            done += len(piece)
        (out / f"{name}.txt").write_text("\n\n".join(mine) + "\n", encoding="utf-8")


def cut(text: str) -> Iterator[str]:
    """Documents of at least PIECE_CHARACTERS: lines of one chapter (chapters end in empty ones)."""
    for chapter in re.split(r"\n\s*\n", text):
        lines: list[str] = []
        for line in filter(None, map(str.strip, chapter.splitlines())):
            lines.append(line)
            if sum(map(len, lines)) >= PIECE_CHARACTERS:
                yield "\n".join(lines)
                lines = []
        if lines:
            yield "\n".join(lines)


def make_tokenizer(out: Path, classes: int) -> None:
    """A byte-level BPE, trained on all but the held-out text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=classes,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(out / "student.txt"), str(out / "teacher.txt")], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.save_pretrained(out / "tokenizer")


def make_config(folder: Path, width: int, layers: int, sizes: Sizes) -> None:
    """A Llama with heads of 32 channels and tied embeddings."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=sizes.classes,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=sizes.length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        attention_dropout=0.0,
    ).save_pretrained(folder)


def capture(out: Path, name: str, text: str, sizes: Sizes, options: dict[str, Any]) -> None:
    """`cache-teacher run`; a cache that is complete is left alone."""
    try:
        open_cache(out / name)
    except (TeacherCacheError, FileNotFoundError):
        capture_run(
            CaptureConfig(
                corpus=str(out / text),
                out=out / name,
                sample_by="paragraph",
                max_length=sizes.length,
                device="cpu",
                **options,
            )
        )


def check_same_rows(caches: list[Cache]) -> None:
    """The batches of two caches are the same only where rows and blocks are."""
    first = caches[0]
    for other in caches[1:]:
        for field in ("row_tokens", "block_rows"):
            if not np.array_equal(getattr(first, field), getattr(other, field)):
                raise ValueError(f"{first.path} and {other.path} differ in {field}")


# ---- the teacher on held-out text


def held_out_batches(out: Path) -> list[Batch]:
    """The held-out rows in their order."""
    cache = open_cache(out / "labels-held-out")
    spec = OrderSpec(batch_tokens=HELD_OUT_TOKENS, shuffle=False, epochs=1)
    order = Order(cache.block_rows, cache.row_tokens, spec)
    stream = BatchStream(cache, order, StreamSpec(), max_steps=order.steps_for_epochs(1))
    return list(stream)


def logits_of(model: Any, batch: Batch, classes: int) -> Tensor:
    """A model's logits at the positions of a batch, [N, C]."""
    output = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    return output.logits.flatten(0, 1).index_select(0, batch["position_index"])[:, :classes]


def write_held_out(out: Path) -> None:
    """The teacher's log-probabilities at every held-out position, float32 [positions, C]."""
    teacher = load_teacher(out)
    with torch.no_grad():
        logprobs = [
            logits_of(teacher, batch, teacher.config.vocab_size).log_softmax(dim=-1).numpy()
            for batch in held_out_batches(out)
        ]
    temporary = out / "held-out.part"
    with temporary.open("wb") as file:
        np.save(file, np.concatenate(logprobs))
    temporary.replace(out / "held-out.npy")


@lru_cache(maxsize=1)
def load_teacher(out: Path) -> Any:
    """The live teacher."""
    teacher = student_of(out, "teacher", 0).eval()
    return teacher.requires_grad_(False)


@lru_cache(maxsize=1)
def held_out(out: Path) -> tuple[list[Batch], np.ndarray]:
    """Batches and the teacher's log-probabilities, mapped into memory."""
    return held_out_batches(out), np.load(out / "held-out.npy", mmap_mode="c")


# ---- one student


def train(out: Path, sizes: Sizes, name: str, seed: int) -> dict[str, Any]:
    """Trains the student of one arm and one seed, and measures it."""
    torch.set_num_threads(1)
    student = initial_student(out, sizes, seed)
    began = time.perf_counter()
    losses = list(steps(out, sizes, ARMS[name], seed, student))
    seconds = time.perf_counter() - began
    result = {"arm": name, "seed": seed, "seconds": round(seconds, 1), "train_loss": losses[-1]}
    return result | evaluate(out, student, sizes)


def student_of(out: Path, name: str, seed: int) -> Any:
    """A model of one of the folders of this run, which all have its tokenizer."""
    return build_student(str(out / name), open_cache(out / "labels-teacher"), seed=seed)


def initial_student(out: Path, sizes: Sizes, seed: int) -> Any:
    """Fresh weights, or those after `pretrain`."""
    if not sizes.pretrain_steps:
        return student_of(out, "student-config", seed)
    return student_of(out, f"pretrained-{seed}", seed)


def pretrain(out: Path, sizes: Sizes, seed: int) -> None:
    """A student of plain cross-entropy on the teacher's text, which no arm sees."""
    torch.set_num_threads(1)
    folder = out / f"pretrained-{seed}"
    if folder.exists():
        return
    student = student_of(out, "student-config", seed)
    plan = (sizes.pretrain_steps, sizes.learning_rate)
    for _ in optimise(student, text_stream(out / "labels-teacher", sizes, seed, plan[0]), *plan):
        pass
    temporary = out / f"pretrained-{seed}.part"
    student.save_pretrained(temporary)
    temporary.rename(folder)


def text_stream(cache_path: Path, sizes: Sizes, seed: int, max_steps: int) -> BatchStream:
    cache = open_cache(cache_path)
    spec = OrderSpec(batch_tokens=sizes.batch_tokens, seed=seed)
    order = Order(cache.block_rows, cache.row_tokens, spec)
    return BatchStream(cache, order, StreamSpec(targets=False, threads=1), max_steps=max_steps)


def optimise(
    student: Any, batches: BatchStream, max_steps: int, learning_rate: float
) -> Iterator[float]:
    """Plain cross-entropy; yields the loss of each step."""
    objective = Objective(
        spec=LossSpec(),
        num_classes=batches.cache.manifest.targets.num_classes,
        target_kind="none",
        soft_weight=0.0,
        hard_weight=1.0,
    )
    attachment = attach(student, objective)
    step = Stepper(student, max_steps, learning_rate)
    for batch in batches:
        yield step(student(**batch)["loss"])
    attachment.detach()


def steps(out: Path, sizes: Sizes, arm: Arm, seed: int, student: Any) -> Iterator[float]:
    """One loss for each optimiser step."""
    rate = sizes.tuning_rate if sizes.pretrain_steps else sizes.learning_rate
    if arm.source == "text":
        stream = text_stream(out / arm.cache, sizes, seed, sizes.steps)
        yield from optimise(student, stream, sizes.steps, rate)
        return
    cache = open_cache(out / arm.cache)
    spec = OrderSpec(batch_tokens=sizes.batch_tokens, seed=seed)
    stream = BatchStream(
        cache,
        Order(cache.block_rows, cache.row_tokens, spec),
        StreamSpec(targets=arm.source == "cache", threads=1, temperature=arm.temperature),
        max_steps=sizes.steps,
    )
    step = Stepper(student, sizes.steps, rate)
    if arm.source == "full":
        teacher = load_teacher(out)
        for batch in stream:
            yield step(full_loss(student, teacher, batch, arm, sizes.classes))
        return
    attachment = attach(student, objective_of(arm, cache))
    draws = Draws(out, sizes, seed) if arm.source == "rskd" else None
    for batch in stream:
        batch = batch if draws is None else draws.added_to(batch)
        yield step(student(**batch)["loss"])
    attachment.detach()


def objective_of(arm: Arm, cache: Cache) -> Objective:
    return Objective(
        spec=LossSpec(tail=arm.tail, temperature=arm.temperature),
        num_classes=cache.manifest.targets.num_classes,
        target_kind="sample" if arm.source == "rskd" else cache.manifest.targets.kind,
        soft_weight=arm.soft,
        hard_weight=arm.hard,
    )


class Stepper:
    """AdamW under a cosine with a warm-up of 5 %, gradients clipped to 1: the same for all arms."""

    def __init__(self, student: nn.Module, max_steps: int, learning_rate: float) -> None:
        self.parameters = list(student.parameters())
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        warm_up = max(1, max_steps // 20)

        def factor(number: int) -> float:
            if number < warm_up:
                return (number + 1) / warm_up
            return 0.5 + 0.5 * math.cos(math.pi * (number - warm_up) / (max_steps - warm_up))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, factor)

    def __call__(self, loss: Tensor) -> float:
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.schedule.step()
        return loss.item()


# ---- what the product has not: the teacher in the loop


def full_loss(student: Any, teacher: Any, batch: Batch, arm: Arm, classes: int) -> Tensor:
    """KL(teacher || student) over every class, from both models' own logits, times T^2."""
    T, count = arm.temperature, batch["num_positions"]
    with torch.no_grad():
        teacher_NC = (logits_of(teacher, batch, classes) / T).log_softmax(dim=-1)
    logits_NC = logits_of(student, batch, classes)
    kl = nn.functional.kl_div(
        (logits_NC / T).log_softmax(dim=-1), teacher_NC, reduction="sum", log_target=True
    )
    loss = arm.soft * T * T * kl / count
    if arm.hard:
        hard = nn.functional.cross_entropy(logits_NC, batch["labels"], reduction="sum")
        loss = loss + arm.hard * hard / count
    return loss


class Draws:
    """RS-KD as published: S draws with replacement from the live teacher, each of weight 1 / S.

    The loss adds up draws of one class, which makes its weight count / S.
    """

    def __init__(self, out: Path, sizes: Sizes, seed: int) -> None:
        self.teacher, self.classes = load_teacher(out), sizes.classes
        self.generator = torch.Generator().manual_seed(seed)
        probs_NC = torch.from_numpy(
            np.exp(held_out(out)[1][:: max(1, len(held_out(out)[1]) // 2000)])
        )
        self.draws = draws_for(probs_NC, 12.0)

    def added_to(self, batch: Batch) -> Batch:
        """The batch with fresh draws as its targets."""
        with torch.no_grad():
            logprobs_NC = logits_of(self.teacher, batch, self.classes).log_softmax(dim=-1)
            probs_NC = logprobs_NC.exp()
            ids_NS = torch.multinomial(
                probs_NC, self.draws, replacement=True, generator=self.generator
            )
        N = len(ids_NS)
        return batch | {
            "target_ids": ids_NS,
            "target_logprobs": torch.full(ids_NS.shape, -math.log(self.draws)),
            "target_log_tail": torch.full((N,), -math.inf),
            "entropy": -(probs_NC * logprobs_NC).sum(dim=-1),
        }


def unique_ids(probs_NC: Tensor, draws: int) -> float:
    """Expected number of different classes among draws with replacement, mean over positions."""
    return float((1 - (1 - probs_NC.double()) ** draws).sum(dim=-1).mean())


def draws_for(probs_NC: Tensor, entries: float) -> int:
    """How many draws give that many different classes on average, or the next fewer."""
    low, high = 1, 2
    while unique_ids(probs_NC, high) < entries and high < 1 << 16:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if unique_ids(probs_NC, middle) <= entries else (low, middle)
    return low


# ---- measuring


def evaluate(out: Path, model: Any, sizes: Sizes) -> dict[str, float]:
    """Against text and live teacher on the held-out positions, every class, float32, T = 1.

    loss: cross-entropy on the text. kl: KL(teacher || model). agreement: equal most probable class.
    ece: expected calibration error of the most probable class, 15 bins of equal width.
    """
    batches, teacher_PC = held_out(out)
    first, sums = 0, np.zeros(3)
    bins = np.zeros((3, BINS))  # positions, sum of confidence, sum of correct
    model.eval()
    with torch.no_grad():
        for batch in batches:
            logq_NC = logits_of(model, batch, sizes.classes).log_softmax(dim=-1)
            logp_NC = torch.from_numpy(teacher_PC[first : first + len(logq_NC)])
            first += len(logq_NC)
            top_N, class_N = logq_NC.max(dim=-1)
            label_N = batch["labels"]
            loss = -logq_NC.gather(1, label_N[:, None]).sum()
            kl = (logp_NC.exp() * (logp_NC - logq_NC)).sum()
            agree = (class_N == logp_NC.argmax(dim=-1)).sum()
            sums += [float(loss), float(kl), float(agree)]
            confidence_N = top_N.exp().numpy()
            bin_N = np.minimum((confidence_N * BINS).astype(int), BINS - 1)
            correct_N = (class_N == label_N).numpy()
            for row, weight_N in enumerate((np.ones_like(confidence_N), confidence_N, correct_N)):
                bins[row] += np.bincount(bin_N, weight_N, BINS)
    loss, kl, agreement = sums / first
    ece = float(np.abs(bins[1] - bins[2]).sum() / first)
    return {"loss": loss, "kl": kl, "agreement": agreement, "ece": ece, "positions": first}


def bytes_per_token(out: Path, name: str) -> float | None:
    """Target columns of the arm's cache for each token; RS-KD as it was published."""
    arm = ARMS[name]
    if arm.source == "rskd":
        return 12.0 * PUBLISHED_BYTES
    if arm.source != "cache":
        return None
    cache = open_cache(out / arm.cache)
    sizes = summary(cache)
    return sizes["target_bytes_per_position"] * sizes["positions"] / sizes["tokens"]


def seconds_per_step(
    out: Path, sizes: Sizes, names: list[str], rounds: int = 6, each: int = 2
) -> dict[str, float]:
    """Median over rounds in which every arm in turn takes a few steps; one thread."""
    torch.set_num_threads(1)
    sizes = replace(sizes, steps=1 + rounds * each)
    running = {
        name: steps(out, sizes, ARMS[name], 0, student_of(out, "student-config", 0))
        for name in names
    }
    for loop in running.values():
        next(loop)
    measured: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, loop in running.items():
            began = time.perf_counter()
            for _ in range(each):
                next(loop)
            measured[name].append((time.perf_counter() - began) / each)
    for loop in running.values():
        loop.close()
    return {name: float(np.median(seconds)) for name, seconds in measured.items()}


def same_settings(out: Path, sizes: Sizes, corpus: list[Path]) -> None:
    """Refuses to add results of other sizes or another corpus to a folder."""
    here = {"sizes": asdict(sizes), "corpus": sorted(path.name for path in corpus)}
    for name in ("pretrain_steps", "tuning_rate"):  # in the name of the results' file
        del here["sizes"][name]
    file = out / "settings.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(here))
    there = json.loads(file.read_text())
    if there != here:
        raise SystemExit(
            f"{out} holds results of other settings: {there}, now {here}. Name another --out."
        )
