"""`cache-teacher run`: this process's share of a job, or several processes that share it.

open_job (resolve, publish or adopt) -> my_shards -> capture_shard
"""

import logging
import os
from pathlib import Path

import torch

from shared.cache import committed_shards
from shared.errors import Stopped, TeacherCacheError
from shared.options import write_resolved
from shared.signals import StopRequest, stop_on_signals
from shared.storage.local import LocalStorage
from teacher_cache.config import CaptureConfig
from teacher_cache.engines.base import LoadEngine
from teacher_cache.engines.table import DEFAULT_ENGINE, ENGINES
from teacher_cache.job.calibrate import publish_or_adopt
from teacher_cache.job.finished import finished_as_asked
from teacher_cache.job.opening import open_job, record
from teacher_cache.job.workers import Share, run_local_processes, share_of

log = logging.getLogger(__name__)


def run(config: CaptureConfig, *, load_engine: LoadEngine = ENGINES[DEFAULT_ENGINE]) -> None:
    """Captures this process's share of the cache, then whatever is still missing."""
    with stop_on_signals() as stop:
        run_stoppable(config, stop, load_engine=load_engine)


def run_stoppable(
    config: CaptureConfig,
    stop: StopRequest,
    *,
    load_engine: LoadEngine = ENGINES[DEFAULT_ENGINE],
) -> None:
    """As `run`, with the caller's handlers, which may outlive it; a signal raises `Stopped`."""
    share = share_of(config.worker, os.environ)
    count = _local_processes(config, share)
    if count > 1:
        _run_many(config, share, count, stop)
        return
    storage = LocalStorage(config.out)
    if (finished := finished_as_asked(config, storage)) is not None:
        manifest, _ = publish_or_adopt(finished, storage)
        record(config, storage, share)
    else:
        with open_job(config, share=share, stop=stop, load_engine=load_engine) as job:
            for shard in job.my_shards():
                job.capture_shard(shard)
        manifest = job.manifest
    done, shards = len(committed_shards(storage)), manifest.plan.num_shards
    log.info("%s: %d of %d shards done", storage.root, done, shards)


def _local_processes(config: CaptureConfig, share: Share) -> int:
    if config.processes != "auto":
        return config.processes
    return torch.cuda.device_count() if share.world == 1 and config.device == "auto" else 1


def _run_many(config: CaptureConfig, share: Share, count: int, stop: StopRequest) -> None:
    folder = Path(config.out) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"processes-{os.getpid()}.yaml"
    write_resolved(config, file)
    own_gpus = torch.cuda.device_count() >= count
    code = run_local_processes(file, count, one_gpu_each=own_gpus, stop=stop, share=share)
    if code == 75:
        raise Stopped(f"{config.out}: stopped by a signal. Run the same command again to go on.")
    if code != 0:
        raise TeacherCacheError(
            f"{config.out}: one of {count} processes failed (see its message above). Finished "
            "shards are kept; run the same command again to go on."
        )
