"""Real tiny objects that many tests share: a corpus, a tokenizer, a teacher, and caches of them.

Nothing is downloaded and nothing larger than a few hundred kilobytes is made. Captured caches are
made once per test session; a test that changes one works on a copy.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers and datasets are imported
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="teacher-cache-tests-")
os.environ["NO_COLOR"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # several test processes share the machine; children inherit it

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)

WORDS = """
the a of and to in is it you that he was for on are with as his they be at one have this
from or had by hot but some what there we can out other were all your when up use word
how said an each she which do their time if will way about many then them would write
like so these her long make thing see him two has look more day could go come did my
sound no most
""".split()  # noqa: SIM905 (a list of a hundred strings reads worse)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 documents of 1 to 60 words, one per line, with an empty and a one-word line."""
    generator = torch.Generator().manual_seed(1)
    lines = []
    for index in range(500):
        count = int(torch.randint(1, 60, (1,), generator=generator))
        picks = torch.randint(0, len(WORDS), (count,), generator=generator).tolist()
        lines.append(" ".join(WORDS[pick] for pick in picks) + (".", "?", "!")[index % 3])
    lines[7] = ""
    lines[11] = "so"
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def tokenizer_dir(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(corpus_file)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


def llama_config(**changes: object) -> LlamaConfig:
    """Two layers of 32 channels over 300 classes."""
    options: dict[str, object] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    return LlamaConfig(**options | changes)


@pytest.fixture(scope="session")
def teacher_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher whose distributions are far from flat."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(llama_config())
    with torch.no_grad():
        teacher.lm_head.weight.mul_(12)
    teacher.save_pretrained(folder)
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def student_config_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student from scratch: only a config.json, one layer of 16 channels, with dropout."""
    folder = tmp_path_factory.mktemp("student-config")
    config = llama_config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, attention_dropout=0.1
    )
    config.save_pretrained(folder)
    return folder


Capture = Callable[..., Path]


@pytest.fixture(scope="session")
def capture(
    corpus_file: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Capture:
    """Captures the corpus in this process; keyword arguments are options of CaptureConfig."""
    from teacher_cache.config import CaptureConfig
    from teacher_cache.job.run import run

    def make(**options: object) -> Path:
        defaults: dict[str, object] = {
            "teacher": str(teacher_dir),
            "corpus": str(corpus_file),
            "out": tmp_path_factory.mktemp("captured") / "cache",
            "max_length": 64,
            "shard_tokens": 3000,
            "device": "cpu",
        }
        if not {"targets", "like"} & options.keys():
            defaults["top_k"] = 8
        config = CaptureConfig(**defaults | options)
        run(config)
        return config.out

    return make


@pytest.fixture(scope="session")
def cache_dir(capture: Capture) -> Path:
    """A cache with several shards of several blocks, a stored temperature and two hidden layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("teacher_cache.job.assemble.MIN_BLOCK_POSITIONS", 1024)
        return capture(temperature=(2.0,), hidden_layers=(-1, 0))


@pytest.fixture(scope="session")
def labels_dir(capture: Capture, tokenizer_dir: Path) -> Path:
    """A cache of hard labels only."""
    return capture(teacher=None, tokenizer=str(tokenizer_dir), targets="none")


@pytest.fixture
def cache_copy(cache_dir: Path, tmp_path: Path) -> Path:
    """A copy of the cache that a test may damage."""
    return Path(shutil.copytree(cache_dir, tmp_path / "cache"))
