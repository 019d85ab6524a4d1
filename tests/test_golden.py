"""Format 1 stays readable: golden caches, and a second reader that follows the text alone.

P positions of a row, K entries, C classes, D channels.
"""

import functools
import hashlib
import inspect
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from safetensors.numpy import save as save_safetensors

import shared
from shared import cache, open_cache, strict
from shared.errors import CacheMismatch, CorruptCache
from shared.format import commits, frames, limits, manifest_file, reader
from shared.format.encoding import to_planes
from shared.format.schema import COLUMNS, planes_of
from shared.format.writer import EncodedBlock, ShardWriter, encode_block
from shared.storage import base
from shared.storage.local import LocalStorage
from shared.targets.spec import TargetSpec
from teacher_cache.config import VerifyConfig
from teacher_cache.tools import seal
from teacher_cache.tools.verify import verify
from tests import plain_reader, questions
from tests.plain_reader import read_cache
from tests.shared.format.test_shards import CLASSES, NO_HIDDEN, RANKS, cache_manifest, random_block

GOLDEN = Path(__file__).parent / "golden"
NAMES = [
    *("format-1", "format-1-labels"),
    *("format-1-adaptive", "format-1-sample", "format-1-dense"),
]
FLOAT32 = 3e-6  # a few roundings of a probability or of a unit of log-probability
OF_ROWS = ("row_id", "input_ids", "segments", "positions", "labels")
OF_ENTRIES = ("target_ids", "target_probabilities")
EXACT = (*OF_ROWS, "target_ids", "target_counts")

each_cache = pytest.mark.parametrize("name", NAMES)


def rows_of(path):
    """Every row as the plain reader names its parts, from open_cache and its blocks."""
    cache = open_cache(path)
    rows = []
    for number in range(cache.num_blocks):
        block = cache.read_block(number, hidden_layers=cache.manifest.hidden.layers)
        hidden = {f"hidden.{layer}": states for layer, states in block.hidden.items()}
        parts = {}
        for temperature, ratio in block.log_partition_ratio.items():
            parts[f"log_partition_ratio.{temperature:g}"] = ratio
        if block.target is not None:
            parts |= {"label_logprob": block.label_logprob, "entropy": block.entropy}
        ends = np.cumsum(block.num_positions)
        state_ends = np.cumsum(-(-block.num_positions // cache.manifest.hidden.every))
        for index, end in enumerate(ends):
            row = cache[len(rows)]
            names = ("row_id", "segments", "input_ids", "positions", "labels")
            found = {name: np.asarray(getattr(row, name)) for name in names}
            if row.targets is not None:
                found["target_ids"] = row.targets.ids.numpy()
                found["target_probabilities"] = row.targets.logprobs.exp().numpy()
                found["target_tail"] = row.targets.tail_mass.numpy()
                if row.targets.counts is not None:
                    found["target_counts"] = row.targets.counts.numpy()
            start = end - block.num_positions[index]
            states = slice(state_ends[index - 1] if index else 0, state_ends[index])
            found |= {name: values[states] for name, values in hidden.items()}
            rows.append(found | {name: values[start:end] for name, values in parts.items()})
    return rows


@functools.cache
def golden_rows(name):
    return rows_of(GOLDEN / name)


def assert_same(found, expected):
    """Integers and bits exactly, the rest to float32 rounding."""
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        assert left.keys() == right.keys()
        for part, value in right.items():
            assert np.shape(left[part]) == np.shape(value), part
            if part in EXACT or part.startswith("hidden."):
                np.testing.assert_array_equal(left[part], value, err_msg=part)
            else:
                np.testing.assert_allclose(
                    left[part], value, rtol=FLOAT32, atol=FLOAT32, err_msg=part
                )


def frozen(name):
    """What golden/README.md describes: some rows, each with its first and its last position."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def first_and_last(row):
    """The row with two of its positions only; of their entries, all."""
    found = {
        part: values if part in OF_ROWS else values[[0, -1]]
        for part, values in row.items()
        if "target_counts" not in row or part not in OF_ENTRIES
    }
    if "target_counts" in row:
        first, last = row["target_counts"][[0, -1]]
        for part in OF_ENTRIES:
            found[part] = np.concatenate([row[part][:first], row[part][-last:]])
    return found


@each_cache
def test_a_golden_cache_gives_its_frozen_values(name):
    rows, expected = golden_rows(name), frozen(name)
    assert len(rows) == expected["num_rows"]
    found = [first_and_last(rows[int(index)]) for index in expected["rows"]]
    assert_same(found, list(expected["rows"].values()))
    every_integer = hashlib.sha256()
    for row in rows:
        for part in sorted(row):
            if part in EXACT or part.startswith("hidden."):
                every_integer.update(np.asarray(row[part], "<i8").tobytes())
    assert every_integer.hexdigest() == expected["sha256_of_integers"]


@each_cache
def test_verify_finds_a_golden_cache_sound(name):
    found = verify(VerifyConfig(cache=GOLDEN / name))
    assert found.sound
    assert found.shards == found.num_shards > 1


@each_cache
def test_the_plain_reader_agrees_on_every_value_of_a_golden_cache(name):
    assert_same(list(read_cache(GOLDEN / name)), golden_rows(name))


@pytest.mark.parametrize("value_bits", [7, 8, 16])
@pytest.mark.parametrize(("packed", "labels", "top_k"), [(True, False, 5), (False, True, CLASSES)])
def test_the_plain_reader_agrees_on_columns_that_the_golden_caches_lack(
    value_bits, packed, labels, top_k, tmp_path
):
    """Written positions and labels, wide values, all classes kept, entries of probability 0."""
    spec = TargetSpec(
        kind="topk",
        num_classes=CLASSES,
        top_k=top_k,
        value_bits=value_bits,
        temperatures=(0.5, 4.0),
    )
    learnt = save_safetensors({"class_by_rank": RANKS.classes})
    digest = xxhash.xxh3_128_hexdigest(learnt)
    learnt_name = f"learnt-{digest[:16]}.safetensors"
    manifest = cache_manifest(packed=packed, positions=labels, labels=labels, targets=spec)
    plan = replace(manifest.plan, num_shards=1)
    manifest = replace(manifest, side_files={learnt_name: digest}, plan=plan)
    storage = LocalStorage(tmp_path / "cache")
    storage.put_new(learnt_name, learnt)
    manifest_file.publish(storage, manifest)
    with ShardWriter(storage, manifest, manifest.cache_id, 0) as writer:
        for number in range(2):
            block = random_block(manifest, 6, seed=number)
            if labels:
                block.positions = np.concatenate([np.arange(n) for n in block.num_positions])
            block.target.logprobs[::3, 1] = -np.inf
            writer.write(encode_block(block, number, manifest, RANKS))
    assert_same(list(read_cache(storage.root)), rows_of(storage.root))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("codec", ["bf16", "fp8", "int8"])
def test_the_plain_reader_agrees_on_hidden_states_of_every_codec(codec, every, capture):
    options = {"hidden_codec": codec, "hidden_every": every, "hidden_layers": (-1, 0)}
    cache = capture(limit_documents=120, pack=every == 3, top_k=4, **options)
    rows = rows_of(cache)
    assert_same(list(read_cache(cache)), rows)
    columns = plain_reader.layout(json.loads((cache / "manifest.json").read_bytes()))
    assert {name.removesuffix(".scale") for name in columns} == {
        plane.column for plane in planes_of(open_cache(cache).manifest)
    }
    for row in rows:
        assert len(row["hidden.0"]) == -(-len(row["positions"]) // every)


@pytest.mark.parametrize("kind", ["dense", "adaptive"])
def test_the_plain_reader_agrees_on_windows_and_their_references(kind, tmp_path):
    """Segments of another meaning, token types, references, classes that are tokens."""
    corpus = questions.write_corpus(tmp_path / "q.jsonl", questions.make_documents(20))
    teacher = questions.write_teacher(tmp_path / "teacher")
    options = {"teacher": str(teacher), "targets": kind}
    if kind == "adaptive":
        options["mean_entries"] = 3.0
    cache = questions.capture(tmp_path / "cache", corpus, **options)
    rows = list(read_cache(tmp_path / "cache"))
    assert_same(
        [
            {n: v for n, v in row.items() if n not in ("token_type_ids", "reference")}
            for row in rows
        ],
        rows_of(tmp_path / "cache"),
    )
    for row, ours in zip(rows, cache, strict=True):
        assert row["reference"] == ours.reference
        assert row["token_type_ids"].tolist() == ours.token_type_ids.tolist()
        before, tokens = row["segments"][:2]
        begins = np.cumsum(ours.reference["steps"])
        assert len(begins) == len(ours.reference["lengths"]) == tokens
        start, end = row["labels"] - before
        if row["labels"].any():
            found = ours.reference["text"][
                begins[start] : begins[end] + ours.reference["lengths"][end]
            ]
            assert found in ours.reference["answers"]


@pytest.mark.parametrize("value_bits", [7, 8, 16])
@pytest.mark.parametrize("kind", ["adaptive", "sample", "dense"])
def test_the_plain_reader_agrees_on_every_code_of_the_other_kinds(kind, value_bits, tmp_path):
    """Codes and tails at random, also those that no writer makes."""
    spec = TargetSpec(
        kind=kind, num_classes=CLASSES, value_bits=value_bits, mean_entries=9, threshold=0.013
    )
    cache = one_shard(tmp_path / "cache", spec, code_seed=value_bits)
    assert_same(list(read_cache(cache)), rows_of(cache))


def one_shard(path, spec, *, code_seed):
    """A cache of one shard of two blocks whose planes of codes and tails are random."""
    rng = np.random.default_rng(code_seed)
    learnt = save_safetensors({"class_by_rank": RANKS.classes})
    digest = xxhash.xxh3_128_hexdigest(learnt)
    name = f"learnt-{digest[:16]}.safetensors"
    manifest = cache_manifest(targets=spec, hidden=NO_HIDDEN)
    plan = replace(manifest.plan, num_shards=1)
    manifest = replace(manifest, side_files={name: digest}, plan=plan)
    storage = LocalStorage(path)
    storage.put_new(name, learnt)
    manifest_file.publish(storage, manifest)
    with ShardWriter(storage, manifest, manifest.cache_id, 0) as writer:
        for number in range(2):
            block = random_block(manifest, 6, seed=number)
            planes = to_planes(block, manifest, RANKS)
            for plane in planes_of(manifest):
                if plane.column in ("target_codes", "target_tail"):
                    size = planes[plane.name].size
                    high = 0x50 if plane.name == "target_codes.1" else 256  # 32 nats
                    planes[plane.name] = rng.integers(0, high, size).astype(np.uint8)
            frames_of = {
                plane.name: frames.compress(
                    planes[plane.name],
                    block=number,
                    column=frames.column_code(plane.number, plane.plane),
                )
                for plane in planes_of(manifest)
            }
            writer.write(EncodedBlock(frames_of, block.num_tokens, block.num_positions))
    return path


def test_the_text_lists_exactly_the_columns_of_the_schema():
    text = (Path(shared.__file__).parent / "format" / "FORMAT.md").read_text()
    text, _, _ = text.partition("| what | at most |")  # the table of limits comes later
    found = []
    for names, numbers in re.findall(
        r"^\| (`[^|]*`) \| (\d+(?:, \d+)*)(?: [^|]*)? \|", text, re.MULTILINE
    ):
        columns = [name.partition(".<")[0] for name in re.findall(r"`([^`]+)`", names)]
        found += zip(columns, map(int, numbers.split(",")), strict=True)
    assert found == sorted(((c.name, c.number) for c in COLUMNS), key=lambda pair: pair[1])


LIMITS = re.compile(r"_?(MAX|MOST|FREE)_[A-Z_]+|_ROWS_ON_TRUST")


def test_the_text_states_every_limit_with_its_value():
    text = (Path(shared.__file__).parent / "format" / "FORMAT.md").read_text()
    rows = re.findall(r"^\| .* \| ([\d,]+) \| `(\w+)\.(\w+)` \|$", text, re.MULTILINE)
    stated = {(module, name): int(value.replace(",", "")) for value, module, name in rows}
    actual = {
        (module.__name__.rpartition(".")[2], name): value
        for module in (base, strict, manifest_file, limits, commits, reader, cache, seal)
        for name, value in vars(module).items()
        if LIMITS.fullmatch(name) and f"\n{name} = " in inspect.getsource(module)
    }
    assert len(rows) == len(stated)
    assert stated == actual


@each_cache
def test_the_plain_reader_knows_exactly_the_planes_of_the_writer(name):
    """Every plane of a shard is read, so none can be left out of the text."""
    columns = plain_reader.layout(json.loads((GOLDEN / name / "manifest.json").read_bytes()))
    found = {f"{column}.{p}" for column, row in columns.items() for p in range(row[1])}
    assert found == {plane.name for plane in planes_of(open_cache(GOLDEN / name).manifest)}
    for path in (GOLDEN / name / "shards").iterdir():
        assert found == set(pa.ipc.open_file(path.read_bytes()).schema.names)


def change_manifest(cache, **changes):
    """Changes fields of manifest.json, and its hash; returns the new cache id."""
    fields = json.loads((cache / "manifest.json").read_bytes()) | changes
    content = json.dumps(fields).encode()
    cache_id = hashlib.sha256(content).hexdigest()
    (cache / "manifest.json").write_bytes(content)
    (cache / "manifest.sha256").write_text(f"{cache_id}  manifest.json\n")
    return cache_id


def rewrite(cache, cache_id, change):
    """Every shard and commit again under this cache id, with its record batches changed."""
    for path in (cache / "commits").iterdir():
        commit = json.loads(path.read_bytes())
        old = pa.ipc.open_file((cache / commit["file"]).read_bytes())
        batches = [change(old.get_batch(index)) for index in range(old.num_record_batches)]
        schema = batches[0].schema.with_metadata(
            old.schema.metadata | {b"cache_id": cache_id.encode()}
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        content = sink.getvalue().to_pybytes()
        digest = xxhash.xxh3_128_hexdigest(content)
        (cache / commit["file"]).unlink()
        del commit["checksum"]
        commit |= {"cache_id": cache_id, "num_bytes": len(content), "xxh3_128": digest}
        commit |= {"file": f"shards/{commit['shard']:05d}-{digest[:16]}.arrow", "a_later_field": 1}
        text = json.dumps(commit, sort_keys=True, separators=(",", ":"))
        commit["checksum"] = xxhash.xxh3_128_hexdigest(text.encode())
        (cache / commit["file"]).write_bytes(content)
        path.write_text(json.dumps(commit, sort_keys=True, separators=(",", ":")))


@pytest.fixture
def golden_copy(tmp_path):
    """Copies a golden cache, for a test that changes it."""
    return lambda name: Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def test_a_later_format_is_refused(golden_copy):
    cache = golden_copy("format-1")
    change_manifest(cache, format_version=2)
    expected = (
        "manifest.json: format 2 needs a newer teacher-cache; this one reads up to format 1. "
        "Run pip install --upgrade teacher-cache."
    )
    with pytest.raises(CacheMismatch, match=re.escape(expected)):
        open_cache(cache)
    with pytest.raises(ValueError, match="format_version"):
        next(read_cache(cache))


@each_cache
def test_fields_and_columns_of_a_later_version_are_ignored(name, golden_copy):
    cache = golden_copy(name)
    fields = json.loads((cache / "manifest.json").read_bytes())
    cache_id = change_manifest(
        cache,
        a_later_field={"of": ["any", "kind"]},
        columns=[*fields["columns"], "a_later_column"],
        targets=fields["targets"] | {"a_later_field": 1},
    )
    rewrite(
        cache,
        cache_id,
        lambda batch: batch.append_column(
            "a_later_column.0", pa.array([b"any bytes"] * len(batch), pa.large_binary())
        ),
    )
    assert open_cache(cache).cache_id == cache_id
    assert_same(rows_of(cache), golden_rows(name))
    assert_same(list(read_cache(cache)), golden_rows(name))
    assert verify(VerifyConfig(cache=cache)).sound


def test_blocks_in_each_other_s_place_are_refused_by_both_readers(golden_copy):
    """All hashes are right: only the frames themselves say where they belong."""
    cache = golden_copy("format-1-labels")
    cache_id = open_cache(cache).cache_id
    rewrite(cache, cache_id, lambda batch: batch.take(pa.array([1, 0])))
    with pytest.raises(CorruptCache, match="block 0, column 1, plane 0: found"):
        open_cache(cache)[0]
    with pytest.raises(ValueError, match="frame of block 0, column 1, plane 0"):
        next(read_cache(cache))


@each_cache
def test_the_plain_reader_finds_a_changed_byte_in_every_file(name, golden_copy):
    cache = golden_copy(name)
    rng = np.random.default_rng(0)
    for path in sorted(path for path in cache.rglob("*") if path.is_file()):
        sound = path.read_bytes()
        changed = bytearray(sound)
        changed[int(rng.integers(len(sound)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        with pytest.raises((ValueError, KeyError)):
            list(read_cache(cache))
        path.write_bytes(sound)
    next(read_cache(cache))  # the copy is whole again: it was the bytes
