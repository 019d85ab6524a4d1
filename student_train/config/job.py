"""What a run of stage two is about: the options that every run names first."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from shared.errors import ConfigError
from shared.options import Option, group

_LIGHTEST, _HEAVIEST = 1e-6, 1e6  # of weights: more would make an epoch of any cache endless


@group("What to train")
@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Which student learns from which caches, into which folder."""

    student: Annotated[
        str, Option(help="Hub id or folder; a folder with only config.json: from scratch.")
    ]
    cache: Annotated[
        tuple[Path, ...],
        Option(
            help="Folder of the cache to train from. Repeatable: joined, or mixed by tokens where "
            "one is given as DIR=WEIGHT (a plain DIR then has weight 1)."
        ),
    ]
    out: Annotated[Path, Option(help="Folder of this run.")]
    validation_cache: Annotated[
        Path | None, Option(help="Held-out cache, for evaluation and early stopping.")
    ] = None
    ensemble: Annotated[
        bool,
        Option(help="The caches are teachers on the same rows: learn from their weighted mixture."),
    ] = False
    allow_partial: Annotated[
        bool, Option(help="Train on the shards that are there if some are missing.")
    ] = False

    @property
    def cache_paths(self) -> tuple[Path, ...]:
        """The folders that --cache names, without weights."""
        return tuple(_path_and_weight(given)[0] for given in self.cache)

    @property
    def cache_weights(self) -> tuple[float, ...]:
        """A weight for each cache, 1 where none is given; empty where there is nothing to weigh."""
        weights = [_path_and_weight(given)[1] for given in self.cache]
        if len(weights) == 1 or all(weight is None for weight in weights):
            return ()
        return tuple(1.0 if weight is None else weight for weight in weights)


def _path_and_weight(given: Path) -> tuple[Path, float | None]:
    """DIR or DIR=WEIGHT: a number behind the last `=` is a weight, anything else part of the name.

    A folder whose own name ends so is named with a weight behind it: `runs/lr=2=1`.
    """
    path, equals, number = str(given).rpartition("=")
    try:
        weight = float(number) if equals else None
    except ValueError:
        weight = None
    if weight is None:
        return given, None
    if not path or math.isnan(weight) or not _LIGHTEST <= weight <= _HEAVIEST:
        raise ConfigError(
            f"--cache {given}: expected DIR or DIR=WEIGHT with a weight from {_LIGHTEST:g} to "
            f"{_HEAVIEST:,.0f}. A folder whose own name ends in =NUMBER needs a weight behind it: "
            f"{given}=1"
        )
    return Path(path), weight
