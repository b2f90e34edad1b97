"""Tasks with seeds: retrieval, shared by the training mix, the demo and the evaluation, and long texts as users have
them, for comparisons."""

from .generator import TASKS, Question, Sample, TaskGenerator
from .scoring import copied_share, score_answer
from .text import RULER_TASKS, TEXT_TASKS, TextSample, TextTasks
from .training import DRILL_MIX, MIXES, TASK_MIX, TrainingMix, checked_mix, like_evaluation

__all__ = [
    "DRILL_MIX",
    "MIXES",
    "RULER_TASKS",
    "TASKS",
    "TASK_MIX",
    "TEXT_TASKS",
    "Question",
    "Sample",
    "TaskGenerator",
    "TextSample",
    "TextTasks",
    "TrainingMix",
    "checked_mix",
    "copied_share",
    "like_evaluation",
    "score_answer",
]
