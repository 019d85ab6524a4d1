"""Distillation on every task: teacher, student on hard labels, student from the cache.

    python benchmarks/tasks.py --data DATA --out DIR [--sets NAME...] [--seeds 3] [--processes 2]

DATA holds a folder for each data set (`classify_en_banking77`, ...) with train.jsonl and
validation.jsonl. For each set a teacher is trained on the spot, with the tool itself: a cache of
hard labels and the hard loss. It runs once over both splits. Then students of one size, the same
seeds and batches, learn from the hard labels alone and from the cache. Each result is kept in DIR:
run again to go on. Prints one JSON line, and a table to stderr.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # two trainings of one thread beat one of two; children inherit
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import multiprocessing
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import transformers
from codec import processor

from shared.cache import open_cache
from shared.errors import TeacherCacheError
from shared.tasks import TaskName
from student_train.config import EvaluateConfig, TrainConfig
from student_train.evaluate import run as evaluate_run
from student_train.trainer import run as train_run
from teacher_cache.config import CaptureConfig
from teacher_cache.job import run as capture_run

LOWER_IS_BETTER = ("loss",)
ARMS = ("hard", "distilled")


@dataclass(frozen=True, slots=True)
class Size:
    """Of a model from scratch; heads have 32 channels."""

    width: int
    layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A data set, and how its teacher and its students are trained."""

    task: TaskName
    tokenizer: str  # a folder of DATA/tokenizers, or own:N, a byte-level BPE of the training text
    fields: tuple[str, ...] = ()  # whose text an own tokenizer is trained on
    options: dict[str, Any] = field(default_factory=dict)  # of the captures
    teacher: Size = Size(192, 3)
    student: Size = Size(64, 2)
    teacher_steps: int = 800
    teacher_rate: float = 7e-4
    steps: int = 600
    rate: float = 2e-3
    batch_tokens: int = 1024
    dropout: float = 0.1
    distil: dict[str, Any] = field(default_factory=dict)  # of the training from the cache
    evaluation: dict[str, Any] = field(default_factory=dict)  # of `train-student evaluate`


CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

LABELS = {"temperature": 2.0, "hard_weight": 0.5}
RECIPES: dict[str, Recipe] = {
    "ner_en_wnut17": Recipe(
        task="token-classification",
        tokenizer="bert_base_uncased",
        options={"max_length": 96},
        distil=LABELS,
    ),
    "ner_zh_uner_gsdsimp": Recipe(
        task="token-classification",
        tokenizer="bert_base_chinese",
        options={"max_length": 128},
        distil=LABELS,
    ),
    "classify_en_banking77": Recipe(
        task="sequence-classification",
        tokenizer="bert_base_uncased",
        options={"max_length": 64},
        distil=LABELS,
    ),
    "classify_en_sentence_polarity": Recipe(
        task="sequence-classification",
        tokenizer="bert_base_uncased",
        options={"max_length": 64},
        distil=LABELS,
    ),
    "dialogue_zh_crosswoz": Recipe(
        task="causal-lm",
        tokenizer="own:4096",
        fields=("messages",),
        options={"max_length": 512, "mean_entries": 12.0},
        dropout=0.0,
    ),
    "instruct_en_gsm8k": Recipe(
        task="causal-lm",
        tokenizer="own:4096",
        fields=("question", "answer"),
        options={"max_length": 256, "mean_entries": 12.0},
        dropout=0.0,
    ),
}


def main() -> None:
    """Runs what is missing and prints what there is."""
    args = parser().parse_args()
    names = args.sets or list(RECIPES)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report_only:
        run_missing(args.data, args.out, names, args.seeds, args.processes)
    lines = [line for name in names if (line := summary(args.out, name)) is not None]
    print(table(lines), file=sys.stderr)
    print(json.dumps({"benchmark": "tasks", **environment(), "sets": lines}))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, help="folder of the data sets", required=True)
    options.add_argument("--out", type=Path, help="folder of everything made", required=True)
    options.add_argument("--sets", nargs="+", choices=list(RECIPES), help="default: all")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--report-only", action="store_true", help="train nothing")
    return options


def run_missing(data: Path, out: Path, names: list[str], seeds: int, processes: int) -> None:
    """Teachers first, each a job of its own; then every (set, arm, seed) without a result."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for future in as_completed([pool.submit(prepare, data, out, name) for name in names]):
            print(f"teacher of {future.result()} is there", file=sys.stderr, flush=True)
        jobs = [
            pool.submit(train_student, out, name, arm, seed)
            for name in names
            for seed in range(seeds)
            for arm in ARMS
        ]
        for future in as_completed(jobs):
            print(future.result(), file=sys.stderr, flush=True)


# ---- the teacher, once for each set


def prepare(data: Path, out: Path, name: str) -> str:
    """Tokenizer, configs, teacher and caches of one set; what is there already is kept."""
    torch.set_num_threads(1)
    recipe, folder, source = RECIPES[name], out / name, data / name
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizer_of(recipe, data, source, folder)
    for role, size in (("teacher", recipe.teacher), ("student", recipe.student)):
        make_config(folder / f"{role}-config", recipe, size, tokenizer)
    for split in ("train", "validation"):
        plain = {"targets": "none", "tokenizer": str(tokenizer)}
        capture(source, folder / f"labels-{split}", split, recipe, plain)
    train_run(
        TrainConfig(
            student=str(folder / "teacher-config"),
            cache=(folder / "labels-train",),
            validation_cache=folder / "labels-validation",
            out=folder / "teacher",
            soft_weight=0.0,
            hard_weight=1.0,
            max_steps=recipe.teacher_steps,
            learning_rate=recipe.teacher_rate,
            batch_tokens=recipe.batch_tokens,
            eval_every=100,
            save_every=100,
            weight_decay=0.01,
        )
    )
    for split in ("train", "validation"):
        teacher = {"teacher": str(folder / "teacher")}
        capture(source, folder / f"cache-{split}", split, recipe, teacher)
    return name


def capture(source: Path, out: Path, split: str, recipe: Recipe, options: dict[str, Any]) -> None:
    """`cache-teacher run`; a cache that is complete is left alone."""
    try:
        open_cache(out)
    except (TeacherCacheError, FileNotFoundError):
        labels = source / "labels.json"
        if recipe.task.endswith("classification") and labels.exists() and "teacher" not in options:
            options = options | {"labels": labels}
        capture_run(
            CaptureConfig(
                corpus=str(source),
                split=split,
                task=recipe.task,
                out=out,
                device="cpu",
                **only_read(recipe.options, options),
                **options,
            )
        )


def only_read(options: dict[str, Any], mode: dict[str, Any]) -> dict[str, Any]:
    """Without what a cache of hard labels does not read."""
    unread = ("mean_entries",) if mode.get("targets") == "none" else ()
    return {name: value for name, value in options.items() if name not in unread}


def tokenizer_of(recipe: Recipe, data: Path, source: Path, folder: Path) -> Path:
    """A known tokenizer, or one of the training text."""
    kind, _, size = recipe.tokenizer.partition(":")
    if kind != "own":
        return data / "tokenizers" / kind
    if not (folder / "tokenizer").exists():
        make_tokenizer(folder / "tokenizer", texts(source, recipe.fields), int(size))
    return folder / "tokenizer"


def texts(source: Path, fields: tuple[str, ...]) -> list[str]:
    """Everything written in these fields of the training split."""
    found = []
    for line in (source / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name in fields:
            values = row[name] if isinstance(row[name], list) else [row[name]]
            found += [v["content"] if isinstance(v, dict) else v for v in values]
    return found


def make_tokenizer(folder: Path, lines: list[str], classes: int) -> None:
    """A byte-level BPE with marks for the turns of a chat."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=classes,
        special_tokens=["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def make_config(folder: Path, recipe: Recipe, size: Size, tokenizer: Path) -> None:
    """A model of the task's kind, from scratch."""
    from transformers import AutoTokenizer, BertConfig, LlamaConfig

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    ids = max(loaded.get_vocab().values()) + 1
    shape = {
        "vocab_size": ids,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // 32,
        "max_position_embeddings": 512,
        "pad_token_id": loaded.pad_token_id,
    }
    config: Any
    if recipe.task == "causal-lm":
        config = LlamaConfig(
            **shape,
            num_key_value_heads=size.width // 32,
            intermediate_size=3 * size.width,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=loaded.eos_token_id,
        )
    else:
        config = BertConfig(
            **shape,
            intermediate_size=4 * size.width,
            hidden_dropout_prob=recipe.dropout,
            attention_probs_dropout_prob=recipe.dropout,
        )
    config.save_pretrained(folder)


# ---- the students


def train_student(out: Path, name: str, arm: str, seed: int) -> str:
    """One student, and its result; one that is there already is kept."""
    torch.set_num_threads(1)
    recipe, folder = RECIPES[name], out / name
    run, file = folder / f"{arm}-{seed}", folder / f"{arm}-{seed}.json"
    if not file.exists():
        began = time.perf_counter()
        weights = {"soft_weight": 0.0, "hard_weight": 1.0} if arm == "hard" else recipe.distil
        train_run(
            TrainConfig(
                student=str(folder / "student-config"),
                cache=(folder / "cache-train",),
                validation_cache=folder / "cache-validation",
                out=run,
                max_steps=recipe.steps,
                learning_rate=recipe.rate,
                batch_tokens=recipe.batch_tokens,
                seed=seed,
                **weights,
            )
        )
        seconds = round(time.perf_counter() - began, 1)
        numbers = evaluate(run, folder, recipe)
        file.write_text(json.dumps({"seconds": seconds, **numbers}))
    result = json.loads(file.read_text())
    return f"{name} {arm} {seed}: {metric_of(result)} {result[metric_of(result)]:.4f}"


def evaluate(run: Path, folder: Path, recipe: Recipe) -> dict[str, Any]:
    cache = folder / "cache-validation"
    return evaluate_run(EvaluateConfig(student=str(run), cache=cache, **recipe.evaluation))


def metric_of(result: dict[str, Any]) -> str:
    return result.get("metric", "loss")


# ---- the table


def summary(out: Path, name: str) -> dict[str, Any] | None:
    """Teacher, and each arm over its seeds; None where nothing is there."""
    folder = out / name
    results = {
        arm: [json.loads(p.read_text()) for p in sorted(folder.glob(f"{arm}-*.json"))]
        for arm in ARMS
    }
    if not all(results.values()):
        return None
    first = results["distilled"][0]
    metric = metric_of(first)
    cache = open_cache(folder / "cache-train")
    size = sum(commit.num_bytes for commit in cache.commits)
    line = {
        "set": name,
        "task": cache.manifest.task,
        "metric": metric,
        "positions": first["positions"],
        "teacher": first[f"teacher_{metric}"],
        "teacher_parameters": cache.manifest.teacher.parameters,  # type: ignore[union-attr]
        "student_parameters": first["parameters"],
        "targets": cache.manifest.targets.text,
        "bytes_per_token": round(size / max(1, int(cache.row_tokens.sum())), 1),
    }
    for arm, some in results.items():
        values = [result[metric] for result in some]
        line[arm] = {
            "mean": fmean(values),
            "deviation": stdev(values) if len(values) > 1 else 0.0,
            "seeds": len(values),
            "seconds": fmean(result["seconds"] for result in some),
        }
    return line


def table(lines: list[dict[str, Any]]) -> str:
    """One row for each set."""
    header = ("set", "metric", "teacher", "hard labels", "distilled", "gain", "B/token")
    rows = [header]
    for line in lines:
        hard, distilled = line["hard"], line["distilled"]
        gain = distilled["mean"] - hard["mean"]
        if line["metric"] in LOWER_IS_BETTER:
            gain = -gain
        rows.append(
            (
                line["set"],
                line["metric"],
                f"{line['teacher']:.4f}",
                f"{hard['mean']:.4f} ±{hard['deviation']:.4f}",
                f"{distilled['mean']:.4f} ±{distilled['deviation']:.4f}",
                f"{gain:+.4f}",
                f"{line['bytes_per_token']}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def environment() -> dict[str, Any]:
    """What a number means nothing without."""
    return {
        "command": " ".join(sys.argv),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
