"""Retrieval tasks with seeds, shared by the training mix, the demo and the evaluation."""

from .generator import TASKS, Question, Sample, TaskGenerator
from .training import DRILL_MIX, MIXES, TASK_MIX, TrainingMix, checked_mix

__all__ = [
    "DRILL_MIX",
    "MIXES",
    "TASKS",
    "TASK_MIX",
    "Question",
    "Sample",
    "TaskGenerator",
    "TrainingMix",
    "checked_mix",
]
