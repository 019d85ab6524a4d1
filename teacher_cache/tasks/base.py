"""What stage one asks of a task, and what most tasks answer.

A task of stage one is one object: what its rows are, how a model reads them, what its targets are
over, and which columns its cache has. Its file is named after its family; `table.py` lists all.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.errors import ConfigError
from shared.format.manifest import Manifest, Preprocessing
from shared.format.schema import optional_columns
from shared.rows import Row
from shared.tasks import TASKS, Pooling, ProblemType, TaskName
from teacher_cache.tasks.inputs import SEQUENCES, ForwardInputs
from teacher_cache.tasks.rows import TrainingRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from teacher_cache.config import CaptureConfig

SHOWN_TOKENS = 64  # of a row

# The tokens a teacher is to go on from, and the answers that the corpus has to them.
AskedSource = tuple[list[int], tuple[str, ...]]
Vocabulary = Callable[[], int]  # asked only where classes are neither labels nor places


@dataclass(frozen=True, slots=True)
class RowContext:
    """What rows depend on besides their documents; all of it is in the manifest."""

    tokenizer: "PreTrainedTokenizerBase"
    preprocessing: Preprocessing
    labels: tuple[str, ...] = ()  # names of the classes of a label space
    pooling: Pooling = "none"
    labelled: bool = True


class TeacherTask(ABC):
    """A task as stage one knows it.

    name          its row in the plain table of both stages (`shared/tasks.py`)
    head          what a teacher of it predicts with; an engine knows how to read each of them
    inputs        how rows become the inputs of a forward
    problem_type  what the labels of a row are to it, where a task has several answers to that
    """

    head: str
    inputs: ForwardInputs = SEQUENCES
    problem_type: ProblemType = "single_label"
    fills_rows = False  # rows are as long as --max-length allows, so a model must take such rows
    predicts = True  # a teacher has a distribution, or a number, at each position
    keeps_every_class = False  # where --targets leaves it open
    numbers = False  # what is predicted are numbers, not classes
    names_classes = False  # classes are labels that have names
    fewest_labels = 2
    has_problem_types = False
    rows_have_parts = False  # every row consists of segments that mean something
    rows_have_references = False  # every row has what an answer is compared with
    always_has_token_types = False
    positions_are_outputs = False  # of the row as a whole, one for each label; else tokens
    shows_positions = True  # to a person; else what there is to see is said of the row as a whole

    def __init__(self, name: TaskName) -> None:
        self.name = name

    def of_problem(self, problem_type: ProblemType) -> "TeacherTask":
        """This task where labels are that to a row; most tasks know one way only."""
        return self

    # Rows

    @abstractmethod
    def build_rows(
        self, documents: Iterable[tuple[int, Any]], context: RowContext, counters: Counter[str]
    ) -> Iterator[TrainingRow]:
        """The rows of (index, document) pairs, in order; what is left out is counted."""

    def labelled(self, roles: Collection[str]) -> bool:
        """Whether rows have hard labels, by the roles of the corpus's columns."""
        return True

    def sources(
        self,
        documents: Sequence[tuple[int, Any]],
        tokenizer: "PreTrainedTokenizerBase",
        preprocessing: Preprocessing,
        counters: Counter[str],
    ) -> list[AskedSource]:
        """What the teacher reads of each document before it writes an answer (--generate)."""
        raise ConfigError(f"--generate is not there for --task {self.name}: leave it out")

    # Options and what follows from them

    def preprocessing(self, config: "CaptureConfig") -> dict[str, Any]:
        """The fields of `Preprocessing` that this task alone sets."""
        return {}

    def options_like(self, old: Manifest) -> dict[str, Any]:
        """The options that --like takes over from a cache, beside those of every task."""
        return {}

    def num_classes(self, config: "CaptureConfig", num_labels: int, vocabulary: Vocabulary) -> int:
        """How many classes a target is over, of the names of labels or the tokens there are."""
        return num_labels or vocabulary()

    def columns(
        self,
        preprocessing: Preprocessing,
        column_of: Mapping[str, str],
        *,
        labelled: bool,
        distributions: bool,
    ) -> list[str]:
        """The columns of a cache of this task.

        `column_of` has the corpus's columns by their roles; with `distributions` each position has
        the teacher's.
        """
        stored = TASKS[self.name].labels == "stored" and labelled
        return optional_columns(
            segments=preprocessing.pack or self.rows_have_parts,
            references=self.rows_have_references or preprocessing.generation is not None,
            positions=self.stores_positions(column_of),
            labels=stored and not self.numbers,
            label_values=stored and self.numbers,
            label_logprob=labelled,
            targets=distributions,
            token_types="text_pair" in column_of or self.always_has_token_types,
        )

    def stores_positions(self, roles: Collection[str]) -> bool:
        """Whether it must be said where targets are; else they are at all tokens but the last."""
        return set(roles) != {"text"} or TASKS[self.name].labels != "next"

    def possible_classes(self, rows: Sequence[TrainingRow], num_classes: int) -> float:
        """Classes that have a probability at a position of such rows, on average."""
        return num_classes

    # For a person

    def shown(
        self, row: Row, manifest: Manifest, tokenizer: "PreTrainedTokenizerBase"
    ) -> dict[str, Any]:
        """A cached row as `inspect` shows it, but for its positions."""
        return {"text": tokenizer.decode(row.input_ids[:SHOWN_TOKENS])}

    def shown_around(
        self, row: Row, position: int, tokenizer: "PreTrainedTokenizerBase"
    ) -> dict[str, str]:
        """The tokens near a position that its prediction is made from."""
        return {"after": tokenizer.decode(row.input_ids[: position + 1][-8:])}


def around(row: Row, position: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The tokens on both sides of a position, with its own."""
    return str(tokenizer.decode(row.input_ids[max(0, position - 5) : position + 4]))
