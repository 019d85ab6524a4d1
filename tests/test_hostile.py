"""A cache from somebody with intent: every hash is right, and still nothing is run or swallowed.

Whatever it says, the answer is an error of our own, before memory is taken for what it claims.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import zstandard
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from shared import open_cache
from shared.cache import read_commits
from shared.errors import CorruptCache, TeacherCacheError
from shared.format import frames
from shared.format.commits import (
    MAX_COMMIT_BYTES,
    _checksum,
    commit_name,
    file_hash,
    packed_lengths,
    parse_commit,
    shard_name,
)
from shared.format.limits import MAX_SHARD_ROWS
from shared.format.manifest_file import MANIFEST, MANIFEST_HASH, MAX_MANIFEST_BYTES
from shared.format.reader import ShardReader
from shared.format.schema import planes_of
from shared.models.tokenizer import load_cached_tokenizer
from shared.storage.local import LocalStorage
from teacher_cache.config import VerifyConfig
from teacher_cache.tools.verify import verify


def ascii_of(value):
    return ascii(value)[:40]


SMALL = {"limit_documents": 20, "top_k": 4, "hidden_layers": (-1,), "temperature": (2.0,)}


@pytest.fixture(scope="module")
def pristine(capture):
    """20 documents in one shard."""
    return capture(**SMALL)


@pytest.fixture(scope="module")
def packed(capture):
    """The same in packed rows."""
    return capture(limit_documents=20, top_k=4, pack=True)


@pytest.fixture
def copy(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


@pytest.fixture
def packed_copy(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "packed"))


def read_all(path):
    """Everything that a student could read."""
    cache = open_cache(path, allow_partial=True)
    layers = cache.manifest.hidden.layers
    blocks = [cache.read_block(b, hidden_layers=layers) for b in range(cache.num_blocks)]
    return blocks, [cache.channel_deviation(layer) for layer in layers], cache.missing_shards


def forge_manifest(path, change):
    """Changes the manifest, and everything that holds its hash accordingly."""
    before = (path / MANIFEST).read_bytes()
    raw = json.loads(before)
    change(raw)
    after = json.dumps(raw).encode()
    old, new = (hashlib.sha256(data).hexdigest() for data in (before, after))
    (path / MANIFEST).write_bytes(after)
    (path / MANIFEST_HASH).write_text(f"{new}  {MANIFEST}\n")
    for shard in sorted((path / "shards").iterdir()):
        shard.write_bytes(shard.read_bytes().replace(old.encode(), new.encode()))
        forge_commit(path, lambda commit: commit | {"cache_id": new}, shard=shard)


def forge_commit(path, change=dict, *, shard=None):
    """Changes the commit of the only shard, for a file of other content too, with its checksum."""
    name = path / commit_name(0)
    body = json.loads(name.read_bytes())
    del body["checksum"]
    if shard is not None:
        digest = file_hash(shard)
        body |= {"xxh3_128": digest, "num_bytes": shard.stat().st_size}
        body["file"] = shard_name(0, digest)
        shard.rename(path / body["file"])
    body = change(body)
    body["checksum"] = _checksum(body)
    name.write_text(json.dumps(body, sort_keys=True, separators=(",", ":")))


def forge_shard(path, make):
    """Replaces the only shard by what `make` makes of its content."""
    (shard,) = (path / "shards").iterdir()
    shard.write_bytes(make(shard.read_bytes()))
    forge_commit(path, shard=shard)


def forge_side_file(path, start, data):
    """Replaces a side file, with its hash in the manifest."""

    def change(raw):
        name = next(name for name in raw["side_files"] if name.startswith(start))
        (path / name).write_bytes(data)
        raw["side_files"][name] = file_hash(path / name)

    forge_manifest(path, change)


def setter(keys, value):
    """Sets one value of nested objects, by its dotted name."""
    *parents, last = keys.split(".")

    def change(raw):
        for key in parents:
            raw = raw[key]
        raw[last] = value

    return change


def commit_of(path):
    return parse_commit((path / commit_name(0)).read_bytes(), "here")


def refused(path, match=""):
    with pytest.raises(TeacherCacheError, match=match):
        read_all(path)


def test_forging_alone_changes_nothing(copy):
    before = read_all(copy)
    forge_manifest(copy, lambda raw: None)
    forge_shard(copy, lambda data: data)
    assert len(read_all(copy)[0]) == len(before[0])


# Names ------------------------------------------------------------------------------------------

OUTSIDE = [
    "../secret",
    "a/../../secret",
    "/etc/passwd",
    "C:secret",
    "C:\\secret",
    "..\\secret",
    "a\0b",
    "",
    ".",
    "\ud800",
    "a\nb",
    "x" * 5000,
    "a/" * 3000 + "b",
]


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii_of)
def test_a_side_file_outside_the_folder_is_refused(copy, name):
    (copy.parent / "secret").write_text("secret")
    digest = file_hash(copy.parent / "secret")
    forge_manifest(copy, lambda raw: raw["side_files"].update({name: digest}))
    refused(copy, r"does not stay inside|is no name of|expected Unicode")


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii_of)
def test_a_commit_cannot_name_a_file_outside_the_folder(copy, name):
    for file in (name, f"shards/00000-{name}", f"shards/00000-/../../{name}"):
        shutil.copy(copy / commit_name(0), copy.parent / "commit")
        forge_commit(copy, lambda body, file=file: body | {"file": file})
        refused(copy, r"00000\.json: (names the file|file: found)")
        shutil.copy(copy.parent / "commit", copy / commit_name(0))


def test_a_hash_cannot_smuggle_a_path_into_the_name_of_a_shard(copy):
    digest = "/../../secret.ar"
    forge_commit(copy, lambda body: body | {"xxh3_128": digest, "file": shard_name(0, digest)})
    refused(copy, "does not stay inside the folder")


def test_links_out_of_the_folder_and_in_circles_are_refused(copy):
    (shard,) = (copy / "shards").iterdir()
    shard.rename(copy.parent / "outside")
    shard.symlink_to(copy.parent / "outside")
    refused(copy, "this link leaves the folder")
    shard.unlink()
    shard.symlink_to(shard.name)
    refused(copy, shard.name)


def test_a_pipe_is_not_waited_for(copy):
    (shard,) = (copy / "shards").iterdir()
    shard.unlink()
    os.mkfifo(shard)
    forge_commit(copy, lambda body: body | {"num_bytes": 0})
    refused(copy, shard.name)
    learnt = next(copy.glob("learnt-*"))
    learnt.unlink()
    os.mkfifo(learnt)
    refused(copy, "this file is missing")
    with pytest.raises(CorruptCache, match="this is no file"):
        LocalStorage(copy).read(learnt.name)


# Numbers ----------------------------------------------------------------------------------------

HUGE = [2**31, 2**62, 2**63, 2**64, 10**400, -1, -(2**63), 0]
SIZES = [
    "tokenizer.num_ids",
    "preprocessing.max_length",
    "targets.num_classes",
    "targets.top_k",
    "plan.num_shards",
    "plan.documents_per_shard",
]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", HUGE, ids=ascii_of)
def test_numbers_that_sizes_follow_from_have_limits(copy, name, value):
    forge_manifest(copy, setter(name, value))
    refused(copy, rf"manifest\.json: .*{name.rpartition('.')[2]}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("targets.temperatures", [float("nan")]),
        ("targets.temperatures", [float("inf")]),
        ("targets.temperatures", [2.0 + i for i in range(1000)]),
        ("targets.temperatures", [-2.0]),
        ("targets.value_bits", 9),
        ("hidden.widths", [2**40]),
        ("hidden.widths", [0]),
        ("hidden.widths", [-32]),
        ("hidden.widths", []),
        ("hidden.layers", [-1, -1]),
        ("hidden.layers", list(range(100_000))),
        ("hidden.codec", "zip"),
        ("hidden.every", 0),
        ("hidden.every", -1),
        ("hidden.every", 2**31),
        ("columns", []),
        ("columns", ["row_ids", "num_tokens", "num_positions"]),
        ("columns", ["row_ids", "row_ids", "num_tokens", "num_positions", "input_ids"]),
        ("columns", ["row_ids", "num_tokens", "num_positions", "input_ids", "target_ids"]),
        ("columns", ["row_ids", "num_tokens", "num_positions", "input_ids", "hidden"]),
        ("columns", ["row_ids", "num_tokens", "num_positions", "input_ids", "segments"]),
        ("side_files", {f"file-{i}": "00" for i in range(1000)}),
        ("teacher", []),
        ("seed", float("nan")),
        ("task", "\ud800"),
    ],
    ids=ascii_of,
)
def test_what_no_cache_has_is_refused_by_the_name_of_the_field(copy, name, value):
    forge_manifest(copy, setter(name, value))
    refused(copy, rf"manifest\.json: .*{name.partition('.')[0]}")


def test_a_writer_is_told_before_it_starts(pristine, tmp_path):
    from shared.errors import ConfigError
    from shared.format import manifest_file

    manifest = open_cache(pristine).manifest
    manifest = replace(manifest, plan=replace(manifest.plan, num_shards=10**7))
    with pytest.raises(ConfigError, match=r"plan\.num_shards: found 10000000.*--shard-tokens"):
        manifest_file.publish(LocalStorage(tmp_path / "new"), manifest)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in ("rows", "tokens", "positions", "num_bytes") for value in HUGE),
        {"block_rows": [2**62, 2**62]},
        {"block_rows": [-5, 25]},
        {"block_rows": []},
        {"batch_blocks": [0, 1]},
        {"batch_blocks": [2**62]},
        {"batch_blocks": []},
        {"statistics": {"documents": float("nan")}},
        {"statistics": {"documents": float("inf")}},
        {"statistics": {"sum_entropy": float("nan")}},
        {"column_bytes": {"input_ids": 10**400}},
        {"row_tokens": "A" * 100},
        {"shard": 2**62},
        {"cache_id": "\ud800"},
    ],
    ids=ascii_of,
)
def test_a_commit_whose_numbers_cannot_be_is_refused(copy, change):
    forge_commit(copy, lambda body: body | change)
    refused(copy, "00000")


@pytest.mark.parametrize(
    ("token", "position"),
    [(0, 0), (0, -1), (-1, -2), (-(2**31), 0), (5, 6), (5, 3), (5, -1), (2**31 - 1, 2**31 - 2)],
)
def test_lengths_that_add_up_but_cannot_be_are_refused(copy, token, position):
    """The second row takes up the difference, so that every total is right."""
    commit = commit_of(copy)
    tokens, positions = (lengths.astype(np.int64) for lengths in commit.lengths("here"))
    tokens[:2] = token, tokens[:2].sum() - token
    positions[:2] = position, positions[:2].sum() - position
    packed = {"row_tokens": packed_lengths(tokens), "row_positions": packed_lengths(positions)}
    forge_commit(copy, lambda body: body | packed)
    refused(copy, "00000")


# Arrow ------------------------------------------------------------------------------------------


def batch_of(data):
    reader = pa.ipc.open_file(data)
    return reader.schema, reader.get_batch(0)


def written(schema, *batches, how=pa.ipc.new_file, **options):
    sink = pa.BufferOutputStream()
    with how(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def with_column(name, convert):
    """The same shard with one column as another array, or another type of field."""

    def make(data):
        schema, batch = batch_of(data)
        index = schema.get_field_index(name)
        array = convert(batch.column(index))
        schema = schema.set(index, pa.field(name, array.type))
        columns = [array if i == index else batch.column(i) for i in range(batch.num_columns)]
        return written(schema, pa.record_batch(columns, schema=schema))

    return make


def with_extra(name, array, metadata=None):
    def make(data):
        schema, batch = batch_of(data)
        schema = schema.append(pa.field(name, array.type, metadata=metadata))
        return written(schema, pa.record_batch([*batch.columns, array], schema=schema))

    return make


def compressed(codec):
    def make(data):
        schema, batch = batch_of(data)
        return written(schema, batch, compression=codec)

    return make


def as_stream(data):
    schema, batch = batch_of(data)
    return written(schema, batch, how=pa.ipc.new_stream)


def with_batches(count):
    def make(data):
        schema, batch = batch_of(data)
        return written(schema, *[batch] * count)

    return make


def with_metadata(num_bytes):
    def make(data):
        schema, batch = batch_of(data)
        schema = schema.with_metadata({**schema.metadata, b"more": b"x" * num_bytes})
        return written(schema, pa.record_batch(batch.columns, schema=schema))

    return make


def with_offset(index, value):
    """The same shard with one offset of the column input_ids.0 changed in place."""

    def make(data):
        buffer = pa.py_buffer(data)
        _, batch = batch_of(buffer)
        array = batch.column("input_ids.0")
        place = array.buffers()[1].address - buffer.address + 8 * (index % (len(array) + 1))
        return data[:place] + struct.pack("<q", value) + data[place + 8 :]

    return make


def with_buffer(offset=None, length=None):
    """The same shard with what its metadata says about the offsets of input_ids.0 changed."""

    def make(data):
        buffer = pa.py_buffer(data)
        source = pa.BufferReader(buffer)
        source.seek(8)
        _, message = pa.ipc.MessageReader.open_stream(source)
        _, batch = batch_of(buffer)
        values = batch.column("input_ids.0").buffers()[1]
        old = struct.pack("<qq", values.address - message.body.address, values.size)
        assert data.count(old) == 1
        start, size = struct.unpack("<qq", old)
        changed = start if offset is None else offset, size if length is None else length
        return data.replace(old, struct.pack("<qq", *changed))

    return make


def with_footer(size):
    return lambda data: data[:-10] + struct.pack("<i", size) + data[-6:]


def to_dictionary(array):
    return pa.DictionaryArray.from_arrays(pa.array([0] * len(array), pa.int8()), array[:1])


ARROW = {
    "zstd body": compressed("zstd"),
    "lz4 body": compressed("lz4"),
    "a stream": as_stream,
    "no batch": with_batches(0),
    "a batch too many": with_batches(2),
    "a null": with_column("input_ids.0", lambda a: pa.nulls(len(a), pa.large_binary())),
    "binary": with_column("input_ids.0", lambda a: a.cast(pa.binary())),
    "string view": with_column("input_ids.0", lambda a: a.cast(pa.binary_view())),
    "integers": with_column("input_ids.0", lambda a: pa.array(range(len(a)))),
    "list": with_column("input_ids.0", lambda a: pa.array([[b"x"]] * len(a))),
    "dictionary": with_column("input_ids.0", to_dictionary),
    "union": with_column(
        "input_ids.0",
        lambda a: pa.UnionArray.from_sparse(pa.array([0] * len(a), pa.int8()), [a]),
    ),
    "a name twice": with_extra("input_ids.0", pa.array([b"x"], pa.large_binary())),
    "an extra dictionary": with_extra("more", to_dictionary(pa.array([b"x"]))),
    "5 MB of metadata": with_metadata(5_000_000),
    "first offset negative": with_offset(0, -8),
    "first offset far": with_offset(0, 2**62),
    "last offset far": with_offset(-1, 2**62),
    "last offset negative": with_offset(-1, -(2**63)),
    "last offset too small": with_offset(-1, 3),
    "no offsets": with_buffer(length=0),
    "offsets cut": with_buffer(length=8),
    "offsets of 2**62 bytes": with_buffer(length=2**62),
    "offsets of negative length": with_buffer(length=-16),
    "offsets beyond the file": with_buffer(offset=2**62),
    "offsets before the file": with_buffer(offset=-64),
    "offsets unaligned": with_buffer(offset=3),
    "a footer of 2 GB": with_footer(2**31 - 1),
    "a negative footer": with_footer(-1),
    "an empty footer": with_footer(0),
    "pickle": lambda data: pickle.dumps(data),
    "nothing": lambda data: b"",
    "magic only": lambda data: b"ARROW1\0\0" + data[-10:],
}


@pytest.mark.parametrize("how", ARROW)
def test_an_arrow_file_that_is_not_as_we_write_it_is_refused(copy, how):
    forge_shard(copy, ARROW[how])
    refused(copy, r"shards/00000-\w+\.arrow: ")


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


def bomb(marker):
    """A pickle that leaves `marker` behind where it is loaded."""
    return pickle.dumps(Touch(marker))


def test_bombs_go_off(tmp_path):
    """Without this the tests below would pass for nothing."""
    pickle.loads(bomb(tmp_path / "marker"))  # noqa: S301
    torch.save(Touch(tmp_path / "other"), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "marker").exists()
    assert (tmp_path / "other").exists()


def test_an_extension_type_that_is_a_pickle_is_not_loaded(copy, tmp_path):
    """Columns that we do not know are ignored, whatever type they claim to have."""
    names = {"name": "arrow.py_extension_type", "metadata": bomb(tmp_path / "marker")}
    metadata = {f"ARROW:extension:{key}": value for key, value in names.items()}
    forge_shard(copy, with_extra("more", pa.array([b"x"], pa.large_binary()), metadata))
    assert read_all(copy)[0]
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("name", ["shard", "learnt-", "tokenizer/tokenizer.json"])
def test_a_pickle_under_the_name_of_another_file_is_never_loaded(copy, tmp_path, kind, name):
    marker = tmp_path / "marker"
    data = bomb(marker)
    if kind == "torch":
        torch.save(Touch(marker), tmp_path / "x.pt")
        data = (tmp_path / "x.pt").read_bytes()
    if name == "shard":
        forge_shard(copy, lambda _: data)
        refused(copy, "not readable as Arrow")
    elif name == "learnt-":
        forge_side_file(copy, name, data)
        refused(copy, "learnt-")
    else:
        forge_side_file(copy, name, data)
        assert read_all(copy)[0]  # values do not need the tokenizer
        with pytest.raises(Exception):  # noqa: B017, PT011 (what class it is: see the next test)
            load_cached_tokenizer(LocalStorage(copy))
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"[]", b"", b"\x80\x04", b"[" * 100_000], ids=ascii_of)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_file_of_another_kind_is_an_error_of_ours(copy, file, content):
    forge_side_file(copy, f"tokenizer/{file}", content)
    with pytest.raises(TeacherCacheError, match="tokenizer"):
        load_cached_tokenizer(LocalStorage(copy))


def test_a_tokenizer_that_names_code_does_not_run_it(copy, tmp_path):
    code = f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Own: pass\n"
    (copy / "tokenizer" / "own.py").write_text(code)
    name = copy / "tokenizer" / "tokenizer_config.json"
    config = json.loads(name.read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    forge_side_file(copy, "tokenizer/tokenizer_config.json", json.dumps(config).encode())
    with suppress(TeacherCacheError, ValueError):
        load_cached_tokenizer(LocalStorage(copy))
    assert not (tmp_path / "marker").exists()


# The learnt file --------------------------------------------------------------------------------


def raw_safetensors(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def described(dtype="U32", shape=(300,), offsets=(0, 1200)):
    return {"class_by_rank": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


ORDER = np.arange(300, dtype=np.uint32)
LEARNT = {
    "a header of 2**60 bytes": raw_safetensors(described(), size=2**60),
    "a header of 90 MB": raw_safetensors(described(), size=90_000_000),
    "a header of nothing": raw_safetensors(b""),
    "deep": raw_safetensors(b"[" * 100_000),
    "offsets beyond": raw_safetensors(described(offsets=(0, 2**60))),
    "offsets reversed": raw_safetensors(described(offsets=(1200, 0)), bytes(1200)),
    "a shape that overflows": raw_safetensors(described(shape=(2**62, 4)), bytes(1200)),
    "a negative shape": raw_safetensors(described(shape=(-300,)), bytes(1200)),
    "bfloat16": raw_safetensors(described("BF16", offsets=(0, 600)), bytes(600)),
    "fp8": raw_safetensors(described("F8_E4M3", offsets=(0, 300)), bytes(300)),
    "no dtype": raw_safetensors(described("OBJECT"), bytes(1200)),
    "floats": save_safetensors({"class_by_rank": ORDER.astype(np.float32)}),
    "signed": save_safetensors({"class_by_rank": ORDER.astype(np.int64)}),
    "two dimensions": save_safetensors({"class_by_rank": ORDER[None]}),
    "one class twice": save_safetensors({"class_by_rank": np.where(ORDER == 7, 8, ORDER)}),
    "beyond": save_safetensors({"class_by_rank": ORDER + np.uint32(2**31)}),
}


@pytest.mark.parametrize("how", LEARNT)
def test_a_learnt_file_that_is_not_as_we_write_it_is_refused(copy, how):
    forge_side_file(copy, "learnt-", LEARNT[how])
    refused(copy, r"learnt-\w+\.safetensors: ")


@pytest.mark.parametrize(
    "deviation", [None, np.ones(31, np.float32), np.ones((32, 1), np.float32), np.ones(32)], ids=str
)
def test_channel_deviations_of_another_shape_are_refused(copy, deviation):
    arrays = load_safetensors(next(copy.glob("learnt-*")).read_bytes())
    del arrays["hidden.-1.std"]
    if deviation is not None:
        arrays["hidden.-1.std"] = deviation
    forge_side_file(copy, "learnt-", save_safetensors(arrays))
    refused(copy, r"learnt-\w+\.safetensors: hidden\.-1\.std is not 32 numbers")


@pytest.mark.parametrize(
    ("name", "value"), [("hidden.every", 2), ("hidden.codec", "fp8"), ("hidden.codec", "int8")]
)
def test_hidden_states_are_not_read_as_others(copy, name, value):
    """Another codec or other positions have planes of another size, or more of them."""
    forge_manifest(copy, setter(name, value))
    refused(copy, r"hidden\.-1\.(centre|1)|column 64, plane [01]: found \d+ bytes")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("centre", None),
        ("unit", np.ones(31, np.float32)),
        ("unit", np.ones(32)),
        ("unit", np.zeros(32, np.float32)),
        ("unit", np.full(32, np.nan, np.float32)),
        ("centre", np.full(32, np.inf, np.float32)),
    ],
    ids=ascii_of,
)
def test_what_int8_is_relative_to_must_be_numbers_that_can_be(capture, tmp_path, name, value):
    copy = Path(shutil.copytree(capture(**SMALL, hidden_codec="int8"), tmp_path / "cache"))
    arrays = load_safetensors(next(copy.glob("learnt-*")).read_bytes())
    del arrays[f"hidden.-1.{name}"]
    if value is not None:
        arrays[f"hidden.-1.{name}"] = value
    forge_side_file(copy, "learnt-", save_safetensors(arrays))
    refused(copy, r"learnt-\w+\.safetensors: hidden\.-1\..*restore it from a copy")


# Frames -----------------------------------------------------------------------------------------


def forge_planes(path, change):
    """Changes decompressed planes in place; every checksum is right again afterwards."""
    storage = LocalStorage(path)
    manifest = open_cache(path).manifest
    (commit,) = read_commits(storage, manifest, manifest.cache_id)
    planes = planes_of(manifest)
    reader = ShardReader(storage.local(commit.file), manifest, commit)
    columns = {plane.name: [] for plane in planes}
    for block in range(len(commit.block_rows)):
        values = reader.read_planes(block, planes)
        values = {name: np.array(plane) for name, plane in values.items()}
        change(values)
        for plane in planes:
            code = frames.column_code(plane.number, plane.plane)
            frame = frames.compress(values[plane.name], block=block, column=code)
            columns[plane.name].append(frame)

    def make(data):
        schema, _ = batch_of(data)
        arrays = [pa.array(columns[plane.name], pa.large_binary()) for plane in planes]
        return written(schema, pa.record_batch(arrays, schema=schema))

    forge_shard(path, make)


def replaced_frame(name, frame):
    """The same shard with another frame in the first block of one column."""
    return with_column(name, lambda a: pa.array([frame, *a.to_pylist()[1:]], pa.large_binary()))


def frame_of(data, *, block=0, column=0, **parameters):
    options = {"write_checksum": True, "write_content_size": True} | parameters
    made = zstandard.ZstdCompressionParameters.from_level(1, **options)
    payload = frames.FRAME_HEADER.pack(block, column) + data
    return zstandard.ZstdCompressor(compression_params=made).compress(payload)


def long_frame(size, column):
    """A small frame of `size` zeros, made without holding them."""
    options = {"write_checksum": True, "write_content_size": True}
    made = zstandard.ZstdCompressionParameters.from_level(1, **options)
    compressor = zstandard.ZstdCompressor(compression_params=made).compressobj(size=size + 8)
    parts = [compressor.compress(frames.FRAME_HEADER.pack(0, column))]
    parts += [compressor.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, compressor.flush()])


def input_ids(path):
    """Column code and content of the first plane of the token ids of block 0."""
    storage, manifest = LocalStorage(path), open_cache(path).manifest
    (commit,) = read_commits(storage, manifest, manifest.cache_id)
    plane = next(plane for plane in planes_of(manifest) if plane.name == "input_ids.0")
    reader = ShardReader(storage.local(commit.file), manifest, commit)
    values = reader.read_planes(0, [plane])["input_ids.0"].tobytes()
    return frames.column_code(plane.number, plane.plane), values


@pytest.mark.parametrize(
    "make",
    [
        lambda column, data: frame_of(data[:-1], column=column),
        lambda column, data: frame_of(data + b"x", column=column),
        lambda column, data: frame_of(data, column=column) * 2,
        lambda column, data: frame_of(data, column=column) + b"\x50\x2a\x4d\x18\4\0\0\0skip",
        lambda column, data: b"\x50\x2a\x4d\x18\4\0\0\0skip" + frame_of(data, column=column),
        lambda column, data: frame_of(data, column=column, write_checksum=False),
        lambda column, data: frame_of(data, column=column, write_content_size=False),
        lambda column, data: frame_of(data, column=column, block=1),
        lambda column, data: frame_of(data, column=column + 1),
        lambda column, data: long_frame(1 << 26, column),
        lambda column, data: frame_of(data, column=column)[:12],
        lambda column, data: b"",
        lambda column, data: bytes(64),
        lambda column, data: b"\x28\xb5\x2f\xfd\xc4" + b"\xff" * 40,  # 2**64 - 1 bytes
    ],
    ids=[
        *("a byte less", "a byte more", "twice", "skippable after", "skippable before"),
        *("no checksum", "no size", "other block", "other column", "long", "cut", "empty"),
        *("zeros", "2**64 - 1 bytes"),
    ],
)
def test_a_frame_that_is_not_the_one_expected_is_refused(copy, make):
    forge_shard(copy, replaced_frame("input_ids.0", make(*input_ids(copy))))
    refused(copy, r"shards/00000-\w+\.arrow: block 0, column 4, plane 0: found")


def test_a_frame_with_a_huge_window_takes_no_more_memory_for_it(copy):
    """The window is only kept where a frame is read in pieces."""
    column, data = input_ids(copy)
    frame = frame_of(data, column=column, window_log=27)
    forge_shard(copy, replaced_frame("input_ids.0", frame))
    assert read_all(copy)[0]


def all_ones(name):
    def change(values):
        values[name][:] = 255

    return change


def grown_segments(values):
    values["num_segments.0"].view("<u4")[0] += 1
    values["segments.0"] = np.append(values["segments.0"], np.uint8(1))


def long_segments(values):
    values["segments.0"][:] = 255


def no_segments(values):
    values["segments.0"][:] = 0


@pytest.mark.parametrize(
    "change",
    [
        all_ones("num_segments.0"),
        pytest.param(grown_segments),
        pytest.param(long_segments),
        pytest.param(no_segments),
    ],
    ids=["2**32 - 1 segments", "one more", "longer than their rows", "empty"],
)
def test_segments_that_are_not_their_rows_are_refused(packed_copy, change):
    forge_planes(packed_copy, change)
    refused(packed_copy, r"shards/00000-\w+\.arrow: ")


@pytest.mark.parametrize("name", ["target_ids.0", "target_ids.1"])
def test_classes_beyond_the_last_are_refused(copy, name):
    forge_planes(copy, all_ones(name))
    refused(copy, "target_ids: found rank")


def test_token_ids_beyond_the_vocabulary_are_refused(copy):
    forge_planes(copy, all_ones("input_ids.1"))
    refused(copy, "input_ids")


def test_a_position_without_any_class_is_refused(copy):
    """All of its codes say: no class. The encoder refuses to write one."""
    forge_planes(copy, all_ones("target_codes.0"))
    refused(copy, "target_codes")


@pytest.mark.parametrize("name", ["target_range.0", "target_tail.1", "entropy.0"])
def test_other_codes_are_other_values_and_nothing_else(copy, name):
    """Every code has a meaning, so these can only be found by the hash of the file."""
    forge_planes(copy, all_ones(name))
    blocks, _, _ = read_all(copy)
    assert not any(np.isnan(block.target.logprobs).any() for block in blocks)


# The seal ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sealed(pristine, tmp_path_factory):
    path = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("sealed") / "cache"))
    verify(VerifyConfig(cache=path, seal=True))
    return path


@pytest.fixture
def sealed_copy(sealed, tmp_path):
    return Path(shutil.copytree(sealed, tmp_path / "sealed"))


def with_sealed(name, convert):
    """The same index with one column as another array."""

    def make(data):
        schema, batch = batch_of(data)
        index = schema.get_field_index(name)
        array = convert(batch.column(index))
        schema = schema.set(index, pa.field(name, array.type))
        columns = [array if i == index else batch.column(i) for i in range(batch.num_columns)]
        return written(schema, pa.record_batch(columns, schema=schema))

    return make


def with_sealed_offset(index, value):
    """The same index with one 32-bit offset of the column commit changed in place."""

    def make(data):
        buffer = pa.py_buffer(data)
        _, batch = batch_of(buffer)
        place = batch.column("commit").buffers()[1].address - buffer.address + 4 * index
        return data[:place] + struct.pack("<i", value) + data[place + 4 :]

    return make


def with_nothing_else(data):
    schema, batch = batch_of(data)
    return written(schema, batch.slice(0, 0))


def of_another_cache(data):
    schema, batch = batch_of(data)
    schema = schema.with_metadata({"cache_id": "0" * 64})
    return written(schema, pa.record_batch(batch.columns, schema=schema))


UNREADABLE = {
    "zstd body": compressed("zstd"),
    "lz4 body": compressed("lz4"),
    "a stream": as_stream,
    "shards as text": with_sealed("shard", lambda a: a.cast(pa.string())),
    "large text": with_sealed("commit", lambda a: a.cast(pa.large_string())),
    "binary": with_sealed("commit", lambda a: a.cast(pa.binary())),
    "dictionary": with_sealed("file", lambda a: a.dictionary_encode()),
    "a column more": with_extra("more", pa.array(["x"])),
    "of another cache": of_another_cache,
    "no UTF-8": lambda data: data.replace(b"shards/0", b"shards\xff0"),
    "metadata more": with_metadata(300_000),
    "first offset negative": with_sealed_offset(0, -8),
    "last offset far": with_sealed_offset(1, 2**31 - 1),
    "last offset negative": with_sealed_offset(1, -(2**31)),
    "a footer of 2 GB": with_footer(2**31 - 1),
    "a negative footer": with_footer(-1),
    "an empty footer": with_footer(0),
    "cut in half": lambda data: data[: len(data) // 2],
    "a byte less": lambda data: data[:-1],
    "a byte more": lambda data: data + b"x",
    "junk": lambda data: b"junk" * 1000,
    "pickle": lambda data: pickle.dumps(data),
    "nothing": lambda data: b"",
    "magic only": lambda data: b"ARROW1\0\0" + data[-10:],
}
NOT_AS_SEALED = {
    "a null": with_sealed("sha256", lambda a: pa.nulls(len(a), pa.string())),
    "no row": with_nothing_else,
    "no batch": with_batches(0),
    "a batch too many": with_batches(2),
    "another sha256": lambda data: with_sealed("sha256", lambda a: pa.array(["0" * 64]))(data),
    "last offset too small": with_sealed_offset(1, 3),
}


def refused_seal(path, match):
    with pytest.raises(CorruptCache, match=match) as caught:
        verify(VerifyConfig(cache=path))
    assert "seal again with cache-teacher verify --seal" in str(caught.value)


def test_a_forged_index_that_says_the_same_is_accepted(sealed_copy):
    """Without this the tests below could pass for the way they forge."""
    index = sealed_copy / "index.arrow"
    index.write_bytes(with_sealed("sha256", lambda array: array)(index.read_bytes()))
    assert verify(VerifyConfig(cache=sealed_copy)).sealed


@pytest.mark.parametrize("how", UNREADABLE)
def test_an_index_that_is_not_as_we_write_it_is_refused(sealed_copy, how):
    index = sealed_copy / "index.arrow"
    index.write_bytes(UNREADABLE[how](index.read_bytes()))
    refused_seal(sealed_copy, r"index\.arrow: not readable as an index: ")


def test_an_index_much_larger_than_its_commits_is_not_read(sealed_copy):
    index = sealed_copy / "index.arrow"
    index.write_bytes(with_metadata(900_000)(index.read_bytes()))
    refused_seal(sealed_copy, r"index\.arrow: 1,8\d\d,\d+ bytes where at most 1,05\d,\d+ are")


@pytest.mark.parametrize("how", NOT_AS_SEALED)
def test_an_index_of_other_content_is_refused(sealed_copy, how):
    index = sealed_copy / "index.arrow"
    index.write_bytes(NOT_AS_SEALED[how](index.read_bytes()))
    refused_seal(sealed_copy, r"index\.arrow: the shards and commits are not the ones")


# Targets whose positions differ in their entries ------------------------------------------------


@pytest.fixture(scope="module", params=["adaptive", "sample"])
def ragged(request, capture):
    """20 documents in one shard of one block; 16 bits, so that there are codes of no number."""
    return capture(targets=request.param, limit_documents=20, mean_entries=6.0, value_bits=16)


@pytest.fixture
def ragged_copy(ragged, tmp_path):
    return Path(shutil.copytree(ragged, tmp_path / "ragged"))


def counts_set(place, value):
    def change(values):
        values["target_counts.0"][place] = value

    return change


def one_position_without(values):
    """Its entries go to the next one, so that every length is right."""
    counts = values["target_counts.0"]
    counts[1] += counts[0]
    counts[0] = 0


def lone_high_gap(values):
    values["target_ids.1"][values["target_counts.0"][0]] = 255


def halves_of(high):
    def change(values):
        values["target_codes.1"][5] = high

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (counts_set(slice(None), 255), "column 16, plane 0: found"),  # the frames are shorter
        (counts_set(0, 200), "column 16, plane 0: found"),
        (counts_set(slice(None), 0), "column 16, plane 0: found"),
        (one_position_without, "column target_counts: found a position without any class"),
        (lone_high_gap, "column target_ids: found rank"),
        (all_ones("target_ids.1"), "column target_ids: found rank"),
        (halves_of(0x7E), "column target_codes: found 0x7e"),
        (halves_of(0x80), "column target_codes: found 0x80"),
    ],
    ids=["255 each", "one longer", "none", "one empty", "a rank", "ranks", "NaN", "negative"],
)
def test_entries_that_no_position_has_are_refused(ragged_copy, change, said):
    """By reading and by verify, with the same words: shard, block and column."""
    forge_planes(ragged_copy, change)
    expected = rf"shards/00000-\w+\.arrow: block 0, {said}"
    refused(ragged_copy, expected)
    assert re.search(expected, verify(VerifyConfig(cache=ragged_copy)).bad[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", 0),
        ("threshold", -0.1),
        ("threshold", 1),
        ("threshold", 1e-12),
        ("threshold", float("nan")),
        ("threshold", float("inf")),
        ("threshold", "0.1"),
        ("mean_entries", 0),
        ("mean_entries", 256),
        ("mean_entries", float("nan")),
    ],
)
def test_thresholds_that_calibration_cannot_find_are_refused(ragged_copy, field, value):
    forge_manifest(ragged_copy, setter(f"targets.{field}", value))
    refused(ragged_copy, rf"manifest\.json: .*{field}")


def test_a_kind_that_the_planes_are_not_of_is_refused(ragged_copy):
    kind = open_cache(ragged_copy).manifest.targets.kind
    other = "sample" if kind == "adaptive" else "adaptive"
    forge_manifest(ragged_copy, setter("targets.kind", "topk"))
    refused(ragged_copy, r"column target_tail\.0 is missing|column 16, plane 0: found")
    forge_manifest(ragged_copy, setter("targets.kind", "dense"))
    refused(ragged_copy, "column 17, plane 0: found")
    forge_manifest(ragged_copy, setter("targets.kind", other))
    if other == "adaptive":
        refused(ragged_copy, r"column target_tail\.0 is missing")


def claims(positions, *, no_number=False):
    """A first row so long that the shard has `positions` more, each of 255 entries: all zeros."""

    def make(path):
        manifest, commit = open_cache(path).manifest, commit_of(path)
        (rows,) = commit.block_rows
        tokens, places = (lengths.astype(np.int64) for lengths in commit.lengths("here"))
        tokens[0] += positions
        places[0] += positions
        sizes = {"row": rows, "token": tokens.sum(), "position": places.sum()}
        sizes["entry"] = 255 * sizes["position"]

        def change(values):
            for plane in planes_of(manifest):
                old, new = values[plane.name], int(sizes[plane.per] * plane.item_bytes)
                values[plane.name] = np.zeros(new, np.uint8)
                values[plane.name][: min(old.size, new)] = old[:new]
            for name, lengths in (("num_tokens.0", tokens), ("num_positions.0", places)):
                values[name] = lengths.astype("<u4").view(np.uint8)
            values["target_counts.0"][:] = 255
            for name in values:
                if name.startswith(("target_ids", "target_codes")):
                    values[name][:] = 0
            if no_number:
                values["target_codes.1"][-1] = 0x7E  # told after the classes are decoded

        forge_planes(path, change)
        lengths = {"row_tokens": packed_lengths(tokens), "row_positions": packed_lengths(places)}
        totals = {"tokens": int(tokens.sum()), "positions": int(places.sum())}
        forge_commit(path, lambda body: body | lengths | totals)

    return make


RAGGED_BOMBS = {
    "255-entries-for-all": claims(100_000),
    "255-entries-just-too-many": claims(16_500),
    "255-entries-as-many-as-may-be": claims(15_200, no_number=True),
}


def test_no_forged_count_takes_memory_or_time(ragged, tmp_path):
    found = measured(ragged, RAGGED_BOMBS, tmp_path)
    said = [said for _, said, *_ in found]
    assert "block 0, column target_counts: found 25," in said[0]
    assert "block 0, column target_counts: found 4," in said[1]
    assert "block 0, column target_codes: found 0x7e00" in said[2]


# Memory -----------------------------------------------------------------------------------------

_MEASURE = """
import json, re, sys, time
from pathlib import Path
from tests.test_hostile import VerifyConfig, read_all, verify
from shared.errors import TeacherCacheError

def peak():  # of this program alone: ru_maxrss begins with that of the process that started it
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

def read(path):
    read_all(path)
    if (path / "index.arrow").exists():
        verify(VerifyConfig(cache=path))

good, *bad = map(Path, sys.argv[1:])
read(good)
for path in bad:
    before, start = peak(), time.process_time()
    try:
        read(path)
        said = "nothing"
    except TeacherCacheError as error:
        said = f"{type(error).__name__}: {error}"
    except Exception as error:
        said = f"not ours: {error!r}"
    seconds = time.process_time() - start
    print(json.dumps([path.name, said[:300], seconds, peak() - before]))
"""


def long_row(path):
    """256 MiB of token ids in a few kilobytes, and a commit that says so."""
    size, (column, _) = 1 << 28, input_ids(path)
    commit = commit_of(path)
    tokens, positions = (lengths.astype(np.int64) for lengths in commit.lengths("here"))
    tokens[0], positions[0] = 0, 0
    tokens[0] = size - tokens.sum()
    positions[0] = tokens[0] - 1
    forge_shard(path, replaced_frame("input_ids.0", long_frame(size, column)))
    lengths = {"row_tokens": packed_lengths(tokens), "row_positions": packed_lengths(positions)}
    totals = {"tokens": int(tokens.sum()), "positions": int(positions.sum())}
    forge_commit(path, lambda body: body | lengths | totals)


def many_rows(path):
    """64 commits of a few hundred bytes, each of as many rows as a shard may have."""
    forge_manifest(path, setter("plan.num_shards", 64))
    ones = np.ones(MAX_SHARD_ROWS, np.int64)
    lengths = {"row_tokens": packed_lengths(ones), "row_positions": packed_lengths(ones - 1)}
    totals = {"rows": ones.size, "tokens": ones.size, "positions": 0, "block_rows": [ones.size]}
    forge_commit(path, lambda body: body | lengths | totals | {"batch_blocks": [1]})
    body = json.loads((path / commit_name(0)).read_bytes())
    del body["checksum"]
    for shard in range(64):
        body |= {"shard": shard, "file": shard_name(shard, body["xxh3_128"])}
        text = json.dumps(body | {"checksum": _checksum(body)})
        (path / commit_name(shard)).write_text(text)


def expanding_commit(path):
    """A frame of a few kilobytes that declares and holds 256 MiB."""
    frame = long_frame(1 << 28, 0)
    import base64

    text = base64.b64encode(frame).decode()
    forge_commit(path, lambda body: body | {"row_tokens": text, "rows": 1 << 26})


def expanding_body(path):
    """Arrow's own compression: 256 MiB in a file of a few kilobytes."""

    def make(data):
        schema, batch = batch_of(data)
        array = pa.array([bytes(1 << 28)], pa.large_binary())
        index = schema.get_field_index("input_ids.0")
        columns = [array if i == index else batch.column(i) for i in range(batch.num_columns)]
        return written(schema, pa.record_batch(columns, schema=schema), compression="zstd")

    forge_shard(path, make)


def json_bomb(file, pattern, size):
    def make(path):
        data = (pattern * (size // len(pattern)))[: size - 2]
        (path / file).write_bytes(data)
        if file == MANIFEST:
            (path / MANIFEST_HASH).write_text(hashlib.sha256(data).hexdigest())

    return make


def long_text(name, letter, size):
    """A commit with one long string of a letter that takes 4 bytes of memory, once."""

    def make(path):
        text = json.dumps({name: "x" * (size - 100) + letter}, ensure_ascii=False)
        (path / commit_name(0)).write_text(text)

    return make


def sparse(file, size):
    def make(path):
        with open(path / file, "r+b") as opened:
            opened.truncate(size)

    return make


def sparse_side_file(path):
    name = next(path.glob("learnt-*")).name
    sparse(name, 1 << 36)(path)


def index_of(text, **options):
    """An index of one row with a long text instead of the commit."""

    def make(path):
        def make_index(data):
            return with_sealed("commit", lambda a: pa.array([text]))(data)

        index = path / "index.arrow"
        schema, batch = batch_of(make_index(index.read_bytes()))
        index.write_bytes(written(schema, batch, **options))

    return make


BOMBS = {
    "index-expands": index_of("x" * (1 << 28), compression="zstd"),
    "index-of-256-MB": index_of("x" * (1 << 28)),
    "index-of-1-TB": sparse("index.arrow", 1 << 40),
    "manifest-of-lists": json_bomb(MANIFEST, b"[],", MAX_MANIFEST_BYTES),
    "manifest-deep": json_bomb(MANIFEST, b"[", MAX_MANIFEST_BYTES),
    "manifest-of-objects": json_bomb(MANIFEST, b'{"a":', MAX_MANIFEST_BYTES),
    "manifest-of-100-MB": sparse(MANIFEST, 100_000_000),
    "commit-of-numbers": json_bomb(commit_name(0), b"1,", MAX_COMMIT_BYTES),
    "commit-deep": json_bomb(commit_name(0), b"[", MAX_COMMIT_BYTES),
    "commit-of-1-TB": sparse(commit_name(0), 1 << 40),
    "commit-of-text": long_text("cache_id", "\U0001f600", MAX_COMMIT_BYTES),
    "commit-expands": expanding_commit,
    "rows-without-bytes": many_rows,
    "block-expands": long_row,
    "body-expands": expanding_body,
    "metadata-of-100-MB": lambda path: forge_shard(path, with_metadata(100_000_000)),
    "classes": lambda path: forge_manifest(path, setter("targets.num_classes", 2**31 - 1)),
    "classes-within": lambda path: forge_manifest(path, setter("targets.num_classes", 2**24)),
    "shards": lambda path: forge_manifest(path, setter("plan.num_shards", 2**62)),
    "learnt-sparse": sparse_side_file,
    "learnt-header": lambda path: forge_side_file(
        path, "learnt-", LEARNT["a header of 90 MB"] + bytes(90_000_000)
    ),
}


def test_no_bomb_takes_memory_or_time(sealed, tmp_path):
    measured(sealed, BOMBS, tmp_path)


def measured(good, bombs, tmp_path):
    """Measured from outside: less than 200 MB more than reading a good cache, 1 s of CPU each."""
    paths = [tmp_path / name for name in bombs]
    for path in paths:
        shutil.copytree(good, path)
        bombs[path.name](path)
    command = [sys.executable, "-c", _MEASURE, str(good), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == list(bombs)
    for name, said, seconds, _ in found:
        assert said.startswith("CorruptCache: "), (name, said)
        assert seconds < 1, (name, seconds)
    assert sum(grown for *_, grown in found) < 200e6, found
    return found


# The student's own checkpoint -------------------------------------------------------------------

STATES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]


@pytest.fixture(scope="module")
def stopped(pristine, student_config_dir, tmp_path_factory):
    """A run of two steps with a checkpoint, and how to go on with it."""
    from student_train.config import TrainConfig
    from student_train.run.run import run

    def go_on(out, steps):
        config = TrainConfig(
            student=str(student_config_dir),
            cache=(pristine,),
            out=out,
            max_steps=steps,
            save_every=2,
            batch_tokens=200,
            device="cpu",
        )
        return run(config)

    out = tmp_path_factory.mktemp("student") / "run"
    go_on(out, 2)
    return out, go_on


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("file", [*STATES, "pytorch_model.bin", "adapter_model.bin"])
def test_resuming_from_a_tampered_checkpoint_runs_no_code(stopped, tmp_path, file, kind):
    before, go_on = stopped
    out, marker = Path(shutil.copytree(before, tmp_path / "run")), tmp_path / "marker"
    (out / "result.json").unlink()
    checkpoint = out / "checkpoint-2"
    assert (checkpoint / "optimizer.pt").is_file()
    if kind == "pickle":
        (checkpoint / file).write_bytes(bomb(marker))
    else:
        torch.save({"state": Touch(marker)}, checkpoint / file)
    if file == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    go_on(out, 3)  # without this checkpoint, or without this file that nobody reads
    assert json.loads((out / "result.json").read_text())["steps"] == 3
    assert not marker.exists()
