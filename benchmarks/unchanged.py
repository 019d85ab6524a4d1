"""Proof that a change of the code changes nothing of what it makes.

    python benchmarks/unchanged.py --before REV [--work DIR]

Runs one list of small jobs (unchanged_jobs.py) with a checkout of REV, made for it as a git
worktree, and with the checkout this file is in: the same interpreter, the same inputs
(unchanged_props.py), one thread each, no GPU. Then it compares

  caches   every file but runs/, by sha256: for every kind of target, every task, every codec of
           hidden states, --like, repack; and the model that `cache-teacher student` makes
  losses   every number of metrics.jsonl that is no time or rate, as float.hex: of a student of each
           task and of ensembles and mixtures
  weights  every .safetensors file of a run, by sha256
  printed  what each command wrote to standard output, and its exit code
  options  the flags of each command with their defaults and help; not how they are grouped
  configs  keys and values of the resolved configs

Prints one JSON line, in which `equal` says it all, and the details to stderr; ends with 1 if
anything differs, or if a job fails that is meant to succeed. With --work the outputs stay there, in
before/ and after/.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from unchanged_jobs import jobs
from unchanged_props import make_props

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "32c74a2"
SIDES = ("before", "after")
_TIME_OR_RATE = re.compile(r"(^|_)(s|seconds|gib)$")
_DEFAULT = re.compile(r"\[(?:default: (.*)|required)\]$")
_OF_THE_MACHINE = re.compile(r'"free_bytes": \d+')
_SHOWN = 12  # differences of a kind that are listed on stderr

Facts = dict[str, dict[str, str]]  # of a thing, such as a cache: a value by its name


def main() -> None:
    """Makes both checkouts' outputs, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default=BASELINE, help="revision to compare with")
    parser.add_argument("--work", type=Path, help="a new folder to keep the outputs in")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(args.work or scratch).resolve() / "unchanged"
        make_props(work / "props", ROOT / "tests" / "data")
        with checkout_of(args.before, Path(scratch)) as before:
            run_both(work, {"before": before, "after": ROOT})
        found = compare(work / "before", work / "after")
    found["seconds"] = round(time.monotonic() - started)
    print(json.dumps({"benchmark": "unchanged", "before": commit_of(args.before), **found}))
    sys.exit(0 if found["equal"] else 1)


@contextmanager
def checkout_of(revision: str, scratch: Path) -> Iterator[Path]:
    """A worktree of a revision, which is gone afterwards."""
    folder = scratch / "checkout"
    git("worktree", "add", "--quiet", "--detach", str(folder), revision)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def git(*arguments: str) -> str:
    """What git says in this checkout."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit_of(revision: str) -> str:
    """The short hash of a revision."""
    return git("rev-parse", "--short", f"{revision}^{{commit}}")


def run_both(work: Path, checkouts: dict[str, Path]) -> None:
    """Runs all jobs with each checkout, side by side, in folders of their names."""
    script = Path(__file__).with_name("unchanged_jobs.py")
    children = {}
    for side, checkout in checkouts.items():
        (work / side).mkdir()
        command = [sys.executable, "-P", str(script), str(checkout)]
        environment = child_environment(checkout, work / f"home-{side}")
        children[side] = subprocess.Popen(command, cwd=work / side, env=environment)
    codes = {side: child.wait() for side, child in children.items()}
    if any(codes.values()):
        raise SystemExit(f"a child ended by itself: exit codes {codes}, its output is above")


def child_environment(checkout: Path, home: Path) -> dict[str, str]:
    """One thread, no GPU, no network, no launcher's variables, and lines as long as they are."""
    launchers = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return kept | {
        "PYTHONPATH": str(checkout),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home),
        "NO_COLOR": "1",
        "COLUMNS": "2000",
        "TERMINAL_WIDTH": "2000",
    }


# ---- What a side made


def cache_facts(side: Path) -> Facts:
    """The sha256 of every file of every cache and model, but of runs/, which is for people."""
    folders = sorted([*(side / "caches").iterdir(), *(side / "models").iterdir()])
    return {folder.name: file_hashes(folder, "*", besides="runs") for folder in folders}


def file_hashes(folder: Path, pattern: str, *, besides: str = "") -> dict[str, str]:
    """Path below the folder -> sha256."""
    files = (path for path in sorted(folder.rglob(pattern)) if path.is_file())
    named = {str(path.relative_to(folder)): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in named.items()
        if not (besides and name.startswith(f"{besides}/"))
    }


def weight_facts(side: Path) -> Facts:
    """The sha256 of every file of weights of every run."""
    return {
        run.name: file_hashes(run, "*.safetensors") for run in sorted((side / "runs").iterdir())
    }


def loss_facts(side: Path) -> Facts:
    """Every number of the log of every run but times and rates, in hexadecimal."""
    facts: Facts = {}
    for run in sorted((side / "runs").iterdir()):
        facts[run.name] = {}
        for number, line in enumerate(
            (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ):
            said = json.loads(line)
            if said["kind"] != "speed":
                where = f"line {number}, {said['kind']} of step {said['step']}"
                facts[run.name] |= dict(_numbers(said, where))
    return facts


def _numbers(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Where a number stands, and the number itself."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not _TIME_OR_RATE.search(name):
                yield from _numbers(inner, f"{where}: {name}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{where}[{index}]")
    elif isinstance(value, float):
        yield where, value.hex()
    else:
        yield where, json.dumps(value)


def printed_facts(side: Path) -> Facts:
    """What every job said, but of the machine's disk, and how it ended."""
    codes = json.loads((side / "done.json").read_text(encoding="utf-8"))
    facts: Facts = {}
    for job in jobs():
        said = (side / "printed" / f"{job.name}.out").read_text(encoding="utf-8")
        facts[job.name] = {
            "exit code": str(codes[job.name]["code"]),
            "standard output": _OF_THE_MACHINE.sub("", said),
        }
    return facts


def option_facts(side: Path) -> Facts:
    """For every command, each flag's default and help; the order and the headings do not count."""
    facts: Facts = {}
    for file in sorted((side / "printed").glob("help-*.out")):
        rows = facts[file.stem.removeprefix("help-")] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            cells = line.strip().strip("│").split()
            if line.startswith("│") and cells:
                text = " ".join(cells[1:])
                default = _DEFAULT.search(text)
                rows[cells[0]] = default.group() if default else "[no default]"
                rows[f"{cells[0]}, in full"] = text
    return facts


def config_facts(side: Path) -> Facts:
    """Keys and values of the resolved config of every cache and run."""
    files = [*side.glob("caches/*/runs/*.yaml"), *side.glob("runs/*/run.yaml")]
    return {
        str(file.relative_to(side)): {
            key: json.dumps(value)
            for key, value in yaml.safe_load(file.read_text(encoding="utf-8")).items()
        }
        for file in sorted(files)
    }


# ---- Comparison

_COMPARED = {
    "caches": cache_facts,
    "losses": loss_facts,
    "weights": weight_facts,
    "printed": printed_facts,
    "options": option_facts,
    "configs": config_facts,
}


def compare(before: Path, after: Path) -> dict[str, Any]:
    """The counts and all differences of each kind; `equal` if there are none and no job failed."""
    results: dict[str, Any] = {}
    for kind, facts_of in _COMPARED.items():
        old, new = facts_of(before), facts_of(after)
        differences = dict(_differences(old, new))
        results[kind] = {
            "compared": len(old),
            "values": sum(map(len, old.values())),
            "differ": differences,
        }
        _tell(kind, results[kind])
    manifests = {name: fields for name, fields in _manifest_differences(before, after) if fields}
    failed = _failed(before) | _failed(after)
    for name, error in failed.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    for name, fields in manifests.items():
        print(f"manifest of {name}: {fields}", file=sys.stderr)
    equal = not failed and not any(result["differ"] for result in results.values())
    return {"equal": equal, **results, "manifests": manifests, "failed": failed, **_versions()}


def _differences(old: Facts, new: Facts) -> Iterator[tuple[str, list[str]]]:
    """Thing -> names whose values differ, or that one side lacks."""
    for thing in sorted(old.keys() | new.keys()):
        one, two = old.get(thing, {}), new.get(thing, {})
        if thing not in old or thing not in new:
            yield thing, [f"only {'after' if thing in new else 'before'}"]
            continue
        changed = [name for name in one.keys() & two.keys() if one[name] != two[name]]
        added = [f"{name} (added)" for name in two.keys() - one.keys()]
        removed = [f"{name} (removed)" for name in one.keys() - two.keys()]
        if changed or added or removed:
            yield thing, sorted([*changed, *added, *removed])


def _manifest_differences(before: Path, after: Path) -> Iterator[tuple[str, list[str]]]:
    """Cache -> fields of its manifest that differ: everything else in a cache names its hash."""
    for file in sorted((before / "caches").glob("*/manifest.json")):
        other = after / file.relative_to(before)
        if other.is_file():
            fields: list[Facts] = [
                {
                    key: dict(_numbers(value, ""))
                    for key, value in json.loads(path.read_text(encoding="utf-8")).items()
                }
                for path in (file, other)
            ]
            yield file.parent.name, [f"{a}: {', '.join(b)}" for a, b in _differences(*fields)]


def _failed(side: Path) -> dict[str, str]:
    """Jobs that did not end with 0, and the last thing that each said."""
    codes = json.loads((side / "done.json").read_text(encoding="utf-8"))
    failed = {}
    for name in (name for name, done in codes.items() if done["code"] != 0):
        said = (side / "printed" / f"{name}.err").read_text(encoding="utf-8").splitlines()
        failed[f"{name} ({side.name})"] = said[-1] if said else "nothing was said"
    return failed


def _tell(kind: str, result: dict[str, Any]) -> None:
    """A line for a kind of fact, and one for each of the first differences."""
    differ = result["differ"]
    verdict = f"{len(differ)} differ" if differ else "all equal"
    print(f"{kind}: {result['compared']} compared, {verdict}", file=sys.stderr)
    for thing, names in differ.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        print(f"  {thing}: {', '.join(names[:_SHOWN])}{more}", file=sys.stderr)


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
