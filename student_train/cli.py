"""`train-student`: the commands of stage two. Nothing heavy is imported before it is needed."""

import json
import logging
import os
import sys
from typing import Any

import typer

from shared.options import command
from shared.options import main as run_app
from shared.signals import stop_until_exit
from student_train.config import (
    CompareConfig,
    EvaluateConfig,
    ExportConfig,
    StatusConfig,
    TrainConfig,
)

_TEXT_SHOWN = 160  # characters of a row

app = typer.Typer(
    name="train-student",
    help="Train students from a cache; the teacher is never loaded.",
    no_args_is_help=True,
    add_completion=False,
)


@command(app, "run", TrainConfig)
def run_command(config: TrainConfig) -> None:
    """Trains one student from a cache. Run again to resume.

    SIGTERM and SIGUSR1 save the state and end it with exit code 75: run it again. Under a launcher
    that has exit codes of its own, train-student status asks the folder.

    A run names a student, a cache and a folder. What else matters most: --validation-cache (what it
    is measured on), --hard-weight (how much labels count beside the teacher), --lora-rank (adapters
    in place of all weights). Learning rate, epochs and batch follow from the task unless given:

        train-student run --student Qwen/Qwen3-0.6B --cache cache --out distilled
    """
    stop = stop_until_exit()  # the next import takes seconds
    from student_train.run.run import run_stoppable

    result = run_stoppable(config, stop)
    if "validation" in result:
        typer.echo(_evaluation_text(result["validation"]))
    typer.echo(f"saved in {config.out}", err=True)


@command(app, "status", StatusConfig)
def status_command(config: StatusConfig) -> None:
    """Says how a run ended: finished (exit code 0), stopped, run again (75), or failed (1).

    Ask it when the run has ended: torchrun ends with 1 for any code of its processes. A run that
    was killed leaves no word, as one still at work: stopped, run again. Exit code 2: no run was
    started in this folder.
    """
    from student_train.run.outcome import status

    found = status(config.run)
    typer.echo(json.dumps(found.as_json()) if config.json else found.text)
    raise typer.Exit(found.exit_code)


@command(app, "evaluate", EvaluateConfig)
def evaluate_command(config: EvaluateConfig) -> None:
    """Evaluates a student on a held-out cache: loss, KL, agreement, the metrics of its task."""
    from student_train.evaluate.evaluate import run

    numbers = run(config)
    typer.echo(json.dumps(numbers) if config.json else _evaluation_text(numbers))
    if config.html is not None:
        typer.echo(f"drawn in {config.html}", err=True)


@command(app, "compare", CompareConfig)
def compare_command(config: CompareConfig) -> None:
    """Puts many students of one cache side by side."""
    from student_train.compare.page import write_html
    from student_train.compare.report import compare
    from student_train.compare.table import as_json, table

    comparison = compare(config)
    typer.echo(as_json(comparison) if config.json else table(comparison))
    if config.html is not None:
        write_html(comparison, config.html)
        typer.echo(f"drawn in {config.html}", err=True)


@command(app, "export", ExportConfig)
def export_command(config: ExportConfig) -> None:
    """Makes a folder ready to serve: adapters merged, int8, ONNX, each checked, a model card."""
    from student_train.export.export import run
    from student_train.export.table import table

    numbers = run(config)
    typer.echo(json.dumps(numbers) if config.json else table(numbers))
    typer.echo(f"saved in {config.out}", err=True)


def _text_line(text: dict[str, Any]) -> str:
    """A source, what the student wrote, and what was expected."""
    return (
        f"chrF {text['chrf']:5.1f}  {text['source']!r} -> {text['text']!r}, "
        f"expected {text['reference']!r}"
    )


def _evaluation_text(numbers: dict[str, Any]) -> str:
    of_loss = ("loss", "perplexity", "kl", "kl_bucketed", "mse_to_teacher", "agreement")
    of_labels = ("accuracy", "micro_f1", "macro_f1", "entity_f1", "subset_accuracy", "ece")
    of_task = (*of_labels, "f1", "exact_match", "pearson", "spearman")
    of_teacher = ("teacher_loss", *of_task, *(f"teacher_{name}" for name in of_task))
    of_vectors = ("cosine", "nearest_agreement", "similarity_correlation")
    counts = ("positions", "documents")
    of_texts = ("chrf", "bleu", "rouge1", "rouge2", "rougeL", "teacher_chrf", "written_rows")
    all_names = (*of_loss, *of_teacher, *of_vectors, *counts, *of_texts)
    shown = [name for name in all_names if name in numbers]
    width = max(14, *(len(name) + 2 for name in shown))
    lines = [f"{name:<{width}}{_number(numbers[name])}{_range(name, numbers)}" for name in shown]
    texts = [_text_line(text) for text in numbers.get("texts", [])]
    return "\n".join([*lines, *texts, *_worst_text(numbers)])


def _worst_text(numbers: dict[str, Any]) -> list[str]:
    """The worst rows, each with its answer of the highest loss."""
    lines = []
    for row in numbers.get("details", {}).get("worst", []):
        answer = max(row["answers"], key=lambda answer: answer["loss"])
        student = f"{answer['student']!r} ({answer['probability']:.2f})"
        lines += [
            f"document {row['document']}, chunk {row['chunk']}: loss {row['loss']:.4f}; "
            f"{answer['label']!r} answered by {student}",
            "    " + " ".join("".join(row["tokens"]).split())[:_TEXT_SHOWN],
        ]
    return lines


def _range(name: str, numbers: dict[str, Any]) -> str:
    """The interval of the main metric of the task."""
    if numbers.get("metric") != name:
        return ""
    low, high = (_number(numbers[f"{name}_{end}"]) for end in ("low", "high"))
    what = "documents" if "documents" in numbers else "rows"
    return f"  (95 % of resampled {what}: {low} to {high})"


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def main() -> None:
    """Entry point of the command."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the encoders
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "transformers", "accelerate", "huggingface_hub", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    run_app(app)


if __name__ == "__main__":
    main()
