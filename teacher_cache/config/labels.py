"""What the labels of a corpus are, for the tasks that have some."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from shared.options import Option, group
from shared.tasks import ProblemType


@group("Labels of texts and words")
@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """What the labels of the corpus are, and whether they are read."""

    labels: Annotated[
        Path | None,
        Option(
            help="JSON list of the classes' names, in order.",
            show_default="the teacher's, or those in the corpus",
            read_when={"task": ("token-classification", "sequence-classification")},
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
            read_when={"task": ("sequence-classification",)},
        ),
    ] = "auto"
    unlabelled: Annotated[
        bool,
        Option(
            help="Take no labels from the corpus: students learn from what the teacher says of its "
            "rows alone. So it is anyhow where no column of labels is found.",
            read_when={"task": ("token-classification", "sequence-classification")},
        ),
    ] = False
