"""The table of tasks in stage two: complete, in the words of others, and open to a new line."""

import math
from dataclasses import replace
from typing import Any

import pytest
import transformers
from peft import TaskType
from transformers import AutoModelForCausalLM

from shared.cache import open_cache
from shared.errors import ConfigError
from shared.tasks import TASKS
from student_train.evaluate.evaluate import evaluate
from student_train.tasks.language import LanguageTask
from student_train.tasks.table import (
    STUDENT_TASKS,
    auto_class_of,
    served_as,
    task_named,
    task_of,
)
from tests.conftest import llama_config


def test_every_task_has_a_line():
    assert STUDENT_TASKS.keys() == TASKS.keys()


def test_adapters_are_named_as_peft_names_them():
    named = {name: task.peft_type for name, task in STUDENT_TASKS.items() if task.peft_type}
    assert {*named.values()} <= {each.value for each in TaskType}
    assert {auto_class_of(each) for each in named.values()} == {
        TASKS[name].auto_class for name in named
    }
    assert auto_class_of("None") is None


@pytest.mark.parametrize(
    ("config", "encoder_decoder", "tag"),
    [
        ("GPT2Config", False, "text-generation"),
        ("LlamaConfig", False, "text-generation"),
        ("BertConfig", False, "fill-mask"),
        ("T5Config", True, "text2text-generation"),
        ("MarianConfig", True, "text2text-generation"),
    ],
)
def test_a_model_is_served_by_what_its_class_is_for(config, encoder_decoder, tag):
    """Classes as transformers itself maps them, not as a list of ours has them."""
    kind = {
        "text-generation": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        "fill-mask": transformers.MODEL_FOR_MASKED_LM_MAPPING,
        "text2text-generation": transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    }[tag]
    name = kind[getattr(transformers, config)].__name__
    found = served_as(name, encoder_decoder=encoder_decoder)
    assert found is not None
    assert (found.tag, found.writes) == (tag, tag != "fill-mask")


def test_a_generating_class_without_an_encoder_is_not_served_as_one_with():
    assert served_as("WhisperForConditionalGeneration", encoder_decoder=False) is None


class InBits(LanguageTask):
    """Also says its loss in bits."""

    def numbers_of_loss(self, loss: float) -> dict[str, float]:
        return super().numbers_of_loss(loss) | {"bits": loss / math.log(2)}


def test_a_line_added_at_run_time_is_a_task(cache_dir, monkeypatch):
    monkeypatch.setitem(TASKS, "toy-lm", TASKS["causal-lm"])
    monkeypatch.setitem(STUDENT_TASKS, "toy-lm", InBits())
    cache: Any = open_cache(cache_dir)
    cache.manifest = replace(cache.manifest, task="toy-lm")
    student = AutoModelForCausalLM.from_config(llama_config())
    numbers = evaluate(student, cache, batch_tokens=2000)
    assert isinstance(task_of(cache.manifest), InBits)
    assert numbers["bits"] == pytest.approx(math.log2(numbers["perplexity"]))


def test_a_task_without_a_line_is_refused_by_the_table_that_wants_one():
    with pytest.raises(ConfigError, match=r"toy-lm: expected one of causal-lm, .*STUDENT_TASKS"):
        task_named("toy-lm")
