"""Every exception a user may catch, as one small tree; each class knows its exit code.

1: the work failed. 2: refused before any work, because things do not fit each other or were asked
for wrongly. 75: stopped by a signal with the state saved, run again to go on. A message says where,
what was found, what was expected and what to do next.
"""


class TeacherCacheError(Exception):
    """The work failed; what is finished stays finished."""

    exit_code = 1


class CorruptCache(TeacherCacheError):
    """Bytes of a cache are not what was written; names the file, and block and column if known."""


class CorruptRun(TeacherCacheError):
    """A file of a student's run folder is not what a run wrote; names it and how to go on."""


class DiskFull(TeacherCacheError):
    """No space left; names the folder and how much is missing."""


class NonFiniteTargets(TeacherCacheError):
    """The teacher gave NaN or infinity; names the document and the position."""


class Refused(TeacherCacheError):
    """Refused before any work was done."""

    exit_code = 2


class ConfigError(Refused):
    """An option or a config file is wrong; names the option and what it may be."""


class CorpusError(Refused):
    """The corpus cannot be read as asked; names the file and, where known, the line."""


class CacheMismatch(Refused):
    """Two things that must agree do not; names both sides, field by field."""


class IncompleteCache(Refused):
    """No cache, an empty one, or one with shards still missing."""


class Stopped(TeacherCacheError):
    """Stopped by a signal with the state saved: run again to go on."""

    exit_code = 75
