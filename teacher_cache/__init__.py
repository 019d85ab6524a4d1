"""Stage one: runs a teacher over a corpus once and writes a cache."""

__all__: list[str] = []
