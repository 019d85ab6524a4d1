"""An opened corpus: documents by index, and what is known of their labels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets

from shared.format.manifest import CorpusInfo
from shared.tasks import ProblemType
from teacher_cache.corpus.label_names import labels_of
from teacher_cache.corpus.values import DOCUMENTS, LABEL_ROLES, VALUES, Column

_READ_AT_ONCE = 1000  # documents


@dataclass(frozen=True)
class Corpus:
    """Documents by index; `read` of a range is one memory-mapped read."""

    info: CorpusInfo
    documents: datasets.Dataset
    columns: dict[str, str]  # role -> column

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def supervised(self) -> bool:
        """Whether only a part of each document is predicted: what an assistant says."""
        return self.columns.keys() != {"text"}

    @property
    def label_role(self) -> str | None:
        """The role of the column of labels; None where there is none."""
        return next((role for role in LABEL_ROLES if role in self.columns), None)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """What the numbers in the column of labels stand for, where the data set says so."""
        if self.label_role is None:
            return ()
        feature = self.documents.features[self.columns[self.label_role]]
        while isinstance(feature, datasets.List | datasets.LargeList):
            feature = feature.feature
        return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()

    @cached_property
    def problem_type(self) -> ProblemType:
        """By the type of the column of labels: a list of several, a number, or one class."""
        if "label" not in self.columns:
            return "single_label"
        feature = self.documents.features[self.columns["label"]]
        if isinstance(feature, datasets.List | datasets.LargeList):
            return "multi_label"
        number = isinstance(feature, datasets.Value) and feature.dtype.startswith("float")
        return "regression" if number else "single_label"

    def labels(self, problem_type: ProblemType = "single_label") -> tuple[str, ...]:
        """The names of all labels there are.

        A data set that names its classes itself has those, in its own order; else they are what is
        found in the column of labels (`label_names.py`).
        """
        if self.class_names:
            return self.class_names
        assert self.label_role is not None  # only a task with labels asks
        column = self._column(self.label_role)
        return labels_of(self._all(column.name), problem_type, column)

    def read(self, indices: Sequence[int]) -> list[Any]:
        """Documents as the task builds rows of them; a null is an empty document."""
        if not indices:
            return []
        found = self.documents[list(indices)]
        parts = []
        for role, name in self.columns.items():
            read, column = VALUES[role], self._column(role)
            pairs = zip(indices, found[name], strict=True)
            parts.append([read(value, index, column) for index, value in pairs])
        make = DOCUMENTS[tuple(self.columns)]
        return [make(*values) for values in zip(*parts, strict=True)]

    def _column(self, role: str) -> Column:
        names = self.class_names if role in LABEL_ROLES else ()
        return Column(self.info.source, self.columns[role], names)

    def _all(self, column: str) -> Iterator[Any]:
        for start in range(0, len(self), _READ_AT_ONCE):
            yield from self.documents[start : start + _READ_AT_ONCE][column]
