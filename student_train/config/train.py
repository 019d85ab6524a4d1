"""The options of `train-student run` as a whole, and which of them go together."""

from dataclasses import dataclass, replace

from shared.errors import ConfigError
from shared.options import check_bounds
from student_train.config.adapters import AdapterOptions
from student_train.config.evaluation import EvaluationOptions
from student_train.config.execution import ExecutionOptions
from student_train.config.hidden import HiddenOptions
from student_train.config.job import JobOptions
from student_train.config.loss import LossOptions
from student_train.config.saving import SavingOptions
from student_train.config.schedule import ScheduleOptions
from student_train.config.training import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    JobOptions,
    LossOptions,
    TrainingOptions,
    EvaluationOptions,
    SavingOptions,
    AdapterOptions,
    HiddenOptions,
    ScheduleOptions,
    ExecutionOptions,
):
    """`train-student run`: which student, which cache, how to train."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.cache:
            raise ConfigError("--cache is missing: name the folder of a cache")
        _ = self.cache_weights  # refuses what is no weight
        _ = self.loss_spec  # refuses combinations that have no loss
        self._check_schedule()
        if not (self.uses_soft_loss or self.uses_hard_loss or self.uses_hidden_loss):
            raise ConfigError(
                "--soft-weight, --hard-weight and --hidden-weight are all 0: nothing to learn from"
            )
        if self.label_smoothing and not self.uses_hard_loss:
            raise ConfigError(
                "--label-smoothing is only read with a hard loss, but --hard-weight is 0: give it "
                "a weight or leave this one out"
            )
        if self.early_stopping_patience and not (self.validation_cache and self.eval_every):
            raise ConfigError("--early-stopping-patience needs --validation-cache and --eval-every")
        if self.generate_rows and self.validation_cache is None:
            raise ConfigError("--generate-rows needs --validation-cache")
        self._check_hidden_map()

    @property
    def scheduled(self) -> dict[str, tuple[float, float]]:
        """First and last value of everything that has an end value; empty: all is constant."""
        ends = {
            "temperature": (self.temperature, self.temperature_end),
            "soft_weight": (self.soft_weight, self.soft_weight_end),
            "hard_weight": (self.hard_weight, self.hard_weight_end),
            "hidden_weight": (self.hidden_weight, self.hidden_weight_end),
        }
        return {name: (start, end) for name, (start, end) in ends.items() if end is not None}

    @property
    def uses_soft_loss(self) -> bool:
        """Whether it has a weight at any step."""
        return max(self.soft_weight, self.soft_weight_end or 0) > 0

    @property
    def uses_hard_loss(self) -> bool:
        """Whether it has a weight at any step."""
        return max(self.hard_weight, self.hard_weight_end or 0) > 0

    @property
    def uses_hidden_loss(self) -> bool:
        """Whether it has a weight at any step."""
        return max(self.hidden_weight, self.hidden_weight_end or 0) > 0

    def layer_pairs(self, cached: tuple[int, ...], blocks: int) -> tuple[tuple[int, int], ...]:
        """(teacher layer, student layer) for the hidden loss; empty where it has no weight.

        `cached` are the layers of the cache, `blocks` the number of the student's.
        """
        return self.mapped_layers(cached, blocks) if self.uses_hidden_loss else ()

    def _check_schedule(self) -> None:
        if self.loss_schedule != "constant" and not self.scheduled:
            raise ConfigError(
                f"--loss-schedule {self.loss_schedule}: nothing changes over the run. Give an end "
                "value with --soft-weight-end, --hard-weight-end, --hidden-weight-end or "
                "--temperature-end."
            )
        if self.temperature_end is None:
            return
        _ = replace(self.loss_spec, temperature=self.temperature_end)  # refuses mse at T != 1
        if self.ensemble:
            raise ConfigError(
                "--temperature-end with --ensemble: teachers are tempered and mixed while blocks "
                "are read, long before their step is known. Use one --temperature for the run."
            )
