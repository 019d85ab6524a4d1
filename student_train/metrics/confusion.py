"""Which classes a student knows and which it takes for which: counts of (label, answer).

Shapes: P positions, L labels that occur with an answer that occurs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST_CLASSES, MOST_CONFUSIONS = 50, 20  # listed


class Confusion:
    """Counts of pairs that occur: with many classes most never do."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.pairs: Counter[tuple[int, int]] = Counter()

    def add(self, labels_P: np.ndarray, answers_P: np.ndarray) -> None:
        codes_L, counts_L = np.unique(labels_P * len(self.names) + answers_P, return_counts=True)
        for code, count in zip(codes_L.tolist(), counts_L.tolist(), strict=True):
            self.pairs[divmod(code, len(self.names))] += count

    def classes(self) -> list[dict[str, Any]]:
        """Precision, recall, F1 and support of each class that is a label or an answer anywhere.

        By support, the largest first, `MOST_CLASSES` at most. What would be divided by 0 is 0.
        """
        support: Counter[int] = Counter()
        answered: Counter[int] = Counter()
        for (label, answer), count in self.pairs.items():
            support[label] += count
            answered[answer] += count
        right = {number: self.pairs[number, number] for number in {*support, *answered}}
        return _listed(self.names, right, answered, support)

    def confusions(self) -> list[dict[str, Any]]:
        """The pairs of a label and another answer, the most frequent first."""
        support: Counter[int] = Counter()
        for (label, _), count in self.pairs.items():
            support[label] += count
        wrong = [(count, pair) for pair, count in self.pairs.items() if pair[0] != pair[1]]
        wrong.sort(key=lambda found: (-found[0], found[1]))
        return [
            {
                "label": self.names[label],
                "answer": self.names[answer],
                "count": count,
                "share": count / support[label],
            }
            for count, (label, answer) in wrong[:MOST_CONFUSIONS]
        ]


class LabelCounts:
    """Counts of rows with several labels, of which each is right or not."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.counts_3C = np.zeros((3, len(names)), np.int64)  # both; said; there

    def add(self, labels_P: np.ndarray, answers_P: np.ndarray) -> None:
        """Yes (1) and no (0) of all labels of some rows, row by row."""
        there_RC, said_RC = (
            each.reshape(-1, len(self.names)) == 1 for each in (labels_P, answers_P)
        )
        self.counts_3C += [each.sum(axis=0) for each in (there_RC & said_RC, said_RC, there_RC)]

    def classes(self) -> list[dict[str, Any]]:
        """Precision, recall, F1 and support of each label, as of classes."""
        right, said, there = (dict(enumerate(counts)) for counts in self.counts_3C.tolist())
        found = {number for number in right if said[number] or there[number]}
        return _listed(self.names, {number: right[number] for number in found}, said, there)

    def confusions(self) -> list[dict[str, Any]]:
        """None: a label that is missed is not taken for another one."""
        return []


def _listed(
    names: Sequence[str],
    right: Mapping[int, int],
    answered: Mapping[int, int],
    support: Mapping[int, int],
) -> list[dict[str, Any]]:
    """The classes that have a count in `right`."""
    return [
        {
            "name": names[number],
            "precision": right[number] / answered[number] if answered[number] else 0.0,
            "recall": right[number] / support[number] if support[number] else 0.0,
            "f1": 2 * right[number] / (support[number] + answered[number]),
            "support": support[number],
        }
        for number in sorted(right, key=lambda number: (-support[number], number))[:MOST_CLASSES]
    ]
