"""What corpus and teacher say of a row as a whole, in words: for `inspect`."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from shared.format.manifest import Manifest
from shared.rows import Row
from shared.tasks import ProblemType

_SHOWN = 4  # labels of a row


def _one_class(row: Row, manifest: Manifest) -> list[str]:
    names = manifest.labels
    label = names[int(row.labels[0])] if manifest.labelled else "not known"
    return _with_teacher(f"label: {label}", row, names, lambda logprobs: logprobs[0])


def _several(row: Row, manifest: Manifest) -> list[str]:
    names = manifest.labels
    there = [names[place] for place in (row.labels == 1).nonzero()[:, 0].tolist()]
    line = f"labels: {_listed(there)}" if manifest.labelled else "labels: not known"
    return _with_teacher(line, row, names, lambda logprobs: logprobs[:, 1])


def _with_teacher(
    line: str, row: Row, names: Sequence[str], of_labels: Callable[[Tensor], Tensor]
) -> list[str]:
    if row.targets is None:
        return [line]
    probs_C = of_labels(row.targets.logprobs).exp()
    return [f"{line}; the teacher says {_likeliest(probs_C, names)}"]


def _numbers(row: Row, manifest: Manifest) -> list[str]:
    names = manifest.labels
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


# One line for a class, one for the likeliest labels, one for each of the first numbers.
SAID: dict[ProblemType, Callable[[Row, Manifest], list[str]]] = {
    "single_label": _one_class,
    "multi_label": _several,
    "regression": _numbers,
}
