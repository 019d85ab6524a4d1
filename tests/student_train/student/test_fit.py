"""What is held out must ask of a student what it learns, and hold rows to judge it by."""

import json
import shutil
from pathlib import Path

import pytest

from shared.cache import open_cache
from shared.errors import CacheMismatch
from student_train.config import EvaluateConfig
from student_train.evaluate.evaluate import run as evaluate
from teacher_cache.config import RepackConfig
from teacher_cache.tools.repack import repack


@pytest.fixture
def other_ids(capture, tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A cache of the same corpus by as many tokens, two of which have changed their ids."""
    folder = Path(shutil.copytree(tokenizer_dir, tmp_path / "other-tokenizer"))
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [token for token, index in vocabulary.items() if index in (260, 261)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return capture(teacher=None, tokenizer=str(folder), targets="none", limit_documents=40)


@pytest.fixture
def without_rows(cache_dir: Path, tmp_path: Path) -> Path:
    """A cache of document 7 alone, which is an empty line."""
    repack(RepackConfig(cache=cache_dir, out=tmp_path / "empty", documents="7:8"))
    assert open_cache(tmp_path / "empty").num_rows == 0
    return tmp_path / "empty"


def test_a_held_out_cache_of_another_tokenizer_is_refused(train, cache_dir, other_ids):
    """The student has no tokenizer files, so it takes any cache's; two at once it cannot."""
    ids = [open_cache(path).manifest.tokenizer.hash for path in (other_ids, cache_dir)]
    expected = (
        rf"--validation-cache {other_ids}: its tokenizer's content hash is {ids[0]}, but that of "
        rf"{cache_dir} is {ids[1]}\. Hold out rows of the same kind, with cache-teacher run --like"
    )
    with pytest.raises(CacheMismatch, match=expected):
        train(validation_cache=other_ids)


def test_a_checkpoint_is_judged_by_the_tokenizer_of_its_run(train, cache_dir, other_ids, tmp_path):
    train(max_steps=2, save_every=1)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert not list(checkpoint.glob("tokenizer*"))

    def judge(cache: Path) -> None:
        evaluate(EvaluateConfig(student=str(checkpoint), cache=cache, device="cpu"))

    judge(cache_dir)
    with pytest.raises(CacheMismatch, match=rf"{checkpoint}: its tokenizer is not the one of"):
        judge(other_ids)
    for file in (tmp_path / "run").glob("tokenizer*"):  # before its end a run has none either
        file.unlink()
    judge(cache_dir)
    with pytest.raises(CacheMismatch, match=rf"{checkpoint}: its tokenizer is not the one of"):
        judge(other_ids)


def test_a_held_out_cache_without_rows_is_refused(train, without_rows, teacher_dir):
    expected = (
        f"{without_rows}: its 13 committed shards hold 0 rows and no position to evaluate a "
        "student on. Name a cache with rows"
    )
    with pytest.raises(CacheMismatch, match=f"^--validation-cache {expected}"):
        train(validation_cache=without_rows)
    with pytest.raises(CacheMismatch, match=f"^{expected}"):
        evaluate(EvaluateConfig(student=str(teacher_dir), cache=without_rows, device="cpu"))
