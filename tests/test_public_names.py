"""What a package's __all__ lists is public: there, documented, and of one meaning everywhere."""

import importlib
from collections import defaultdict

import pytest

import shared.cache

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


def test_a_public_name_is_one_object_wherever_it_is_listed():
    homes: dict[str, set[int]] = defaultdict(set)
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in public_names(package):
            homes[name].add(id(getattr(module, name)))
    assert [name for name, objects in homes.items() if len(objects) > 1] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_cache_is_opened_from_whichever_package_is_at_hand(package):
    assert importlib.import_module(package).open_cache is shared.cache.open_cache
