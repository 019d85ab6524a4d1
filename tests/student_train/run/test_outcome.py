"""How a run ended, as its folder says it: three answers with their exit codes."""

import json

import pytest

from shared.errors import CorruptRun, IncompleteCache, Refused, Stopped, TeacherCacheError
from shared.options import main
from student_train.cli import app
from student_train.run import run as run_module
from student_train.run.folder import RunFolder
from student_train.run.outcome import RunRecord, status
from tests.student_train.run.test_trainer import SignalAt


def test_a_run_that_was_stopped_is_to_be_run_again_and_is_finished_then(
    train, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    SignalAt(monkeypatch, [2])
    with pytest.raises(Stopped) as stopped:
        train(max_steps=3)
    found = status(run)
    assert (found.answer, found.exit_code) == ("stopped, run again", 75)
    assert found.message == str(stopped.value)
    train(max_steps=3)
    assert (status(run).answer, status(run).exit_code) == ("finished", 0)
    assert not (run / "status.json").exists()


def test_a_run_that_failed_says_why(train, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "train_or_stop", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(max_steps=1)
    found = status(run)
    assert (found.answer, found.exit_code) == ("failed", 1)
    assert found.message == "ZeroDivisionError: division by zero"
    train(max_steps=1)
    assert status(run).answer == "finished"


def test_a_run_that_is_refused_when_it_would_go_on_has_failed(train, tmp_path, monkeypatch):
    """Whoever starts again what was stopped would do so for ever."""
    SignalAt(monkeypatch, [1])
    with pytest.raises(Stopped):
        train(max_steps=3)
    with pytest.raises(Refused) as refused:
        train(max_steps=3, seed=5)
    found = status(tmp_path / "run")
    assert (found.answer, found.message) == ("failed", str(refused.value))


def test_a_finished_run_is_finished_whatever_is_refused_later(train, tmp_path):
    train(max_steps=1)
    with pytest.raises(Refused):
        train(max_steps=1, seed=5)
    assert status(tmp_path / "run").answer == "finished"


def test_a_run_that_was_killed_is_to_be_run_again(train, tmp_path, monkeypatch):
    """It left no word, and nothing says that it would fail again."""

    def killed(*arguments):
        raise KeyboardInterrupt  # what ends it leaves no more than `kill -9` does

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "train_or_stop", killed)
        with pytest.raises(KeyboardInterrupt):
            train(max_steps=1)
    found = status(run)
    assert (found.answer, found.exit_code) == ("stopped, run again", 75)
    assert "it was killed, or is still at work" in found.message
    (run / "status.json").unlink()  # as an earlier version leaves it
    assert status(run) == found


def test_a_finished_run_that_was_stopped_on_its_way_to_more_steps(train, tmp_path, monkeypatch):
    train(max_steps=1)
    SignalAt(monkeypatch, [2])
    with pytest.raises(Stopped):
        train(max_steps=4)
    assert status(tmp_path / "run").answer == "stopped, run again"
    train(max_steps=1)  # asked for what it has
    assert status(tmp_path / "run").answer == "finished"


def test_the_failure_of_the_first_rank_stays(train, tmp_path, monkeypatch):
    """The other ranks fail after it, because it is gone."""

    def fail(*arguments):
        monkeypatch.setenv("RANK", "1")
        for reason in ("memory ran out", "connection closed by peer"):
            with (
                pytest.raises(RuntimeError),
                RunRecord(RunFolder(tmp_path / "run").storage, main_process=False),
            ):
                raise RuntimeError(reason)
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(run_module, "train_or_stop", fail)
    with pytest.raises(RuntimeError):
        train(max_steps=1)
    assert status(tmp_path / "run").message == "RuntimeError: memory ran out"


def test_what_the_command_prints(train, tmp_path, capsys):
    train(max_steps=1)

    def ask(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(app, ["status", str(tmp_path / "run"), *flags])
        return end.value.code or 0, capsys.readouterr().out

    message = f"{tmp_path / 'run'}: this run is finished, up to --max-steps 1 or an early stop."
    assert ask() == (0, f"finished\n{message}\n")
    code, text = ask("--json")
    assert code == 0
    assert json.loads(text) == {"status": "finished", "exit_code": 0, "message": message}
    (tmp_path / "run" / "result.json").unlink()
    assert ask()[0] == 75
    record = {"state": "failed", "max_steps": 1, "message": "why"}
    (tmp_path / "run" / "status.json").write_text(json.dumps(record))
    assert ask() == (1, "failed\nwhy\n")


def test_a_folder_without_a_run_and_a_damaged_status_have_their_messages(train, tmp_path):
    with pytest.raises(IncompleteCache, match=r"no run was started here \(snapshot.json is missi"):
        status(tmp_path)
    train(max_steps=1)
    file = tmp_path / "run" / "status.json"
    for damage in (b"", b"{}", b'{"state": "asleep", "max_steps": 1, "message": null}', b"[1]"):
        file.write_bytes(damage)
        with pytest.raises(TeacherCacheError) as error:
            status(tmp_path / "run")
        assert type(error.value) is CorruptRun
        assert str(error.value).startswith(f"{file}: ")
        assert "Delete it and run the same train-student run command again" in str(error.value)
