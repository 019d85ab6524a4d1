"""What both stages must agree on: the format, the codec, the manifest, the reader."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.cache import Cache, open_cache
    from shared.errors import TeacherCacheError

__all__ = ["Cache", "TeacherCacheError", "open_cache"]

_HOMES = {"Cache": "cache", "open_cache": "cache", "TeacherCacheError": "errors"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `--help` never waits for torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
