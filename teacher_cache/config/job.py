"""What a job of stage one is about: the options that every run names first."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from shared.options import Option, group
from shared.tasks import DEFAULT_TASK, TASKS, TaskName

NOT_LIKE = {"like": (None,)}  # with --like these come from that cache


@group("What to cache")
@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Which teacher runs over which corpus, into which folder."""

    teacher: Annotated[
        str | None, Option(help="Hub id or folder of the teacher; none with --targets none.")
    ] = None
    corpus: Annotated[
        str,
        Option(
            help="A .txt, .jsonl, .parquet or .arrow file, of tagged words also a column file "
            "(.conll, .bio, .iob2, .tsv, ...), a folder, a glob, or a Hub name."
        ),
    ]
    out: Annotated[Path, Option(help="Folder of the cache.")]
    task: Annotated[TaskName, Option(help="What is distilled.", choices=TASKS)] = DEFAULT_TASK
    like: Annotated[
        Path | None,
        Option(help="A cache to match: its targets, rows and learnt tables, on new documents."),
    ] = None
