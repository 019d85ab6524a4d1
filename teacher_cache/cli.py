"""`cache-teacher`: the commands of stage one. Nothing heavy is imported before it is needed."""

import json
import logging
import os
import sys
from dataclasses import asdict
from typing import Any

import typer

from shared.options import command
from shared.options import main as run_app
from shared.signals import stop_until_exit
from teacher_cache.config import (
    CaptureConfig,
    CheckConfig,
    CleanConfig,
    InspectConfig,
    PlanConfig,
    RepackConfig,
    StudentConfig,
    VerifyConfig,
)

app = typer.Typer(
    name="cache-teacher",
    help="Run a large teacher once and keep what matters of its outputs in a checked cache.",
    no_args_is_help=True,
    add_completion=False,
)


@command(app, "plan", PlanConfig)
def plan_command(config: PlanConfig) -> None:
    """Counts a job before any GPU hour: documents, rows, tokens, shards, bytes over k.

    It takes the options of run, and --calibrate to measure with the teacher on a sample of the
    corpus what each kind and size of targets keeps and costs:

        cache-teacher plan --calibrate --teacher DIR --corpus data.jsonl --out cache
    """
    from teacher_cache.tools.plan import estimate
    from teacher_cache.tools.report import estimate_text

    numbers = estimate(config)
    if config.html is not None:
        from teacher_cache.tools.pages import write_plan

        write_plan(numbers, config.html)
    _show(numbers, estimate_text(numbers), as_json=config.json)


@command(app, "run", CaptureConfig)
def run_command(config: CaptureConfig) -> None:
    """Runs a teacher over a corpus once and writes a cache. Run again to resume.

    A job names a teacher, a corpus and a folder, and a --task where it is not causal-lm. What else
    matters most: --mean-entries (how much is kept of each distribution), --max-length (how long a
    row is), --split (which documents):

        cache-teacher run --teacher Qwen/Qwen3-8B --corpus 'data/*.jsonl' --out cache
    """
    stop = stop_until_exit()  # the next import takes seconds
    from teacher_cache.job.run import run_stoppable

    run_stoppable(config, stop)


@command(app, "inspect", InspectConfig)
def inspect_command(config: InspectConfig) -> None:
    """Shows what a cache holds: provenance, completeness, sizes, kept mass, a few rows."""
    from teacher_cache.tools.inspection import inspect
    from teacher_cache.tools.report import inspect_text

    numbers = inspect(config)
    if config.html is not None:
        from teacher_cache.tools.pages import write_inspection

        write_inspection(numbers, config.html)
    _show(numbers, inspect_text(numbers), as_json=config.json)


@command(app, "verify", VerifyConfig)
def verify_command(config: VerifyConfig) -> None:
    """Reads every byte of a cache and checks every checksum and count."""
    from teacher_cache.tools.inspection import verify
    from teacher_cache.tools.report import verify_text

    found = verify(config)
    _show(asdict(found) | {"sound": found.sound}, verify_text(found), as_json=config.json)
    if not found.sound:
        raise typer.Exit(1)


@command(app, "check", CheckConfig)
def check_command(config: CheckConfig) -> None:
    """Runs the teacher again on a few rows and holds the cache against it."""
    from teacher_cache.tools.check import check
    from teacher_cache.tools.report import check_text

    found = check(config)
    _show(asdict(found) | {"sound": found.sound}, check_text(found), as_json=config.json)
    if not found.sound:
        raise typer.Exit(1)


@command(app, "repack", RepackConfig)
def repack_command(config: RepackConfig) -> None:
    """Makes a smaller cache out of a cache, without the teacher. Run again to resume."""
    from teacher_cache.tools.repack import repack

    repack(config)


@command(app, "student", StudentConfig)
def student_command(config: StudentConfig) -> None:
    """Makes a smaller model of some of the teacher's blocks, for a student to start from."""
    from teacher_cache.tools.layers import run

    typer.echo(run(config).text)
    typer.echo(f"saved in {config.out}", err=True)


@command(app, "clean", CleanConfig)
def clean_command(config: CleanConfig) -> None:
    """Removes what no commit names, and temporary files without a writer."""
    from teacher_cache.tools.inspection import clean

    removed = clean(config)
    verb = "would be removed" if config.dry_run else "removed"
    typer.echo("\n".join(removed) if removed else "nothing to remove")
    typer.echo(f"{len(removed)} files {verb}", err=True)


def _show(numbers: dict[str, Any], text: str, *, as_json: bool) -> None:
    typer.echo(json.dumps(numbers, ensure_ascii=False) if as_json else text)


def main() -> None:
    """Entry point of the command."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the encoders
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "datasets", "transformers", "huggingface_hub", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    run_app(app)


if __name__ == "__main__":
    main()
