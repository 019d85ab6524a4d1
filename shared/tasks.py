"""A plain table of the tasks: what their targets are over, and which model class they load."""

from dataclasses import dataclass
from typing import Literal

TaskName = Literal["causal-lm"]


@dataclass(frozen=True, slots=True)
class Task:
    """`target_space`: what a class is. `auto_class`: the class in `transformers` that loads it."""

    target_space: Literal["vocabulary", "labels"]
    auto_class: str
    needs: str


TASKS: dict[TaskName, Task] = {
    "causal-lm": Task("vocabulary", "AutoModelForCausalLM", "text"),
}
