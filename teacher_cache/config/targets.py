"""What is kept of the teacher's distribution at a position."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from shared.options import Option, group
from shared.targets.base import Kind
from shared.targets.kinds import KINDS
from teacher_cache.config.job import NOT_LIKE

_AUTO = "auto"


class _Asked(Collection[str]):
    """What may be asked for, as the table of kinds stands when an option is read.

    Numbers are kept where labels are numbers, and nobody asks for them.
    """

    def __iter__(self) -> Iterator[str]:
        return iter((_AUTO, *(name for name, kind in KINDS.items() if not kind.numbers)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == each for each in self)


def _reading(option: str) -> dict[str, tuple[str, ...]]:
    """With which --targets an option is read: those whose kind does, or may be chosen."""
    return {"targets": (_AUTO, *(name for name, kind in KINDS.items() if option in kind.reads))}


@group("What is kept of each distribution")
@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Which classes of a distribution are kept, and how exactly."""

    targets: Annotated[
        str,
        Option(
            help="What to keep of each distribution: the k largest classes, all above a threshold, "
            "an unbiased sample, or every class; none: hard labels only; auto: every class where "
            "they are few, topk where --top-k or --temperature ask for it, else sample.",
            read_when=NOT_LIKE,
            choices=_Asked(),
        ),
    ] = _AUTO
    mean_entries: Annotated[
        float,
        Option(
            help="Entries kept at a position on average.",
            min=1,
            max=255,
            read_when=NOT_LIKE | _reading("mean_entries"),
        ),
    ] = 16.0
    top_k: Annotated[
        int | None,
        Option(
            help="Entries kept at each position.",
            min=1,
            max=255,
            show_default="32",
            read_when=NOT_LIKE | _reading("top_k"),
        ),
    ] = None
    value_bits: Annotated[
        Literal[7, 8, 16],
        Option(
            help="Bits of a log-probability; 16 is fp16.",
            read_when=NOT_LIKE | _reading("value_bits"),
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

    @property
    def asked_kind(self) -> Kind[Any] | None:
        """The kind that is asked for; None where the job chooses one."""
        return KINDS.get(self.targets)

    @property
    def label_only(self) -> bool:
        """Whether no target is asked for, so that there are hard labels only."""
        return self.asked_kind is not None and not self.asked_kind.has_targets

    @property
    def asks_for_every_class(self) -> bool:
        """Whether every class of every distribution is asked for."""
        return self.asked_kind is not None and self.asked_kind.every_temperature
