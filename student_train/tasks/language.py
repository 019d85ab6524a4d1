"""Language models in stage two: classes are the ids of a vocabulary, and the loss has no metric."""

import math

from student_train.recipes import LANGUAGE_MODELS
from student_train.tasks.base import Served, StudentTask


class LanguageTask(StudentTask):
    """A student over a vocabulary.

    With `writes_on` a position is about the next token, else about its own, which was masked.
    """

    recipes = LANGUAGE_MODELS
    has_metric = False

    def __init__(
        self,
        *,
        peft_type: str | None = None,
        served: Served | None = None,
        writes_on: bool = True,
    ) -> None:
        super().__init__(peft_type=peft_type, served=served)
        self.place_of_label = 1 if writes_on else 0

    def numbers_of_loss(self, loss: float) -> dict[str, float]:
        return {"perplexity": math.exp(min(loss, 700.0))}
