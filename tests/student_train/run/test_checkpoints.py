"""Damaged and tampered checkpoints: no code runs, the file is named, the run goes back to a whole
one."""

import json
import os
import pickle
import random
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import CorruptCache, CorruptRun, TeacherCacheError
from student_train.run.checkpoints import check
from tests.student_train.run.test_trainer import losses

OPTIONS = {"save_every": 2, "scheduler": "constant", "warmup_ratio": 0.0}
FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def run(train, tmp_path):
    """A run of 4 steps with checkpoints at 2 and at 4."""
    train(max_steps=4, out=tmp_path / "run", **OPTIONS)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-4",
    }
    return tmp_path / "run"


def tampered(path: Path, marker: Path) -> dict[str, bytes]:
    """What may stand in a file instead of what a run wrote."""
    torch.save({"state": Touch(marker)}, path.with_name("bomb"))
    bomb = path.with_name("bomb").read_bytes()
    path.with_name("bomb").unlink()
    data = path.read_bytes()
    return {
        "a pickle that runs code": pickle.dumps(Touch(marker)),
        "a torch file that runs code": bomb,
        "junk": bytes(range(256)) * 8,
        "nothing": b"",
        "half of it": data[: len(data) // 2],
        "all but the last bytes": data[:-3],
    }


def test_the_bombs_go_off(tmp_path):
    """Where they are unpickled as torch would without weights_only."""
    (tmp_path / "x").touch()
    made = tampered(tmp_path / "x", tmp_path / "marker")
    pickle.loads(made["a pickle that runs code"])  # noqa: S301
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("file", FILES)
def test_what_no_run_wrote_is_found_and_not_run(run, tmp_path, file):
    checkpoint, marker = run / "checkpoint-4", tmp_path / "marker"
    check(checkpoint)
    before = (checkpoint / file).read_bytes()
    for what, data in tampered(checkpoint / file, marker).items():
        (checkpoint / file).write_bytes(data)
        with pytest.raises((CorruptRun, CorruptCache)) as error:
            check(checkpoint)
        assert str(error.value).startswith(f"{checkpoint / file}: "), what
        assert "found" in str(error.value) or "not valid JSON" in str(error.value), what
        assert not marker.exists(), what
    (checkpoint / file).unlink()
    with pytest.raises((CorruptRun, CorruptCache)) as error:
        check(checkpoint)
    gone = "found no weights" if file == "model.safetensors" else f"{file}: this file is missing"
    assert gone in str(error.value)
    (checkpoint / file).write_bytes(before)
    check(checkpoint)


@pytest.mark.parametrize("file", FILES)
def test_a_run_goes_back_one_checkpoint(run, train, tmp_path, file, caplog):
    """And computes what an uninterrupted run computes."""
    train(max_steps=6, out=tmp_path / "whole", **OPTIONS)
    path, marker = run / "checkpoint-4" / file, tmp_path / "marker"
    path.write_bytes(tampered(path, marker)["a torch file that runs code"])
    train(max_steps=6, out=run, **OPTIONS)
    assert f"{path.parent}: incomplete or damaged, going back to the one before. {path}" in (
        caplog.text
    )
    assert losses(run) == losses(tmp_path / "whole")
    assert not marker.exists()


def test_without_a_whole_checkpoint_a_run_starts_again(run, train, tmp_path, caplog):
    train(max_steps=6, out=tmp_path / "whole", **OPTIONS)
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
    train(max_steps=6, out=run, **OPTIONS)
    assert "none of its checkpoints can be used, so the run starts again at step 0" in caplog.text
    assert losses(run) == losses(tmp_path / "whole")


def test_states_of_other_things_are_no_states(run):
    checkpoint = run / "checkpoint-4"
    for file, state, message in (
        ("optimizer.pt", {"weights": torch.ones(2)}, "a dict, expected a dict with state, param_"),
        ("scheduler.pt", [1, 2], "a list, expected a dict with last_epoch"),
        ("rng_state.pth", torch.ones(2), "a Tensor, expected a dict with python, numpy, cpu"),
    ):
        before = (checkpoint / file).read_bytes()
        torch.save(state, checkpoint / file)
        with pytest.raises(CorruptRun) as error:
            check(checkpoint)
        assert f"{checkpoint / file}: found {message}" in str(error.value)
        (checkpoint / file).write_bytes(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_step": 3}, "found global_step 3, expected 4"),
        ({"global_step": "4"}, "global_step: found '4', expected a value of type int"),
        ({"log_history": {}}, "log_history: found '{}', expected a list"),
        ({"loss": 1}, "found the field 'loss', which no Trainer writes"),
        ({"best_model_checkpoint": "run/checkpoint-1"}, "checkpoint-1: found no weights"),
    ],
)
def test_a_trainer_state_that_does_not_fit_is_named(run, change, message):
    path = run / "checkpoint-4" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(TeacherCacheError) as error:
        check(run / "checkpoint-4")
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model_fsdp_0/.metadata"])
def test_weights_that_are_no_safetensors_are_not_loaded(run, tmp_path, name):
    path, marker = run / "checkpoint-4" / name, tmp_path / "marker"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(CorruptRun, match="may hold a pickle, expected weights in safetensors"):
        check(run / "checkpoint-4")
    assert not marker.exists()


def test_weights_in_several_files_are_all_looked_at(run):
    checkpoint = run / "checkpoint-4"
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    files = {name: f"model-{index}.safetensors" for index, name in enumerate(sorted(tensors))}
    for name, file in files.items():
        save_file({name: tensors[name]}, checkpoint / file)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    check(checkpoint)
    (checkpoint / "model-1.safetensors").unlink()
    with pytest.raises(CorruptRun, match=r"model-1\.safetensors: found no readable"):
        check(checkpoint)
    index.write_text(json.dumps({"weight_map": {"x": "../../model.safetensors"}}))
    with pytest.raises(CorruptCache, match="does not stay inside the folder"):
        check(checkpoint)


@pytest.mark.parametrize("file", FILES)
def test_bytes_changed_at_random_end_in_our_errors_only(run, file):
    """Some changes no structure shows, those of a number for instance; none is a traceback."""
    path = run / "checkpoint-4" / file
    before, chance, found = path.read_bytes(), random.Random(7), 0
    for _ in range(200):
        data = bytearray(before)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(min(len(data), 2000))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            check(run / "checkpoint-4")
        except TeacherCacheError:
            found += 1
    assert found > 20


def test_checkpoints_of_adapters_and_of_early_stopping_are_whole(
    train, teacher_dir, cache_dir, tmp_path
):
    """They hold other files, and name the best checkpoint so far; a damaged best one is named."""
    train(student=str(teacher_dir), lora_rank=2, out=tmp_path / "adapters", **OPTIONS)
    train(
        out=tmp_path / "stopping",
        eval_every=2,
        early_stopping_patience=3,
        validation_cache=cache_dir,
        **OPTIONS,
    )
    for run in ("adapters", "stopping"):
        made = list((tmp_path / run).glob("checkpoint-*"))
        assert len(made) == 2
        for checkpoint in made:
            check(checkpoint)
    best = json.loads((made[0] / "trainer_state.json").read_text())["best_model_checkpoint"]
    weights_file = Path(best) / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    with pytest.raises(CorruptRun, match=f"{Path(best).name}/model.safetensors: found no readable"):
        check(made[0])


def test_the_numbers_of_a_state_are_not_read(run):
    """A state of 1 GiB, a hole in the file, is checked without taking memory for it."""
    path = run / "checkpoint-4" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    state["state"][0]["exp_avg"] = torch.empty(1 << 28)
    with torch.serialization.skip_data():
        torch.save(state, path)
    assert path.stat().st_size > 1 << 30
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check(run / "checkpoint-4")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
