"""Conversations to tokens, and which of them the assistant says: those alone are predicted.

A template of its own decides how a conversation is written. Where it marks what the assistant
generates (`{% generation %}`) that is believed; otherwise each assistant turn is what is there with
the turn and was not there before it, without the white space behind its end-of-turn token.

T tokens of a conversation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from shared.errors import CorpusError
from teacher_cache.corpus.documents import Conversation, Exchange

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Spoken:
    """Token ids i32 [T], and which of them the assistant says, bool [T]."""

    input_ids: np.ndarray
    by_assistant: np.ndarray


def split_answer(conversation: Conversation) -> tuple[Conversation, tuple[str, ...]]:
    """What was said before the assistant is to speak, and what it then says where it does.

    That is its last turn; where someone else spoke last, it comes after all there is.
    """
    messages = conversation.messages
    if not messages or messages[-1]["role"] != "assistant":
        return conversation, ()
    answer = messages[-1].get("content")
    return Conversation(messages[:-1]), (answer,) if isinstance(answer, str) else ()


def written_prompt(
    conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", where: str
) -> str:
    """A conversation in the tokenizer's own template, up to where the assistant begins."""
    messages = [dict(message) for message in conversation.messages]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except TemplateError as error:
        raise CorpusError(f"{where}: the chat template refuses these messages: {error}") from error


def encode_conversation(
    conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", where: str
) -> Spoken:
    """The conversation in the tokenizer's own template; `where` names it in errors."""
    messages = [dict(message) for message in conversation.messages]
    try:
        if "generation %}" in str(tokenizer.chat_template):
            return _marked(messages, tokenizer)
        text, spans = _written(messages, tokenizer, where)
    except TemplateError as error:
        raise CorpusError(f"{where}: the chat template refuses these messages: {error}") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], np.int64)
    by_assistant = np.zeros(len(starts), bool)
    for begin, end in spans:
        by_assistant |= (starts >= begin) & (starts < end)
    return Spoken(np.array(encoded["input_ids"], np.int32), by_assistant)


def encode_exchange(
    exchange: Exchange,
    tokenizer: "PreTrainedTokenizerBase",
    ends: tuple[Sequence[int], Sequence[int]],
) -> Spoken:
    """Prompt and completion one after the other, for a tokenizer without a template.

    On a line of its own, unless white space parts them already. `ends` are BOS and EOS; EOS is
    predicted, as the end of the completion.
    """
    bos, eos = ends
    seam = exchange.prompt[-1:] + exchange.completion[:1]
    parted = len(seam) < 2 or any(map(str.isspace, seam))
    texts = [exchange.prompt + ("" if parted else "\n"), exchange.completion]
    prompt, completion = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    by_assistant = [False] * (len(bos) + len(prompt)) + [True] * (len(completion) + len(eos))
    return Spoken(np.array([*bos, *prompt, *completion, *eos], np.int32), np.array(by_assistant))


def _marked(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> Spoken:
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = np.array(encoded["assistant_masks"], bool)
    return Spoken(np.array(encoded["input_ids"], np.int32), mask)


def _written(
    messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and where in it each assistant turn begins and ends."""

    def render(count: int, *, prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=prompt
            )
        )

    text, spans = render(len(messages)), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, prompt=True) if index else "", render(index + 1).rstrip()
        if not (text.startswith(before) and text.startswith(after)):
            raise CorpusError(
                f"{where}: the chat template writes message {index} another way when more messages "
                "follow, so it cannot be told what the assistant says. Mark it in the template "
                "with {% generation %} and {% endgeneration %}."
            )
        spans.append((len(before), len(after)))
    return text, spans
