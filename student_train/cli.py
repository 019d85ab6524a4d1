"""`train-student`: the commands of stage two. Nothing heavy is imported before it is needed."""

import json
import logging
import os
import sys

import typer

from shared.options import command
from shared.options import main as run_app
from student_train.config import CompareConfig, EvaluateConfig, TrainConfig

app = typer.Typer(
    name="train-student",
    help="Train students from a cache; the teacher is never loaded.",
    no_args_is_help=True,
    add_completion=False,
)


@command(app, "run", TrainConfig)
def run_command(config: TrainConfig) -> None:
    """Trains one student from a cache. Run again to resume."""
    from student_train.trainer import run

    result = run(config)
    if "validation" in result:
        typer.echo(_evaluation_text(result["validation"]))
    typer.echo(f"saved in {config.out}", err=True)


@command(app, "evaluate", EvaluateConfig)
def evaluate_command(config: EvaluateConfig) -> None:
    """Evaluates a student on a held-out cache: loss, KL, agreement, the metrics of its task."""
    from student_train.evaluate import run

    numbers = run(config)
    typer.echo(json.dumps(numbers) if config.json else _evaluation_text(numbers))


@command(app, "compare", CompareConfig)
def compare_command(config: CompareConfig) -> None:
    """Puts many students of one cache side by side."""
    from student_train.report import as_json, compare, table, write_html

    comparison = compare(config)
    typer.echo(as_json(comparison) if config.json else table(comparison))
    if config.html is not None:
        write_html(comparison, config.html)
        typer.echo(f"drawn in {config.html}", err=True)


def _evaluation_text(numbers: dict[str, object]) -> str:
    of_loss = ("loss", "perplexity", "kl", "kl_bucketed", "mse_to_teacher", "agreement")
    of_labels = ("accuracy", "micro_f1", "macro_f1", "entity_f1", "subset_accuracy", "ece")
    of_numbers = ("pearson", "spearman")
    of_task = (*of_labels, *of_numbers)
    of_teacher = (f"teacher_{name}" for name in of_task)
    names = (*of_loss, "teacher_loss", *of_task, *of_teacher, "positions")
    shown = [name for name in names if name in numbers]
    width = max(14, *(len(name) + 2 for name in shown))
    return "\n".join(
        f"{name:<{width}}{_number(numbers[name])}{_range(name, numbers)}" for name in shown
    )


def _range(name: str, numbers: dict[str, object]) -> str:
    """The interval of the main metric of the task."""
    if numbers.get("metric") != name:
        return ""
    low, high = (_number(numbers[f"{name}_{end}"]) for end in ("low", "high"))
    return f"  (95 % of resampled rows: {low} to {high})"


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
