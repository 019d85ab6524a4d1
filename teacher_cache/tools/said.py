"""What corpus and teacher say of a row as a whole, in words: for `inspect`."""

import math
from collections.abc import Sequence

from torch import Tensor

from shared.format.manifest import Manifest
from shared.rows import Row

_SHOWN = 4  # labels of a row


def said_of_row(row: Row, manifest: Manifest) -> list[str]:
    """One line for a class, one for each of the first numbers, one for the likeliest labels."""
    names = manifest.labels
    if manifest.problem_type == "regression":
        return _numbers(row, names)
    if manifest.problem_type == "multi_label":
        there = [names[place] for place in (row.labels == 1).nonzero()[:, 0].tolist()]
        line = f"labels: {_listed(there)}" if manifest.labelled else "labels: not known"
        probs_C = None if row.targets is None else row.targets.logprobs[:, 1].exp()
    else:
        line = f"label: {names[int(row.labels[0])] if manifest.labelled else 'not known'}"
        probs_C = None if row.targets is None else row.targets.logprobs[0].exp()
    return [line if probs_C is None else f"{line}; the teacher says {_likeliest(probs_C, names)}"]


def _numbers(row: Row, names: Sequence[str]) -> list[str]:
    said = [""] * len(names)
    if row.target_values is not None:
        said = [f"; the teacher says {value:.4g}" for value in row.target_values.tolist()]
    lines = [
        f"{name}: {'not known' if math.isnan(label) else f'{label:.4g}'}{teacher}"
        for name, label, teacher in zip(names, row.labels.tolist(), said, strict=True)
    ]
    return lines[:_SHOWN]


def _likeliest(probs_C: Tensor, names: Sequence[str]) -> str:
    best = probs_C.argsort(descending=True, stable=True)[:_SHOWN].tolist()
    return ", ".join(f"{names[place]} {float(probs_C[place]):.3f}" for place in best)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more
