"""Cut the fixture ``decode_qwen3`` out of the official outputs: the first layers, without what no test looks at.

    python tests/golden/make_decode_qwen3.py SOURCE DESTINATION --layers 1

SOURCE has ``base/`` (an ordinary checkpoint), ``gate_bs64/`` (published layout), ``inputs.safetensors``,
``outputs.safetensors`` and ``meta.json``. See README.md for what is left.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

LAYERS = 3
EFFECTS = ("v_proj", "o_proj", "mlp", "post_attention_layernorm")  # what a layer adds, which only later layers see


def make(source: Path, destination: Path, layers: int) -> None:
    destination.mkdir(parents=True, exist_ok=True)
    inputs = load_file(source / "inputs.safetensors")
    outputs = load_file(source / "outputs.safetensors")
    meta = json.loads((source / "meta.json").read_text())
    prompts = meta["prompts"]
    # Tokens are numbered anew, so that only the embeddings of those that occur are kept.
    known = torch.cat([inputs[f"{part}_{prompt}"] for prompt in prompts for part in ("prompt", "forced")]).unique()
    kept = {
        f"{part}_{prompt}": torch.searchsorted(known, inputs[f"{part}_{prompt}"]).to(torch.int16)
        for prompt in prompts
        for part in ("prompt", "forced")
    }
    runs = [
        run for run in sorted(name.removesuffix("/mask") for name in outputs if name.endswith("/mask")) if chosen(run)
    ]
    for run in runs:
        scores = outputs[f"{run}/pre"][:, :layers]
        # The scores of the first layer are the same for all methods.
        first = 0 if run == next(x for x in runs if x.split("/")[:2] == run.split("/")[:2]) else 1
        if first < layers:
            kept[f"{run}/pre"] = scores[:, first:].contiguous()
        kept[f"{run}/mask"] = torch.from_numpy(np.packbits(outputs[f"{run}/mask"][:, :layers].numpy()))
    for name, value in outputs.items():
        if "kcomp_after_prefill" in name and int(name[-1]) < layers and not name.startswith("pad"):
            kept[name] = value
    write(destination / "outputs.safetensors.xz", kept)
    write(destination / "weights.safetensors.xz", planes(weights(source, known, layers)))
    for folder, name in (("base", "base_config.json"), ("gate_bs64", "gate_config.json")):
        config = json.loads((source / folder / "config.json").read_text())
        config |= {"num_hidden_layers": layers, "vocab_size": len(known), "bos_token_id": None, "eos_token_id": None}
        (destination / name).write_text(json.dumps(config, indent=2) + "\n")
    facts = {
        "official_commit": meta["official_commit"],
        "prompts": prompts,
        "steps": meta["steps"],
        "block_sizes": meta["block_sizes"],
        "methods": meta["methods"],
        "layers": layers,
        "runs": runs,
    }
    (destination / "meta.json").write_text(json.dumps(facts, indent=2) + "\n")


def chosen(run: str) -> bool:
    """Those without the two artefacts of the official cache; of the large budget, where there is none, the official."""
    method, variant = run.split("/")[-2:]
    return not run.startswith("pad") and variant == ("official" if method == "budget256" else "slotfix_blockstart")


def weights(source: Path, known: torch.Tensor, layers: int) -> dict[str, torch.Tensor]:
    """Weights on which the scores of the first layers depend, those of gates as ``gate:<name>``."""
    base = load_file(source / "base" / "model.safetensors")
    gate = torch.load(source / "gate_bs64" / "attn_gate_weights.pth", weights_only=True)
    found = {"model.embed_tokens.weight": base["model.embed_tokens.weight"][known]}
    for prefix, tensors in (("", base), ("gate:", gate)):
        for name, value in tensors.items():
            layer = int(name.split(".")[2]) if name.startswith("model.layers.") else LAYERS
            last = layer == layers - 1 and any(part in name for part in EFFECTS)
            if layer < layers and not last:
                found[prefix + name] = value
    return found


def planes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """bfloat16 split into its two bytes, which compresses better."""
    split = {name: x.contiguous().view(torch.uint8).unflatten(-1, (-1, 2)) for name, x in tensors.items()}
    return {
        f"{byte}/{name}": x[..., place].contiguous()
        for name, x in split.items()
        for place, byte in enumerate(("low", "high"))
    }


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.write_bytes(lzma.compress(save(tensors), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--layers", type=int, default=1, choices=range(1, LAYERS + 1))
    arguments = parser.parse_args()
    make(arguments.source, arguments.destination, arguments.layers)
