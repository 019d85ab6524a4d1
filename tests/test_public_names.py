"""What a package's __all__ lists is public: there, documented, and of one meaning everywhere."""

import importlib
from collections import Counter

import pytest

PACKAGES = ("shared", "teacher_cache", "student_train")


def public_names(package: str) -> list[str]:
    return list(importlib.import_module(package).__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_and_has_a_docstring(package):
    module = importlib.import_module(package)
    for name in public_names(package):
        doc = getattr(module, name).__doc__ or ""
        # A dataclass without a docstring gets its signature as one.
        assert doc, f"{package}.{name} has no docstring"
        assert not doc.startswith(f"{name}("), f"{package}.{name} has no docstring of its own"


def test_no_public_name_is_listed_twice():
    counts = Counter(name for package in PACKAGES for name in public_names(package))
    assert [name for name, count in counts.items() if count > 1] == []
