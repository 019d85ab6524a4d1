"""Where the files of a cache lie: a store, by name, in which everything written appears whole.

`Storage` says what a store can do and `LocalStorage` is the one that is a folder; another kind of
store gets a file of its own here, and runs the tests of tests/shared/storage/test_stores.py.
"""

from shared.storage.base import Storage, check_name, errors_explained
from shared.storage.folders import check_free, new_folder
from shared.storage.local import LocalStorage, temporary_files, temporary_writer

__all__ = [
    "LocalStorage",
    "Storage",
    "check_free",
    "check_name",
    "errors_explained",
    "new_folder",
    "temporary_files",
    "temporary_writer",
]
