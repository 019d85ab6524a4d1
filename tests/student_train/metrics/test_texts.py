"""chrF, BLEU and ROUGE against their formulas, and which words they are of."""

import math
from collections import Counter

import numpy as np
import pytest

from shared.errors import ConfigError
from student_train.metrics.texts import (
    chrf,
    is_cjk,
    require_metrics,
    sentence_chrf,
    text_numbers,
    words,
)

TEXTS = ["the cat sat on the mat", "no dog", "so long and see him", "what is it"]
REFERENCES = [
    ["the cat is on the mat", "there is a cat on the mat"],
    ["no dog at all"],
    ["so long and see her", "see him so long", "bye"],
    ["what was it"],
]
CHINESE = ["我 爱 你", "他希望去国外"], [["我爱你们"], ["他希望到国外去", "他想出国"]]


def plain_chrf(texts: list[str], references: list[list[str]]) -> float:
    """Popovic 2015: F2 of character n-grams to 6, counts summed over the corpus, best reference."""

    def counts(text: str, reference: str) -> list[tuple[int, int, int]]:
        text, reference = ("".join(each.split()) for each in (text, reference))
        found = []
        for n in range(1, 7):
            ours, theirs = (
                Counter(each[i : i + n] for i in range(len(each) - n + 1))
                for each in (text, reference)
            )
            found.append((ours.total(), theirs.total(), (ours & theirs).total()))
        return found

    def score(sums: list[tuple[int, int, int]]) -> float:
        pairs = [(m / h, m / r) for h, r, m in sums if h and r]
        if not pairs:
            return 0.0
        precision, recall = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        whole = 4 * precision + recall
        return 100 * 5 * precision * recall / whole if whole else 0.0

    total = [(0, 0, 0)] * 6
    for text, some in zip(texts, references, strict=True):
        best = max((counts(text, reference) for reference in some), key=score)
        total = [
            tuple(a + b for a, b in zip(*pair, strict=True))
            for pair in zip(total, best, strict=True)
        ]
    return score(total)


def plain_bleu(texts: list[list[str]], references: list[list[list[str]]]) -> float:
    """Papineni et al. 2002, on words; every n-gram order here has a match."""
    matches, totals, length, closest = Counter(), Counter(), 0, 0
    for text, some in zip(texts, references, strict=True):
        length += len(text)
        closest += min((abs(len(r) - len(text)), len(r)) for r in some)[1]
        for n in range(1, 5):
            ours = Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
            most: Counter = Counter()
            for r in some:
                most |= Counter(tuple(r[i : i + n]) for i in range(len(r) - n + 1))
            matches[n] += (ours & most).total()
            totals[n] += ours.total()
    precisions = [math.log(matches[n] / totals[n]) for n in range(1, 5)]
    return 100 * math.exp(sum(precisions) / 4) * math.exp(min(0, 1 - closest / length))


def longest_common(one: list[str], other: list[str]) -> int:
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            above = max(lengths[i][j + 1], lengths[i + 1][j])
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if a == b else above
    return lengths[-1][-1]


def plain_rouge_l(texts: list[list[str]], references: list[list[list[str]]]) -> float:
    def f1(one: list[str], other: list[str]) -> float:
        return 2 * longest_common(one, other) / (len(one) + len(other))

    pairs = zip(texts, references, strict=True)
    return 100 * sum(max(f1(text, r) for r in some) for text, some in pairs) / len(texts)


@pytest.mark.parametrize("chinese", [False, True])
def test_numbers_equal_their_formulas(chinese):
    texts, references = CHINESE if chinese else (TEXTS, REFERENCES)
    numbers = text_numbers(texts, references)
    cut = list if chinese else str.split
    of_words = [cut(text.replace(" ", "") if chinese else text) for text in texts]
    of_references = [[cut(reference) for reference in some] for some in references]
    assert numbers["metric"] == "chrf"
    assert numbers["chrf"] == pytest.approx(plain_chrf(texts, references), abs=1e-6)
    assert numbers["chrf_low"] <= numbers["chrf"] <= numbers["chrf_high"]
    assert numbers["rougeL"] == pytest.approx(plain_rouge_l(of_words, of_references), abs=1e-6)
    if not chinese:  # no four characters match there
        assert numbers["bleu"] == pytest.approx(plain_bleu(of_words, of_references), abs=1e-6)


def test_equal_texts_have_every_point_and_others_none():
    same = ["so long and see him now", "what is it to you"]
    numbers = text_numbers(same, [[text] for text in same])
    assert [numbers[name] for name in ("chrf", "bleu", "rouge1", "rougeL")] == pytest.approx(
        [100] * 4
    )
    numbers = text_numbers(["", "x"], [["a b"], ["c d"]])
    assert [numbers[name] for name in ("chrf", "rouge1", "rougeL")] == [0, 0, 0]
    assert sentence_chrf("我爱你", ["他", "我爱你"]) == pytest.approx(100)


def test_words_of_a_script_without_spaces_are_characters():
    assert words("Don't  他说 OK_2, über") == ["don", "t", "他", "说", "ok", "2", "über"]
    assert is_cjk([["他说 OK 就好了"]])
    assert not is_cjk([["he said 好"]])


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sacrebleu and rouge_score: pip install 'teacher-cache"):
        require_metrics()


def test_texts_of_which_some_score_nothing_have_an_interval():
    """Draws of rows that all score 0 are among those of a student that writes almost nothing."""
    texts, references = ["the cat sat", "", "zz"], [["the cat sat"], ["a dog"], ["a bird"]]
    numbers = text_numbers(texts, references)
    assert 0 == numbers["chrf_low"] < numbers["chrf"] < numbers["chrf_high"] == pytest.approx(100)


def test_the_interval_is_that_of_the_corpus_score_of_drawn_rows():
    texts = [f"the cat number {n % 3} sat" for n in range(12)]
    references = [[f"the cat number {n % 5} sat down"] for n in range(12)]
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, 12, 12) for _ in range(1000)]
    scores = [chrf([texts[i] for i in rows], [references[i] for i in rows]) for rows in drawn[:40]]
    numbers = text_numbers(texts, references)
    spread = numbers["chrf_high"] - numbers["chrf_low"]
    assert np.subtract(*np.percentile(scores, (97.5, 2.5))) == pytest.approx(spread, rel=0.4)
    assert numbers["chrf_low"] < np.mean(scores) < numbers["chrf_high"]
