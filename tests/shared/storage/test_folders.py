"""A folder appears whole or not at all, and never over another one."""

import pytest

from shared.errors import Refused
from shared.storage.folders import new_folder


def test_a_folder_appears_at_a_clean_exit(tmp_path):
    out = tmp_path / "a" / "b"
    with new_folder(out) as folder:
        (folder / "one").write_text("1")
        (folder / "one").chmod(0o600)
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["one"]
    assert list(out.parent.iterdir()) == [out]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "one").write_text("1")
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (out / "one").stat().st_mode == (tmp_path / "plain" / "one").stat().st_mode


def test_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "one").write_text("1")
    assert (tmp_path / "out" / "one").read_text() == "1"


def test_an_error_leaves_nothing(tmp_path):
    def break_off() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "one").write_text("1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("what", "found"), [("folder", "is not empty"), ("file", "is no folder")])
def test_what_is_there_is_not_overwritten(tmp_path, what, found):
    out = tmp_path / "out"
    if what == "folder":
        out.mkdir()
    (out / "mine" if what == "folder" else out).write_text("mine")
    message = f"{found}.*Nothing is overwritten: choose another --out"
    with pytest.raises(Refused, match=message), new_folder(out):
        pass
    assert (out / "mine" if what == "folder" else out).read_text() == "mine"
