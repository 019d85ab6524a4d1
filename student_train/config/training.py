"""The numbers that every training has: steps, batches and the optimiser."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from shared.options import Option, group
from student_train.recipes import Recipe

Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"]

_BY_TASK = "auto: by the task, and whether weights are pretrained, fresh, or adapters"


@group("How long and how fast it learns")
@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Steps, batches and the optimiser."""

    epochs: Annotated[
        int | Literal["auto"],
        Option(help="Passes over the cache.", min=1, show_default=_BY_TASK),
    ] = "auto"
    max_steps: Annotated[int, Option(help="Optimiser steps; 0: by --epochs.", min=0)] = 0
    learning_rate: Annotated[
        float | Literal["auto"], Option(help="Peak learning rate.", min=0, show_default=_BY_TASK)
    ] = "auto"
    batch_tokens: Annotated[
        int | Literal["auto"],
        Option(
            help="Tokens of an optimiser step, over all processes.", min=1, show_default=_BY_TASK
        ),
    ] = "auto"
    micro_batch_tokens: Annotated[
        int | Literal["auto"], Option(help="Tokens of one forward of one process.", min=1)
    ] = "auto"
    scheduler: Annotated[Scheduler, Option(help="Learning rate over the run.")] = "cosine"
    warmup_ratio: Annotated[
        float | Literal["auto"],
        Option(help="Share of the steps that warm up.", min=0, max=1, show_default=_BY_TASK),
    ] = "auto"
    weight_decay: Annotated[
        float | Literal["auto"], Option(help="AdamW weight decay.", min=0, show_default=_BY_TASK)
    ] = "auto"
    max_grad_norm: Annotated[
        float, Option(help="Gradients are clipped to it; 0: never.", min=0)
    ] = 1.0
    dropout: Annotated[
        float | None,
        Option(
            help="Dropout of the student: every number in its config whose name ends in dropout, "
            "dropout_prob, dropout_rate or pdrop.",
            min=0,
            max=0.95,
            show_default="the student's own",
        ),
    ] = None

    def with_recipe(self, usual: Recipe) -> Self:
        """This config with a usual number wherever it said auto in place of one of `Recipe`."""
        rate, epochs, decay = self.learning_rate, self.epochs, self.weight_decay
        tokens, warmup = self.batch_tokens, self.warmup_ratio
        return replace(
            self,
            learning_rate=usual.learning_rate if rate == "auto" else rate,
            epochs=usual.epochs if epochs == "auto" else epochs,
            batch_tokens=usual.batch_tokens if tokens == "auto" else tokens,
            weight_decay=usual.weight_decay if decay == "auto" else decay,
            warmup_ratio=usual.warmup_ratio if warmup == "auto" else warmup,
        )

    @property
    def recipe(self) -> Recipe:
        """The numbers to train by; `with_recipe` has left none open."""
        assert self.learning_rate != "auto"
        assert self.epochs != "auto"
        assert self.batch_tokens != "auto"
        assert self.weight_decay != "auto"
        assert self.warmup_ratio != "auto"
        return Recipe(
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            batch_tokens=self.batch_tokens,
            weight_decay=self.weight_decay,
            warmup_ratio=self.warmup_ratio,
        )
