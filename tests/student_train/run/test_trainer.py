"""Runs of stage two on a real tiny cache: resume, accumulation, processes, adapters, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from shared.cache import Cache, open_cache
from shared.errors import CacheMismatch, ConfigError, CorruptCache, IncompleteCache, Stopped
from student_train.config import TrainConfig
from student_train.data.order import Order, OrderSpec
from student_train.run.callbacks import StopOnSignal
from student_train.run.trainer import DistillTrainer


def losses(run: Path) -> list[tuple[int, str]]:
    """(step, loss in hexadecimal) of every training line."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss_hex"]) for line in lines if line["kind"] == "train"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


class SignalAt:
    """Sends a signal to this process at the end of a step, as a scheduler would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
        original = StopOnSignal.on_step_end
        remaining = list(steps)

        def on_step_end(self: StopOnSignal, args: Any, state: Any, control: Any, **kw: Any) -> Any:
            if remaining and state.global_step == remaining[0]:
                remaining.pop(0)
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, args, state, control, **kw)

        monkeypatch.setattr(StopOnSignal, "on_step_end", on_step_end)


def test_stopped_twice_and_resumed_equals_uninterrupted(train, tmp_path, monkeypatch):
    train(out=tmp_path / "whole", max_steps=9)
    SignalAt(monkeypatch, [3, 5])
    out = tmp_path / "pieces"
    for threads in (1, 2):
        with pytest.raises(Stopped, match=r"after step [35] of 9, state saved"):
            train(out=out, max_steps=9, threads=threads)
    train(out=out, max_steps=9, threads=3)
    assert losses(out) == losses(tmp_path / "whole")
    assert [step for step, _ in losses(out)] == list(range(1, 10))
    torch.testing.assert_close(weights(out), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_a_broken_last_checkpoint_is_passed_over(train, tmp_path, monkeypatch, caplog):
    train(out=tmp_path / "whole", max_steps=8)
    SignalAt(monkeypatch, [6])
    with pytest.raises(Stopped):
        train(out=tmp_path / "run", max_steps=8, save_every=3)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {
        "checkpoint-3",
        "checkpoint-6",
    }
    weights_file = tmp_path / "run" / "checkpoint-6" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:100])
    train(out=tmp_path / "run", max_steps=8, save_every=3)
    assert "checkpoint-6: incomplete or damaged" in caplog.text
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_accumulation_changes_only_rounding(train, tmp_path):
    train(out=tmp_path / "one", micro_batch_tokens=1000, student=_without_dropout(tmp_path))
    train(out=tmp_path / "four", micro_batch_tokens=250, student=_without_dropout(tmp_path))
    # AdamW divides by the root of squared gradients, so float32 rounding grows to 1e-4 of a step.
    torch.testing.assert_close(
        weights(tmp_path / "four"), weights(tmp_path / "one"), rtol=1e-3, atol=3e-6
    )
    for (_, one), (_, four) in zip(
        losses(tmp_path / "one"), losses(tmp_path / "four"), strict=True
    ):
        assert float.fromhex(four) == pytest.approx(float.fromhex(one), rel=1e-6)


def _without_dropout(tmp_path: Path) -> str:
    """The student configuration with no dropout, whose mask would depend on the micro-batch."""
    from tests.conftest import llama_config

    folder = tmp_path / "no-dropout"
    config = llama_config(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    config.save_pretrained(folder)
    return str(folder)


def test_two_processes_equal_one(train, tmp_path, cache_dir):
    student = _without_dropout(tmp_path)
    train(out=tmp_path / "one", student=student, validation_cache=cache_dir)
    options = {
        "student": student,
        "cache": cache_dir,
        "validation-cache": cache_dir,
        "out": tmp_path / "two",
        "max-steps": 6,
        "batch-tokens": 1000,
        "learning-rate": 3e-3,
        "log-every": 2,
        "device": "cpu",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*command, "-m", "student_train.cli", "run", *flags], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(
        weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-3, atol=3e-6
    )
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[1]["validation"]["loss"] == pytest.approx(
        results[0]["validation"]["loss"], rel=1e-5
    )
    assert results[1]["before"]["loss"] == pytest.approx(results[0]["before"]["loss"], rel=1e-5)
    for name in ("one", "two"):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        assert sum(line["kind"] == "eval" and line["step"] == 0 for line in lines) == 1
    for (_, one), (_, two) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert float.fromhex(two) == pytest.approx(float.fromhex(one), rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_and_other_micro_batches(train, tmp_path, cache_dir):
    """One rank, two, one again, in micro-batches of three sizes: only rounding differs."""
    student = _without_dropout(tmp_path)
    common = {"student": student, "max_steps": 9, "save_every": 3, "keep_checkpoints": 3}
    train(out=tmp_path / "whole", **common)
    out = tmp_path / "run"
    train(out=out, micro_batch_tokens=500, **common)
    options = {
        "student": student,
        "cache": cache_dir,
        "out": out,
        "max-steps": 9,
        "save-every": 3,
        "keep-checkpoints": 3,
        "batch-tokens": 1000,
        "learning-rate": 3e-3,
        "log-every": 2,
        "device": "cpu",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    for ranks, size, last in ((2, "250", 3), (1, "125", 6)):
        (out / "result.json").unlink()
        for checkpoint in out.glob("checkpoint-*"):
            if int(checkpoint.name.rpartition("-")[2]) > last:
                shutil.rmtree(checkpoint)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
        ]
        command += ["-m", "student_train.cli", "run", *flags, "--micro-batch-tokens", size]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"going on from checkpoint-{last}" in done.stderr
        for (_, one), (_, other) in zip(losses(tmp_path / "whole"), losses(out), strict=True):
            assert float.fromhex(other) == pytest.approx(float.fromhex(one), rel=1e-5)
        torch.testing.assert_close(weights(out), weights(tmp_path / "whole"), rtol=1e-3, atol=3e-6)


def test_a_resumed_run_reads_only_the_blocks_it_still_trains_on(train, cache_dir, monkeypatch):
    reads: list[int] = []
    original = Cache.read_block

    def read_block(self: Cache, block: int, **options: Any) -> Any:
        reads.append(block)
        return original(self, block, **options)

    options = {"batch_tokens": 500, "save_every": 4, "scheduler": "constant", "warmup_ratio": 0.0}
    train(max_steps=4, **options)
    monkeypatch.setattr(Cache, "read_block", read_block)
    train(max_steps=6, **options)
    cache = open_cache(cache_dir)
    order = Order(cache.block_rows, cache.row_tokens, OrderSpec(batch_tokens=500))
    rows = np.concatenate([step.rows for step in islice(order.steps(4), 2)])
    needed = np.unique(np.searchsorted(order.block_starts, rows, side="right") - 1)
    assert sorted(reads) == needed.tolist()
    assert len(needed) < cache.num_blocks


def test_one_batch_can_be_learnt_by_heart(train, cache_dir, capture, tmp_path):
    """The signal is alive: the KL to the teacher falls to a tenth."""
    from tests.conftest import llama_config

    llama_config(hidden_size=64).save_pretrained(tmp_path / "wide")
    few = capture(limit_documents=6)
    train(
        student=str(tmp_path / "wide"),
        cache=(few,),
        validation_cache=few,
        max_steps=60,
        eval_every=60,
        batch_tokens=5000,
        learning_rate=1e-2,
        hard_weight=0.0,
        out=tmp_path / "run",
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    soft = [line["soft"] for line in lines if line["kind"] == "train"]
    assert soft[-1] < soft[0] / 10
    (kl,) = [line["kl_bucketed"] for line in lines if line["kind"] == "eval" and line["step"]]
    assert kl < soft[0] / 10


def test_all_weights_zero_are_refused(train):
    with pytest.raises(ConfigError, match="are all 0: nothing to learn from"):
        train(soft_weight=0.0, hard_weight=0.0)


def test_label_smoothing_is_of_the_hard_loss_in_training_only(train, tmp_path, cache_dir):
    options = {"learning_rate": 0.0, "max_steps": 2, "validation_cache": cache_dir}
    options |= {"student": _without_dropout(tmp_path), "soft_weight": 0.0}
    plain = train(out=tmp_path / "plain", **options)
    smooth = train(out=tmp_path / "smooth", label_smoothing=0.4, **options)
    assert smooth["validation"] == plain["validation"]
    assert losses(tmp_path / "smooth") != losses(tmp_path / "plain")
    with pytest.raises(ConfigError, match="only read with a hard loss, but --hard-weight is 0"):
        train(hard_weight=0.0, label_smoothing=0.4)


def test_the_student_learns_what_the_teacher_says(train, cache_dir):
    result = train(
        max_steps=60,
        learning_rate=2e-2,
        validation_cache=cache_dir,
        batch_tokens=2000,
        eval_every=1,
    )
    lines = [json.loads(line) for line in (train_out(result)).read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "eval" and line["step"])
    assert result["validation"]["kl_bucketed"] < first["kl_bucketed"] / 1.5
    assert result["validation"]["agreement"] > first["agreement"]


def train_out(result: dict[str, Any]) -> Path:
    return Path(result["out"]) / "metrics.jsonl"


@pytest.mark.parametrize(
    "options", [{"temperature": 2.0}, {"soft_loss": "jsd"}, {"hidden_weight": 1.0}]
)
def test_evaluation_during_training_is_that_at_the_end(options, train, cache_dir, tmp_path):
    """Loss and KL at T = 1, whatever the student is trained on."""
    result = train(max_steps=2, eval_every=2, validation_cache=cache_dir, **options)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (during,) = [line for line in lines if line["kind"] == "eval" and line["step"]]
    for name in ("loss", "kl_bucketed", "agreement"):
        assert during[name] == pytest.approx(result["validation"][name], rel=1e-6)


def test_adapters_are_saved_and_reload(train, tmp_path, cache_dir, teacher_dir):
    from student_train.evaluate.evaluate import evaluate
    from student_train.student.build import build_student

    base = tmp_path / "base"
    shutil.copytree(teacher_dir, base)
    result = train(
        student=str(base), lora_rank=2, validation_cache=cache_dir, out=tmp_path / "lora"
    )
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    cache = open_cache(cache_dir)
    reloaded = build_student(str(tmp_path / "lora"), cache, seed=0)
    again = evaluate(reloaded, cache, batch_tokens=2000)
    assert again["loss"] == pytest.approx(result["validation"]["loss"], rel=1e-5)


PROJECTED: dict[str, Any] = {"hidden_weight": 0.5, "hidden_map": ("-1:-1", "0:0")}


def test_projections_are_in_checkpoints_and_not_in_the_model(train, tmp_path):
    out = tmp_path / "run"
    result = train(**PROJECTED, out=out)
    found = {name: tuple(tensor.shape) for name, tensor in weights(out / "checkpoint-6").items()}
    shapes = {name: shape for name, shape in found.items() if "projections" in name}
    assert shapes == {
        "distillation_projections.m1_m1.weight": (32, 16),
        "distillation_projections.0_0.weight": (32, 16),
    }
    assert weights(out).keys() == found.keys() - shapes.keys()
    assert not [path.name for path in out.iterdir() if "projection" in path.name]
    saved = load_file(out / "model.safetensors")
    assert result["parameters"] == sum(weight.numel() for weight in saved.values())
    lines = (out / "metrics.jsonl").read_text().splitlines()
    hidden = [json.loads(line)["hidden"] for line in lines if '"train"' in line]
    assert hidden[-1] < hidden[0]


def test_projections_go_on_where_a_stopped_run_left_them(train, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "pieces"
    train(**PROJECTED, out=whole)
    SignalAt(monkeypatch, [2])
    with pytest.raises(Stopped):
        train(**PROJECTED, out=out)
    train(**PROJECTED, out=out)
    assert losses(out) == losses(whole)
    last = weights(out / "checkpoint-6")
    torch.testing.assert_close(last, weights(whole / "checkpoint-6"), rtol=0, atol=0)


@pytest.mark.parametrize("hidden_loss", ["mse", "cosine", "contrastive"])
def test_every_hidden_loss_falls_on_a_cache_of_some_states(train, tmp_path, capture, hidden_loss):
    """fp8 states of every third position, layers mapped by themselves."""
    cache = capture(hidden_layers=(0, 1, -1), hidden_codec="fp8", hidden_every=3)
    options = {"soft_weight": 0.0, "hard_weight": 0.0, "hidden_weight": 1.0, "max_steps": 25}
    out = tmp_path / "run"
    train(cache=(cache,), hidden_loss=hidden_loss, hidden_map=("last",), out=out, **options)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    hidden = [line["hidden"] for line in lines if line["kind"] == "train"]
    assert hidden[0] == pytest.approx(lines[0]["loss"], rel=1e-5)
    assert sum(hidden[-3:]) < 0.9 * sum(hidden[:3])


@pytest.mark.parametrize(
    ("hidden_map", "cached", "blocks", "expected"),
    [
        ((), (-1, 3), 6, [(-1, -1)]),
        (("3:0", "-1:5"), (-1, 3), 6, [(3, 0), (-1, 5)]),
        (("last",), (-1, 3), 6, [(-1, -1)]),
        (("last",), (3, 7), 6, [(7, -1)]),
        (("uniform",), (3, 7, 11), 6, [(3, 1), (7, 3), (11, 5)]),
        (("uniform",), (-1, 3, 7), 6, [(3, 1), (7, 3), (-1, -1)]),
        (("uniform",), (-1, 0, 1, 2), 3, [(0, 0), (1, 1), (2, 2), (-1, -1)]),
        (("uniform",), (5,), 4, [(5, 3)]),
        (("uniform",), (0, 1, 2), 4, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_which_cached_layer_goes_to_which_of_the_student(hidden_map, cached, blocks, expected):
    options: dict[str, Any] = {"student": "s", "cache": (Path("c"),), "out": Path("o")}
    config = TrainConfig(**options, hidden_weight=1.0, hidden_map=hidden_map)
    assert list(config.layer_pairs(cached, blocks)) == expected
    assert TrainConfig(**options, hidden_map=hidden_map).layer_pairs(cached, blocks) == ()


def test_more_layers_than_blocks_are_not_spread(train, cache_dir):
    options: dict[str, Any] = {"student": "s", "cache": (Path("c"),), "out": Path("o")}
    config = TrainConfig(**options, hidden_weight=1.0, hidden_map=("uniform",))
    with pytest.raises(ConfigError, match=r"uniform: 3 cached layers .* 2 blocks: name pairs"):
        config.layer_pairs((0, 1, 2), 2)


def test_early_stopping_keeps_the_best_model(train, tmp_path, cache_dir):
    result = train(
        max_steps=40,
        learning_rate=1.0,  # diverges after the first steps
        scheduler="constant",
        warmup_ratio=0.0,
        eval_every=1,
        early_stopping_patience=2,
        validation_cache=cache_dir,
        out=tmp_path / "run",
    )
    evaluations = [
        line
        for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == "eval" and line["step"]
    ]
    assert result["steps"] < 40
    assert result["validation"]["loss"] == pytest.approx(
        min(line["loss"] for line in evaluations), rel=1e-6
    )


def test_early_stopping_by_what_evaluation_does_not_give_is_refused(train, cache_dir, labels_dir):
    options = {"early_stopping_patience": 1, "eval_every": 1}
    with pytest.raises(
        CacheMismatch, match=r"metric: .* is of causal-lm, which has no metric of it"
    ):
        train(early_stopping_metric="metric", validation_cache=cache_dir, **options)
    with pytest.raises(CacheMismatch, match=r"metric kl: .* holds hard labels only\. Use loss, or"):
        train(early_stopping_metric="kl", validation_cache=labels_dir, **options)


def test_another_metric_is_another_run(train, cache_dir):
    """The best number so far is kept with the state, and would be compared with another kind."""
    options = {"early_stopping_patience": 9, "eval_every": 3, "validation_cache": cache_dir}
    train(**options)
    with pytest.raises(CacheMismatch, match="early_stopping_metric: this run has 'loss', asked fo"):
        train(early_stopping_metric="kl", max_steps=9, **options)


def test_a_finished_run_is_not_run_again(train, tmp_path):
    first = train()
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    assert train() == first
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before


def test_a_finished_run_may_go_on_for_more_steps(train, tmp_path):
    train(max_steps=4, scheduler="constant", warmup_ratio=0.0)
    train(max_steps=7, scheduler="constant", warmup_ratio=0.0)
    train(max_steps=7, scheduler="constant", warmup_ratio=0.0, out=tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_another_config_in_the_same_folder_is_refused(train):
    train()
    with pytest.raises(CacheMismatch) as error:
        train(learning_rate=5e-3, soft_weight=0.7)
    assert "holds another run" in str(error.value)
    assert "learning_rate: this run has 0.003, asked for 0.005" in str(error.value)
    assert "soft_weight: this run has 1.0, asked for 0.7" in str(error.value)


def test_micro_batches_may_change_unless_rows_are_compared_within_them(train, tmp_path):
    train(micro_batch_tokens=500, out=tmp_path / "mse", hidden_weight=1.0)
    train(micro_batch_tokens=300, out=tmp_path / "mse", hidden_weight=1.0)
    options = {"out": tmp_path / "rows", "hidden_weight": 1.0, "hidden_loss": "contrastive"}
    train(micro_batch_tokens=500, **options)
    with pytest.raises(CacheMismatch, match="micro_batch_tokens: this run has 500, asked for 300"):
        train(micro_batch_tokens=300, **options)


def test_a_folder_with_something_else_is_not_touched(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(CacheMismatch, match="is not empty and holds no run"):
        train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_shard_gone_since_the_start_is_named(train, tmp_path, cache_copy, monkeypatch):
    SignalAt(monkeypatch, [2])
    with pytest.raises(Stopped):
        train(cache=(cache_copy,))
    (cache_copy / "commits" / "00001.json").unlink()
    with pytest.raises(CorruptCache, match="this run was started on shard 1 with hash"):
        train(cache=(cache_copy,))


def test_an_incomplete_cache_is_refused_unless_allowed(train, tmp_path, cache_copy):
    (cache_copy / "commits" / "00001.json").unlink()
    with pytest.raises(IncompleteCache, match=r"shard 1 is the first missing one.*--allow-partial"):
        train(cache=(cache_copy,))
    assert not (tmp_path / "run").exists()
    train(cache=(cache_copy,), allow_partial=True)


def test_resume_ignores_shards_committed_since(train, tmp_path, cache_copy, cache_dir, monkeypatch):
    hidden = cache_copy / "commits" / "00002.json"
    text = hidden.read_bytes()
    hidden.unlink()
    train(cache=(cache_copy,), allow_partial=True, out=tmp_path / "whole")
    SignalAt(monkeypatch, [2])
    with pytest.raises(Stopped):
        train(cache=(cache_copy,), allow_partial=True)
    hidden.write_bytes(text)
    train(cache=(cache_copy,), allow_partial=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 3.0}, "exact at 1, 2 only"),
        ({"hidden_weight": 1.0, "hidden_map": ("5:0",)}, "holds hidden layers -1, 0, not 5"),
        (
            {"hidden_weight": 1.0, "hidden_map": ("-1:1",)},
            "--hidden-map -1:1: the student has blocks 0 to 0",
        ),
        ({"hidden_map": ("first",)}, "--hidden-map first: expected T:S"),
        ({"hidden_map": ("last", "0:0")}, "--hidden-map last 0:0: last and uniform each stand"),
        ({"settings": ("learning_rate=1",)}, "use --learning-rate"),
        ({"settings": ("adam_bata2=0.9",)}, "did you mean adam_beta2"),
        ({"settings": ("adam_beta2={",)}, r"--set adam_beta2=\{: '\{' is no YAML value: while"),
    ],
)
def test_what_the_cache_or_the_trainer_lacks_is_refused(train, options, message):
    with pytest.raises((CacheMismatch, ConfigError), match=message):
        train(**options)


def test_soft_targets_from_a_label_only_cache_are_refused(train, labels_dir):
    with pytest.raises(CacheMismatch, match="holds hard labels only"):
        train(cache=(labels_dir,))
    train(cache=(labels_dir,), soft_weight=0.0, hard_weight=1.0)


def test_a_narrower_student_is_refused_and_a_wider_one_trains(train, tmp_path):
    from tests.conftest import llama_config

    for width in (299, 305):
        llama_config(vocab_size=width).save_pretrained(tmp_path / str(width))
    with pytest.raises(CacheMismatch, match=r"its head has 299 classes, but .* cached over 300"):
        train(student=str(tmp_path / "299"))
    train(student=str(tmp_path / "305"))


def test_a_student_with_too_few_positions_is_refused(train, tmp_path):
    from tests.conftest import llama_config

    llama_config(max_position_embeddings=16).save_pretrained(tmp_path / "short")
    with pytest.raises(CacheMismatch, match="takes 16 positions, but the longest row"):
        train(student=str(tmp_path / "short"))


def test_a_student_with_another_tokenizer_is_refused(train, tmp_path, teacher_dir):
    other = Path(shutil.copytree(teacher_dir, tmp_path / "other"))
    text = (other / "tokenizer.json").read_text()
    tokens = json.loads(text)
    vocabulary = tokens["model"]["vocab"]
    first, second = [token for token, index in vocabulary.items() if index in (260, 261)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(CacheMismatch) as error:
        train(student=str(other))
    assert "its tokenizer is not the one of" in str(error.value)
    assert "2 ids differ, the first ones (student / cache): 260:" in str(error.value)


def test_every_overridden_method_exists_in_the_trainer():
    own = [name for name in vars(DistillTrainer) if callable(getattr(DistillTrainer, name))]
    for name in set(own) - {"__init__"}:
        assert callable(getattr(Trainer, name)), name


def test_nothing_pickled_beside_the_states_that_load_weights_only(train, tmp_path):
    train(save_every=3)
    names = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "training_args.bin" not in names
    assert {name for name in names if name.endswith((".bin", ".pkl"))} == set()


def test_the_saved_student_loads_with_plain_transformers(train, tmp_path):
    train()
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    logits = student(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert logits.shape == (1, 3, 300)
