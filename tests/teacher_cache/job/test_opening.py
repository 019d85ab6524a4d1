"""A program of one's own opens a job and captures its shards in whatever order it likes."""

import pytest

from shared.errors import Stopped
from shared.signals import StopRequest
from teacher_cache.config import CaptureConfig
from teacher_cache.job.opening import open_job
from teacher_cache.job.run import run
from teacher_cache.job.workers import Share
from tests.teacher_cache.engines.toy import ToyEngine
from tests.teacher_cache.job.test_job import content


@pytest.fixture
def config_of(corpus_file, tokenizer_dir, tmp_path):
    def make(name: str, **options) -> CaptureConfig:
        defaults = {"tokenizer": str(tokenizer_dir), "teacher": "toy", "max_length": 64}
        sizes = {"limit_documents": 100, "shard_tokens": 900, "top_k": 4, "device": "cpu"}
        corpus = {"corpus": str(corpus_file), "out": tmp_path / name}
        return CaptureConfig(**defaults | sizes | corpus | options)

    return make


def test_shards_in_another_order_are_the_same_bytes(config_of):
    run(config_of("run"), load_engine=ToyEngine.load)

    order = []
    with open_job(config_of("own"), load_engine=ToyEngine.load) as job:
        while missing := job.missing():
            shard = missing[len(missing) // 2]
            job.capture_shard(shard)
            assert shard not in job.missing()
            order.append(shard)

    assert sorted(order) == list(range(len(order))) != order
    assert len(order) == job.manifest.plan.num_shards > 3
    assert content(config_of("own").out) == content(config_of("run").out)


def test_two_jobs_open_at_once_share_their_shards(config_of):
    shares = [Share(0, 2), Share(1, 2)]
    config = config_of("shared")
    with (
        open_job(config, share=shares[0], load_engine=ToyEngine.load) as even,
        open_job(config, share=shares[1], load_engine=ToyEngine.load) as odd,
    ):
        assert even.manifest == odd.manifest
        jobs = [(even, even.my_shards()), (odd, odd.my_shards())]
        done: list[list[int]] = [[], []]
        while even.missing():
            for number, (job, shards) in enumerate(jobs):
                for shard in shards:
                    job.capture_shard(shard)
                    done[number].append(shard)
                    break
        assert not list(odd.my_shards())
    assert done[0] == list(range(0, even.manifest.plan.num_shards, 2))
    assert done[1] == list(range(1, even.manifest.plan.num_shards, 2))
    run(config_of("run"), load_engine=ToyEngine.load)
    assert content(config.out) == content(config_of("run").out)


def test_a_stop_is_raised_before_the_next_shard_and_keeps_what_is_done(config_of):
    stop = StopRequest()
    config = config_of("stopped")
    with open_job(config, stop=stop, load_engine=ToyEngine.load) as job:
        job.capture_shard(2)
        stop.requested = True
        with pytest.raises(Stopped, match="run the same command again"):
            job.capture_shard(0)
    with open_job(config, load_engine=ToyEngine.load) as job:
        assert set(range(job.manifest.plan.num_shards)) - set(job.missing()) == {2}
