"""The embedded testbed: a small long-context Llama with trained gates and book text, so that nothing needs a download.

The model was trained from scratch by the recipe in the repository's ``testbed/``; its card lies beside the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..config import GateConfig, PrefillGateConfig

__all__ = ["GATE_CONFIG", "book_texts", "gates_path", "load", "model_path"]

NAME = "seerattention-testbed"
#: The form of its gates. Queries by all three poolings: the average alone loses what a single question among 64 tokens
#: asks for.
GATE_CONFIG = GateConfig(prefill=PrefillGateConfig(q_pooling=("max", "min", "avg")))
_ROOT = Path(__file__).parent


def model_path() -> Path:
    """Folder of the model and its tokenizer, in Hugging Face format."""
    return _ROOT / "model"


def gates_path() -> Path:
    """Folder of the trained gates, for ``seer.attach(model, gates_path())``."""
    return _ROOT / "gates"


def load(device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load the testbed model and its tokenizer.

    Args:
        device: None is the GPU if there is one, else the CPU.
        dtype: None is bfloat16 on a GPU and float32 on the CPU.

    Returns:
        An ordinary ``LlamaForCausalLM`` in evaluation mode, and its tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device(device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path(), dtype=dtype)
    model.to(device).eval()
    # Gates remember the model that they were trained for by name; where the package is installed must not matter.
    model.config._name_or_path = NAME
    return model, AutoTokenizer.from_pretrained(model_path())


def book_texts(split: str = "test") -> list[str]:
    """Passages of public-domain books: "train" ones were part of the model's training text, "test" ones were not.

    Raises:
        ValueError: split is neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    lines = (_ROOT / "books" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]
