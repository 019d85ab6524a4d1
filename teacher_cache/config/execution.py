"""Where a job runs, in how many processes, and in what portions."""

from dataclasses import dataclass
from typing import Annotated, Literal

from shared.options import Option, group


@group("How it runs")
@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """Where a job runs, in how many processes, in what portions."""

    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    processes: Annotated[
        int | Literal["auto"],
        Option(help="Local processes; auto: one for each visible GPU.", min=1, max=64),
    ] = "auto"
    worker: Annotated[
        str, Option(help="This process's share, i/n; auto: from torchrun or SLURM variables.")
    ] = "auto"
    forward_tokens: Annotated[
        int | Literal["auto"], Option(help="Tokens of one forward, padding included.", min=1)
    ] = "auto"
    shard_tokens: Annotated[int, Option(help="Aim for the tokens of a shard.", min=1)] = 2_000_000
    seed: Annotated[int, Option(help="Seed of everything random.", min=0)] = 0
