"""One window of a question-answering cache as a person reads it, with its gold and its teacher."""

from typing import TYPE_CHECKING, Any

import torch

from shared.format.layouts import NO_ANSWER, PLACES
from shared.rows import Row
from shared.tasks import MAX_ANSWER_TOKENS
from shared.windows import best_spans, reference_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN_CHARACTERS = 120  # of a context, from either end


def shown(row: Row, num_classes: int, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Question, the ends of the context, all answers, the labels' span, the teacher's likeliest."""
    before, context = row.segments[:2]
    reference = reference_of(row.reference, context, f"reference of row {row.row_id}")
    start, end = row.labels.tolist()
    lengthy = len(reference.text) > 2 * _SHOWN_CHARACTERS
    ends = reference.text[:_SHOWN_CHARACTERS], reference.text[-_SHOWN_CHARACTERS:]
    found: dict[str, Any] = {
        "question": tokenizer.decode(row.input_ids[:before], skip_special_tokens=True),
        "context": " ... ".join(ends) if lengthy else reference.text,
        "answers": list(reference.answers),
        "here": None if start == NO_ANSWER else reference.between(start - before, end - before),
    }
    if row.targets is None:
        return found
    logp_2C = torch.full((len(PLACES), num_classes), -torch.inf)
    for place in PLACES:
        ids, logprobs = row.targets.entries(place)
        logp_2C[place, ids] = logprobs
    bounds = torch.tensor([[before, before + context]])
    spans = best_spans(logp_2C[None], bounds, MAX_ANSWER_TOKENS)
    score = float(spans.score_B)
    text = ""
    if score > -torch.inf:
        text = reference.between(int(spans.first_B), int(spans.last_B))
    found["teacher"] = text
    found["teacher_p"] = round(float(spans.score_B.exp()), 4)
    found["teacher_p_none"] = round(float(spans.null_B.exp()), 4)
    return found
