"""Two processes that share a model by transformers' tensor-parallel plan give what one gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import seerattention as seer
from decode_models import BOTH, FINE, SPARSE, generate
from tiny_models import CONFIGS, make_ids, make_model

_TESTS = Path(__file__).resolve().parents[1]
FAMILIES = ["glm4", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"]
FINE_FAMILIES = ("llama", "phi3")  # their decode gates have sub-blocks and a vector for each head
# Models of which transformers spreads no heads over processes: every process has all of them.
WHOLE = ("olmo2", "phi3")


def results(model, folder) -> dict:
    """Of sparse prompts and decoding: tokens, logits, and the lists of the heads that are here."""
    ids, lists = make_ids(150), []
    seer.attach(model, folder / "gates", prefill=seer.TopK(0.4), decode=SPARSE, min_context=0)
    with seer.record(model) as stats, seer.observe(model, lambda inputs, blocks: lists.append(blocks.to_mask())):
        tokens, logits = generate(model, ids, 8)
    chunked = generate(model, ids, 8, prefill_chunk_size=50)[1]
    dense = {"sparse_calls": stats.sparse_calls, "density": stats.density}
    seer.save_gates(model, folder / f"saved {os.environ.get('RANK', '')}")
    seer.detach(model)
    return {"tokens": tokens, "logits": logits, "chunked": chunked, "lists": torch.stack(lists), **dense}


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    for name in sorted(path.name for path in folder.iterdir()):
        model = AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto").eval()
        torch.save(results(model, folder / name), folder / name / f"{torch.distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One launch for all families: starting two processes takes longer than what they do."""
    folder = tmp_path_factory.mktemp("parallel")
    for name in FAMILIES:
        model = make_model(name)
        model.save_pretrained(folder / name)
        torch.manual_seed(5)
        seer.attach(model, FINE if name in FINE_FAMILIES else BOTH)
        seer.save_gates(model, folder / name / "gates")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    paths = [str(_TESTS), os.environ.get("PYTHONPATH", "")]
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [*command, str(folder)], env={**os.environ, **variables}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("name", FAMILIES)
def test_two_processes_give_what_one_gives(folder, name):
    assert name in CONFIGS
    one = results(AutoModelForCausalLM.from_pretrained(folder / name).eval(), folder / name)
    two = [torch.load(folder / name / f"{rank}.pt") for rank in (0, 1)]
    for found in two:
        assert torch.equal(found["tokens"], one["tokens"])
        torch.testing.assert_close(found["logits"], one["logits"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["chunked"], one["chunked"], rtol=1e-4, atol=1e-4)
        assert found["sparse_calls"] == one["sparse_calls"] > 0
    heads = [found["lists"].shape[2] for found in two]
    if name in WHOLE:
        assert heads == [4, 4]
        assert torch.equal(two[0]["lists"], one["lists"])
    else:  # each has the lists of its own heads
        assert heads == [2, 2]
        assert torch.equal(torch.cat([found["lists"] for found in two], 2), one["lists"])
    for rank in ("", "0", "1"):  # every process has whole gates
        saved, given = (load_file(folder / name / part / "gates.safetensors") for part in (f"saved {rank}", "gates"))
        assert saved.keys() == given.keys()
        assert all(torch.equal(saved[key], given[key]) for key in given)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
