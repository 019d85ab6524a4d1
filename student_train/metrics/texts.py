"""How near written texts are to references: chrF, BLEU and ROUGE, all from 0 to 100.

Of several references chrF and ROUGE take the nearest of each text, BLEU all of them.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from shared.errors import ConfigError

_RESAMPLES = 1000
_ROUGE = ("rouge1", "rouge2", "rougeL")
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+")


def text_numbers(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """`metric` is chrF (Popovic 2015), whose interval holds 95 % of bootstrap draws of the rows.

    `bleu`: of the whole corpus (Papineni et al. 2002); its words are characters where the
    references are Chinese. `rouge1`, `rouge2`, `rougeL`: mean F1 (Lin 2004) over words as below.
    """
    require_metrics()
    from sacrebleu.metrics import BLEU, CHRF

    streams = _streams(references)
    metric = CHRF()
    low, high = _interval(metric, texts, streams)
    tokenize = "zh" if is_cjk(references) else "13a"
    return {
        "metric": "chrf",
        "chrf": float(metric.corpus_score(list(texts), streams).score),
        "chrf_low": low,
        "chrf_high": high,
        "bleu": BLEU(tokenize=tokenize).corpus_score(list(texts), streams).score,
        **_rouge(texts, references),
    }


def _interval(
    metric: Any, texts: Sequence[str], streams: Sequence[Sequence[str | None]]
) -> tuple[float, float]:
    """95 % of the corpus scores of as many rows, drawn with replacement.

    By the library's own counts of every row; its own bootstrap fails where some draws score 0.
    """
    counts_R = np.array(metric._extract_corpus_statistics(list(texts), streams))
    rng, rows = np.random.default_rng(0), len(texts)
    scores = [
        float(metric._compute_score_from_stats(counts_R[drawn].sum(axis=0).tolist()).score)
        for drawn in (rng.integers(0, rows, rows) for _ in range(_RESAMPLES))
    ]
    low, high = np.percentile(scores, (2.5, 97.5))
    return float(low), float(high)


def chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF of the corpus."""
    require_metrics()
    from sacrebleu.metrics import CHRF

    return float(CHRF().corpus_score(list(texts), _streams(references)).score)


def sentence_chrf(text: str, references: Sequence[str]) -> float:
    """chrF of one text."""
    require_metrics()
    from sacrebleu.metrics import CHRF

    return float(CHRF().sentence_score(text, list(references)).score)


def is_cjk(references: Sequence[Sequence[str]]) -> bool:
    """Whether most letters of the references are of a script without spaces between words."""
    text = "".join(text for some in references for text in some)
    letters = sum(character.isalpha() for character in text)
    return 2 * len(re.findall(f"[{_CJK}]", text)) > letters


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case; every Chinese or Japanese character by itself."""
    return _WORD.findall(text.lower())


def require_metrics() -> None:
    """Refuses with what to install; needed before an hour of training as well as after it."""
    from importlib.util import find_spec

    missing = [name for name in ("sacrebleu", "rouge_score") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"scoring written texts needs {' and '.join(missing)}: "
            "pip install 'teacher-cache[metrics]'"
        )


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """What sacrebleu takes: the first references of all rows, then the second ones, and so on."""
    most = max(map(len, references))
    return [[some[i] if i < len(some) else None for some in references] for i in range(most)]


class _Words:
    """The tokenizer that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(_ROUGE), tokenizer=_Words())
    found = [
        scorer.score_multi(list(some), text) for text, some in zip(texts, references, strict=True)
    ]
    return {name: 100 * sum(each[name].fmeasure for each in found) / len(found) for name in _ROUGE}
