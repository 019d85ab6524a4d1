"""The loss between hidden states, and which layer of the teacher goes to which of the student."""

from dataclasses import dataclass
from typing import Annotated

from shared.errors import ConfigError
from shared.options import Option, group
from student_train.loss.spec import HiddenLoss


@group("Hidden states")
@dataclass(frozen=True, kw_only=True)
class HiddenOptions:
    """Whether the student's hidden states follow the teacher's, and which ones."""

    hidden_weight: Annotated[float, Option(help="Weight of the hidden-state loss.", min=0)] = 0.0
    hidden_loss: Annotated[
        HiddenLoss,
        Option(help="Distance of hidden states; contrastive: of the mean states of whole rows."),
    ] = "mse"
    hidden_map: Annotated[
        tuple[str, ...],
        Option(
            help="Teacher layer T to student layer S, as T:S, repeatable; last: the deepest cached "
            "one to -1; uniform: all cached ones, spread over the student.",
            show_default="-1:-1",
        ),
    ] = ()
    contrastive_temperature: Annotated[
        float,
        Option(
            help="Divides the cosines of rows. They are compared within a micro-batch.",
            read_when={"hidden_loss": ("contrastive",)},
            min=0.001,
        ),
    ] = 0.05

    def mapped_layers(self, cached: tuple[int, ...], blocks: int) -> tuple[tuple[int, int], ...]:
        """The pairs (teacher layer, student layer) that --hidden-map asks for.

        `cached` are the layers of the cache, `blocks` the number of the student's. With `uniform`
        the i-th of L cached layers, from 1 and by depth, goes to the student's block
        ceil(i blocks / L) - 1, counted from 0; the final state goes to the final state.
        """
        by_depth = sorted(cached or (-1,), key=lambda layer: (layer == -1, layer))
        if self.hidden_map == ("last",):
            return ((by_depth[-1], -1),)
        if self.hidden_map == ("uniform",):
            return self._uniform(by_depth, blocks)
        pairs = tuple(self._layer_pair(pair) for pair in self.hidden_map or ("-1:-1",))
        for teacher, student in pairs:
            if not -1 <= student < blocks:
                raise ConfigError(
                    f"--hidden-map {teacher}:{student}: the student has blocks 0 to {blocks - 1} "
                    "(-1: its final state)"
                )
        return pairs

    def _check_hidden_map(self) -> None:
        if len(self.hidden_map) > 1 and {"last", "uniform"} & set(self.hidden_map):
            raise ConfigError(
                f"--hidden-map {' '.join(self.hidden_map)}: last and uniform each stand alone"
            )
        for pair in self.hidden_map:
            if pair not in ("last", "uniform"):
                self._layer_pair(pair)

    def _uniform(self, by_depth: list[int], blocks: int) -> tuple[tuple[int, int], ...]:
        count = len(by_depth)
        if count > blocks + (by_depth[-1] == -1):
            raise ConfigError(
                f"--hidden-map uniform: {count} cached layers are more than the student's {blocks} "
                "blocks: name pairs, such as 11:5"
            )
        places = [-(-i * blocks // count) - 1 for i in range(1, count + 1)]
        pairs = zip(by_depth, places, strict=True)
        return tuple((layer, -1 if layer == -1 else place) for layer, place in pairs)

    def _layer_pair(self, pair: str) -> tuple[int, int]:
        teacher, _, student = pair.partition(":")
        try:
            return int(teacher), int(student)
        except ValueError:
            raise ConfigError(
                f"--hidden-map {pair}: expected T:S, such as -1:-1 or 11:5, or last, or uniform"
            ) from None
