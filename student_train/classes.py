"""Which classes a student knows and which it takes for which: counts of (label, answer).

Shapes: P positions, L labels that occur with an answer that occurs.
"""

from collections import Counter
from collections.abc import Sequence
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
        found = []
        for number in sorted({*support, *answered}, key=lambda c: (-support[c], c))[:MOST_CLASSES]:
            right = self.pairs[number, number]
            found.append(
                {
                    "name": self.names[number],
                    "precision": right / answered[number] if answered[number] else 0.0,
                    "recall": right / support[number] if support[number] else 0.0,
                    "f1": 2 * right / (support[number] + answered[number]),
                    "support": support[number],
                }
            )
        return found

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
