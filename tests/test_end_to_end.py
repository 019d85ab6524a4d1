"""The real commands, as a user types them, on real tiny objects."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def command(program: str, *arguments: object, ok: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(BIN / program), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == ok, done.stderr
    return done


def test_from_corpus_to_comparison(corpus_file, teacher_dir, student_config_dir, tmp_path):
    teacher = Path(shutil.copytree(teacher_dir, tmp_path / "teacher"))
    common = ("--teacher", teacher, "--corpus", corpus_file, "--max-length", 64, "--top-k", 8)
    planned = command("cache-teacher", "plan", *common, "--out", tmp_path / "cache", "--json")
    plan = json.loads(planned.stdout)
    assert plan["documents"] == 500
    train_split = ("--split", "train[:90%]", "--shard-tokens", 5000)
    command("cache-teacher", "run", *common, *train_split, "--out", tmp_path / "cache")
    command(
        "cache-teacher", "run", *common, "--split", "train[90%:]", "--out", tmp_path / "held-out"
    )
    verified = json.loads(command("cache-teacher", "verify", tmp_path / "cache", "--json").stdout)
    assert verified["sound"]
    inspected = json.loads(command("cache-teacher", "inspect", tmp_path / "cache", "--json").stdout)
    assert inspected["complete"]
    assert inspected["teacher"]["parameters"] > 0
    assert 0 < inspected["kept_mass"]["1"] <= 1

    shutil.rmtree(teacher)  # stage two must never need it
    runs = []
    for name, weights in (("distilled", ()), ("text", ("--soft-weight", 0, "--hard-weight", 1))):
        runs.append(tmp_path / name)
        command(
            "train-student",
            "run",
            *("--student", student_config_dir, "--cache", tmp_path / "cache"),
            *("--validation-cache", tmp_path / "held-out", "--out", runs[-1]),
            *("--max-steps", 4, "--batch-tokens", 1000),
            *weights,
        )
    compared = command("train-student", "compare", *runs, "--html", tmp_path / "compare.html")
    assert [line.split()[0] for line in compared.stdout.splitlines()[1:4]] == [
        "teacher",
        "distilled",
        "text",
    ]
    assert (tmp_path / "compare.html").stat().st_size > 5000
    evaluated = command(
        "train-student",
        "evaluate",
        "--student",
        runs[0],
        "--cache",
        tmp_path / "held-out",
        "--json",
    )
    result = json.loads((runs[0] / "result.json").read_text())
    assert json.loads(evaluated.stdout)["loss"] == pytest.approx(
        result["validation"]["loss"], rel=1e-5
    )
    again = command("train-student", "run", "--config", runs[0] / "run.yaml")
    assert "this run is finished" in again.stderr


_BLOCKED = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("the network is blocked in this test")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from student_train.cli import main
try:
    main()
finally:
    loaded = sorted(name for name in sys.modules if name.split(".")[0] == "teacher_cache")
    assert not loaded, loaded
"""


def test_a_student_trains_with_the_network_blocked_and_without_stage_one(
    cache_dir, student_config_dir, tmp_path
):
    arguments = ["run", "--student", student_config_dir, "--cache", cache_dir]
    arguments += ["--out", tmp_path / "run", "--max-steps", 2, "--batch-tokens", 500]
    done = subprocess.run(
        [sys.executable, "-c", _BLOCKED, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_HUB_OFFLINE": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").is_file()


def test_errors_are_one_paragraph_with_their_exit_code(tmp_path, student_config_dir):
    nowhere = command(
        "train-student",
        "run",
        *("--student", student_config_dir, "--cache", tmp_path / "none", "--out", tmp_path / "run"),
        ok=2,
    )
    assert "no cache here (manifest.json is missing)" in nowhere.stderr
    assert "Traceback" not in nowhere.stderr
    assert not (tmp_path / "run").exists()
    misspelt = tmp_path / "config.yaml"
    misspelt.write_text("student: x\ncache: y\nout: z\nlearning_rte: 1e-4\n")
    refused = command("train-student", "run", "--config", misspelt, ok=2)
    assert "learning_rte" in refused.stderr
    assert "learning_rate" in refused.stderr
