"""`compare`: the table, the refusals, and an HTML file that is safe to open."""

import json
from pathlib import Path

import pytest

from shared.errors import CacheMismatch, IncompleteCache
from student_train.config import CompareConfig
from student_train.report import compare, table, write_html


def run_folder(path: Path, *, loss: float = 2.5, held_out: str = "abc") -> Path:
    path.mkdir()
    result = {
        "max_steps": 2,
        "parameters": 1234,
        "seconds": 3.5,
        "weights": {"soft": 1.0, "hard": 0.5, "hidden": 0.0},
        "teacher_parameters": 9999,
        "validation_cache_id": held_out,
        "validation": {
            "loss": loss,
            "positions": 77,
            "kl_bucketed": 0.25,
            "agreement": 0.5,
            "teacher_loss": 2.0,
            "targets": "topk 32",
        },
    }
    (path / "result.json").write_text(json.dumps(result))
    lines = [{"kind": "train", "step": s, "loss": 3.0 - s, "hard": 3.0 - s} for s in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_table_has_the_teacher_and_every_run(tmp_path):
    runs = (run_folder(tmp_path / "a"), run_folder(tmp_path / "b", loss=2.25))
    text = table(compare(CompareConfig(runs=runs)))
    lines = text.splitlines()
    assert lines[1].split()[:5] == ["teacher", "9,999", "2.0000", "0.0000", "100.0%"]
    assert lines[2].split()[:6] == ["a", "1,234", "2.5000", "0.2500", "50.0%", "3.5"]
    assert lines[3].split()[2] == "2.2500"
    assert "77 positions" in text
    assert "topk 32" in text


def test_different_held_out_caches_do_not_compare(tmp_path):
    runs = (run_folder(tmp_path / "a"), run_folder(tmp_path / "b", held_out="xyz"))
    with pytest.raises(CacheMismatch, match="different held-out caches"):
        compare(CompareConfig(runs=runs))


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(IncompleteCache, match=r"no finished run here \(result.json is missing\)"):
        compare(CompareConfig(runs=(tmp_path / "nothing",)))


def test_markup_in_names_is_escaped_in_the_html(tmp_path):
    run = run_folder(tmp_path / "<script>alert(1)<script>")
    write_html(compare(CompareConfig(runs=(run,))), tmp_path / "out.html")
    html = (tmp_path / "out.html").read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert html.count("<svg") == 1
