"""The manifest: written canonically, read strictly, compared field by field."""

import hashlib
import json
from copy import deepcopy
from dataclasses import asdict, replace

import pytest

from shared.errors import CacheMismatch, CorruptCache, IncompleteCache
from shared.format import manifest_file
from shared.format.column import Contents
from shared.format.manifest import (
    BatchPlan,
    CorpusInfo,
    HiddenSpec,
    Manifest,
    Preprocessing,
    TeacherInfo,
    TokenizerInfo,
    differences,
    rows_id,
)
from shared.format.schema import columns_of
from shared.storage.local import LocalStorage
from shared.targets.spec import TargetSpec

TOKENIZER = TokenizerInfo(
    hash="aa", num_ids=300, bos_token_id=None, eos_token_id=0, template_hash="bb"
)
CORPUS = CorpusInfo(source="Bücher.txt", fingerprint="cc", num_documents=9)
PREPROCESSING = Preprocessing(
    split="train",
    columns=("text=text",),
    sample_by="line",
    encoding_errors="strict",
    limit_documents=0,
    max_length=64,
    pack=False,
)


def make_manifest(**changes):
    """A manifest as stage one writes one, with two hidden layers and a stored temperature."""
    manifest = Manifest(
        format_version=1,
        task="causal-lm",
        teacher=TeacherInfo(
            id="someone/teacher",
            revision="abc",
            config_hash="dd",
            weights_digest="ee",
            dtype="bfloat16",
            attn_implementation="sdpa",
            parameters=12,
        ),
        tokenizer=TOKENIZER,
        corpus=CORPUS,
        preprocessing=PREPROCESSING,
        rows_id="ff",
        targets=TargetSpec(kind="topk", num_classes=300, top_k=8, temperatures=(2.0, 4.0)),
        hidden=HiddenSpec(layers=(-1, 3), widths=(32, 32), codec="bf16"),
        columns=tuple(
            columns_of(Contents(segments=False, positions=False, labels=False, targets=True))
        ),
        plan=BatchPlan(
            documents_per_shard=3,
            num_shards=3,
            estimated_tokens=100,
            forward_tokens=64,
            chunk_positions=16,
            cpu_threads=1,
            asked_shard_tokens=2_000_000,
            asked_forward_tokens="auto",
        ),
        seed=0,
        nonfinite="stop",
        origin=None,
        side_files={"tokenizer/tokenizer.json": "00ff"},
    )
    return replace(manifest, **changes)


def forge(storage, data):
    """A manifest with a matching hash, as only someone with intent (or a newer writer) makes it."""
    storage.put(manifest_file.MANIFEST, data)
    digest = hashlib.sha256(data).hexdigest()
    storage.put(manifest_file.MANIFEST_HASH, f"{digest}  {manifest_file.MANIFEST}\n".encode())


def forged(tmp_path, change):
    """A storage whose manifest is the usual one, changed by `change` in place."""
    raw = json.loads(make_manifest().to_json())
    change(raw)
    storage = LocalStorage(tmp_path)
    forge(storage, json.dumps(raw).encode())
    return storage


@pytest.mark.parametrize(
    "manifest",
    [
        make_manifest(),
        make_manifest(teacher=None, side_files={}),
        make_manifest(tokenizer=replace(TOKENIZER, bos_token_id=5, eos_token_id=None)),
        make_manifest(plan=replace(make_manifest().plan, asked_forward_tokens=512)),
        make_manifest(hidden=HiddenSpec(layers=(), widths=(), codec="bf16")),
    ],
)
def test_what_is_published_is_what_is_read(tmp_path, manifest):
    storage = LocalStorage(tmp_path / "a cache")
    assert manifest_file.publish(storage, manifest)
    found, cache_id = manifest_file.read(storage)
    assert found == manifest
    assert cache_id == manifest.cache_id


def test_the_cache_id_is_the_sha256_of_the_file_and_the_hash_file_is_for_sha256sum(tmp_path):
    storage = LocalStorage(tmp_path)
    manifest_file.publish(storage, make_manifest())
    data = (tmp_path / "manifest.json").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert manifest_file.read(storage)[1] == digest
    assert (tmp_path / "manifest.sha256").read_text() == f"{digest}  manifest.json\n"


def test_equal_manifests_are_equal_bytes_and_any_other_field_is_another_cache():
    assert make_manifest().to_json() == make_manifest().to_json()
    ids = {make_manifest(seed=seed).cache_id for seed in range(3)}
    ids |= {make_manifest(teacher=None).cache_id, make_manifest(side_files={}).cache_id}
    assert len(ids) == 5


def test_the_second_publisher_changes_nothing(tmp_path):
    storage = LocalStorage(tmp_path)
    assert manifest_file.publish(storage, make_manifest())
    assert not manifest_file.publish(storage, make_manifest(seed=1))
    assert manifest_file.read(storage)[0].seed == 0


def test_a_crash_between_manifest_and_hash_is_told_and_mended(tmp_path):
    storage = LocalStorage(tmp_path)
    manifest_file.publish(storage, make_manifest())
    storage.delete(manifest_file.MANIFEST_HASH)
    with pytest.raises(IncompleteCache, match=r"manifest.sha256 is missing.* run command again"):
        manifest_file.read(storage)
    manifest_file.write_hash(storage)
    assert manifest_file.read(storage)[0] == make_manifest()


def test_a_folder_without_a_manifest_is_no_cache(tmp_path):
    with pytest.raises(IncompleteCache, match=r"no cache here .*cache-teacher run --out"):
        manifest_file.read(LocalStorage(tmp_path))


def paths_of(value, path=()):
    """Every field of the manifest, outermost first."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            if (*path, key) != ("side_files",):
                yield from paths_of(item, (*path, key))


EVERY_FIELD = list(paths_of(json.loads(make_manifest().to_json())))
ADDED = [
    *(("targets", "mean_entries"), ("targets", "threshold"), ("labels",), ("problem_type",)),
    *(("hidden", "every"), ("hidden", "pooling"), ("labelled",)),
    *(("preprocessing", name) for name in ("mask_copies", "mask_share", "mask_seed", "stride")),
    *(("preprocessing", name) for name in ("max_target_length", "decoder_start", "generation")),
]


def at(raw, path):
    for key in path:
        raw = raw[key]
    return raw


@pytest.mark.parametrize("path", [p for p in EVERY_FIELD if p not in ADDED], ids=".".join)
def test_a_missing_field_is_named(tmp_path, path):
    storage = forged(tmp_path, lambda raw: at(raw, path[:-1]).pop(path[-1]))
    with pytest.raises(CorruptCache, match=f"manifest.json.*'{path[-1]}' is missing"):
        manifest_file.read(storage)


@pytest.mark.parametrize("path", ADDED, ids=".".join)
def test_a_field_that_was_added_later_has_its_default(tmp_path, path):
    """The id of such a cache stays that of its file."""
    storage = forged(tmp_path, lambda raw: at(raw, path[:-1]).pop(path[-1]))
    found, cache_id = manifest_file.read(storage)
    assert found == make_manifest()
    assert cache_id == hashlib.sha256(storage.read(manifest_file.MANIFEST)).hexdigest()


@pytest.mark.parametrize("path", EVERY_FIELD, ids=".".join)
def test_a_field_of_another_type_is_named(tmp_path, path):
    """true is of no field's type but of yes or no, although Python takes it for a number."""
    wrong = "yes" if path[-1] in ("pack", "labelled") else True
    storage = forged(tmp_path, lambda raw: at(raw, path[:-1]).__setitem__(path[-1], wrong))
    with pytest.raises(CorruptCache, match=f"manifest.json: .*{path[-1]}: found .*expected"):
        manifest_file.read(storage)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("columns",), ["row_ids", 3]),
        (("hidden", "layers"), [-1, "3"]),
        (("hidden", "layers"), [-1, 3.0]),
        (("side_files",), {"a": 1}),
        (("side_files",), ["a"]),
        (("targets", "temperatures"), ["2"]),
        (("targets", "temperatures"), [10**400]),
        (("targets", "kind"), "everything"),
        (("targets", "kind"), "adaptive"),  # without what calibration found
        (("targets", "value_bits"), 9),
        (("targets", "num_classes"), 0),
        (("tokenizer", "eos_token_id"), "0"),
        (("plan", "asked_forward_tokens"), None),
        (("format_version",), 0),
        (("format_version",), "1"),
    ],
)
def test_a_value_that_cannot_be_is_an_error_that_names_the_file(tmp_path, path, value):
    storage = forged(tmp_path, lambda raw: at(raw, path[:-1]).__setitem__(path[-1], value))
    with pytest.raises((CorruptCache, CacheMismatch), match=r"manifest\.json"):
        manifest_file.read(storage)


def test_whole_numbers_are_fine_where_a_float_belongs(tmp_path):
    storage = forged(tmp_path, lambda raw: raw["targets"].update(temperatures=[2, 4]))
    assert manifest_file.read(storage)[0].targets.temperatures == (2.0, 4.0)


def test_unknown_fields_are_ignored_but_belong_to_the_cache_id(tmp_path):
    def add(raw):
        raw["later"] = {"anything": [1]}
        raw["plan"]["later"] = 3
        raw["targets"]["later"] = None

    found, cache_id = manifest_file.read(forged(tmp_path, add))
    assert found == make_manifest()
    assert cache_id != make_manifest().cache_id


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_format_is_refused_whatever_else_it_says(tmp_path, version):
    storage = LocalStorage(tmp_path)
    forge(storage, json.dumps({"format_version": version, "all": "new"}).encode())
    with pytest.raises(
        CacheMismatch,
        match=rf"manifest.json: format {version} needs a newer teacher-cache; this one reads up to "
        r"format 1. Run pip install --upgrade teacher-cache",
    ):
        manifest_file.read(storage)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"format_version": ' + b"9" * 5000 + b"}",
        b"[" * 100_000 + b"]" * 100_000,
    ],
    ids=["empty", "cut", "list", "null", "not UTF-8", "5,000 digits", "deep"],
)
def test_what_is_no_manifest_is_an_error_that_names_the_file(tmp_path, data):
    storage = LocalStorage(tmp_path)
    forge(storage, data)
    with pytest.raises(CorruptCache, match=r"manifest\.json: "):
        manifest_file.read(storage)


def test_a_manifest_too_large_is_not_read(tmp_path):
    storage = LocalStorage(tmp_path)
    manifest_file.publish(storage, make_manifest())
    with open(tmp_path / "manifest.json", "r+b") as file:
        file.truncate(manifest_file.MAX_MANIFEST_BYTES + 1)  # sparse: takes no disk
    with pytest.raises(CorruptCache, match=r"manifest.json: 16,777,217 bytes where at most"):
        manifest_file.read(storage)


def test_a_changed_manifest_is_found_by_its_hash_and_a_changed_hash_too(tmp_path):
    storage = LocalStorage(tmp_path)
    manifest_file.publish(storage, make_manifest())
    good = deepcopy(make_manifest())
    storage.put(manifest_file.MANIFEST, replace(good, seed=1).to_json())
    with pytest.raises(CorruptCache, match=r"manifest.json: its sha256 is .* manifest.sha256 says"):
        manifest_file.read(storage)
    storage.put(manifest_file.MANIFEST, good.to_json())
    for content in (b"", b"00  manifest.json\n", b"\xff\x00"):
        storage.put(manifest_file.MANIFEST_HASH, content)
        with pytest.raises(CorruptCache, match=r"manifest.sha256 says .*restore it from a copy"):
            manifest_file.read(storage)


def test_rows_are_joinable_exactly_when_corpus_tokenizer_and_preprocessing_agree():
    same = rows_id(CORPUS, TOKENIZER, PREPROCESSING)
    assert rows_id(replace(CORPUS, source="elsewhere.txt"), TOKENIZER, PREPROCESSING) == same
    others = {
        rows_id(replace(CORPUS, fingerprint="x"), TOKENIZER, PREPROCESSING),
        rows_id(CORPUS, replace(TOKENIZER, hash="x"), PREPROCESSING),
        rows_id(CORPUS, replace(TOKENIZER, template_hash="x"), PREPROCESSING),
        rows_id(CORPUS, TOKENIZER, replace(PREPROCESSING, max_length=65)),
        rows_id(CORPUS, TOKENIZER, replace(PREPROCESSING, pack=True)),
    }
    assert len(others | {same}) == 6


def test_differences_name_every_field_that_differs_and_no_other():
    found = asdict(make_manifest())
    asked = asdict(
        make_manifest(
            seed=1,
            targets=TargetSpec(kind="topk", num_classes=300, top_k=16, temperatures=(2.0,)),
            hidden=replace(make_manifest().hidden, layers=(-1,)),
        )
    )
    assert list(differences(found, asked)) == [
        "hidden.layers: the cache has (-1, 3), asked for (-1,)",
        "seed: the cache has 0, asked for 1",
        "targets.temperatures: the cache has (2.0, 4.0), asked for (2.0,)",
        "targets.top_k: the cache has 8, asked for 16",
    ]
    assert list(differences(found, found)) == []


def test_differences_cover_what_only_one_side_has():
    lines = differences({"a": {"b": 1}, "c": None}, {"a": None, "d": 2}, left="the run has")
    assert list(lines) == [
        "a: the run has {'b': 1}, asked for None",
        "d: the run has None, asked for 2",
    ]


@pytest.mark.parametrize(
    ("task", "start", "message"),
    [
        ("causal-lm", 3, r"preprocessing.decoder_start: found 3, expected -1, for no decoder"),
        ("seq2seq-lm", -1, r"preprocessing.decoder_start: found -1, expected a token below"),
        ("seq2seq-lm", 300, r"preprocessing.decoder_start: found 300, expected a token below 300"),
    ],
)
def test_a_decoder_starts_from_a_token_and_nothing_else_does(tmp_path, task, start, message):
    def forge(raw):
        raw["task"], raw["preprocessing"]["decoder_start"] = task, start

    with pytest.raises(CorruptCache, match=message):
        manifest_file.read(forged(tmp_path, forge))
