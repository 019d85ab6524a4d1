"""The student's hidden states inside its own forward, and their loss against the teacher's.

Shapes: B rows, T tokens, S positions with hidden states, D hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils import ModelOutput

from shared.errors import Refused
from shared.models.pooling import pooled
from student_train.architecture import num_blocks
from student_train.loss.hidden import PER_STATE, hidden_contrastive
from student_train.loss.objective import Objective, Targets, num_positions

PROJECTIONS = "distillation_projections"  # the name of a module of the student

States = dict[int, Tensor]  # student layer -> [B, T, D]


def projection_name(teacher_layer: int, student_layer: int) -> str:
    """A name that may be one of a module."""
    return f"{teacher_layer}_{student_layer}".replace("-", "m")


class StudentLayers:
    """Keeps the states that an objective asks for between `listen` and `take`.

    Where layers differ in width the student gets `PROJECTIONS`: a linear map for each such pair,
    student to teacher, which is trained with it.
    """

    def __init__(self, student: Any, objective: Objective) -> None:
        self._student, self._objective = student, objective
        self._states: States = {}
        self._listening = False
        self.handles = [
            self._hook(layer)
            for _, layer in objective.layer_pairs
            if not (layer == -1 and objective.states_alone)  # the student's own output
        ]
        if objective.layer_pairs and not hasattr(student, PROJECTIONS):
            setattr(student, PROJECTIONS, self._projections())

    def listen(self) -> None:
        """The states of the next forward are kept."""
        self._states, self._listening = {}, True

    def take(self) -> States:
        """What was kept; nothing more is until `listen` is called again."""
        states, self._states, self._listening = self._states, {}, False
        return states

    def loss(
        self, states: States, mask_BT: Tensor | None, targets: Targets, weight: float
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss, and what is reported: its mean times all positions.

        The other sums that are reported are divided by the number of positions, and so is this.
        """
        count = self._count(targets)
        total = torch.zeros((), device=targets["hidden_index"].device)
        for pair in self._objective.layer_pairs:
            states_SD = self.at(pair, states, mask_BT, targets)
            total = total + self._distance(states_SD, pair[0], targets)
        return total * (weight / count), total.detach() * (num_positions(targets) / count)

    def at(
        self, pair: tuple[int, int], states: States, mask_BT: Tensor | None, targets: Targets
    ) -> Tensor:
        """The student's states [S, D] where the teacher's are, pooled and of its width."""
        pooling, states_BTD = self._objective.pooling, states[pair[1]]
        if pooling == "none":
            states_SD = states_BTD.flatten(0, 1).index_select(0, targets["hidden_index"])
        else:
            assert mask_BT is not None  # every sequence of a batch comes with its mask
            pooled_BD = pooled(states_BTD, mask_BT, pooling)
            states_SD = pooled_BD.index_select(0, targets["hidden_row"])
        projections: nn.ModuleDict = getattr(self._student, PROJECTIONS)
        name = projection_name(*pair)
        return projections[name](states_SD) if name in projections else states_SD

    def _count(self, targets: Targets) -> Tensor:
        """States or, for a loss of whole rows, rows of the whole optimiser step; at least 1."""
        per_row = self._objective.hidden_loss == "contrastive"
        return targets["num_rows" if per_row else "num_states"].clamp_min(1).to(torch.float32)

    def _distance(self, states_SD: Tensor, teacher_layer: int, targets: Targets) -> Tensor:
        objective, teacher_SD = self._objective, targets[f"hidden.{teacher_layer}"]
        if objective.hidden_loss == "contrastive":
            row_S, rows = targets["hidden_row"], len(targets["row_ids"])
            temperature = objective.contrastive_temperature
            return hidden_contrastive(states_SD, teacher_SD, row_S, rows, temperature)
        deviation_D = objective.deviations[teacher_layer].to(states_SD.device)
        return PER_STATE[objective.hidden_loss](states_SD, teacher_SD, deviation_D)

    def _projections(self) -> nn.ModuleDict:
        """A linear map for each pair of layers of different width, student to teacher."""
        width = int(self._student.config.get_text_config().hidden_size)
        maps: dict[str, nn.Module] = {}
        for pair in self._objective.layer_pairs:
            wanted = len(self._objective.deviations[pair[0]])
            if wanted != width:
                maps[projection_name(*pair)] = nn.Linear(width, wanted, bias=False)
        return nn.ModuleDict(maps)

    def _hook(self, layer: int) -> RemovableHandle:
        student = self._student
        if layer != -1:
            return _blocks(student)[layer].register_forward_hook(self._keeper(layer))
        if student.config.is_encoder_decoder:  # a T5 scales its states for the head
            decoder: nn.Module = student.get_decoder()
            return decoder.register_forward_hook(self._keeper(layer))
        trunk: nn.Module = without_adapters(student).base_model
        return trunk.register_forward_hook(self._keep_final)

    def _keeper(self, layer: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self._listening:
                ended = isinstance(output, ModelOutput)  # after the last norm
                self._states[layer] = output[0] if ended or isinstance(output, tuple) else output

        return keep

    def _keep_final(self, module: nn.Module, args: Any, output: Any) -> None:
        """The final state, which a masked language model transforms before its head."""
        if self._listening:
            self._states[-1] = output["last_hidden_state"]


def without_adapters(student: Any) -> Any:
    """The model of `transformers`, also inside adapters."""
    return student.get_base_model() if hasattr(student, "peft_config") else student


def _blocks(student: Any) -> nn.ModuleList:
    """The list of blocks: the longest ModuleList whose length is the number of layers."""
    wanted = num_blocks(student.config)
    trunk: nn.Module = student.get_decoder() if student.config.is_encoder_decoder else student
    for module in trunk.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise Refused(
        f"--hidden-map: no list of {wanted} blocks was found in {type(student).__name__}, which "
        "may run one block several times. Learn from the final state alone: --hidden-map -1:-1."
    )
