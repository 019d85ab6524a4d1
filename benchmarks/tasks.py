"""Distillation on every task: teacher, student on hard labels, student from the cache.

    python benchmarks/tasks.py --data DATA --out DIR [--sets NAME...] [--seeds 3] [--processes 2]

DATA holds a folder for each data set (`classify_en_banking77`, ...) with train.jsonl and
validation.jsonl. A tenth of the training rows is held back: teachers and students are stopped by
it, and nothing but the last evaluation sees the validation split. For each set a teacher is trained
on the spot, with the tool itself: a cache of hard labels and the hard loss. It runs once over all
splits. Then students of one size and seed learn for the same number of steps from the hard labels
alone and from the cache; and from it and that of text without labels, where a set has any. Each
result is kept in DIR: run again to go on. Prints one JSON line, and a table to stderr.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # two trainings of one thread beat one of two; children inherit
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import multiprocessing
import platform
import random
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
import transformers
from codec import processor

from shared.cache import open_cache
from shared.errors import TeacherCacheError
from shared.tasks import TaskName
from student_train.config import EvaluateConfig, TrainConfig
from student_train.evaluate.evaluate import run as evaluate_run
from student_train.run.run import run as train_run
from teacher_cache.config import CaptureConfig
from teacher_cache.job.run import run as capture_run

LOWER_IS_BETTER = ("loss",)
ARMS = ("hard", "distilled", "more-text")
SPLITS = ("train", "stopping", "validation")
STOPPING_SHARE = 10  # one of so many training rows is of the split that stops a training


@dataclass(frozen=True, slots=True)
class Size:
    """Of a model from scratch; heads have 32 channels."""

    width: int
    layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A data set, and how its teacher and its students are trained."""

    task: TaskName
    source: str | None = None  # folder of the data, where it is not the name of the set
    teacher_of: str | None = None  # the set whose teacher this is, where it has none of its own
    unlabelled: str | None = (
        None  # a set whose texts the teacher labels too, for the distilled ones
    )
    tokenizer: str  # a folder of DATA/tokenizers, or own:N, a byte-level BPE of the training text
    fields: tuple[str, ...] = ()  # whose text an own tokenizer is trained on
    options: dict[str, Any] = field(default_factory=dict)  # of the captures
    teacher: Size = Size(192, 3)
    student: Size = Size(64, 2)
    teacher_steps: int = 800
    teacher_rate: float = 1e-3
    steps: int = 800
    rate: float = 2e-3
    batch_tokens: int = 1024
    dropout: float = 0.1
    stop_by: Literal["loss", "metric"] = "metric"
    distil: dict[str, Any] = field(default_factory=dict)  # of the training from the cache
    evaluation: dict[str, Any] = field(default_factory=dict)  # of `train-student evaluate`


CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

LABELS = {"temperature": 2.0, "hard_weight": 0.5}
WRITING = {"generate": True, "generate_rows": 200, "max_new_tokens": 40}
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
        unlabelled="classify_en_clinc150",
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
        options={"max_length": 512, "mean_entries": 16.0},
        dropout=0.0,
        stop_by="loss",
    ),
    "instruct_en_gsm8k": Recipe(
        task="causal-lm",
        tokenizer="own:4096",
        fields=("question", "answer"),
        options={"max_length": 256, "mean_entries": 16.0},
        dropout=0.0,
        stop_by="loss",
    ),
    "qa_zh_cmrc2018": Recipe(
        task="question-answering",
        tokenizer="bert_base_chinese",
        options={"max_length": 256, "stride": 64},
        teacher_steps=300,
        steps=200,
        batch_tokens=4096,
        distil=LABELS,
    ),
    "translate_en_zh_tatoeba": Recipe(
        task="seq2seq-lm",
        tokenizer="own:6144",
        fields=("en", "zh"),
        options={
            "max_length": 64,
            "max_target_length": 64,
            "mean_entries": 16.0,
            "columns": ("source=en", "target=zh"),
        },
        teacher_rate=2e-3,
        rate=4e-3,
        stop_by="loss",
        evaluation=WRITING,
    ),
    "summarise_en_scitldr": Recipe(
        task="seq2seq-lm",
        tokenizer="own:4096",
        fields=("document",),
        options={"max_length": 192, "max_target_length": 48, "mean_entries": 16.0},
        teacher_steps=200,
        teacher_rate=2e-3,
        steps=160,
        rate=4e-3,
        batch_tokens=4096,
        stop_by="loss",
        evaluation=WRITING,
    ),
    "embed_en_banking77": Recipe(
        task="feature-extraction",
        source="classify_en_banking77",
        teacher_of="classify_en_banking77",
        tokenizer="bert_base_uncased",
        options={"max_length": 64, "columns": ("text=text",)},
        distil={"hidden_loss": "mse"},
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
        borrowing = [name for name in names if RECIPES[name].teacher_of is not None]
        owning = [name for name in names if name not in borrowing]
        for some in (owning, borrowing):
            for future in as_completed([pool.submit(prepare, data, out, name) for name in some]):
                print(f"teacher of {future.result()} is there", file=sys.stderr, flush=True)
        jobs = [
            pool.submit(train_student, out, name, arm, seed)
            for name in names
            for seed in range(seeds)
            for arm in arms_of(name)
        ]
        for future in as_completed(jobs):
            print(future.result(), file=sys.stderr, flush=True)


# ---- the teacher, once for each set


def prepare(data: Path, out: Path, name: str) -> str:
    """Tokenizer, configs, teacher and caches of one set; what is there already is kept."""
    torch.set_num_threads(1)
    recipe, folder = RECIPES[name], out / name
    folder.mkdir(exist_ok=True)
    source = split_of(data / (recipe.source or name), folder / "data")
    tokenizer = tokenizer_of(recipe, data, source, folder)
    for role, size in (("teacher", recipe.teacher), ("student", recipe.student)):
        make_config(folder / f"{role}-config", recipe, size, tokenizer)
    if recipe.teacher_of is None:
        make_teacher(recipe, source, folder, tokenizer)
    teacher = out / (recipe.teacher_of or name) / "teacher"
    for split in SPLITS:
        capture(source, folder / f"cache-{split}", split, recipe, {"teacher": str(teacher)})
    if recipe.unlabelled is not None:
        options = {"teacher": str(teacher), "unlabelled": True}
        capture(data / recipe.unlabelled, folder / "cache-unlabelled", "train", recipe, options)
    if recipe.task != "feature-extraction":  # whose teacher is what all else is compared with
        (folder / "teacher.json").write_text(json.dumps(evaluate(teacher, folder, recipe)))
    return name


def split_of(source: Path, folder: Path) -> Path:
    """The data with one of STOPPING_SHARE training rows, drawn once, in a split of their own."""
    if folder.exists():
        return folder
    rows = [row for row in (source / "train.jsonl").read_text(encoding="utf-8").split("\n") if row]
    random.Random(0).shuffle(rows)
    held_back = len(rows) // STOPPING_SHARE
    temporary = folder.with_suffix(".part")
    temporary.mkdir(exist_ok=True)
    for name, some in (("stopping", rows[:held_back]), ("train", rows[held_back:])):
        (temporary / f"{name}.jsonl").write_text("\n".join(some) + "\n", encoding="utf-8")
    for known in ("validation.jsonl", "labels.json"):
        if (source / known).exists():
            shutil.copy(source / known, temporary / known)
    temporary.rename(folder)
    return folder


def make_teacher(recipe: Recipe, source: Path, folder: Path, tokenizer: Path) -> None:
    """Hard labels of the training rows, and a model trained on them."""
    for split in ("train", "stopping"):
        plain = {"targets": "none", "tokenizer": str(tokenizer)}
        capture(source, folder / f"labels-{split}", split, recipe, plain)
    train_run(
        TrainConfig(
            student=str(folder / "teacher-config"),
            cache=(folder / "labels-train",),
            validation_cache=folder / "labels-stopping",
            out=folder / "teacher",
            soft_weight=0.0,
            hard_weight=1.0,
            max_steps=recipe.teacher_steps,
            learning_rate=recipe.teacher_rate,
            batch_tokens=recipe.batch_tokens,
            weight_decay=0.01,
            **stopping(recipe, recipe.teacher_steps, patience=3),
        )
    )


def stopping(recipe: Recipe, steps: int, patience: int) -> dict[str, Any]:
    """Eight looks at the held-back rows; the model of the best one is what is saved."""
    return {
        "eval_every": steps // 8,
        "save_every": steps // 8,
        "early_stopping_patience": patience,
        "early_stopping_metric": recipe.stop_by,
    }


def arms_of(name: str) -> tuple[str, ...]:
    """Vectors have no hard labels, and few sets have text without any."""
    recipe = RECIPES[name]
    if recipe.task == "feature-extraction":
        return ("distilled",)
    return ARMS if recipe.unlabelled is not None else ARMS[:2]


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
    lines = (source / "train.jsonl").read_text(encoding="utf-8").split("\n")
    for line in filter(None, lines):  # not splitlines: a text may hold other line separators
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
    """A model of the task's kind, from scratch.

    Those that learn in minutes: a BERT or Marian of this size sits on a plateau for hundreds of
    steps whose end is a matter of the seed.
    """
    from transformers import AutoTokenizer, LlamaConfig, ModernBertConfig, T5Config

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    ids = max(loaded.get_vocab().values()) + 1
    common = {"vocab_size": ids, "pad_token_id": loaded.pad_token_id, "bos_token_id": None}
    shape = {
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // 32,
        "max_position_embeddings": 512,
    }
    config: Any
    if recipe.task == "seq2seq-lm":
        config = T5Config(
            **common,
            d_model=size.width,
            d_kv=32,
            d_ff=3 * size.width,
            num_layers=size.layers,
            num_heads=size.width // 32,
            feed_forward_proj="gated-gelu",
            dropout_rate=recipe.dropout,
            eos_token_id=loaded.eos_token_id,
            decoder_start_token_id=loaded.pad_token_id,
        )
    elif recipe.task == "causal-lm":
        config = LlamaConfig(
            **common,
            **shape,
            num_key_value_heads=size.width // 32,
            intermediate_size=3 * size.width,
            tie_word_embeddings=True,
            eos_token_id=loaded.eos_token_id,
        )
    else:
        config = ModernBertConfig(
            **common,
            **shape,
            intermediate_size=2 * size.width,
            eos_token_id=None,
            cls_token_id=loaded.cls_token_id,
            sep_token_id=loaded.sep_token_id,
            embedding_dropout=recipe.dropout,
            mlp_dropout=recipe.dropout,
            classifier_dropout=recipe.dropout,
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
                cache=caches_of(folder, arm),
                validation_cache=folder / "cache-stopping",
                out=run,
                max_steps=recipe.steps,
                learning_rate=recipe.rate,
                batch_tokens=recipe.batch_tokens,
                seed=seed,
                **stopping(recipe, recipe.steps, patience=8),
                **weights,
            )
        )
        seconds = round(time.perf_counter() - began, 1)
        numbers = evaluate(run, folder, recipe)
        file.write_text(json.dumps({"seconds": seconds, **numbers}))
    result = json.loads(file.read_text())
    return f"{name} {arm} {seed}: {metric_of(result)} {result[metric_of(result)]:.4f}"


def caches_of(folder: Path, arm: str) -> tuple[Path, ...]:
    more = (folder / "cache-unlabelled",) if arm == "more-text" else ()
    return (folder / "cache-train", *more)


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
        for arm in arms_of(name)
    }
    if not all(results.values()):
        return None  # there is an arm without any result
    first = results["distilled"][0]
    metric = metric_of(first)
    file = folder / "teacher.json"
    teacher = json.loads(file.read_text())[metric] if file.exists() else None
    cache = open_cache(folder / "cache-train")
    size = sum(commit.num_bytes for commit in cache.commits)
    line = {
        "set": name,
        "task": cache.manifest.task,
        "metric": metric,
        "positions": first["positions"],
        "teacher": teacher,
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
    header = ("set", "metric", "teacher", *ARMS, "gain", "B/token")
    rows = [header]
    for line in lines:
        hard, distilled = line.get("hard"), line["distilled"]
        sign = -1 if line["metric"] in LOWER_IS_BETTER else 1
        rows.append(
            (
                line["set"],
                line["metric"],
                "" if line["teacher"] is None else f"{line['teacher']:.4f}",
                *(spread(line[arm]) if arm in line else "" for arm in ARMS),
                "" if hard is None else f"{sign * (distilled['mean'] - hard['mean']):+.4f}",
                f"{line['bytes_per_token']}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def spread(values: dict[str, float]) -> str:
    return f"{values['mean']:.4f} ±{values['deviation']:.4f}"


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
