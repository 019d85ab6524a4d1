"""Opens a job: what was asked for is resolved, the manifest published, the pool of encoders begun.

Everything else about a capture is a loop over shards, in whatever order and process:

    with open_job(config) as job:
        for shard in job.missing():
            job.capture_shard(shard)
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from shared.cache import channel_scales, class_ranks, committed_shards
from shared.format.manifest import Manifest
from shared.options import write_resolved
from shared.progress import Progress, WaitClock
from shared.signals import StopRequest
from shared.storage.base import Storage
from shared.storage.local import LocalStorage
from teacher_cache.config import CaptureConfig
from teacher_cache.engines.base import LoadEngine
from teacher_cache.engines.table import DEFAULT_ENGINE, ENGINES
from teacher_cache.job.calibrate import publish_or_adopt
from teacher_cache.job.draft import resolve
from teacher_cache.job.shard import Job
from teacher_cache.job.workers import WHOLE, Share


@contextmanager
def open_job(
    config: CaptureConfig,
    *,
    share: Share = WHOLE,
    stop: StopRequest | None = None,
    load_engine: LoadEngine = ENGINES[DEFAULT_ENGINE],
) -> Iterator[Job]:
    """The job of this config, ready to capture shards in this process.

    The first one to open it calibrates and publishes the manifest, all others adopt that. `share`
    is what `Job.my_shards` and the progress bar go by; whoever catches signals passes `stop`.
    """
    storage = LocalStorage(config.out)
    draft = resolve(config, load_engine=load_engine)
    manifest, cache_id = publish_or_adopt(draft, storage)
    torch.set_num_threads(manifest.plan.cpu_threads)  # on a CPU it decides the last bits
    record(config, storage, share)
    with (
        Progress("cache-teacher", total=_tokens_left(storage, manifest, share)) as progress,
        ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode") as pool,
    ):
        yield Job(
            draft=draft,
            storage=storage,
            manifest=manifest,
            cache_id=cache_id,
            share=share,
            ranks=class_ranks(storage, manifest),
            scales=channel_scales(storage, manifest),
            stop=StopRequest() if stop is None else stop,
            progress=progress,
            waits=WaitClock(),
            pool=pool,
        )


def _tokens_left(storage: Storage, manifest: Manifest, share: Share) -> int:
    """Tokens of this process's share of the shards that are missing, as calibration saw them."""
    plan = manifest.plan
    left = plan.num_shards - len(committed_shards(storage))
    return round(plan.estimated_tokens * left / plan.num_shards / share.world)


def record(config: CaptureConfig, storage: LocalStorage, share: Share) -> None:
    """The resolved config of this process, for the user; never read by stage two."""
    folder = storage.root / "runs"
    folder.mkdir(exist_ok=True)
    write_resolved(config, folder / f"worker-{share.rank}-of-{share.world}.yaml")
