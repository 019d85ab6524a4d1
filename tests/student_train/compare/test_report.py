"""`compare`: the table, the refusals, and an HTML file that is safe to open."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from shared.errors import CacheMismatch, CorruptRun, IncompleteCache
from shared.options import write_resolved
from student_train.compare.page import write_html
from student_train.compare.report import compare
from student_train.compare.table import as_json, table
from student_train.config import CompareConfig, TrainConfig


def run_folder(
    path: Path,
    *,
    loss: float = 2.5,
    held_out: str = "abc",
    options: dict[str, Any] | None = None,
    numbers: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A finished run; `options`: of its run.yaml, `numbers` and `changes`: of its result."""
    path.mkdir()
    if options is not None:
        config = TrainConfig(student="s", cache=(Path("c"),), out=path, **options)
        write_resolved(config, path / "run.yaml")
    result: dict[str, Any] = {
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
    result["validation"] |= numbers or {}
    result |= changes
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


HARD = {"soft": 0.0, "hard": 1.0, "hidden": 0.0}


def models(*runs: Path) -> dict[str, dict[str, Any]]:
    """What --json has of each line by its name."""
    found = json.loads(as_json(compare(CompareConfig(runs=runs))))
    return {model["name"]: model for model in found["models"]}


def test_before_and_after_stand_side_by_side(tmp_path):
    before = {"loss": 6.25, "positions": 77, "kl_bucketed": 4.0, "agreement": 0.01}
    runs = (run_folder(tmp_path / "a", before=before), run_folder(tmp_path / "b"))
    text = table(compare(CompareConfig(runs=runs)))
    assert "parameters  loss before    loss  " in text.splitlines()[0]
    assert text.splitlines()[2].split()[:4] == ["a", "1,234", "6.2500", "2.5000"]
    assert text.splitlines()[3].split()[:3] == ["b", "1,234", "2.5000"]
    found = models(*runs)
    assert found["a"]["before"]["loss"] == 6.25
    assert found["a"]["before"]["kl"] == 4.0
    assert found["b"]["before"] is None


@pytest.mark.parametrize(
    ("weights", "scheduled", "expected"),
    [
        (HARD, {}, True),
        (HARD | {"soft": 0.1}, {}, False),
        (HARD | {"hidden": 0.1}, {}, False),
        (HARD, {"soft_weight": [0.0, 0.5]}, False),
        (HARD, {"hard_weight": [1.0, 0.5], "soft_weight": [0.0, 0.0]}, True),
    ],
)
def test_which_run_is_the_baseline(tmp_path, weights, scheduled, expected):
    run = run_folder(tmp_path / "a", weights=weights, scheduled=scheduled)
    assert models(run)["a"]["is_baseline"] is expected
    text = table(compare(CompareConfig(runs=(run,))))
    assert ("hard labels only" in text.splitlines()[2]) is expected


def test_the_share_of_the_teachers_gain(tmp_path):
    """Loss: the teacher has 2.0, hard labels alone 3.0, so 2.25 has three quarters of the gain."""
    runs = (
        run_folder(tmp_path / "text", loss=3.0, weights=HARD),
        run_folder(tmp_path / "distilled", loss=2.25),
        run_folder(tmp_path / "worse", loss=3.5),
    )
    found = models(*runs)
    assert found["distilled"]["recovered"] == pytest.approx(0.75)
    assert found["worse"]["recovered"] == pytest.approx(-0.5)
    assert found["text"]["recovered"] is None
    assert found["distilled"]["baseline"] == "text"
    text = table(compare(CompareConfig(runs=runs)))
    assert "gain recovered" in text.splitlines()[0]
    assert " 75% " in text.splitlines()[3]
    assert "baseline, the same student on hard labels only: text" in text


def test_a_teacher_that_is_no_better_leaves_no_gain(tmp_path):
    runs = (
        run_folder(tmp_path / "text", loss=2.0, weights=HARD),
        run_folder(tmp_path / "distilled", loss=1.9),
    )
    found = models(*runs)["distilled"]
    assert (found["recovered"], found["note"]) == (None, "no gain to recover")
    assert "no gain to recover" in table(compare(CompareConfig(runs=runs))).splitlines()[3]


def test_a_baseline_is_of_the_same_student_and_the_best_one(tmp_path):
    """In the main metric, of which more is better."""
    of = {"metric": "accuracy", "teacher_accuracy": 0.9, "accuracy_low": 0.1, "accuracy_high": 0.99}
    runs = (
        run_folder(tmp_path / "weak", numbers=of | {"accuracy": 0.5}, weights=HARD, student="s"),
        run_folder(tmp_path / "best", numbers=of | {"accuracy": 0.7}, weights=HARD, student="s"),
        run_folder(tmp_path / "other", numbers=of | {"accuracy": 0.8}, weights=HARD, student="t"),
        run_folder(tmp_path / "mine", numbers=of | {"accuracy": 0.85}, student="s"),
        run_folder(tmp_path / "alone", numbers=of | {"accuracy": 0.85}, student="u"),
    )
    found = models(*runs)
    assert found["mine"]["baseline"] == "best"
    assert found["mine"]["recovered"] == pytest.approx(0.75)
    assert found["alone"]["recovered"] is None
    assert found["alone"]["baseline"] is None
    assert "0.1000 to 0.9900" in table(compare(CompareConfig(runs=runs))).splitlines()[2]


def test_seeds_of_one_recipe_are_grouped(tmp_path):
    losses = {"d-0": 2.0, "d-1": 2.5, "d-2": 2.25}
    runs = [
        run_folder(tmp_path / name, loss=loss, options={"seed": seed})
        for seed, (name, loss) in enumerate(losses.items())
    ]
    runs.append(run_folder(tmp_path / "hot", loss=9.0, options={"learning_rate": 0.5, "seed": 3}))
    runs.append(run_folder(tmp_path / "unknown", loss=9.0))
    found = models(*runs)
    assert list(found) == ["teacher", "d-0", "d-1", "d-2", "hot", "unknown", "d, 3 seeds"]
    group = found["d, 3 seeds"]
    assert (group["kind"], group["runs"]) == ("seeds", ["d-0", "d-1", "d-2"])
    assert group["loss"] == pytest.approx(2.25)
    assert group["deviation"]["loss"] == pytest.approx(statistics.stdev(losses.values()))
    assert group["deviation"]["loss"] == pytest.approx(0.25)
    assert found["d-0"]["kind"] == "run"
    text = table(compare(CompareConfig(runs=tuple(runs))))
    assert "2.2500 ± 0.2500" in text.splitlines()[7]
    write_html(compare(CompareConfig(runs=tuple(runs))), tmp_path / "out.html")
    assert '<tr class="seeds"><td>d, 3 seeds</td>' in (tmp_path / "out.html").read_text()


def test_seeds_are_compared_with_the_mean_of_the_baseline(tmp_path):
    """Means 2.5 and 3.0, teacher 2.0: half of the gain, also where one seed did better."""
    runs = [
        run_folder(tmp_path / f"d-{seed}", loss=loss, options={"seed": seed})
        for seed, loss in ((0, 2.25), (1, 2.75))
    ]
    hard: dict[str, Any] = {"soft_weight": 0.0, "hard_weight": 1.0}
    runs += [
        run_folder(tmp_path / f"t-{seed}", loss=loss, options=hard | {"seed": seed}, weights=HARD)
        for seed, loss in ((0, 2.5), (1, 3.5))
    ]
    found = models(*runs)
    assert found["d, 2 seeds"]["recovered"] == pytest.approx(0.5)
    assert found["d-0"]["recovered"] == pytest.approx(0.75)
    assert found["d, 2 seeds"]["baseline"] == "t, 2 seeds"
    assert found["t, 2 seeds"]["is_baseline"]


def test_an_end_of_an_interval_that_is_no_number_is_named(tmp_path):
    run = run_folder(tmp_path / "a", numbers={"metric": "accuracy", "accuracy_low": "x"})
    with pytest.raises(CorruptRun, match="validation: accuracy_low: found 'x', expected a number"):
        models(run)
