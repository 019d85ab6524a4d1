"""The real command under torchrun: a rank that dies is started again, and no byte differs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import teacher_cache
from shared import open_cache
from tests.test_crash import CAPTURED, tree

# `cache-teacher run` where one rank ends at the n-th time it is about to name a shard, once; every
# rank writes down which start of torchrun it saw, and whether there was a process group.
COMMAND = """
import os, sys
from pathlib import Path
import torch.distributed
from shared.storage import local
from shared.format import writer
from teacher_cache import cli

folder, name = Path(os.environ["SEEN"]), "before-publish"
start, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
seen = 0

def crash_point(point):
    global seen
    seen += point == name
    if point != name:
        return
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    (folder / f"start-{start}-rank-{rank}").write_text(f"{seen} shards, process group: {group}")
    if (start, seen) == ("0", 2):  # whichever rank is first
        os._exit(9)

local.crash_point = writer.crash_point = crash_point
cli.main()
"""


@pytest.mark.slow
def test_torchrun_starts_a_rank_that_died_again_and_the_bytes_are_those_of_a_calm_run(
    capture, teacher_dir, corpus_file, tmp_path
):
    options = CAPTURED | {"limit_documents": 60}
    calm = capture(**options)
    assert open_cache(calm).manifest.plan.num_shards >= 6
    script, seen, out = tmp_path / "command.py", tmp_path / "seen", tmp_path / "cache"
    script.write_text(COMMAND)
    seen.mkdir()
    named = options | {"teacher": teacher_dir, "corpus": corpus_file, "out": out}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in named.items()]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, "--max-restarts=2", str(script), "run", *arguments],
        env=os.environ | {"SEEN": str(seen), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert tree(out) == tree(calm)
    starts = {path.name: path.read_text() for path in seen.iterdir()}
    assert any(text.startswith("2 shards") for name, text in starts.items() if "start-0" in name)
    assert any(name.startswith("start-1") for name in starts)
    assert all(text.endswith("process group: False") for text in starts.values())
    workers = {path.stem for path in (out / "runs").iterdir()}
    assert workers == {"worker-0-of-2", "worker-1-of-2"}


def test_capture_makes_no_process_group():
    """With one, a restart of the ranks fails in the teardown of the group."""
    for path in Path(teacher_cache.__file__).parent.rglob("*.py"):
        assert "init_process_group" not in path.read_text(), path
