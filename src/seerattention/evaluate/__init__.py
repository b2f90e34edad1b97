"""Measuring: retrieval accuracy, perplexity by length, prefill time and what else is registered as a measure; pictures
of attention, and the report that shows them.
"""

from .cases import Group, run_measures
from .journal import Journal
from .measure import Measure, Picture, Prompts, Subject
from .perplexity import PerplexityResult, cut_documents, evaluate_perplexity
from .registry import MEASURES, register
from .report import Report
from .retrieval import RetrievalResult, evaluate_retrieval, make_samples
from .settings import Setting
from .timing import TimingResult, time_prefill

__all__ = [
    "MEASURES",
    "Group",
    "Journal",
    "Measure",
    "PerplexityResult",
    "Picture",
    "Prompts",
    "Report",
    "RetrievalResult",
    "Setting",
    "Subject",
    "TimingResult",
    "cut_documents",
    "evaluate_perplexity",
    "evaluate_retrieval",
    "make_samples",
    "register",
    "run_measures",
    "time_prefill",
]
