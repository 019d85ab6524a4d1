"""`inspect`: text and page of every kind, held against what the blocks hold; `plan --html`."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from shared import open_cache
from shared.models.tokenizer import load_cached_tokenizer
from shared.pages.drawing import Axis, Series, histogram, lines, log_axis
from shared.targets.ragged import drawn_logprob
from teacher_cache.config import InspectConfig, PlanConfig
from teacher_cache.tools import inspect as inspection
from teacher_cache.tools.inspect import inspect
from teacher_cache.tools.pages import write_inspection, write_plan
from teacher_cache.tools.plan import estimate
from teacher_cache.tools.report import inspect_text
from tests.conftest import Capture

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"targets": "topk", "top_k": 8, "temperature": (2.0,)},
    "adaptive": {"targets": "adaptive", "mean_entries": 6.0, "temperature": (2.0,)},
    "sample": {"targets": "sample", "mean_entries": 6.0},
    "dense": {"targets": "dense"},
    "none": {"targets": "none", "teacher": None},
}
VOID = {"meta", "br", "hr", "img", "link", "input"}


class WellFormed(HTMLParser):
    """Every element is closed in order; collects the text and the names of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(path: Path) -> WellFormed:
    """The page, after checking that it is well-formed and needs nothing from outside."""
    html = path.read_text(encoding="utf-8")
    page = WellFormed()
    page.feed(html)
    page.close()
    assert page.open == []
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    assert page.seen & {"script", "link", "img", "iframe", "object"} == set()
    assert not any(name.startswith("on") or name in ("src", "href") for name in page.attributes)
    assert "url(" not in html
    return page


@pytest.fixture(scope="module")
def cache_of(capture: Capture, tokenizer_dir: Path):
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            options = {"tokenizer": str(tokenizer_dir)} if name == "none" else {}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("teacher_cache.job.assemble.MIN_BLOCK_POSITIONS", 256)
                made[name] = capture(limit_documents=60, **KINDS[name], **options)
        return made[name]

    return make


def inspected(path: Path, html: Path | None = None, rows: int = 3) -> dict[str, Any]:
    return inspect(InspectConfig(cache=path, html=html, rows=rows))


@pytest.mark.parametrize("name", KINDS)
def test_a_page_of_every_kind_is_well_formed_and_says_what_the_text_says(cache_of, tmp_path, name):
    html = tmp_path / "deep" / "inspect.html"
    numbers = inspected(cache_of(name), html)
    json.dumps(numbers)
    write_inspection(numbers, html)
    page = page_of(html)
    charts = {"topk": 2, "adaptive": 3, "sample": 3, "dense": 1, "none": 0}[name]
    assert html.read_text().count("<svg") == charts
    for column in numbers["column_bytes_per_position"]:
        assert column in page.text
    assert f"{numbers['shards']:,} of {numbers['num_shards']:,}" in page.text
    assert numbers["corpus"]["fingerprint"] in page.text
    if name != "none":
        assert numbers["teacher"]["weights_digest"] in page.text
        for mass in numbers["kept_mass"].values():
            assert f"{mass:.1%}" in page.text


@pytest.mark.parametrize("name", KINDS)
def test_the_text_says_what_is_kept(cache_of, name):
    numbers = inspected(cache_of(name))
    text = inspect_text(numbers)
    (targets,) = re.findall(r"^targets +(.*)$", text, re.MULTILINE)
    spec = open_cache(cache_of(name)).manifest.targets
    found = f"{numbers['entries']:.1f} of 300 classes (6 asked for), every p >= {spec.threshold:g}"
    expected = {
        "topk": "topk, 8 of 300 classes, 7 bits, exact at T = 1, 2",
        "adaptive": f"adaptive, {found}, 7 bits, exact at T = 1, 2",
        "sample": f"sample, {found}, the others drawn with that weight, 7 bits, exact at T = 1",
        "dense": "dense, all 300 classes, 16 bits, exact at any T",
        "none": "none",
    }
    assert targets == expected[name]
    assert ("of the classes kept as they are" in text) == (name == "sample")
    assert ("kept mass" in text) == (name != "none")


def test_the_tokenizer_is_loaded_once_for_all_rows_shown(cache_of, monkeypatch):
    loads, original = [], inspection.load_cached_tokenizer
    monkeypatch.setattr(
        inspection, "load_cached_tokenizer", lambda storage: loads.append(1) or original(storage)
    )
    path = open_cache(cache_of("topk")).path
    assert len(inspected(path, rows=20)["rows_shown"]) == 20
    assert len(loads) == 1
    assert inspected(path, rows=0)["rows_shown"] == []
    assert len(loads) == 1


@pytest.mark.parametrize("name", ["adaptive", "sample"])
def test_entries_found_are_those_of_the_blocks(cache_of, name):
    cache = open_cache(cache_of(name))
    counts = [cache.read_block(block).target.counts for block in range(cache.num_blocks)]
    found = inspected(cache.path, rows=0)["entries"]
    assert found == pytest.approx(np.concatenate(counts).mean(), rel=1e-6)
    assert found == pytest.approx(6, rel=0.15)


@pytest.mark.parametrize("name", ["topk", "adaptive", "sample", "dense"])
def test_decoded_rows_show_the_likeliest_entries_of_their_own_position(cache_of, name):
    """Entry by entry out of the block's flat arrays."""
    cache = open_cache(cache_of(name))
    tokenizer, spec = load_cached_tokenizer(cache.storage), cache.manifest.targets
    shown = inspected(cache.path)["rows_shown"][1]
    index = next(i for i in range(len(cache)) if cache[i].row_id == shown["row_id"])
    block, before = 0, index
    while before >= cache.block_rows[block]:
        before -= int(cache.block_rows[block])
        block += 1
    values = cache.read_block(block)
    first = int(values.num_positions[:before].sum())
    assert len(shown["positions"]) == min(6, values.num_positions[before])
    entries = values.target.counts
    if entries is None:
        entries = np.full(int(values.num_positions.sum()), spec.num_entries)
    for place, position in enumerate(shown["positions"]):
        start = int(entries[: first + place].sum())
        own = slice(start, start + int(entries[first + place]))
        ids = values.target.ids.reshape(-1)[own]
        p = np.exp(values.target.logprobs.reshape(-1)[own])
        order = np.argsort(-p, kind="stable")[:6]
        assert [e["token"] for e in position["teacher"]] == [
            tokenizer.decode([int(ids[slot])]) for slot in order
        ]
        assert [e["p"] for e in position["teacher"]] == pytest.approx(p[order].tolist(), abs=1e-4)
        assert position["entries"] == entries[first + place]
        rest = math.exp(values.target.log_tail[first + place])
        if name == "sample":
            drawn = values.target.logprobs[own] == drawn_logprob(spec)
            assert [e["drawn"] for e in position["teacher"]] == drawn[order].tolist()
            rest = max(0.0, 1 - p[~drawn].sum())
        assert position["tail_mass"] == pytest.approx(rest, abs=1e-4)


@pytest.mark.parametrize("name", ["topk", "adaptive", "sample"])
def test_histograms_are_those_of_all_blocks_of_a_small_cache(cache_of, tmp_path, name):
    cache = open_cache(cache_of(name))
    blocks = [cache.read_block(number) for number in range(cache.num_blocks)]
    assert 2 <= len(blocks) <= 16
    found = inspected(cache.path, tmp_path / "x.html")["histograms"]
    assert found["positions"] == cache.row_positions.sum()
    entropy = np.concatenate([block.entropy for block in blocks])
    steps = np.rint(entropy * 255 / math.log(300)).astype(int)  # as stored, 0 to 255
    assert found["entropy"]["counts"] == np.bincount(steps // 8, minlength=32).tolist()
    middle = (np.array(found["entropy"]["edges"])[1:] + found["entropy"]["edges"][:-1]) / 2
    assert middle == pytest.approx((8 * np.arange(32) + 3.5) * math.log(300) / 255, abs=1e-5)
    kept = np.average(
        1 - np.array(found["tail_mass"]["edges"][:-1]) - 1 / 80,
        weights=found["tail_mass"]["counts"],
    )
    mean = inspected(cache.path, rows=0)["kept_mass"]["1"]
    assert kept == pytest.approx(mean, abs=1 / 80)  # half a bar
    if name != "topk":
        counts = np.concatenate([block.target.counts for block in blocks])
        most = int(counts.max())
        assert most <= 40  # a bar for each number
        assert found["entries"]["counts"] == np.bincount(counts, minlength=most + 1)[1:].tolist()


def test_a_page_reads_a_bounded_number_of_blocks(cache_of, tmp_path, monkeypatch):
    monkeypatch.setattr("teacher_cache.tools.inspect._HISTOGRAM_BLOCKS", 2)
    cache = open_cache(cache_of("topk"))
    found = inspected(cache.path, tmp_path / "x.html", rows=0)["histograms"]
    ends = [cache.read_block(number).num_positions.sum() for number in (0, cache.num_blocks - 1)]
    assert (found["blocks"], found["positions"]) == (2, sum(ends))
    assert "histograms" not in inspected(cache.path, rows=0)


def test_markup_in_the_corpus_is_text_on_the_page(capture, tmp_path):
    """In documents, in the name of the corpus, and in the options."""
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)> &amp; \"q\" 'a' ]]> </svg>"
    corpus = tmp_path / "<b>bold<b>.txt"
    corpus.write_text("".join(f"{hostile} {number}\n" for number in range(20)))
    numbers = inspected(capture(corpus=str(corpus), targets="adaptive", mean_entries=4.0))
    write_inspection(numbers, tmp_path / "page.html")
    page = page_of(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert page.seen & {"b", "script", "img"} <= {"b"}  # tiles have a b of their own
    assert "<b>bold" not in html
    assert "<script" not in html
    assert "onerror=alert(2)" in page.text
    assert "<script>alert(1)</script>" in page.text


def test_an_incomplete_cache_says_which_shards_are_missing(cache_of, tmp_path):
    copy = Path(shutil.copytree(cache_of("topk"), tmp_path / "cache"))
    commits = sorted((copy / "commits").iterdir())
    assert len(commits) > 1
    commits[0].unlink()
    numbers = inspected(copy)
    write_inspection(numbers, tmp_path / "page.html")
    text = page_of(tmp_path / "page.html").text
    assert "INCOMPLETE" in text
    assert "Missing: 0" in text


def test_the_page_of_a_plan(teacher_dir, corpus_file, tmp_path):
    config = PlanConfig(
        teacher=str(teacher_dir),
        corpus=str(corpus_file),
        out=tmp_path / "cache",
        html=tmp_path / "plan.html",
        calibrate=True,
        limit_documents=30,
        max_length=64,
        device="cpu",
        top_k=8,
        temperature=(2.0,),
    )
    numbers = estimate(config)
    write_plan(numbers, tmp_path / "plan.html")
    page = page_of(tmp_path / "plan.html")
    html = (tmp_path / "plan.html").read_text()
    assert html.count("<svg") == 4  # two students, kept mass, entropy
    assert html.count('class="asked"') == 1
    for choice in numbers["choices"]:
        assert choice["text"] in page.text
    assert "T = 2" in page.text
    assert html.count('class="ring"') == 4  # one for each student, one for each temperature


# Charts


def test_points_and_ticks_stand_where_their_axis_says():
    x, y = Axis("x", 1, 100, log=True), Axis("y", 0, 1, percent=True)
    chart = lines("t", x, y, [Series("s", [(1, 0), (10, 0.5), (100, 1)], 0)])
    (line,) = chart.lines
    (x0, y0), (x1, y1), (x2, y2) = ((a, b) for a, b, _ in line["dots"])
    assert (x0, x2, y0, y2) == (chart.left, chart.right, chart.bottom, chart.top)
    assert (x1, y1) == pytest.approx(((x0 + x2) / 2, (y0 + y2) / 2), abs=0.01)
    assert (x1, "10") in chart.x_ticks
    assert (y1, "50%") not in chart.y_ticks  # a tick every 20 %
    assert [label for _, label in chart.y_ticks] == ["0%", "20%", "40%", "60%", "80%", "100%"]


@pytest.mark.parametrize("values", [[5.0], [0.004, 0.5], [1e-4, 2e3], [7, 8]])
def test_a_log_axis_has_a_few_ticks_inside_it(values):
    axis = log_axis("x", values)
    assert all(0 < axis.share(value) < 1 for value in values)
    ticks = axis.ticks()
    assert len(ticks) <= 9
    assert all(-0.01 <= axis.share(tick) <= 1.01 for tick in ticks)


def test_bars_are_shares_that_fill_the_chart():
    chart = histogram("t", "x", {"edges": [0, 1, 2, 3, 4], "counts": [0, 3, 1, 0]})
    heights = [bar["height"] for bar in chart.bars]
    assert heights[0] == heights[3] == 0
    assert heights[1] == pytest.approx(3 * heights[2], rel=1e-3)
    assert chart.bars[1]["title"] == "1 to 2: 75.0%"
    assert chart.bars[0]["x"] == chart.left + 0.5
