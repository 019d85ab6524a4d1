"""Small experiments on a teacher before it is trusted: random tokens in, two ways compared.

B rows, T tokens, V logit width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from teacher_cache.engines.streamed_head import same_values
from teacher_cache.tasks.inputs import SEQUENCES, ForwardInputs, TeacherBatch

LogitsFn = Callable[[TeacherBatch], Tensor]  # a batch to the logits of its N positions, [N, V]

# Shares of the largest logit. Other shapes round otherwise; the same shape twice does not, save for
# mixtures of experts, whose products change shape with the tokens. Seen: packed against alone 2e-6
# in float32; documents that do mix, at small random weights, 4e-3 and more.
OTHER_SHAPE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
SAME_SHAPE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

PACKED_ROWS = ((9, 10, 5), (6, 11, 7))  # lengths of segments; the last of each stands for padding


def padded_batch(num_classes: int, inputs: ForwardInputs = SEQUENCES) -> TeacherBatch:
    """2 rows of 12 tokens, the second padded after 7; every token a position.

    Of pairs that is what the decoder reads, after 9 and 5 tokens for the encoder.
    """
    mask_BT = _mask((12, 7))
    return inputs.trial(
        predicted=(_tokens((2, 12), num_classes, seed=0), mask_BT),
        source=(_tokens((2, 9), num_classes, seed=3), _mask((9, 5))),
        position_index=mask_BT.flatten().nonzero()[:, 0],
    )


def _mask(lengths: Sequence[int]) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def sees_later_tokens(
    logits: LogitsFn, num_classes: int, inputs: ForwardInputs = SEQUENCES
) -> bool:
    """Whether another last token changes the logits before it, as in a bidirectional encoder."""
    first, second = _with_other_last_tokens(logits, num_classes, inputs)
    return not same_values(first, second, OTHER_SHAPE[first.dtype])


def ignores_later_tokens(logits: LogitsFn, num_classes: int) -> bool:
    """Whether another last token leaves the logits before it as they are, to the last bit.

    A masked language model that has learnt little looks at other tokens, but hardly: its logits
    may change by less than what `sees_later_tokens` forgives. Those of a decoder are the same.
    """
    return torch.equal(*_with_other_last_tokens(logits, num_classes))


def _with_other_last_tokens(
    logits: LogitsFn, num_classes: int, inputs: ForwardInputs = SEQUENCES
) -> tuple[Tensor, Tensor]:
    """Logits of all tokens but the last, which differs, of one row: [11, V] each.

    Of pairs the last token of the decoder: what the encoder reads may be seen as a whole.
    """
    tokens_BT = _tokens((1, 12), num_classes, seed=1)
    other_BT = tokens_BT.clone()
    other_BT[:, -1] = (other_BT[:, -1] + 1) % num_classes
    ones_BT, index_N = torch.ones_like(tokens_BT), torch.arange(11)
    batches = [
        inputs.trial((ids_BT, ones_BT), source=(tokens_BT, ones_BT), position_index=index_N)
        for ids_BT in (tokens_BT, other_BT)
    ]
    first, second = map(logits, batches)
    return first, second


def packed_equals_alone(logits: LogitsFn, num_classes: int) -> bool:
    """Whether packed segments get the logits they get alone, and ignore what is packed before them.

    The first comparison is across shapes, so it must forgive rounding; the second is within one
    shape and tells mixing from rounding in half types too.
    """
    tokens_BT = _tokens((len(PACKED_ROWS), sum(PACKED_ROWS[0])), num_classes, seed=2)
    packed_NV = logits(_packed(tokens_BT))
    tolerance = OTHER_SHAPE[packed_NV.dtype]
    place = 0
    for row, lengths in enumerate(PACKED_ROWS):
        for start, length in zip(_starts(lengths), lengths, strict=True):
            ids_BT = tokens_BT[row : row + 1, start : start + length]
            alone_NV = logits(
                TeacherBatch(
                    input_ids=ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    position_index=torch.arange(length),
                )
            )
            if not same_values(packed_NV[place : place + length], alone_NV, tolerance):
                return False
            place += length

    other_BT, second_BT = tokens_BT.clone(), torch.zeros_like(tokens_BT, dtype=torch.bool)
    for row, lengths in enumerate(PACKED_ROWS):
        other_BT[row, : lengths[0]] = (other_BT[row, : lengths[0]] + 1) % num_classes
        second_BT[row, lengths[0] : sum(lengths[:2])] = True
    kept_N = second_BT.flatten().to(packed_NV.device)
    return same_values(
        logits(_packed(other_BT))[kept_N], packed_NV[kept_N], SAME_SHAPE[packed_NV.dtype]
    )


def _packed(tokens_BT: Tensor) -> TeacherBatch:
    position_ids_BT = torch.stack(
        [torch.cat([torch.arange(length) for length in lengths]) for lengths in PACKED_ROWS]
    )
    return TeacherBatch(
        input_ids=tokens_BT,
        position_ids=position_ids_BT,
        position_index=torch.arange(tokens_BT.numel()),
    )


def _starts(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths))]


def _tokens(shape: tuple[int, int], num_classes: int, *, seed: int) -> Tensor:
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))
