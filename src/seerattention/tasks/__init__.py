"""Retrieval tasks with seeds, shared by the training mix, the demo and the evaluation."""

from .generator import TASKS, Question, Sample, TaskGenerator
from .training import DRILL_MIX, TASK_MIX, TrainingMix

__all__ = ["DRILL_MIX", "TASKS", "TASK_MIX", "Question", "Sample", "TaskGenerator", "TrainingMix"]
