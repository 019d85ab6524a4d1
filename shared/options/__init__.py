"""A frozen config dataclass is a command: name, type, default, bound and help are written once.

    @group("What is kept")
    @dataclass(frozen=True, kw_only=True)
    class TargetOptions:
        top_k: Annotated[int, Option(help="Entries kept per position.", min=1)] = 32

    @dataclass(frozen=True, kw_only=True)
    class CaptureConfig(JobOptions, TargetOptions):
        def __post_init__(self) -> None:
            check_bounds(self)

    @command(app, "run", CaptureConfig)
    def run(config: CaptureConfig) -> None: ...

A config may inherit its fields from dataclasses that each hold one concern. `group` names the
heading in --help that the fields of one such class stand under; headings come in the order of the
bases, after the config's own fields. (Bases with slots cannot be inherited side by side.)

A flag beats the --config file, which beats the default; a leading ~/ is the home folder in both. A
field may be str, int, float, bool, Path, a Literal, a union of these (`int | Literal["auto"]`, `str
| None`) or a tuple[X, ...] of these, whose flag is repeatable. A field without a default is
required.
"""

from shared.options.command import command, main
from shared.options.configs import check_bounds, group, load, resolved, write_resolved
from shared.options.fields import SET, Option

__all__ = [
    "SET",
    "Option",
    "check_bounds",
    "command",
    "group",
    "load",
    "main",
    "resolved",
    "write_resolved",
]
