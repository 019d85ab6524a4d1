"""What `train-student export` prints: how each artefact compares with the student."""

from collections.abc import Mapping, Sequence
from typing import Any

from student_train.metrics.names import TITLES


def table(numbers: Mapping[str, Any]) -> str:
    """The checks as aligned text."""
    rows: list[tuple[str, ...]] = [
        ("", "size", "max diff", "mean diff", "argmax equal", "time", "loss", "metric")
    ]
    first = numbers["files"][0]["check"]["student"]
    rows.append(
        ("student, float32", _size(numbers["student_bytes"]), *("",) * 3, "1.00 x", *_of(first))
    )
    rows += [_row_of(each) for each in numbers["files"]]
    threads = numbers["threads"]
    return "\n".join(
        [
            *_aligned(rows),
            f"on {numbers['checked_on']}; time of one row, {threads} thread{'s'[: threads != 1]}, "
            "against float32 in torch, adapters merged",
        ]
    )


def _row_of(artefact: Mapping[str, Any]) -> tuple[str, ...]:
    found, name = artefact["check"], artefact["format"]
    return (
        f"{name}, {artefact['dtype']}" if name == "safetensors" else name,
        _size(artefact["bytes"]),
        f"{found['max_difference']:.1e}",
        f"{found['mean_difference']:.1e}",
        "" if found["agreement"] is None else f"{found['agreement']:.2%}",
        f"{found['time_ratio']:.2f} x",
        *_of(found["artefact"]),
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, without the columns that are empty below their head."""
    used = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in used}
    return [
        "  ".join(
            row[column].rjust(widths[column]) if column else row[column].ljust(widths[column])
            for column in used
        ).rstrip()
        for row in rows
    ]


def _of(scores: Mapping[str, Any]) -> tuple[str, str]:
    loss = "" if scores["loss"] is None else f"{scores['loss']:.4f}"
    name = scores["metric"]
    return loss, "" if name is None else f"{TITLES[name]} {scores['value']:.4f}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
