"""Hidden states alone in stage two: a student without a head, whose vectors are the teacher's.

S states (of rows, where these are pooled), D channels of the teacher.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from shared.cache import Cache
from shared.errors import ConfigError
from shared.format.manifest import Manifest
from student_train.data.collate import MicroBatch
from student_train.loss.outputs import STATES
from student_train.metrics.bootstrap import bootstrap_interval, ratio
from student_train.metrics.vectors import nearest_agreement, similarity_correlation
from student_train.processes import of_all_processes
from student_train.tasks.base import Collector, HardLabels, StudentTask
from student_train.tasks.vector_folder import layer_pair, load_projection, projection_of, save

MOST_ROWS = 2000  # whose vectors are kept; their cosines take 32 MB


class VectorTask(StudentTask):
    """The final state of a student stands in for the teacher's deepest cached one."""

    outputs = STATES

    def finish(self, student: Any, *, from_scratch: bool) -> Any:
        """A pooler would be trained by nothing."""
        if "pooler" in dict(student.named_children()):
            student.pooler = None
        return student

    def save_beside(self, folder: Path, student: Any, cache: Cache) -> None:
        """The projection, which a student of another width needs in use, and its pooling."""
        folder.mkdir(parents=True, exist_ok=True)
        width = int(student.config.get_text_config().hidden_size)
        save(folder, projection_of(student, cache), width, cache)

    def parameters_beside(self, student: Any, cache: Cache) -> int:
        projection = projection_of(student, cache)
        return 0 if projection is None else projection.weight.numel()

    def load_beside(self, name: str, student: Any, cache: Cache) -> None:
        load_projection(name, student, cache)

    def layer_pairs(self, cache: Cache) -> tuple[tuple[int, int], ...]:
        return (layer_pair(cache),)

    def collector(self, cache: Cache, max_answer_tokens: int) -> Collector | None:
        return VectorAnswers(cache)

    def numbers(self, sums: Mapping[str, float], cache: Cache) -> dict[str, Any]:
        """The loss is one of the metrics."""
        return {"positions": int(cache.row_positions.sum())}

    def check_shown(self, cache: Cache) -> None:
        raise ConfigError(
            f"--html and --worst: {cache.path} holds hidden states, and no answers that could be "
            "right or wrong. Leave them out."
        )

    def hard_labels(self, manifest: Manifest, config: PretrainedConfig) -> HardLabels | None:
        return None


class VectorAnswers:
    """Cosines of all states, and the vectors of the first `MOST_ROWS` rows."""

    def __init__(self, cache: Cache) -> None:
        self._layer, _ = layer_pair(cache)
        self._pooled = cache.manifest.hidden.pooling != "none"
        self._cosines: list[Tensor] = []
        self._vectors: list[Tensor] = []
        self._kept = 0

    def add(self, output: Mapping[str, Tensor], batch: MicroBatch) -> None:
        """Keeps row id and cosine f64 [S, 2], and vectors of both models beside each other."""
        ours_SD, theirs_SD = output["vectors"].cpu().float(), batch[f"hidden.{self._layer}"].float()
        row_S = batch["row_ids"][batch["hidden_row"]].double()
        cosine_S = F.cosine_similarity(ours_SD.double(), theirs_SD.double(), dim=-1)
        self._cosines.append(torch.stack([row_S, cosine_S], dim=1))
        if self._pooled and self._kept < MOST_ROWS:
            self._vectors.append(torch.cat([ours_SD, theirs_SD], dim=1))
            self._kept += len(ours_SD)

    def numbers(self, device: torch.device) -> dict[str, Any]:
        """`cosine` to the teacher with its interval over rows; of pooled vectors also how alike
        both models find rows to each other."""
        cosines = of_all_processes(torch.cat(self._cosines), device).numpy()
        _, row_S = np.unique(cosines[:, 0], return_inverse=True)
        sum_R = np.bincount(row_S, weights=cosines[:, 1])
        count_R = np.bincount(row_S).astype(np.float64)
        low, high = bootstrap_interval(sum_R, count_R, seed=0)
        mean = ratio(sum_R, count_R)
        found: dict[str, Any] = {"loss": 1 - mean, "metric": "cosine", "cosine": mean}
        found |= {"cosine_low": low, "cosine_high": high}
        if self._pooled:
            both = of_all_processes(torch.cat(self._vectors), device)[:MOST_ROWS]
            ours_RD, theirs_RD = both.split(both.shape[1] // 2, dim=1)
            if len(both) > 2:
                found["nearest_agreement"] = nearest_agreement(ours_RD, theirs_RD)
                found["similarity_correlation"] = similarity_correlation(ours_RD, theirs_RD)
        return found
