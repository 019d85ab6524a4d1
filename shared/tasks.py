"""A plain table of the tasks: what their targets are over, where these are, which class loads them.

Rows are built in stage one and metrics live in stage two; both read the task from the manifest.
"""

from dataclasses import dataclass
from typing import Literal

TaskName = Literal["causal-lm", "token-classification", "sequence-classification"]
Layout = Literal["tokens", "row", "outputs"]
ProblemType = Literal["single_label", "multi_label", "regression"]


@dataclass(frozen=True, slots=True)
class Task:
    """`target_space`: what a class is. `auto_class`: the class in `transformers` that loads it.

    `layout`: how a row is laid out and where its targets are. tokens: at tokens, or the next ones;
    row: of the row as a whole, at position 0; outputs: of the row as a whole, one position for each
    output of the head (`Manifest.layout` says when a task has this in place of its own).
    `ways`: which columns a document may consist of, by role.
    """

    target_space: Literal["vocabulary", "labels"]
    auto_class: str
    layout: Layout
    ways: tuple[tuple[str, ...], ...]


TASKS: dict[TaskName, Task] = {
    "causal-lm": Task(
        "vocabulary",
        "AutoModelForCausalLM",
        layout="tokens",
        ways=(("messages",), ("text",), ("prompt", "completion")),
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
}
