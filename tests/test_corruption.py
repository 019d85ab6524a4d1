"""Damage to a cache: nothing that is read is silently wrong, and `verify` finds and mends it.

Every damage ends in an error of our own that names the file, or changes no value at all. The caches
are small: frames, Arrow's metadata and JSON are the same in a large one.
"""

import os
import random
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shared import open_cache
from shared.cache import Cache, class_ranks, read_commits
from shared.errors import CorruptCache, TeacherCacheError
from shared.format import writer as shard_writer
from shared.format.commits import commit_name, packed_lengths
from shared.format.reader import ShardReader
from shared.storage.local import LocalStorage
from teacher_cache.config import CleanConfig, InspectConfig, VerifyConfig
from teacher_cache.tools.inspect import inspect
from teacher_cache.tools.verify import clean, verify
from tests.shared.format import test_shards as blocks
from tests.shared.storage.test_local import tree

OPTIONS = {
    "temperature": (2.0,),
    "hidden_layers": (-1,),
    "limit_documents": 60,
    "shard_tokens": 700,
    "top_k": 4,
}
SHARDS = 6


@pytest.fixture(scope="module")
def pristine(capture):
    """60 documents in 6 shards of about 30 KB each."""
    return capture(**OPTIONS)


@pytest.fixture
def copy(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


@pytest.fixture(scope="module")
def expected(pristine):
    """Every value of the undamaged cache."""
    return values_of(pristine)


def values_of(path):
    """Everything that a student could read: manifest, rows and blocks in order, deviations."""
    cache = open_cache(path)
    layers = cache.manifest.hidden.layers
    found = [cache.read_block(b, hidden_layers=layers) for b in range(cache.num_blocks)]
    deviations = [cache.channel_deviation(layer).tolist() for layer in layers]
    return cache.manifest, cache.commits, found, deviations


def assert_same_values(found, expected):
    assert (found[0], found[1], found[3]) == (expected[0], expected[1], expected[3])
    assert len(found[2]) == len(expected[2])
    for one, other in zip(found[2], expected[2], strict=True):
        blocks.assert_same(one, other)


def names(error, path):
    """Whether the message says which file; either of the two that vouch for each other will do."""
    pair = {"manifest.sha256": "manifest.json"}
    return path.name in str(error) or pair.get(path.name, path.name) in str(error)


def content(path):
    """Bytes of every file but the logs."""
    return {name: (path / name).read_bytes() for name in tree(path) if not name.startswith("runs/")}


class Damage:
    """One file damaged in place, again and again; the old content comes back at the end."""

    def __init__(self, path):
        self.path, self.good = path, path.read_bytes()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.path.write_bytes(self.good)

    def flip(self, bit):
        changed = bytearray(self.good)
        changed[bit // 8] ^= 1 << (bit % 8)
        self.path.write_bytes(changed)


def is_found(read, expected_values, path):
    """True if reading fails as it should, false if every value is still right."""
    found, error = outcome(read)
    if error is None:
        assert_same_values(found, expected_values)
    else:
        assert names(error, path), f"{path.name} is not named: {error}"
    return error is not None


def outcome(read):
    """What it gives, and the error of our own it raises; any other one is a failure."""
    try:
        return read(), None
    except TeacherCacheError as error:
        return None, error


def shard_reader(path, expected_values):
    """Reads one shard's blocks among otherwise undamaged values: 10 times faster than all."""
    storage = LocalStorage(path)
    manifest = expected_values[0]
    commits = read_commits(storage, manifest, manifest.cache_id)
    ranks = class_ranks(storage, manifest)

    def reader(commit):
        first = sum(len(c.block_rows) for c in commits if c.shard < commit.shard)

        def read():
            opened = ShardReader(storage.local(commit.file), manifest, commit)
            found = list(expected_values[2])
            for block in range(len(commit.block_rows)):
                found[first + block] = opened.read_block(
                    block, ranks, hidden_layers=manifest.hidden.layers, targets=True
                )
            return (*expected_values[:2], found, expected_values[3])

        return read

    return {storage.local(commit.file): reader(commit) for commit in commits}


def flip_everywhere(copy, expected, rng, flips):
    """Random bits over all files, each file at least twice, larger ones more often."""
    readers = shard_reader(copy, expected)
    paths = [copy / name for name in sorted(content(copy))]
    sizes = [path.stat().st_size for path in paths]
    picked = [*paths, *paths, *rng.choices(paths, sizes, k=flips - 2 * len(paths))]
    errors = dict.fromkeys(paths, 0)
    for path in paths:
        with Damage(path) as damage:
            for bit in {rng.randrange(8 * len(damage.good)) for _ in range(picked.count(path))}:
                damage.flip(bit)
                read = readers.get(path, lambda: values_of(copy))
                errors[path] += is_found(read, expected, path)
    assert sum(errors.values()) > 0.5 * flips
    assert_same_values(values_of(copy), expected)  # the damage was undone
    return errors


@pytest.mark.parametrize("seed", [0, 1])
def test_a_flipped_bit_anywhere_is_an_error_or_changes_nothing(copy, expected, seed):
    flip_everywhere(copy, expected, random.Random(seed), 300)


@pytest.fixture(scope="module", params=["adaptive", "sample", "dense"])
def other_kind(request, capture):
    """20 documents in 2 shards."""
    entries = {} if request.param == "dense" else {"mean_entries": 6.0}
    return capture(targets=request.param, limit_documents=20, shard_tokens=700, **entries)


def test_a_flipped_bit_in_a_cache_of_another_kind(other_kind, tmp_path):
    copy, rng = Path(shutil.copytree(other_kind, tmp_path / "cache")), random.Random(0)
    expected = values_of(copy)
    errors = flip_everywhere(copy, expected, rng, 250)
    assert all(errors[path] for path in errors if path.suffix == ".arrow")
    for path, read in shard_reader(copy, expected).items():  # and in every column of targets
        with Damage(path) as damage:
            for start, end in frames_of_targets(path, expected):
                damage.flip(8 * rng.randrange(start, end) + rng.randrange(8))
                assert is_found(read, expected, path)
                found = verify(VerifyConfig(cache=copy)).bad
                assert len(found) == 1
                assert re.search(rf"{path.name}: block 0, column \d+, plane \d", *found.values())


def frames_of_targets(path, expected_values):
    """Where the first frame of each plane of the targets lies in the file."""
    commit = next(c for c in expected_values[1] if path.name in c.file)
    columns = ShardReader(path, expected_values[0], commit)._columns(0)
    data = path.read_bytes()
    for name, (offsets, frames) in columns.items():
        if name.startswith("target_"):
            place = data.index(bytes(frames[offsets[0] : offsets[1]]))
            yield place, place + int(offsets[1] - offsets[0])


def test_a_cut_shard_of_another_kind(other_kind, tmp_path):
    copy = Path(shutil.copytree(other_kind, tmp_path / "cache"))
    expected = values_of(copy)
    for path, read in shard_reader(copy, expected).items():
        with Damage(path) as damage:
            size = len(damage.good)
            for length in sorted({0, 1, size - 1, *range(0, size, -(-size // 32))}):
                path.write_bytes(damage.good[:length])
                assert is_found(read, expected, path)
            path.write_bytes(damage.good + b"\0")
            assert is_found(read, expected, path)


@pytest.mark.slow
def test_twenty_thousand_flipped_bits(copy, expected):
    errors = flip_everywhere(copy, expected, random.Random(2), 20_000)
    assert all(errors[path] for path in errors if path.suffix == ".arrow")


@pytest.mark.parametrize(
    ("name", "step"),
    [("manifest.json", 5), ("manifest.sha256", 1), (commit_name(0), 3), (commit_name(4), 3)],
)
def test_bytes_all_over_the_small_files_count(copy, expected, name, step):
    """One bit of every `step`-th byte, and what is silent is silent for a reason."""
    rng, silent = random.Random(0), []
    with Damage(copy / name) as damage:
        for place in range(0, len(damage.good), step):
            damage.flip(8 * place + rng.randrange(8))
            _, error = outcome(lambda: open_cache(copy))
            if error is None:
                silent.append(place)
                assert_same_values(values_of(copy), expected)
            else:
                assert names(error, copy / name)
    if name == "manifest.sha256":
        assert set(silent) <= set(range(64, len(damage.good)))  # only its hash is read
    else:
        assert len(silent) <= 2  # the 17th digit of a mean may not change the number


def metadata_bytes(path, reader):
    """Places of a shard that are in no frame: Arrow's header, footer, offsets and padding."""
    data = path.read_bytes()
    inside = bytearray(len(data))
    for index in range(len(reader.commit.batch_blocks)):
        for offsets, frames in reader._columns(index).values():
            for start, end in pairwise(offsets):
                place = data.index(bytes(frames[start:end]))
                inside[place : place + end - start] = b"\1" * int(end - start)
    return [place for place in range(len(data)) if not inside[place]]


def damaged_metadata(tmp_path, monkeypatch, *, share):
    """Flips in Arrow's own bytes of a shard with 5 blocks in 3 record batches."""
    monkeypatch.setattr(shard_writer, "_BATCH_BLOCKS", 2)
    manifest, storage = blocks.MANIFESTS["packed labels only"], LocalStorage(tmp_path)
    blocks.write(storage, manifest, [blocks.random_block(manifest, r, r) for r in (3, 1, 6, 2, 4)])
    commit = blocks.read_commit(storage)
    path = storage.local(commit.file)
    expected = (manifest, [], blocks.read_all(storage, manifest), [])
    places = metadata_bytes(path, ShardReader(path, manifest, commit))
    rng = random.Random(0)

    def read():
        return manifest, [], blocks.read_all(storage, manifest), []

    with Damage(path) as damage:
        for place in rng.sample(places, round(share * len(places))):
            for bit in range(8) if share == 1 else [rng.randrange(8)]:
                damage.flip(8 * place + bit)
                is_found(read, expected, path)


def test_arrows_own_bytes_are_checked_or_mean_nothing(tmp_path, monkeypatch):
    damaged_metadata(tmp_path, monkeypatch, share=0.25)


@pytest.mark.slow
def test_every_bit_of_arrows_own_bytes_is_checked_or_means_nothing(tmp_path, monkeypatch):
    damaged_metadata(tmp_path, monkeypatch, share=1)


@pytest.mark.parametrize("which", [0, -1])
def test_header_and_footer_of_a_captured_shard(copy, expected, which):
    """One bit in every eighth byte of the first and the last kilobyte."""
    path, read = list(shard_reader(copy, expected).items())[which]
    rng = random.Random(which)
    with Damage(path) as damage:
        size = len(damage.good)
        for place in [*range(0, 1024, 8), *range(size - 1024, size, 8)]:
            damage.flip(8 * place + rng.randrange(64))
            is_found(read, expected, path)


def test_the_ends_of_a_shard_are_fixed_text(copy, expected):
    """ARROW1 at both ends, all bits of all 12 bytes; Arrow looks at the last six only."""
    path, read = next(iter(shard_reader(copy, expected).items()))
    with Damage(path) as damage:
        size = len(damage.good)
        assert damage.good[:6] == damage.good[-6:] == b"ARROW1"
        for place in [*range(6), *range(size - 6, size)]:
            for bit in range(8):
                damage.flip(8 * place + bit)
                assert is_found(read, expected, path) or place < 6


@pytest.mark.slow
def test_a_file_cut_at_every_64th_byte_is_an_error(copy, expected):
    """Every file of the cache; an error, or not a number of it has changed."""
    readers = shard_reader(copy, expected)
    for name in sorted(content(copy)):
        path = copy / name
        read = readers.get(path, lambda: values_of(copy))
        with Damage(path) as damage:
            for length in range(0, len(damage.good), 64):
                path.write_bytes(damage.good[:length])
                found = is_found(read, expected, path)
                # Of manifest.sha256 only the hash is read, its first 64 letters.
                assert found or (name == "manifest.sha256" and length == 64), (name, length)


def test_a_file_that_was_cut_or_grew_is_an_error(copy, expected):
    """A shard at 64 places, every other file at 16, each also empty and one byte too long."""
    readers = shard_reader(copy, expected)
    for name in sorted(content(copy)):
        path = copy / name
        read = readers.get(path, lambda: values_of(copy))
        with Damage(path) as damage:
            size = len(damage.good)
            steps = 64 if path in readers else 16
            for length in sorted({0, 1, size - 1, *range(0, size, -(-size // steps))}):
                path.write_bytes(damage.good[:length])
                found = is_found(read, expected, path)
                assert found or (name == "manifest.sha256" and length >= 64), (name, length)
            for extra in (b"\0", b"\n", damage.good[:1]):
                path.write_bytes(damage.good + extra)
                found = is_found(read, expected, path)
                # JSON may end in white space, and only the hash of manifest.sha256 is read.
                blank = extra.isspace() and name.startswith("commits/")
                assert found or blank or name == "manifest.sha256", (name, extra)


def test_a_missing_file_is_an_error_that_names_it(copy):
    cache = open_cache(copy)
    with Damage(copy / "manifest.json"):
        (copy / "manifest.json").unlink()
        with pytest.raises(TeacherCacheError, match=r"manifest.json is missing"):
            open_cache(copy)
    for name in cache.manifest.side_files:
        with Damage(copy / name):
            (copy / name).unlink()
            with pytest.raises(CorruptCache, match=f"{name}: this file is missing"):
                open_cache(copy)
    name = cache.commits[2].file
    (copy / name).unlink()
    with pytest.raises(CorruptCache, match=f"{name}: this shard is missing .* verify --drop-bad"):
        values_of(copy)


def test_a_commit_of_another_cache_or_of_another_day_is_an_error(copy, pristine, capture):
    """B4: the cache id of the first differs; the second names a shard that is not there."""
    other = capture(**OPTIONS | {"seed": 1})
    for name in content(other):
        if name.startswith(("commits/00001", "shards/00001")):
            shutil.copy(other / name, copy / name)
    with pytest.raises(CorruptCache, match=r"commits/00001.json: belongs to shard 1 of cache"):
        open_cache(copy)
    commit = open_cache(pristine).commits[1]
    digest = "0123456789abcdef" * 2
    stale = replace(commit, file=f"shards/00001-{digest[:16]}.arrow", xxh3_128=digest)
    (copy / commit_name(1)).write_bytes(stale.to_json())
    with pytest.raises(CorruptCache, match=r"00001-0123456789abcdef.arrow: this shard is missing"):
        values_of(copy)


def test_swapped_shards_are_an_error(copy):
    cache = open_cache(copy)
    one, two = (copy / cache.commits[shard].file for shard in (1, 2))
    one_bytes, two_bytes = one.read_bytes(), two.read_bytes()
    one.write_bytes(two_bytes)
    two.write_bytes(one_bytes)
    with pytest.raises(CorruptCache, match=one.name):
        values_of(copy)
    assert set(verify(VerifyConfig(cache=copy)).bad) == {1, 2}


def test_swapped_shards_and_commits_are_an_error(copy):
    """Both renamed: the commits then say which shard they are of."""
    one, two = copy / commit_name(1), copy / commit_name(2)
    one_bytes, two_bytes = one.read_bytes(), two.read_bytes()
    one.write_bytes(two_bytes)
    two.write_bytes(one_bytes)
    with pytest.raises(CorruptCache, match=f"{one}: belongs to shard 2 .*expected shard 1"):
        open_cache(copy)
    assert set(verify(VerifyConfig(cache=copy)).bad) == {1, 2}


def flip_middle(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_four(path):
    """Shard 0: a frame. 2: cut. 3: its commit. 5: gone."""
    commits = open_cache(path).commits
    flip_middle(path / commits[0].file)
    os.truncate(path / commits[2].file, 1000)
    flip_middle(path / commit_name(3))
    (path / commits[5].file).unlink()
    return {
        0: Path(commits[0].file).name,
        2: Path(commits[2].file).name,
        3: "00003.json",
        5: Path(commits[5].file).name,
    }


def test_verify_finds_a_good_cache_good(pristine):
    before = content(pristine)
    found = verify(VerifyConfig(cache=pristine, drop_bad=True))
    assert found.sound
    assert (found.shards, found.num_shards, found.bad, found.dropped) == (SHARDS, SHARDS, {}, [])
    assert found.bytes == sum(len(data) for name, data in before.items() if ".arrow" in name)
    assert content(pristine) == before


def test_verify_lists_exactly_the_bad_shards_and_a_run_restores_them(capture, copy, pristine):
    """B5."""
    culprits = damage_four(copy)
    damaged = content(copy)
    kept = {shard: (copy / commit_name(shard)).stat().st_mtime_ns for shard in (1, 4)}
    found = verify(VerifyConfig(cache=copy))
    assert not found.sound
    assert found.bad.keys() == culprits.keys()
    assert (found.shards, found.dropped) == (SHARDS, [])
    for shard, name in culprits.items():
        assert name in found.bad[shard]
    assert content(copy) == damaged  # looking changes nothing

    dropped = verify(VerifyConfig(cache=copy, drop_bad=True))
    assert dropped.bad == found.bad
    assert sorted(dropped.dropped) == sorted(culprits)
    assert verify(VerifyConfig(cache=copy)).sound
    assert open_cache(copy, allow_partial=True).missing_shards == sorted(culprits)

    capture(**OPTIONS, out=copy)
    assert content(copy) == content(pristine)
    assert {shard: (copy / commit_name(shard)).stat().st_mtime_ns for shard in kept} == kept


def test_verify_sees_a_changed_byte_that_no_value_depends_on(copy, expected):
    """Padding between Arrow's buffers: reading is right, the file is not the one committed."""
    path, read = list(shard_reader(copy, expected).items())[4]
    commit = open_cache(copy).commits[4]
    rng = random.Random(0)
    places = metadata_bytes(path, ShardReader(path, expected[0], commit))
    with Damage(path) as damage:
        for place in rng.sample(places, len(places)):
            damage.flip(8 * place)
            if not is_found(read, expected, path):
                break
        found = verify(VerifyConfig(cache=copy))
    assert found.bad.keys() == {4}
    assert "its xxh3_128 is" in found.bad[4]


def test_verify_compares_the_lengths_in_the_shard_with_those_in_the_commit(copy):
    """A commit with other lengths of the same sum, made with a right checksum."""
    commit = open_cache(copy).commits[1]
    tokens, positions = commit.lengths("here")
    order = [*range(1, len(tokens)), 0]
    assert tokens[0] != tokens[1]
    forged = replace(
        commit,
        row_tokens=packed_lengths(tokens[order]),
        row_positions=packed_lengths(positions[order]),
    )
    (copy / commit_name(1)).write_bytes(forged.to_json())
    found = verify(VerifyConfig(cache=copy))
    assert found.bad.keys() == {1}
    assert "column num_tokens: not as in the commit" in found.bad[1]


@pytest.mark.parametrize("kind", ["learnt", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("how", ["missing", "flipped"])
def test_a_bad_side_file_stops_everything_by_name(copy, kind, how):
    name = next(n for n in open_cache(copy).manifest.side_files if n.startswith(kind))
    path = copy / name
    if how == "missing":
        path.unlink()
    else:
        flip_middle(path)
    for use in (
        open_cache,
        lambda copy: verify(VerifyConfig(cache=copy)),
        lambda copy: inspect(InspectConfig(cache=copy)),
    ):
        with pytest.raises(CorruptCache, match=f"{path}: .*[Rr]estore it from a copy"):
            use(copy)


def test_inspect_counts_what_is_there(copy, pristine):
    cache = open_cache(pristine)
    whole = inspect(InspectConfig(cache=pristine, rows=3))
    assert whole["complete"]
    assert (whole["shards"], whole["num_shards"]) == (SHARDS, SHARDS)
    assert (whole["rows"], whole["cache_id"]) == (len(cache), cache.cache_id)
    assert whole["tokens"] == cache.row_tokens.sum()
    assert whole["positions"] == cache.row_positions.sum()
    assert whole["bytes"] == sum(os.path.getsize(pristine / c.file) for c in cache.commits)
    assert whole["counters"]["documents"] == 60
    # Kept mass, entropy and loss are sums over the undecoded targets: their means agree with the
    # decoded ones within the codec's rounding.
    found = [cache.read_block(b) for b in range(cache.num_blocks)]
    positions = whole["positions"]

    def mean(values):
        return sum(float(v.astype(float).sum()) for v in values) / positions

    kept = [1 - np.exp(b.target.log_tail) for b in found]
    assert whole["kept_mass"]["1"] == pytest.approx(mean(kept), abs=1e-4)
    halves = [tempered(b, 2.0) for b in found]
    assert whole["kept_mass"]["2"] == pytest.approx(mean(halves), rel=0.01)
    assert whole["entropy"] == pytest.approx(mean([b.entropy for b in found]), abs=0.012)
    loss = -mean([b.label_logprob for b in found])
    assert whole["teacher_loss"] == pytest.approx(loss, rel=2**-11)

    assert [row["row_id"] for row in whole["rows_shown"]] == [
        cache[i].row_id for i in (0, (len(cache) - 1) // 2, len(cache) - 1)
    ]
    (copy / commit_name(2)).unlink()
    part = inspect(InspectConfig(cache=copy, rows=0))
    assert not part["complete"]
    assert (part["shards"], part["rows_shown"]) == (SHARDS - 1, [])
    assert part["rows"] == len(cache) - cache.commits[2].rows


def tempered(block, temperature):
    ratio = block.log_partition_ratio[temperature]
    return np.exp(block.target.logprobs / temperature - ratio[:, None]).sum(axis=1)


DAY_S = 24 * 3600


def age(path, seconds):
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def litter(path):
    """What crashes and lost races leave behind, and what must stay; by whether `clean` takes it."""
    host = os.uname().nodename
    shard = next((path / "shards").iterdir())
    files = {
        f"shards/.tmp.{host}.{2**22 + 1}.aa": True,  # above the largest process id: nobody's
        f"shards/.tmp.{host}.{os.getpid()}.bb": False,  # being written
        "commits/.tmp.node-7.rack.example.1.cc": False,  # perhaps being written elsewhere
        "commits/.tmp.node-8.1.dd": True,  # a day old
        "shards/00001-00000000000000aa.arrow": True,  # lost a race: shard 1 has another
        "shards/00003-00000000000000bb.arrow": False,  # its commit may be a moment away
        "shards/00003-00000000000000cc.arrow": True,  # a day old
    }
    for name in files:
        shutil.copy(shard, path / name)
    for name in ("commits/.tmp.node-8.1.dd", "shards/00003-00000000000000cc.arrow"):
        age(path / name, DAY_S + 60)
    return files


def test_clean_removes_what_nobody_needs_and_nothing_else(copy, pristine):
    commit = open_cache(pristine).commits[3]
    (copy / commit_name(3)).unlink()
    (copy / commit.file).unlink()
    before = tree(copy)
    files = litter(copy)
    taken = {name for name, gone in files.items() if gone}
    assert set(clean(CleanConfig(cache=copy, dry_run=True))) == taken
    assert tree(copy) == before | files.keys()
    assert set(clean(CleanConfig(cache=copy))) == taken
    assert tree(copy) == before | files.keys() - taken
    assert clean(CleanConfig(cache=copy)) == []


def test_clean_leaves_a_good_cache_alone(copy, pristine):
    assert clean(CleanConfig(cache=copy)) == []
    assert content(copy) == content(pristine)


def test_clean_removes_nothing_while_a_commit_is_bad(copy):
    """Which shard files are needed is not known then."""
    litter(copy)
    flip_middle(copy / commit_name(3))
    before = tree(copy)
    with pytest.raises(CorruptCache, match=r"00003.json: .* Nothing was removed\."):
        clean(CleanConfig(cache=copy))
    assert tree(copy) == before


@pytest.mark.parametrize("name", ["shards/notes.txt", "shards/.DS_Store", "runs/.tmp.mine"])
def test_clean_leaves_files_alone_that_are_not_ours(copy, name):
    (copy / name).write_text("mine")
    assert clean(CleanConfig(cache=copy)) == []
    assert (copy / name).exists()


def test_the_same_class_reads_a_restricted_cache_after_damage_elsewhere(copy, expected):
    """Shards are read one by one: a bad one harms no row of another."""
    cache = open_cache(copy)
    flip_middle(copy / cache.commits[1].file)
    found = Cache(cache.storage, cache.manifest, cache.cache_id, cache.commits)
    blocks.assert_same(found.read_block(0, hidden_layers=(-1,)), expected[2][0])
    first = len(cache.commits[0].block_rows)
    with pytest.raises(CorruptCache, match=Path(cache.commits[1].file).name):
        found.read_block(first, hidden_layers=(-1,))
