"""A plain table of the tasks: what their targets are over, where these are, which class loads them.

Rows are built in stage one and metrics live in stage two; both read the task from the manifest.
"""

from dataclasses import dataclass
from typing import Literal

TaskName = Literal[
    "causal-lm",
    "masked-lm",
    "token-classification",
    "sequence-classification",
    "feature-extraction",
]
Layout = Literal["tokens", "row"]
Labels = Literal["next", "stored", "none"]
Pooling = Literal["mean", "cls", "last", "none"]


@dataclass(frozen=True, slots=True)
class Task:
    """`target_space`: what a class is; states: there are none, and no targets.
    `auto_class`: the class in `transformers` that loads it.

    `layout`: how a row is laid out and where its targets are. tokens: at tokens, or the next ones;
    row: of the row as a whole, at position 0.
    `labels`: the hard labels are the next tokens, stored in a column of their own, or absent.
    `ways`: which columns a document may consist of, by role.
    """

    target_space: Literal["vocabulary", "labels", "states"]
    auto_class: str
    layout: Layout
    ways: tuple[tuple[str, ...], ...]
    labels: Labels = "stored"


TASKS: dict[TaskName, Task] = {
    "causal-lm": Task(
        "vocabulary",
        "AutoModelForCausalLM",
        layout="tokens",
        ways=(("messages",), ("text",), ("prompt", "completion")),
        labels="next",
    ),
    "masked-lm": Task(
        "vocabulary",
        "AutoModelForMaskedLM",
        layout="tokens",
        ways=(("text",),),
    ),
    "token-classification": Task(
        "labels",
        "AutoModelForTokenClassification",
        layout="tokens",
        ways=(("tokens", "tags"),),
    ),
    "sequence-classification": Task(
        "labels",
        "AutoModelForSequenceClassification",
        layout="row",
        ways=(("text", "text_pair", "label"), ("text", "label")),
    ),
    "feature-extraction": Task(
        "states",
        "AutoModel",
        layout="tokens",
        ways=(("text",),),
        labels="none",
    ),
}
