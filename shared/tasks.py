"""A plain table of the tasks: what their targets are over, where these are, which class loads them.

Rows are built in stage one and metrics live in stage two; both read the task from the manifest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

TaskName: TypeAlias = str  # a name in TASKS
Layout = Literal["tokens", "row", "outputs", "window", "pair"]
Labels = Literal["next", "stored", "none"]
Pooling = Literal["mean", "cls", "last", "none"]
HiddenCodec = Literal["bf16", "fp8", "int8"]  # how hidden states are stored: hidden.py
ProblemType = Literal["single_label", "multi_label", "regression"]

# As `transformers` names them: its own loss and its pipelines go by it.
PROBLEM_TYPES: dict[ProblemType, str] = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
MAX_ANSWER_TOKENS = 30  # of question answering; as the scripts that go with SQuAD have it


@dataclass(frozen=True, slots=True)
class Problem:
    """What the named labels of a sequence classification are to a row, for `Manifest.problem_type`.

    `layout` stands in the place of the task's own, where each label is an output of the head with a
    position of its own; then `kind` and `num_classes` are what the targets of a position are.
    `label_column` holds the hard labels, which are `numbers` or classes.
    """

    layout: Layout | None = None
    kind: str = ""
    num_classes: int = 0
    label_column: str = "labels"
    numbers: bool = False


PROBLEMS: dict[ProblemType, Problem] = {
    "single_label": Problem(),  # one of them is right
    "multi_label": Problem("outputs", "dense", 2),  # each is right or not
    "regression": Problem("outputs", "values", 1, "label_values", numbers=True),  # each is a number
}


@dataclass(frozen=True, slots=True)
class Task:
    """`target_space`: what a class is; states: there are none, and no targets.
    `auto_class`: the class in `transformers` that loads it.

    A class is an id of the vocabulary, one of the named labels, or a token of the row itself.
    `layout`: how a row is laid out and where its targets are. tokens: at tokens, or the next ones;
    row: of the row as a whole, at position 0; outputs: of the row as a whole, one position for each
    output of the head (`Manifest.layout` says when a task has this in place of its own); window: of
    start and end of an answer (windows.py); pair: two segments, what the encoder reads and what the
    decoder reads, targets at all tokens of the second but its last.
    `labels`: the hard labels are the next tokens, stored in a column of their own, or absent.
    `ways`: which columns a document may consist of, by role. `unlabelled`: of which ones, where it
    has no label and only what a teacher says of it is learnt. `sources`: of which ones, where the
    teacher writes what is learnt (--generate), so that a corpus need not have the answers.
    `has_problem_type`: whether its labels may be anything else than one of several (`PROBLEMS`).
    `masks`: whether some tokens of a row are hidden, and these are what is asked for.
    """

    target_space: Literal["vocabulary", "labels", "tokens", "states"]
    auto_class: str
    layout: Layout
    ways: tuple[tuple[str, ...], ...]
    labels: Labels = "stored"
    unlabelled: tuple[tuple[str, ...], ...] = ()
    sources: tuple[tuple[str, ...], ...] = ()
    has_problem_type: bool = False
    masks: bool = False

    @property
    def named_classes(self) -> bool:
        """Whether classes are the labels that a manifest names."""
        return self.target_space == "labels"

    @property
    def keeps_states(self) -> bool:
        """Whether hidden states are what is learnt, and there are no targets."""
        return self.target_space == "states"

    @property
    def over_vocabulary(self) -> bool:
        """Whether a model's own head, over its vocabulary, is what is learnt, or no head at all."""
        return self.target_space in ("vocabulary", "states")

    @property
    def is_written(self) -> bool:
        """Whether a teacher can write what is learnt, before it is cached."""
        return bool(self.sources)


TASKS: dict[TaskName, Task] = {
    "causal-lm": Task(
        "vocabulary",
        "AutoModelForCausalLM",
        layout="tokens",
        ways=(("messages",), ("text",), ("prompt", "completion")),
        sources=(("messages",), ("prompt", "completion"), ("prompt",)),
        labels="next",
    ),
    "masked-lm": Task(
        "vocabulary",
        "AutoModelForMaskedLM",
        layout="tokens",
        ways=(("text",),),
        masks=True,
    ),
    "seq2seq-lm": Task(
        "vocabulary",
        "AutoModelForSeq2SeqLM",
        layout="pair",
        ways=(("source", "target"), ("messages",)),
        sources=(("source", "target"), ("source",), ("messages",)),
        labels="next",
    ),
    "token-classification": Task(
        "labels",
        "AutoModelForTokenClassification",
        layout="tokens",
        ways=(("tokens", "tags"),),
        unlabelled=(("tokens",),),
    ),
    "sequence-classification": Task(
        "labels",
        "AutoModelForSequenceClassification",
        layout="row",
        ways=(("text", "text_pair", "label"), ("text", "label")),
        unlabelled=(("text", "text_pair"), ("text",)),
        has_problem_type=True,
    ),
    "question-answering": Task(
        "tokens",
        "AutoModelForQuestionAnswering",
        layout="window",
        ways=(("question", "context", "answers"),),
    ),
    "feature-extraction": Task(
        "states",
        "AutoModel",
        layout="tokens",
        ways=(("text",),),
        labels="none",
    ),
}

DEFAULT_TASK: TaskName = next(iter(TASKS))


def tasks_where(holds: Callable[[Task], bool]) -> tuple[TaskName, ...]:
    """The names of the tasks for which something holds, in the order of the table."""
    return tuple(name for name, task in TASKS.items() if holds(task))


def is_unnamed(labels: Sequence[str]) -> bool:
    """Whether these are the labels of a model that was given no names, as transformers has them."""
    return list(labels) == [f"LABEL_{index}" for index in range(len(labels))]
