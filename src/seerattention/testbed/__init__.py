"""Models to try things on: the embedded testbed with trained gates and book text, and a real pre-trained model.

``"testbed"`` is a small long-context Llama that lies in the package, so that nothing needs a download. It was trained
from scratch by the recipe in the repository's ``testbed/``; its card lies beside the weights. They are compressed, and
unpacked into the Hugging Face cache when they are first asked for. ``"smollm2"`` is SmolLM2-135M-Instruct, which others
trained; see :mod:`~seerattention.testbed.smollm2`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import GateConfig, SubBlockGateConfig
from . import smollm2
from .cache import unpacked

if TYPE_CHECKING:
    import torch

__all__ = ["GATE_CONFIG", "MODELS", "book_texts", "gates_path", "load", "model_path"]

#: The models by name, which commands take as ``--model``.
MODELS = ("testbed", "smollm2")
NAME = "seerattention-testbed"
#: The form of the models' prefill gates, and of those that ``seer distill`` trains for models of their size unless told
#: otherwise. A vector of 64 tokens loses what a single question among them asks for, one of 4 does not.
GATE_CONFIG = GateConfig(prefill=SubBlockGateConfig(q_pitch=4, k_pitch=4, reduce="mass"))
_ROOT = Path(__file__).parent


def model_path(name: str = "testbed") -> Path:
    """Folder of a model and its tokenizer, in Hugging Face format.

    Args:
        name: one of :data:`MODELS`. When it is first asked for, ``"testbed"`` is unpacked into the Hugging Face cache
            (2 seconds, 32 MB), or to a temporary folder of this process if that cannot be written to; ``"smollm2"`` is
            built in the cache, or fetched from the hub.

    Raises:
        ValueError: an unknown name.
        DamagedFileError: the package's file is damaged.
        ModuleNotFoundError: smollm2, whose packages are not installed, on a machine without the hub; or the testbed,
            not unpacked yet, in a Python that was built without ``lzma``. Says what to do.
        OSError: there is no place to write the model to.
    """
    if _known(name) == "testbed":
        return unpacked(_ROOT / "model", NAME)
    return smollm2.folder_path()


def gates_path(name: str = "testbed") -> Path:
    """Folder of the trained gates of a model, for ``seer.attach(model, gates_path())``.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the package has no gates for this model yet; says how to distil them.
    """
    folder = _ROOT / ("gates" if _known(name) == "testbed" else f"gates-{name}")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"this version comes without gates for {name}; distil them on texts of yours "
            f"(seer distill --model {name} --data TEXTS --output FOLDER) and name that folder instead"
        )
    return folder


def load(
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    name: str = "testbed",
    config: Any = None,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        device: None is the GPU if there is one, else the CPU.
        dtype: None is bfloat16 on a GPU and float32 on the CPU.
        name: one of :data:`MODELS`.
        config: the model's, changed: with another rotary embedding, say. None: as it was trained.

    Returns:
        An ordinary ``LlamaForCausalLM`` in evaluation mode, and its tokenizer.

    Raises:
        ValueError, ModuleNotFoundError, OSError: as :func:`model_path`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_path(name)
    device = torch.device(device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, config=config)
    model.to(device).eval()
    # Gates remember the model that they were trained for by name; where its folder lies must not matter.
    model.config._name_or_path = NAME if name == "testbed" else smollm2.HUB_ID
    return model, AutoTokenizer.from_pretrained(folder)


def _known(name: str) -> str:
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}, got {name!r}")
    return name


def book_texts(split: str = "test") -> list[str]:
    """Passages of public-domain books: "train" ones were part of the testbed's training text, "test" ones were not.

    Raises:
        ValueError: split is neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    lines = (_ROOT / "books" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]
