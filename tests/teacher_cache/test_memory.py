"""Out of memory: which errors count, and what a capture does once its plan is published."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from shared import open_cache
from shared.errors import TeacherCacheError
from teacher_cache.config import InspectConfig
from teacher_cache.engines.memory import is_out_of_memory
from teacher_cache.engines.streamed_head import TeacherBatch
from teacher_cache.engines.teacher import Teacher, TeacherOutput
from teacher_cache.tools.inspection import inspect
from teacher_cache.tools.report import inspect_text

ON_CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
                      "allocate memory: you tried to allocate 8 bytes. Error code 12")  # fmt: skip
OF_A_KERNEL = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
TOKENS = 20  # of every row of the corpus of rows of equal length

Fault = Callable[[int, RuntimeError, str], list[int]]


def test_what_torch_itself_raises_on_a_cpu_counts():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "counts"), [(ON_CUDA, True), (ON_CPU, True), (OF_A_KERNEL, False)]
)
def test_which_errors_count(error, counts):
    assert is_out_of_memory(error) == counts


@pytest.fixture(scope="module")
def equal_rows(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of 20 tokens with their end."""
    tokenizer, chance = AutoTokenizer.from_pretrained(tokenizer_dir), np.random.default_rng(0)
    letters = [chance.choice([*"bcdfgjkpqvxz"], TOKENS - 1) for _ in range(60)]
    lines = ["".join(each) for each in letters]  # letters that follow each other in no word
    assert {len(tokenizer(line)["input_ids"]) for line in lines} == {TOKENS - 1}
    path = tmp_path_factory.mktemp("equal") / "corpus.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    """A teacher that has room for so many tokens; returns the sizes of what did not fit."""

    def put(room: int, error: RuntimeError, place: str) -> list[int]:
        forward, refused = Teacher.forward, []

        def limited(self: Teacher, batch: TeacherBatch, *args: Any, **more: Any) -> TeacherOutput:
            captures = "chunk_positions" in more  # probes at the start do not name them
            fits = not captures or batch.input_ids.numel() <= room
            if not fits:
                refused.append(batch.input_ids.numel())
            if not fits and place == "trunk":
                raise error
            output = forward(self, batch, *args, **more)
            if fits:
                return output

            def chunks() -> Iterator[tuple[slice, torch.Tensor]]:
                yield next(iter(output.chunks))
                raise error

            return TeacherOutput(output.hidden, chunks())

        monkeypatch.setattr(Teacher, "forward", limited)
        return refused

    return put


OPTIONS = {
    "forward_tokens": 160,
    "shard_tokens": 500,
    "hidden_layers": (-1, 0),
    "temperature": (2.0,),
}


def published_only(cache: Path, out: Path) -> Path:
    """The same job with its plan published and no shard done."""
    shutil.copytree(cache, out, ignore=shutil.ignore_patterns("shards", "commits"))
    return out


def halved(cache: Path) -> int:
    commits = [json.loads(path.read_bytes()) for path in (cache / "commits").iterdir()]
    return sum(commit["statistics"].get("forwards_halved", 0) for commit in commits)


@pytest.mark.parametrize("place", ["trunk", "head"])
@pytest.mark.parametrize("error", [ON_CUDA, ON_CPU], ids=["cuda", "cpu"])
def test_rows_of_equal_length_get_the_same_bytes_in_halves(
    error, place, capture, equal_rows, fault, tmp_path
):
    """8 rows a forward by the plan, room for 3: halves of 4, then of 2."""
    options = OPTIONS | {"corpus": str(equal_rows)}
    calm = capture(**options)
    out = published_only(calm, tmp_path / "cache")
    refused = fault(3 * TOKENS, error, place)
    capture(**options, out=out)
    assert {8 * TOKENS, 4 * TOKENS} <= set(refused)
    assert halved(calm) == 0
    assert halved(out) == len(refused)
    for name in ("manifest.json", *(f"shards/{path.name}" for path in (calm / "shards").iterdir())):
        assert (out / name).read_bytes() == (calm / name).read_bytes()
    shown = inspect_text(inspect(InspectConfig(cache=out, rows=0)))
    assert f"forwards halved {len(refused)}" in shown
    assert "forwards halved" not in inspect_text(inspect(InspectConfig(cache=calm, rows=0)))


def test_rows_of_any_length_get_the_same_targets_within_rounding(capture, fault, tmp_path):
    """Halves are padded less, which moves the last bits of a float32 sum."""
    options = OPTIONS | {"limit_documents": 60, "value_bits": 16}
    calm = capture(**options)
    out = published_only(calm, tmp_path / "cache")
    assert fault(100, ON_CUDA, "trunk") == []
    capture(**options, out=out)
    assert halved(out) > 0
    one, other = open_cache(calm), open_cache(out)
    assert other.manifest == one.manifest
    for number in range(one.num_blocks):
        before, after = (c.read_block(number, hidden_layers=(-1, 0)) for c in (one, other))
        assert np.array_equal(before.input_ids, after.input_ids)
        assert np.array_equal(before.target.ids, after.target.ids)
        # fp16 of up to 16 nats may round to its other side
        np.testing.assert_allclose(before.target.logprobs, after.target.logprobs, atol=2**-7)
        for layer in (-1, 0):
            states = (
                torch.from_numpy(b.hidden[layer]).view(torch.bfloat16) for b in (before, after)
            )
            torch.testing.assert_close(*states, rtol=2**-7, atol=1e-5)  # a step of bfloat16


def test_a_row_that_does_not_fit_alone_is_named_with_the_way_out(
    capture, equal_rows, fault, tmp_path
):
    options = OPTIONS | {"corpus": str(equal_rows)}
    out = published_only(capture(**options), tmp_path / "cache")
    refused = fault(TOKENS - 1, ON_CUDA, "trunk")
    with pytest.raises(TeacherCacheError) as caught:
        capture(**options, out=out)
    assert refused == [8 * TOKENS, 4 * TOKENS, 2 * TOKENS, TOKENS]
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith(
        "out of memory: the row of document 0, 20 tokens, does not fit into the device's memory"
    )
    assert "run the same command again where more memory is free" in str(caught.value)
    assert "--max-length or --dtype" in str(caught.value)
    assert not list(out.rglob("*.arrow"))


def test_any_other_error_is_no_reason_to_halve(capture, equal_rows, fault, tmp_path):
    options = OPTIONS | {"corpus": str(equal_rows)}
    out = published_only(capture(**options), tmp_path / "cache")
    refused = fault(100, OF_A_KERNEL, "trunk")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        capture(**options, out=out)
    assert refused == [8 * TOKENS]
