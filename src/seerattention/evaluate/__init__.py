"""Measuring: perplexity by length, retrieval accuracy, prefill time, pictures of attention, and the report that shows
them.
"""

from .perplexity import PerplexityResult, cut_documents, evaluate_perplexity
from .report import Report
from .retrieval import RetrievalResult, evaluate_retrieval, make_samples
from .settings import Setting
from .timing import TimingResult, time_prefill

__all__ = [
    "PerplexityResult",
    "Report",
    "RetrievalResult",
    "Setting",
    "TimingResult",
    "cut_documents",
    "evaluate_perplexity",
    "evaluate_retrieval",
    "make_samples",
    "time_prefill",
]
