"""The `reference` column: what an answer is compared with, whatever the task makes of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared import strict
from shared.cache import open_cache
from shared.errors import CorruptCache
from shared.format import manifest_file
from shared.format.column import Contents
from shared.format.commits import commit_name
from shared.format.encoding import from_planes, to_planes
from shared.format.schema import columns_of
from shared.format.writer import ShardWriter, encode_block
from shared.storage.local import LocalStorage
from teacher_cache.config import RepackConfig, VerifyConfig
from teacher_cache.tools.repack import repack
from teacher_cache.tools.verify import verify
from tests import test_hostile as hostile
from tests.plain_reader import read_cache
from tests.shared.format.test_manifest import make_manifest
from tests.shared.format.test_shards import NO_HIDDEN, NO_TARGETS, RANKS, assert_same, random_block

VALUES = [
    None,
    "",
    "Größe 🙂",
    {"answers": ["巴西", "a\nb"], "n": [1, -2, 0.5]},
    [],
    {"deep": [[{}]]},
]
ROWS, BLOCKS = 6, 3


def reference_block(manifest, number):
    """Rows of documents 6 n to 6 n + 5, each with a reference of another length."""
    block = random_block(manifest, ROWS, seed=number)
    block.row_ids = (np.arange(ROWS, dtype=np.uint64) + np.uint64(ROWS * number)) << np.uint64(24)
    texts = [json.dumps(value, ensure_ascii=False).encode() for value in values_of(number)]
    block.reference = np.frombuffer(b"".join(texts), np.uint8)
    block.reference_bytes = np.array([len(text) for text in texts], np.int32)
    return block


def values_of(number):
    return [[number, value] for value in VALUES]


@pytest.fixture(scope="module")
def manifest():
    columns = columns_of(
        Contents(segments=False, positions=False, labels=False, targets=False, references=True)
    )
    made = make_manifest(
        columns=tuple(columns), targets=NO_TARGETS, hidden=NO_HIDDEN, side_files={}, teacher=None
    )
    return replace(made, plan=replace(made.plan, num_shards=1))


@pytest.fixture(scope="module")
def cache(manifest, tmp_path_factory, tokenizer_dir) -> Path:
    """One shard of three blocks."""
    storage = LocalStorage(tmp_path_factory.mktemp("references") / "cache")
    manifest_file.publish(storage, manifest)
    with ShardWriter(storage, manifest, manifest.cache_id, 0) as writer:
        for number in range(BLOCKS):
            block = reference_block(manifest, number)
            writer.write(encode_block(block, number, manifest, RANKS))
    return storage.root


@pytest.fixture
def copy(cache, tmp_path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def test_rows_have_their_references(cache):
    expected = [value for number in range(BLOCKS) for value in values_of(number)]
    assert [row.reference for row in open_cache(cache)] == expected
    assert [row["reference"] for row in read_cache(cache)] == expected
    assert verify(VerifyConfig(cache=cache)).sound


def test_one_row_parses_its_own_reference_only(cache, monkeypatch):
    opened, parsed, original = open_cache(cache), [], strict.parse_json

    def parse_json(data, where, **limits):
        parsed.append(where)
        return original(data, where, **limits)

    monkeypatch.setattr(strict, "parse_json", parse_json)
    row = opened[ROWS + 2]
    assert row.reference == values_of(1)[2]
    assert parsed == [f"reference of row {row.row_id}"]


@pytest.mark.parametrize("rows", [0, 1, ROWS])
def test_planes_hold_the_references(manifest, rows):
    block = reference_block(manifest, 0)
    if rows < ROWS:
        few = random_block(manifest, rows)
        few.reference_bytes = block.reference_bytes[:rows]
        few.reference = block.reference[: int(few.reference_bytes.sum())]
        block = few
    planes = to_planes(block, manifest, RANKS)
    found = from_planes(planes, block.num_tokens, block.num_positions, manifest, RANKS)
    assert found.reference.tobytes() == block.reference.tobytes()
    assert np.array_equal(found.reference_bytes, block.reference_bytes)


def test_a_reader_that_skips_them_reads_the_rest(cache):
    skip = ("reference", "reference_bytes")
    opened = open_cache(cache)
    for number in range(BLOCKS):
        whole, part = opened.read_block(number), opened.read_block(number, skip=skip)
        assert part.reference is None
        assert part.reference_bytes is None
        assert_same(part, replace(whole, reference=None, reference_bytes=None))


def test_repack_keeps_the_references_of_the_documents_that_stay(cache, tmp_path):
    repack(RepackConfig(cache=cache, out=tmp_path / "part", documents="3:14"))
    expected = [value for number in range(BLOCKS) for value in values_of(number)][3:14]
    part = open_cache(tmp_path / "part")
    assert [row.row_id >> 24 for row in part] == list(range(3, 14))
    assert [row.reference for row in part] == expected
    assert verify(VerifyConfig(cache=tmp_path / "part")).sound


def outcome(path):
    """All references, or the error that reading them raises."""
    try:
        return [row.reference for row in open_cache(path)]
    except CorruptCache as error:
        return error


def test_a_flipped_bit_of_a_reference_is_found_or_changes_nothing(copy):
    """Every 7th bit of both columns' frames, in the middle block."""
    opened = open_cache(copy)
    expected = [row.reference for row in opened]
    commit = opened.commits[0]
    path = copy / commit.file
    good = path.read_bytes()
    frames = [
        encode_block(reference_block(opened.manifest, 1), 1, opened.manifest, RANKS).frames[name]
        for name in ("reference.0", "reference_bytes.0")
    ]
    flips = 0
    for frame in frames:
        start = good.index(frame)
        for bit in range(0, 8 * len(frame), 7):
            changed = bytearray(good)
            changed[start + bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            found = outcome(copy)
            if isinstance(found, CorruptCache):
                assert path.name in str(found)
                flips += 1
            else:  # a bit of zstandard that means nothing
                assert found == expected
    path.write_bytes(good)
    assert flips > 50
    assert [row.reference for row in open_cache(copy)] == expected


def forged(copy, change):
    """Other planes in the first block, with all checksums right again."""
    first = []

    def once(values):
        if not first:
            first.append(change(values))

    hostile.forge_planes(copy, once)


def test_lengths_that_do_not_add_up_are_refused(copy):
    def change(values):
        values["reference_bytes.0"].view(np.uint32)[0] += 1

    forged(copy, change)
    with pytest.raises(CorruptCache, match=r"column 11, plane 0: found 126 bytes, expected 127"):
        open_cache(copy)[0]


def test_lengths_of_gigabytes_are_refused_before_memory_is_taken(copy):
    def change(values):
        values["reference_bytes.0"].view(np.uint32)[:] = 2**31 - 1

    forged(copy, change)
    with pytest.raises(
        CorruptCache, match=r"column reference_bytes: found 12,884,901,882 bytes of"
    ):
        open_cache(copy)[0]


@pytest.mark.parametrize("length", [2**31, 2**32 - 1])
def test_lengths_that_are_negative_as_int32_are_refused(copy, length):
    def change(values):
        lengths = values["reference_bytes.0"].view(np.uint32)
        lengths[:] = 0
        lengths[0] = length

    forged(copy, change)
    with pytest.raises(CorruptCache, match="reference_bytes"):
        open_cache(copy)[0]


@pytest.mark.parametrize("change", ["borders", "text"])
def test_a_reference_that_is_no_json_is_refused(copy, change):
    """Lengths that add up but cut in other places, or bytes that mean nothing."""

    def edit(values):
        if change == "borders":
            lengths = values["reference_bytes.0"].view(np.uint32)
            lengths[0], lengths[1] = lengths[0] - 1, lengths[1] + 1
        else:
            values["reference.0"][:] = 0xFF

    forged(copy, edit)
    with pytest.raises(CorruptCache, match="reference of row 0: not valid JSON"):
        open_cache(copy)[0]


def test_references_without_lengths_are_refused(copy):
    def change(raw):
        raw["columns"].remove("reference_bytes")

    hostile.forge_manifest(copy, change)
    with pytest.raises(CorruptCache, match="reference without reference_bytes before it"):
        open_cache(copy)


def test_the_commit_counts_their_bytes(cache):
    (commit,) = open_cache(cache).commits
    assert commit.column_bytes["reference"] > commit.column_bytes["reference_bytes"] > 0
    assert (cache / commit_name(0)).is_file()
