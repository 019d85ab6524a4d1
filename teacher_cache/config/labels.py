"""What the labels of a corpus are, for the tasks that have some."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from shared.options import Option, group
from shared.tasks import PROBLEMS, Problem, ProblemType, tasks_where

_NAMED = {"task": tasks_where(lambda task: task.named_classes)}


@group("Labels of texts and words")
@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """What the labels of the corpus are, and whether they are read."""

    labels: Annotated[
        Path | None,
        Option(
            help="JSON list of the classes' names, in order.",
            show_default="the teacher's, or those in the corpus",
            read_when=_NAMED,
        ),
    ] = None
    problem_type: Annotated[
        ProblemType | Literal["auto"],
        Option(
            help="What labels are to a text: one of them is right, each is or is not, or each "
            "names a number. auto: by the teacher, else by the column: a list is multi_label, a "
            "number with a point regression. A list names or numbers the labels of its text; of "
            "0 and 1 alone, one for each label, it is no or yes for each (of two labels only if "
            "written 0.0 and 1.0).",
            read_when={"task": tasks_where(lambda task: task.has_problem_type)},
        ),
    ] = "auto"
    unlabelled: Annotated[
        bool,
        Option(
            help="Take no labels from the corpus: students learn from what the teacher says of its "
            "rows alone. So it is anyhow where no column of labels is found.",
            read_when=_NAMED,
        ),
    ] = False

    @property
    def asked_problem_type(self) -> ProblemType | None:
        """What labels are said to be to a text; None where the job finds out."""
        return None if self.problem_type == "auto" else self.problem_type

    @property
    def asked_problem(self) -> Problem | None:
        """The object of `asked_problem_type`."""
        name = self.asked_problem_type
        return None if name is None else PROBLEMS[name]
