"""The main metric of every task, and how it is called in tables and on pages."""

from typing import Literal

MetricName = Literal["accuracy", "entity_f1", "micro_f1", "pearson", "f1", "cosine", "chrf"]
TITLES: dict[MetricName, str] = {
    "accuracy": "accuracy",
    "entity_f1": "entity F1",
    "micro_f1": "micro F1",
    "pearson": "Pearson",
    "f1": "answer F1",
    "cosine": "cosine",
    "chrf": "chrF",
}
