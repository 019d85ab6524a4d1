"""When a run is evaluated, what is looked at, and when it ends early."""

from dataclasses import dataclass
from typing import Annotated, Literal

from shared.options import SET, Option, group

EvalMetric = Literal["loss", "kl", "metric"]


@group("Evaluation and early stopping")
@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """When the student is held against the held-out cache, and what follows."""

    eval_every: Annotated[
        int, Option(help="Steps between evaluations; 0: only at the end.", min=0)
    ] = 0
    early_stopping_patience: Annotated[
        int,
        Option(
            help="Evaluations without a better metric before the end, and the model of the best "
            "one is what is saved; 0: never, and the last model is saved.",
            min=0,
        ),
    ] = 0
    early_stopping_metric: Annotated[
        EvalMetric,
        Option(
            help="What early stopping and the best checkpoint look at; metric: the main one of the "
            "task, such as accuracy or entity F1."
        ),
    ] = "loss"
    generate_rows: Annotated[
        int,
        Option(
            help="Held-out rows that the student writes a text for at the end, scored against "
            "their references (seq2seq-lm); 0: none.",
            min=0,
        ),
    ] = 0
    num_beams: Annotated[
        int, Option(help="Beams of generation.", min=1, read_when={"generate_rows": (SET,)})
    ] = 1
    max_new_tokens: Annotated[
        int, Option(help="Tokens of a written text.", min=1, read_when={"generate_rows": (SET,)})
    ] = 128
