"""A config class as a command: its options for typer, its help, and how an error ends it."""

import inspect
import shutil
import sys
import textwrap
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand
from typer.main import get_command

from shared.errors import TeacherCacheError
from shared.options.configs import ConfigT, fields_of, load
from shared.options.fields import Field


def command(
    app: typer.Typer, name: str, config_class: type[ConfigT]
) -> Callable[[Callable[[ConfigT], None]], Callable[[ConfigT], None]]:
    """Registers a function of a config as a subcommand; its docstring is the command's help."""

    def register(function: Callable[[ConfigT], None]) -> Callable[[ConfigT], None]:
        fields = fields_of(config_class)

        # Every parameter defaults to None: a flag equal to its option's default is still "given".
        def run(config: Path | None, traceback: bool | None, **flags: Any) -> None:
            given = {
                name: fields[name].from_flag(value)
                for name, value in flags.items()
                if value not in (None, [], ())
            }
            function(load(config_class, given, config))

        parameters = [_parameter(each, fields, app) for each in fields.values()]
        run.__signature__ = inspect.Signature(parameters + _common_parameters())  # type: ignore[attr-defined]
        paragraphs = (inspect.getdoc(function) or "").split("\n\n")
        # An indented paragraph is an example, whose lines stay as they are.
        unwrapped = "\n\n".join(
            paragraph if paragraph.startswith("    ") else " ".join(paragraph.split())
            for paragraph in paragraphs
        )
        app.command(name, cls=_Command, help=_unmarked(unwrapped, app))(run)
        return function

    return register


def main(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the app and exits: an error is one paragraph on stderr, a traceback with --traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        # Exits by itself: 0, 2 for a usage error, 130 for Ctrl-C. Not app(), which would also put
        # its own excepthook in place.
        sys.exit(get_command(app).main(list(arguments)))
    except (TeacherCacheError, OSError) as error:  # transformers says "no such model" by OSError
        if "--traceback" in arguments:
            traceback.print_exception(error)
        else:
            sys.stderr.write(_error_text(str(error)))
        sys.exit(error.exit_code if isinstance(error, TeacherCacheError) else 1)


_COMMON = "Every command"


class _Command(TyperCommand):
    """A command whose --help shows what every command has last, and a switch in one column.

    The name that turns a switch off is its default; a column of these names leaves the rest of the
    table too narrow to read.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        shown = copy(self)
        shown.params = [copy(each) for each in self.params]
        for each in shown.params:
            each.secondary_opts = []
        TyperCommand.format_help(shown, ctx, formatter)

    def get_help_option(self, ctx: Any) -> Any:
        option: Any = super().get_help_option(ctx)
        option.rich_help_panel, option.metavar = _COMMON, ""
        return option


def _parameter(field: Field, fields: Mapping[str, Field], app: typer.Typer) -> inspect.Parameter:
    shown: dict[str, Any] = {"help": _unmarked(field.help(fields), app), "show_default": False}
    kind: Any = field.typer_scalar
    if field.repeated:
        kind = types.GenericAlias(list, (kind,))
    if field.option.argument:
        return _optional(field.name, kind, typer.Argument(metavar=field.flag, **shown))
    flags = field.option.flag or field.flag
    if field.is_switch and not field.option.flag:
        flags = f"{field.flag}/{field.opposite}"
    shown |= {"rich_help_panel": field.heading, "metavar": field.metavar}
    return _optional(field.name, kind, typer.Option(flags, **shown))


def _common_parameters() -> list[inspect.Parameter]:
    file = (
        "Options from a .yaml, .toml or .json file; a flag beats the file (--no-... turns a switch "
        "off)."
    )
    trace = "Show where in the code an error arose."
    shown: dict[str, Any] = {"rich_help_panel": _COMMON}
    return [
        _optional("config", Path, typer.Option("--config", metavar="FILE", help=file, **shown)),
        _optional("traceback", bool, typer.Option("--traceback", metavar="", help=trace, **shown)),
    ]


def _optional(name: str, kind: Any, info: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, info]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _unmarked(text: str, app: typer.Typer) -> str:
    """Text whose square brackets typer shows as they are, whether or not it reads rich markup."""
    return text.replace("[", r"\[") if app.rich_markup_mode == "rich" else text


def _error_text(message: str) -> str:
    """Wrapped on a terminal; otherwise one line, which a log keeps together and grep finds."""
    lines = [line.strip() for line in f"Error: {message}".splitlines() if line.strip()]
    if not sys.stderr.isatty():
        return " ".join(lines) + "\n"
    width = min(100, shutil.get_terminal_size().columns)
    wrap = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap.fill(line) for line in lines) + "\n"
