"""A tiny random Llama, its tokenizer and text: everything that distillation needs, in well under a second."""

from __future__ import annotations

import json
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from seerattention.config import GateConfig, GateSpec, PrefillGateConfig
from seerattention.hf import attach
from seerattention.hf.state import gates_of

VOCABULARY = 256
WORDS = [f"w{i}" for i in range(VOCABULARY - 3)]


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2) -> LlamaForCausalLM:
    """Random, but with queries and keys large enough that attention has something to predict."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    return model.to(dtype).eval()


def attached_llama(seed: int = 0, dtype: torch.dtype = torch.float32, spec: GateSpec | None = None) -> LlamaForCausalLM:
    """The tiny model with fresh gates of block size 32, of the paper's form if no other is given."""
    model = tiny_llama(seed, dtype)
    torch.manual_seed(seed + 1)
    return attach(model, GateConfig(block_size=32, prefill=spec or PrefillGateConfig()), min_context=0)


def random_batches(count: int, batch: int = 2, length: int = 320, seed: int = 5) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, VOCABULARY, (batch, length), generator=generator)} for _ in range(count)]


def topic_batches(count: int, seed: int = 5) -> list[dict[str, torch.Tensor]]:
    """Every block repeats one token, so that the pooled maps can be predicted from pooled queries and keys."""
    generator = torch.Generator().manual_seed(seed)
    topics = [torch.randint(0, 64, (2, 10), generator=generator) for _ in range(count)]
    return [{"input_ids": topic.repeat_interleave(32, 1)} for topic in topics]


def forget(model) -> None:
    """Fresh gates begin with a good guess; start from gates that know nothing."""
    torch.manual_seed(3)
    with torch.no_grad():
        for gate in gates_of(model):
            gate.k_linear.normal_(std=0.02)


def gate_tensors(model) -> dict[str, torch.Tensor]:
    return {
        f"{layer}.{name}": parameter.detach().clone()
        for layer, gate in enumerate(gates_of(model))
        for name, parameter in gate.named_parameters()
    }


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def write_text(path, documents: int = 30, words: int = 300, seed: int = 0) -> list[str]:
    """JSON lines of random words; returns the texts."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(words // 2, words))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
