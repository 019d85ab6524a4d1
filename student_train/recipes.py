"""The numbers a student is trained by where an option says auto, each with its reason.

What is usual for fine-tuning an encoder is not what is usual for a language model, and fresh
weights or adapters take larger steps than pretrained ones. None of these numbers is measured on
your data: they are where others start, and a flag changes each.
"""

from dataclasses import dataclass, replace
from typing import Literal

Start = Literal["pretrained", "scratch", "adapters"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The numbers of AdamW with warm-up. A step has `batch_tokens` tokens, padding excluded."""

    learning_rate: float
    epochs: int
    batch_tokens: int
    weight_decay: float
    warmup_ratio: float

    @property
    def text(self) -> str:
        """For a line of the log."""
        return (
            f"learning rate {self.learning_rate:g}, {self.epochs} epoch{'s'[: self.epochs != 1]}, "
            f"{self.batch_tokens:,} tokens a step, weight decay {self.weight_decay:g}, "
            f"warm-up {self.warmup_ratio:.0%}"
        )


# Pretrained weights of both.
#
# Targets of a teacher are less noisy than labels, so larger steps than the 2e-5 of fine-tuning on
# labels alone. One pass: text is plenty, and what is seen once needs no weight decay.
_LANGUAGE_MODEL = Recipe(
    learning_rate=1e-4, epochs=1, batch_tokens=16384, weight_decay=0.0, warmup_ratio=0.05
)
# Devlin et al. 2019: 5e-5 is the largest rate they try (A.3); 3 epochs of 32 rows a step, here of
# 64 tokens (section 4.1); weight decay as in pre-training (A.2); warm-up as in their code.
_ENCODER = Recipe(
    learning_rate=5e-5, epochs=3, batch_tokens=2048, weight_decay=0.01, warmup_ratio=0.1
)

LANGUAGE_MODELS: dict[Start, Recipe] = {
    "pretrained": _LANGUAGE_MODEL,
    # Models of 125 to 160 million weights: Brown et al. 2020, table 2.1; Biderman et al. 2023.
    "scratch": replace(_LANGUAGE_MODEL, learning_rate=6e-4),
    # Hu et al. 2021, table 11 (GPT-2); Dettmers et al. 2023, table 9.
    "adapters": replace(_LANGUAGE_MODEL, learning_rate=2e-4),
}
ENCODERS: dict[Start, Recipe] = {
    "pretrained": _ENCODER,
    # Fresh weights have farther to go. A tagger of two layers on 2,000 rows (one seed) ends at a
    # KL of 0.41 to its teacher so, and at 1.07 with the numbers above.
    "scratch": replace(_ENCODER, learning_rate=5e-4, epochs=10),
    # Ten times, as Hu et al. 2021, table 9: 4e-4 and 5e-4 for RoBERTa base.
    "adapters": replace(_ENCODER, learning_rate=5e-4),
}
