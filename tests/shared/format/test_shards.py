"""Blocks and shards: round trips, places of targets, and what makes a commit count.

R rows, T tokens, P positions, K entries, D channels. Blocks are compared after coding, so values
that a codec rounds are first put on its grid by one pass through it.
"""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from shared.errors import CorruptCache, DiskFull
from shared.format import commits, reader
from shared.format import writer as writer_module
from shared.format.blocks import Block
from shared.format.column import Contents
from shared.format.commits import Commit, commit_name, file_hash, parse_commit
from shared.format.encoding import from_planes, to_planes
from shared.format.manifest import HiddenSpec
from shared.format.reader import ShardReader
from shared.format.schema import COLUMNS, columns_of, planes_of
from shared.format.writer import ShardWriter, encode_block
from shared.storage.local import LocalStorage, temporary_files
from shared.targets.ragged import drawn_logprob
from shared.targets.record import ClassRanks, Target
from shared.targets.spec import TargetSpec
from tests.shared.format.test_manifest import PREPROCESSING, make_manifest
from tests.shared.storage.test_local import file_size_limit, tree

CLASSES = 300
RANKS = ClassRanks.from_counts(np.random.default_rng(0).poisson(1.0, CLASSES))
NO_TARGETS = TargetSpec(kind="none", num_classes=CLASSES, top_k=1)
HIDDEN = make_manifest().hidden
NO_HIDDEN = HiddenSpec(layers=(), widths=(), codec="bf16")


def cache_manifest(*, packed=False, positions=False, labels=False, **changes):
    """A manifest whose columns are as asked for."""
    columns = columns_of(
        Contents(
            segments=packed,
            positions=positions,
            labels=labels,
            targets=changes.get("targets") is not NO_TARGETS,
        )
    )
    preprocessing = replace(PREPROCESSING, pack=packed)
    return make_manifest(columns=tuple(columns), preprocessing=preprocessing, **changes)


def slow_positions(num_tokens, segments, num_segments):
    """Index in its row of every token that has a next one in its own segment."""
    found, left = [], list(segments)
    for tokens, count in zip(num_tokens, num_segments, strict=True):
        place = 0
        for _ in range(count):
            length = left.pop(0)
            found += [place + step for step in range(length) if step < length - 1]
            place += length
        assert place == tokens
    return found


def random_block(manifest, rows, seed=0, *, one_token_rows=False):
    """A block with every column that the manifest asks for, as stage one hands it over."""
    rng = np.random.default_rng(seed)
    packed = manifest.preprocessing.pack
    parts = [rng.integers(1 if one_token_rows else 2, 12, 1 + packed * 3) for _ in range(rows)]
    num_tokens = np.array([part.sum() for part in parts], np.int32)
    num_positions = np.array([(part - 1).sum() for part in parts], np.int32)
    P, spec = int(num_positions.sum()), manifest.targets
    block = Block(
        row_ids=rng.integers(0, 2**40, rows).astype(np.uint64),
        num_tokens=num_tokens,
        num_positions=num_positions,
        input_ids=rng.integers(0, CLASSES, num_tokens.sum()).astype(np.int32),
        positions=np.zeros(0, np.int32),
    )
    if packed:
        block.segments = np.array([length for part in parts for length in part], np.int32)
        block.num_segments = np.array([len(part) for part in parts], np.int32)
    if "positions" in manifest.columns:
        limits = np.repeat(block.num_tokens - 1, num_positions)
        block.positions = rng.integers(0, limits).astype(np.int32)
    if "labels" in manifest.columns:
        block.labels = rng.integers(0, CLASSES, P).astype(np.int32)
    if spec.kind != "none":
        block.target = random_ragged(spec, P, rng) if spec.ragged else random_target(spec, P, rng)
        block.label_logprob = -rng.exponential(size=P).astype(np.float16).astype(np.float32)
        block.entropy = rng.uniform(0, np.log(CLASSES), P).astype(np.float32)
        block.log_partition_ratio = {
            t: ((1 - 1 / t) * np.log(CLASSES) * rng.uniform(size=P)).astype(np.float32)
            for t in spec.temperatures
        }
        states = sum(-(-count // manifest.hidden.every) for count in num_positions.tolist())
        most = 1 << (16 if manifest.hidden.codec == "bf16" else 14)  # others hold no NaN
        block.hidden = {
            layer: rng.integers(0, most, (states, width)).astype(np.uint16)
            for layer, width in zip(manifest.hidden.layers, manifest.hidden.widths, strict=True)
        }
    return block


def random_target(spec, P, rng):
    K = spec.num_entries
    logits = rng.normal(size=(P, K + 1)) * 3  # the last cell is the tail
    logprobs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    ids = [rng.choice(CLASSES, K, replace=False) for _ in range(P)]
    return Target(np.array(ids, np.int32).reshape(P, K), logprobs[:, :-1], logprobs[:, -1])


def random_ragged(spec, P, rng):
    """1 to 12 entries at each position, those of a sample drawn ones for the most part."""
    counts = rng.integers(1, 13, P).astype(np.int32)
    ids = [rng.choice(CLASSES, count, replace=False) for count in counts]
    parts = [rng.dirichlet(np.ones(count + 1)) for count in counts]  # the last is the tail
    entries = np.concatenate([*(part[:-1] for part in parts), np.zeros(0)])
    logprobs = np.log(np.maximum(entries, spec.threshold)).astype(np.float32)
    if spec.kind == "sample":
        logprobs[rng.random(len(logprobs)) < 0.6] = drawn_logprob(spec)
    return Target(
        np.concatenate([*ids, np.zeros(0)]).astype(np.int32),
        logprobs,
        np.log(np.array([part[-1] for part in parts], np.float32)),
        counts,
        rng.integers(0, 2**64, P, np.uint64) if spec.kind == "sample" else None,
    )


def arrays_of(block):
    """Every array of a block by name; None stays None."""
    named = {}
    for name in Block.__slots__:
        value = getattr(block, name)
        if isinstance(value, dict):
            named |= {f"{name}.{key}": item for key, item in value.items()}
        elif isinstance(value, Target):
            named |= {f"target.{field}": getattr(value, field) for field in Target.__slots__}
        else:
            named[name] = value
    return named


def assert_same(found, expected):
    """Bit for bit, types included."""
    left, right = arrays_of(found), arrays_of(expected)
    assert left.keys() == right.keys()
    for name, value in right.items():
        if value is None:
            assert left[name] is None, name
        else:
            assert left[name].dtype == value.dtype, name
            np.testing.assert_array_equal(left[name], value, err_msg=name)


MANIFESTS = {
    "plain": cache_manifest(),
    "packed": cache_manifest(packed=True),
    "explicit positions and labels": cache_manifest(positions=True, labels=True),
    "16 bits": cache_manifest(
        targets=TargetSpec(
            kind="topk", num_classes=CLASSES, top_k=5, value_bits=16, temperatures=(0.5,)
        ),
        hidden=NO_HIDDEN,
    ),
    "every third state": cache_manifest(packed=True, hidden=replace(HIDDEN, every=3)),
    "labels only": cache_manifest(targets=NO_TARGETS, hidden=NO_HIDDEN),
    "packed labels only": cache_manifest(packed=True, targets=NO_TARGETS, hidden=NO_HIDDEN),
}


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("kind", MANIFESTS)
def test_planes_hold_the_block(kind, rows):
    manifest = MANIFESTS[kind]
    block = random_block(manifest, rows)
    planes = to_planes(block, manifest, RANKS)
    assert list(planes) == [plane.name for plane in planes_of(manifest)]
    counts = {
        "row": rows,
        "token": int(block.num_tokens.sum()),
        "position": int(block.num_positions.sum()),
        "state": len(block.hidden.get(-1, ())),
        "segment": 0 if block.segments is None else len(block.segments),
    }
    for plane in planes_of(manifest):
        values = planes[plane.name]
        assert values.dtype == np.uint8
        assert values.size == counts[plane.per] * plane.item_bytes, plane.name
        values.flags.writeable = False  # as frames.decompress gives them
    found = from_planes(planes, block.num_tokens, block.num_positions, manifest, RANKS)

    for name in ("row_ids", "num_tokens", "num_positions", "input_ids", "segments", "num_segments"):
        np.testing.assert_array_equal(getattr(found, name), getattr(block, name), err_msg=name)
    if "positions" in manifest.columns:
        np.testing.assert_array_equal(found.positions, block.positions)
        np.testing.assert_array_equal(found.labels, block.labels)
    else:
        packed = block.segments is not None
        segments = block.segments if packed else block.num_tokens
        num_segments = block.num_segments if packed else np.ones(rows, int)
        expected = slow_positions(block.num_tokens, segments, num_segments)
        assert found.positions.tolist() == expected
        assert found.labels is None
    if manifest.targets.kind == "none":
        assert found.target is found.entropy is found.label_logprob is None
        assert found.log_partition_ratio == found.hidden == {}
        return
    by_rank = np.argsort(RANKS.ranks[block.target.ids], axis=1)
    np.testing.assert_array_equal(
        found.target.ids, np.take_along_axis(block.target.ids, by_rank, axis=1)
    )
    np.testing.assert_array_equal(found.label_logprob, block.label_logprob)  # fp16 values went in
    np.testing.assert_allclose(found.entropy, block.entropy, atol=np.log(CLASSES) / 500)
    assert found.log_partition_ratio.keys() == set(manifest.targets.temperatures)
    assert found.hidden.keys() == set(manifest.hidden.layers)
    for layer, states in block.hidden.items():
        np.testing.assert_array_equal(found.hidden[layer], states)


def test_what_was_read_and_is_written_again_is_the_same_bytes():
    """Temperatures and entropy sit on their grids after one pass; `repack` relies on it."""
    manifest = MANIFESTS["plain"]
    block = random_block(manifest, 7)
    planes = to_planes(block, manifest, RANKS)
    found = from_planes(planes, block.num_tokens, block.num_positions, manifest, RANKS)
    again = to_planes(found, manifest, RANKS)
    for name, plane in planes.items():
        if not name.startswith("target_"):  # rescaled by the decoder, so not a fixed point
            np.testing.assert_array_equal(again[name], plane, err_msg=name)


def test_columns_that_were_not_read_stay_absent():
    manifest = MANIFESTS["plain"]
    block = random_block(manifest, 3)
    planes = to_planes(block, manifest, RANKS)
    light = {name: planes[name] for name in ("row_ids.0", "input_ids.0", "input_ids.1")}
    found = from_planes(light, block.num_tokens, block.num_positions, manifest, RANKS)
    assert found.target is found.label_logprob is found.entropy is None
    assert found.hidden == found.log_partition_ratio == {}
    np.testing.assert_array_equal(found.input_ids, block.input_ids)


@pytest.mark.parametrize("kind", ["labels only", "packed labels only"])
def test_segments_of_one_token_have_no_position(kind):
    manifest = MANIFESTS[kind]
    for seed in range(20):
        block = random_block(manifest, 5, seed, one_token_rows=True)
        planes = to_planes(block, manifest, RANKS)
        found = from_planes(planes, block.num_tokens, block.num_positions, manifest, RANKS)
        packed = block.segments is not None
        segments = block.segments if packed else block.num_tokens
        num_segments = block.num_segments if packed else np.ones(5, int)
        assert found.positions.tolist() == slow_positions(block.num_tokens, segments, num_segments)


def test_every_column_has_a_number_of_its_own_and_planes_a_name_of_their_own():
    assert len({column.number for column in COLUMNS}) == len(COLUMNS)
    for manifest in MANIFESTS.values():
        planes = planes_of(manifest)
        assert len({plane.name for plane in planes}) == len(planes)
        assert len({(plane.number, plane.plane) for plane in planes}) == len(planes)


def test_a_column_of_a_later_version_is_ignored():
    manifest = make_manifest()
    later = replace(manifest, columns=(*manifest.columns, "loss_weights"))
    assert planes_of(later) == planes_of(manifest)


def write(storage, manifest, blocks, shard=0, statistics=None):
    """Commits the blocks as one shard; the finished writer."""
    encoded = [encode_block(block, number, manifest, RANKS) for number, block in enumerate(blocks)]
    return write_encoded(storage, manifest, encoded, shard, statistics)


def write_encoded(storage, manifest, encoded, shard=0, statistics=None):
    with ShardWriter(storage, manifest, manifest.cache_id, shard) as writer:
        for block in encoded:
            writer.write(block)
        writer.statistics = statistics or {}
    return writer


def read_commit(storage, shard=0):
    return parse_commit(storage.read(commit_name(shard)), commit_name(shard))


def read_all(storage, manifest, shard=0):
    """Every block, with everything."""
    commit = read_commit(storage, shard)
    reader = ShardReader(storage.local(commit.file), manifest, commit)
    return [
        reader.read_block(b, RANKS, hidden_layers=manifest.hidden.layers, targets=True)
        for b in range(len(commit.block_rows))
    ]


def through_planes(block, manifest):
    planes = to_planes(block, manifest, RANKS)
    return from_planes(planes, block.num_tokens, block.num_positions, manifest, RANKS)


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_shard_of_several_record_batches_round_trips(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(writer_module, "_BATCH_BLOCKS", 2)
    manifest, storage = MANIFESTS[kind], LocalStorage(tmp_path)
    blocks = [random_block(manifest, rows, rows) for rows in (3, 1, 6, 2, 4)]
    writer = write(storage, manifest, blocks, statistics={"documents": 4, "sum_entropy": 1.5})
    assert writer.won
    commit = read_commit(storage)
    with pa.OSFile(str(storage.local(commit.file))) as file:
        assert pa.ipc.open_file(file).num_record_batches == 3
    for found, block in zip(read_all(storage, manifest), blocks, strict=True):
        assert_same(found, through_planes(block, manifest))

    assert (commit.batch_blocks, commit.block_rows) == ((2, 2, 1), (3, 1, 6, 2, 4))
    tokens, positions = commit.lengths("here")
    assert tokens.tolist() == np.concatenate([b.num_tokens for b in blocks]).tolist()
    assert positions.tolist() == np.concatenate([b.num_positions for b in blocks]).tolist()
    assert (commit.rows, commit.tokens, commit.positions) == (16, tokens.sum(), positions.sum())
    assert commit.statistics == {"documents": 4.0, "sum_entropy": 1.5}
    path = storage.local(commit.file)
    assert (commit.num_bytes, commit.xxh3_128) == (path.stat().st_size, file_hash(path))
    assert commit.file == f"shards/00000-{commit.xxh3_128[:16]}.arrow"
    assert commit.column_bytes.keys() == {plane.column for plane in planes_of(manifest)}
    assert 0 < sum(commit.column_bytes.values()) < commit.num_bytes
    assert tree(tmp_path) == {commit.file, "commits/00000.json"}


def test_record_batches_are_cut_by_bytes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_BATCH_BYTES", 1)
    manifest, storage = MANIFESTS["plain"], LocalStorage(tmp_path)
    write(storage, manifest, [random_block(manifest, 2, seed) for seed in range(3)])
    with pa.OSFile(str(storage.local(read_commit(storage).file))) as file:
        assert pa.ipc.open_file(file).num_record_batches == 3
    assert len(read_all(storage, manifest)) == 3


def test_a_shard_without_rows_is_a_shard(tmp_path):
    manifest, storage = MANIFESTS["plain"], LocalStorage(tmp_path)
    assert write(storage, manifest, []).won
    commit = read_commit(storage)
    assert (commit.rows, commit.block_rows) == (0, ())
    assert read_all(storage, manifest) == []


def test_the_same_blocks_are_the_same_bytes(tmp_path):
    manifest = MANIFESTS["packed"]
    blocks = [random_block(manifest, 3, seed) for seed in range(3)]
    trees = []
    for name in ("one", "two"):
        write(LocalStorage(tmp_path / name), manifest, blocks)
        names = sorted(tree(tmp_path / name))
        trees.append([(n, (tmp_path / name / n).read_bytes()) for n in names])
    assert trees[0] == trees[1]


def test_only_the_columns_asked_for_are_decompressed(tmp_path, monkeypatch):
    manifest, storage = MANIFESTS["plain"], LocalStorage(tmp_path)
    write(storage, manifest, [random_block(manifest, 3)])
    commit = read_commit(storage)
    reader = ShardReader(storage.local(commit.file), manifest, commit)
    read = []
    original = reader.read_planes

    def spy(block, planes):
        planes = list(planes)
        read.extend(plane.column for plane in planes)
        return original(block, planes)

    monkeypatch.setattr(reader, "read_planes", spy)
    found = reader.read_block(0, RANKS, hidden_layers=(), targets=False)
    assert set(read) == {"row_ids", "input_ids"}
    assert found.target is None
    read.clear()
    found = reader.read_block(0, RANKS, hidden_layers=(3,), targets=True)
    assert found.hidden.keys() == {3}
    assert "hidden.-1" not in read
    assert {"target_ids", "entropy", "log_partition_ratio.2", "log_partition_ratio.4"} < set(read)


def test_arrow_columns_that_we_do_not_know_are_ignored(tmp_path):
    manifest, storage = MANIFESTS["plain"], LocalStorage(tmp_path)
    blocks = [random_block(manifest, 3)]
    write(storage, manifest, blocks)
    commit = read_commit(storage)
    path = storage.local(commit.file)
    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    table = table.append_column("later.0", pa.array([b"x"], pa.large_binary()))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    commit = replace(commit, num_bytes=path.stat().st_size)
    reader = ShardReader(path, manifest, commit)
    found = reader.read_block(0, RANKS, hidden_layers=(-1, 3), targets=True)
    assert_same(found, through_planes(blocks[0], manifest))


@pytest.fixture
def two_shards(tmp_path):
    """Shards 0 and 1 of equal size: the same rows, so only what says which is which differs."""
    manifest, storage = MANIFESTS["plain"], LocalStorage(tmp_path)
    for shard in (0, 1):
        write(storage, manifest, [random_block(manifest, 5, seed) for seed in (1, 2)], shard)
    sizes = {read_commit(storage, shard).num_bytes for shard in (0, 1)}
    assert len(sizes) == 1
    return storage, manifest


def test_swapped_shard_files_are_found_out(two_shards):
    storage, manifest = two_shards
    paths = [storage.local(read_commit(storage, shard).file) for shard in (0, 1)]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    for shard, path in enumerate(paths):
        with pytest.raises(CorruptCache, match=f"{path}: shard is '{1 - shard}', expected"):
            read_all(storage, manifest, shard)


def test_a_shard_of_another_cache_is_found_out(two_shards, tmp_path):
    storage, manifest = two_shards
    other, elsewhere = replace(manifest, seed=1), LocalStorage(tmp_path / "other")
    write(elsewhere, other, [random_block(other, 5, seed) for seed in (1, 2)], 0)
    foreign = elsewhere.local(read_commit(elsewhere).file).read_bytes()
    path = storage.local(read_commit(storage).file)
    assert len(foreign) == path.stat().st_size
    path.write_bytes(foreign)
    with pytest.raises(CorruptCache, match=f"{path}: cache_id is '{other.cache_id}', expected"):
        read_all(storage, manifest)


def test_a_missing_shard_names_the_way_out(two_shards):
    storage, manifest = two_shards
    storage.delete(read_commit(storage).file)
    with pytest.raises(CorruptCache, match=r"\.arrow: this shard is missing.*verify --drop-bad"):
        read_all(storage, manifest)


@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0", b"\x80\x04pickle"])
def test_what_is_no_shard_is_refused_by_its_size_and_then_by_its_content(two_shards, content):
    storage, manifest = two_shards
    commit = read_commit(storage)
    path = storage.local(commit.file)
    path.write_bytes(content)
    with pytest.raises(CorruptCache, match=f"{path}: {len(content)} bytes, but its commit says"):
        ShardReader(path, manifest, commit)
    with pytest.raises(CorruptCache, match=f"{path}: not readable as Arrow"):
        ShardReader(path, manifest, replace(commit, num_bytes=len(content)))


def test_a_frame_in_the_place_of_another_is_found_out(tmp_path):
    """Blocks 0 and 1 have the same sizes, so that nothing but the frame's own header tells."""
    manifest, storage = MANIFESTS["labels only"], LocalStorage(tmp_path)
    blocks = [random_block(manifest, 4, 1), random_block(manifest, 4, 1)]
    encoded = [encode_block(block, number, manifest, RANKS) for number, block in enumerate(blocks)]
    names = ("input_ids.0", "num_tokens.0")
    for name in names:
        encoded[1].frames[name] = encoded[0].frames[name]
    with pytest.raises(CorruptCache, match=r"found the frame of block 0.*expected its own"):
        write_encoded(storage, manifest, encoded)
    assert tree(tmp_path) == set()  # a shard that cannot be read again is never published


@pytest.mark.parametrize("same", [True, False])
def test_of_two_writers_of_one_shard_the_first_commit_wins(tmp_path, same):
    manifest, storage = MANIFESTS["plain"], LocalStorage(tmp_path)
    first, second = [random_block(manifest, 3, 1)], [random_block(manifest, 3, 1 if same else 2)]
    with ShardWriter(storage, manifest, manifest.cache_id, 0) as slow:
        slow.write(encode_block(second[0], 0, manifest, RANKS))
        fast = write(storage, manifest, first)
        published = read_commit(storage)
    assert (fast.won, slow.won) == (True, False)
    assert read_commit(storage) == published
    assert tree(tmp_path) == {published.file, "commits/00000.json"}
    assert_same(read_all(storage, manifest)[0], through_planes(first[0], manifest))


def test_an_exception_inside_the_writer_leaves_nothing(tmp_path):
    manifest, storage = MANIFESTS["plain"], LocalStorage(tmp_path)
    block = encode_block(random_block(manifest, 3), 0, manifest, RANKS)

    def blocks():
        yield block
        assert len(list(temporary_files(tmp_path))) == 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_encoded(storage, manifest, blocks())
    assert tree(tmp_path) == set()


@pytest.mark.parametrize("limit", [0, 100, 3_000])
@pytest.mark.parametrize("batch_blocks", [1, 64])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, limit, batch_blocks):
    """At the schema, in a record batch inside the `with`, and in the last batch at its end."""
    monkeypatch.setattr(writer_module, "_BATCH_BLOCKS", batch_blocks)
    manifest, storage = MANIFESTS["plain"], LocalStorage(tmp_path)
    encoded = encode_block(random_block(manifest, 20), 0, manifest, RANKS)
    with (
        pytest.raises(DiskFull, match="no space left on the disk"),
        file_size_limit(limit),
        ShardWriter(storage, manifest, manifest.cache_id, 0) as writer,
    ):
        writer.write(encoded)
    assert tree(tmp_path) == set()
    assert write(storage, manifest, [random_block(manifest, 20)]).won


def test_a_full_disk_while_the_file_is_opened(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module.pa, "OSFile", fail)
    manifest = MANIFESTS["plain"]
    with (
        pytest.raises(DiskFull, match="no space left on the disk"),
        ShardWriter(LocalStorage(tmp_path), manifest, manifest.cache_id, 0),
    ):
        pass
    assert tree(tmp_path) == set()


def make_commit(**changes):
    values = {
        "cache_id": "aa",
        "shard": 0,
        "file": "shards/00000-bb.arrow",
        "num_bytes": 10,
        "xxh3_128": "bb",
        "rows": 2,
        "tokens": 7,
        "positions": 5,
        "batch_blocks": (1,),
        "block_rows": (2,),
        "row_tokens": commits.packed_lengths(np.array([3, 4])),
        "row_positions": commits.packed_lengths(np.array([2, 3])),
        "column_bytes": {"input_ids": 5},
        "statistics": {"documents": 2.0},
    }
    return Commit(**values | changes)


def test_a_commit_round_trips():
    commit = make_commit()
    assert parse_commit(commit.to_json(), "here") == commit
    assert [lengths.tolist() for lengths in commit.lengths("here")] == [[3, 4], [2, 3]]


def test_no_byte_of_a_commit_can_change_what_it_says():
    """All 8 bits of all bytes: an error that names the file, or the same commit."""
    data, good = make_commit().to_json(), make_commit()
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            try:
                found = parse_commit(bytes(flipped), "commits/00000.json")
            except CorruptCache as error:
                found = str(error)
            assert found == good or found.startswith("commits/00000.json: ")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 3},
        {"tokens": 8},
        {"positions": 4},
        {"block_rows": (1,)},
        {"batch_blocks": (2,)},
        {"batch_blocks": (2, -1)},
        {"rows": 1 << 40},
        {"row_tokens": make_commit().row_positions},
        {"row_tokens": "no base64"},
        {"row_tokens": "ünïcode"},
        {"row_tokens": ""},
        {"rows": -1},
        {"block_rows": (3, -1), "batch_blocks": (2,)},
    ],
    ids=str,
)
def test_a_commit_that_does_not_add_up_is_refused(change):
    """Forged with a right checksum; the file named is the commit."""
    commit = parse_commit(make_commit(**change).to_json(), "commits/00000.json")
    with pytest.raises(CorruptCache, match=r"commits/00000.json"):
        commit.lengths("commits/00000.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"null", b"[" * 100_000])
def test_what_is_no_commit_is_refused(data):
    with pytest.raises(CorruptCache, match=r"commits/00000.json: "):
        parse_commit(data, "commits/00000.json")


def test_a_commit_lacking_a_field_is_refused_even_with_a_right_checksum():
    body = json.loads(make_commit().to_json())
    del body["checksum"], body["rows"]
    body["checksum"] = commits._checksum(body)
    with pytest.raises(CorruptCache, match="here: the field 'rows' is missing"):
        parse_commit(json.dumps(body).encode(), "here")


def test_a_plane_of_zeros_alone_does_not_make_a_block_too_large(tmp_path, monkeypatch):
    """The high bytes of small gaps take next to nothing, however many entries a block has."""
    monkeypatch.setattr(reader, "_FREE_BLOCK_BYTES", 0)
    spec = TargetSpec(kind="adaptive", num_classes=CLASSES, mean_entries=8.0, threshold=0.001)
    manifest = cache_manifest(targets=spec, hidden=NO_HIDDEN)
    block = random_block(manifest, 500)
    ranks = [np.arange(count) for count in block.target.counts]
    block.target.ids = RANKS.classes[np.concatenate(ranks)].astype(np.int32)
    encoded = encode_block(block, 0, manifest, RANKS)
    assert len(encoded.frames["target_ids.1"]) * 64 * 8 < 8 * len(block.target.ids)
    storage = LocalStorage(tmp_path)
    write(storage, manifest, [block])
    (found,) = read_all(storage, manifest)
    assert found.target.ids.tolist() == block.target.ids.tolist()
