"""Every task of stage one: one line each."""

from shared.format.manifest import Manifest
from shared.tasks import ProblemType, TaskName
from teacher_cache.tasks.base import TeacherTask
from teacher_cache.tasks.causal import CausalTask
from teacher_cache.tasks.labelled import LabelledTask
from teacher_cache.tasks.masked import MaskedTask
from teacher_cache.tasks.questions import QuestionTask
from teacher_cache.tasks.seq2seq import PairTask
from teacher_cache.tasks.tagged import TaggedTask
from teacher_cache.tasks.vectors import VectorTask

_FAMILIES: dict[TaskName, type[TeacherTask]] = {
    "causal-lm": CausalTask,
    "masked-lm": MaskedTask,
    "seq2seq-lm": PairTask,
    "token-classification": TaggedTask,
    "sequence-classification": LabelledTask,
    "question-answering": QuestionTask,
    "feature-extraction": VectorTask,
}
TEACHER_TASKS: dict[TaskName, TeacherTask] = {
    name: family(name) for name, family in _FAMILIES.items()
}


def task_for(name: TaskName, problem_type: ProblemType = "single_label") -> TeacherTask:
    """The task of that name, where labels are `problem_type` to a row."""
    return TEACHER_TASKS[name].of_problem(problem_type)


def task_of(manifest: Manifest) -> TeacherTask:
    """The task that a cache was written for."""
    return task_for(manifest.task, manifest.problem_type)
