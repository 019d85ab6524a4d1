"""Which labels a corpus has, where nobody has named them: read from its column of labels."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from shared.errors import CorpusError
from shared.tasks import PROBLEMS, ProblemType
from teacher_cache.corpus.values import Column


@dataclass(slots=True)
class _Seen:
    """All labels of a column, and how long its lists are."""

    labels: set[str | int | float] = field(default_factory=set)
    lengths: set[int] = field(default_factory=set)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=1)

    @property
    def vectors(self) -> bool:
        """Whether every list says 0 or 1 for each label, and names none: documents.is_vector."""
        named = self.longest <= 2 and not any(
            isinstance(each, bool | float) for each in self.labels
        )
        return self.lengths == {self.longest} and self.labels <= {0, 1} and not named


def labels_of(values: Iterable[Any], problem_type: ProblemType, column: Column) -> tuple[str, ...]:
    """The names of all labels there are, sorted; of numbers, the numbers up to the largest.

    Where each label is a number, or lists say 0 or 1 for each, there are as many as a list is long.
    """
    seen, problem = _seen(values), PROBLEMS[problem_type]
    if problem.numbers or (problem.layout is not None and seen.vectors):
        return _numbered(seen.longest)
    if all(isinstance(label, str) for label in seen.labels):
        return tuple(sorted(map(str, seen.labels)))
    numbers = [label for label in seen.labels if isinstance(label, int)]
    if not numbers:
        raise CorpusError(
            f"{column.source}: found {str(min(seen.labels, key=str))!r} in column "
            f"{column.name!r}, expected names or numbers of classes. Say --problem-type "
            "regression where labels are numbers of another kind."
        )
    return _numbered(max(numbers) + 1)


def _seen(values: Iterable[Any]) -> _Seen:
    seen = _Seen()
    for value in values:
        if isinstance(value, list):
            seen.labels.update(value)
            seen.lengths.add(len(value))
        else:
            seen.labels.add(value)
    seen.labels -= {None, -100}
    return seen


def _numbered(count: int) -> tuple[str, ...]:
    """As `transformers` names the labels of a model that was given no names."""
    return tuple(f"LABEL_{number}" for number in range(count))
