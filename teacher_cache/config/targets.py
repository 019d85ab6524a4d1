"""What is kept of the teacher's distribution at a position."""

from dataclasses import dataclass
from typing import Annotated, Literal

from shared.options import Option, group
from teacher_cache.config.job import NOT_LIKE

Targets = Literal["auto", "topk", "adaptive", "sample", "dense", "none"]


@group("What is kept of each distribution")
@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Which classes of a distribution are kept, and how exactly."""

    targets: Annotated[
        Targets,
        Option(
            help="What to keep of each distribution: the k largest classes, all above a threshold, "
            "an unbiased sample, or every class; none: hard labels only; auto: every class where "
            "they are few, topk where --top-k or --temperature ask for it, else sample.",
            read_when=NOT_LIKE,
        ),
    ] = "auto"
    mean_entries: Annotated[
        float,
        Option(
            help="Entries kept at a position on average.",
            min=1,
            max=255,
            read_when=NOT_LIKE | {"targets": ("auto", "adaptive", "sample")},
        ),
    ] = 16.0
    top_k: Annotated[
        int | None,
        Option(
            help="Entries kept at each position.",
            min=1,
            max=255,
            show_default="32",
            read_when=NOT_LIKE | {"targets": ("auto", "topk")},
        ),
    ] = None
    value_bits: Annotated[
        Literal[7, 8, 16],
        Option(
            help="Bits of a log-probability; 16 is fp16.",
            read_when=NOT_LIKE | {"targets": ("auto", "topk", "adaptive", "sample")},
        ),
    ] = 7
    temperature: Annotated[
        tuple[float, ...],
        Option(
            help="Also make this temperature exact at training time. Repeatable.",
            read_when=NOT_LIKE,
            min=0.05,
            max=20,
        ),
    ] = ()
