"""Every task of stage two: a task of your own gets one line here, and one in shared/tasks.py."""

from collections.abc import Iterator

from transformers import PretrainedConfig

from shared.errors import ConfigError
from shared.format.manifest import Manifest
from shared.tasks import TASKS, TaskName
from student_train.tasks.base import Served, StudentTask
from student_train.tasks.labels import ROW_TASKS, RowLabels, TokenLabels, problem_type_of
from student_train.tasks.language import LanguageTask
from student_train.tasks.questions import QuestionTask
from student_train.tasks.seq2seq import Seq2SeqTask
from student_train.tasks.vectors import VectorTask

_WRITER = Served(
    "text-generation", ("ForCausalLM", "LMHeadModel"), '"Once upon a time"', writes=True
)
_FILLER = Served("fill-mask", ("ForMaskedLM",), 'f"A {task.tokenizer.mask_token} day."')
_TRANSLATOR = Served(
    "text2text-generation", ("Generation", "MTModel"), encoder_decoder=True, writes=True
)
_TAGGER = Served("token-classification", ("ForTokenClassification",), '"Angela lives in Hamburg."')
_CLASSIFIER = Served("text-classification", ("ForSequenceClassification",), '"A fine film."')
_READER = Served("question-answering", ("ForQuestionAnswering",))

# Types of tasks as peft has them; it has none for masked language models.
STUDENT_TASKS: dict[TaskName, StudentTask] = {
    "causal-lm": LanguageTask(peft_type="CAUSAL_LM", served=_WRITER),
    "masked-lm": LanguageTask(served=_FILLER, writes_on=False),
    "seq2seq-lm": Seq2SeqTask(peft_type="SEQ_2_SEQ_LM", served=_TRANSLATOR),
    "token-classification": TokenLabels(peft_type="TOKEN_CLS", served=_TAGGER),
    "sequence-classification": RowLabels(peft_type="SEQ_CLS", served=_CLASSIFIER),
    "question-answering": QuestionTask(peft_type="QUESTION_ANS", served=_READER),
    "feature-extraction": VectorTask(peft_type="FEATURE_EXTRACTION"),
}


def task_named(name: TaskName) -> StudentTask:
    """The task of this name, whatever the labels of its rows are."""
    if name not in STUDENT_TASKS:
        known = ", ".join(STUDENT_TASKS)
        raise ConfigError(
            f"no student can be trained for {name}: expected one of {known}. Give it a line in "
            "STUDENT_TASKS of student_train/tasks/table.py."
        )
    return STUDENT_TASKS[name]


def task_of(manifest: Manifest) -> StudentTask:
    """The task of a cache."""
    return task_named(manifest.task).of_problem(manifest.problem_type)


def task_of_outputs(config: PretrainedConfig) -> StudentTask:
    """A task whose rows have such outputs as a model's own config says, where no cache is known."""
    return ROW_TASKS[problem_type_of(config)]()


def served_as(class_name: str, *, encoder_decoder: bool) -> Served | None:
    """How a model of this class is served; None where its name does not say what it is for."""
    found = (each for each in _served() if each.fits(class_name, encoder_decoder=encoder_decoder))
    return next(found, None)


def auto_class_of(peft_type: str) -> str | None:
    """The class below adapters that say what they are for; None where no task is called so."""
    of_task = {task.peft_type: TASKS[name].auto_class for name, task in STUDENT_TASKS.items()}
    return of_task.get(peft_type)


def _served() -> Iterator[Served]:
    return (task.served for task in STUDENT_TASKS.values() if task.served is not None)
