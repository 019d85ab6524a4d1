"""A window of rows forward by forward: what every engine with batches of its own has to do.

Rows of similar length run together; the results are put back where their rows stand, so that the
order on disk is the order of the corpus.
"""

from collections.abc import Callable, Sequence

import torch

from shared.errors import TeacherCacheError
from shared.format.manifest import Manifest
from shared.format.schema import ROW_CHUNK_BITS
from teacher_cache.engines.batches import ForwardBatch, batch_of, forward_batches
from teacher_cache.engines.memory import is_out_of_memory
from teacher_cache.select.window import ForwardTargets, WindowTargets
from teacher_cache.tasks.rows import TrainingRow
from teacher_cache.tasks.table import task_of

# One forward; the window is asked to select, for it knows what is to be drawn at each position.
Forward = Callable[[ForwardBatch, WindowTargets], ForwardTargets]


def capture_window(
    forward: Forward,
    rows: Sequence[TrainingRow],
    manifest: Manifest,
    check_stop: Callable[[], None],
) -> WindowTargets:
    """Runs every batch of the window; the copy of one overlaps the forward of the next.

    A batch that no longer fits into the device's memory is run in halves; the plan stays as it is.
    """
    window = WindowTargets(manifest, rows)
    waiting: ForwardTargets | None = None
    tokens, packed = manifest.plan.forward_tokens, manifest.preprocessing.pack
    inputs = task_of(manifest).inputs
    for batch in forward_batches(rows, tokens, packed=packed, inputs=inputs):
        check_stop()
        forwarded = _if_it_fits(forward, batch, window)
        if waiting is not None:
            window.store(waiting)
        waiting = forwarded
        if forwarded is None:
            _capture_halves(forward, batch.rows, window, check_stop)
    if waiting is not None:
        window.store(waiting)
    return window


def _if_it_fits(
    forward: Forward, batch: ForwardBatch, window: WindowTargets
) -> ForwardTargets | None:
    try:
        return forward(batch, window)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def _capture_halves(
    forward: Forward,
    chosen: Sequence[int],
    window: WindowTargets,
    check_stop: Callable[[], None],
) -> None:
    """Runs rows that did not fit together in two halves, and each of these so again."""
    if len(chosen) == 1:
        raise _too_long(window.rows[chosen[0]])
    window.forwards_halved += 1
    packed, inputs = window.manifest.preprocessing.pack, task_of(window.manifest).inputs
    for half in (chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]):
        check_stop()
        torch.cuda.empty_cache()  # outside the `except`, whose error holds what did not fit
        batch = batch_of(window.rows, half, window.starts, packed=packed, inputs=inputs)
        forwarded = _if_it_fits(forward, batch, window)
        if forwarded is None:
            _capture_halves(forward, half, window, check_stop)
        else:
            window.store(forwarded)


def _too_long(row: TrainingRow) -> TeacherCacheError:
    return TeacherCacheError(
        f"out of memory: the row of document {row.row_id >> ROW_CHUNK_BITS}, "
        f"{len(row.input_ids):,} tokens, does not fit into the device's memory even alone. "
        "Finished shards are kept: run the same command again where more memory is free, or start "
        "another cache with a smaller --max-length or --dtype."
    )
