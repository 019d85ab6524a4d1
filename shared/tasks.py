"""A plain table of the tasks: what their targets are over, where these are, which class loads them.

Rows are built in stage one and metrics live in stage two; both read the task from the manifest.
"""

from dataclasses import dataclass
from typing import Literal

TaskName = Literal["causal-lm", "token-classification", "sequence-classification"]


@dataclass(frozen=True, slots=True)
class Task:
    """`target_space`: what a class is. `auto_class`: the class in `transformers` that loads it.

    `one_per_row`: a row has one target, whose position is 0; else a target's position is its token.
    `ways`: which columns a document may consist of, by role.
    """

    target_space: Literal["vocabulary", "labels"]
    auto_class: str
    one_per_row: bool
    ways: tuple[tuple[str, ...], ...]


TASKS: dict[TaskName, Task] = {
    "causal-lm": Task(
        "vocabulary",
        "AutoModelForCausalLM",
        one_per_row=False,
        ways=(("messages",), ("text",), ("prompt", "completion")),
    ),
    "token-classification": Task(
        "labels",
        "AutoModelForTokenClassification",
        one_per_row=False,
        ways=(("tokens", "tags"),),
    ),
    "sequence-classification": Task(
        "labels",
        "AutoModelForSequenceClassification",
        one_per_row=True,
        ways=(("text", "text_pair", "label"), ("text", "label")),
    ),
}
