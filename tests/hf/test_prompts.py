"""One check of batches for all that read prompts, and one way to run a prompt through whatever model was given."""

from __future__ import annotations

import accelerate
import pytest
import torch
import transformers

import seerattention as seer
from seerattention.hf.layer import LayerState
from seerattention.hf.prompts import (
    check_batch,
    input_device,
    last_hidden_states,
    module_device,
    place_gates,
    run_prompt,
)
from seerattention.hf.recall import block_recall
from seerattention.ops import pooled_attention

VOCABULARY = 128
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
IMAGE = VOCABULARY - 1


def llama(seed: int = 0) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()


def llava() -> transformers.LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def prompt_tuned(virtual_tokens: int = 40):
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens)
    return peft.get_peft_model(llama(), config).eval()


def ids_of(length: int = 200, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, IMAGE - 1, (batch, length), generator=torch.Generator().manual_seed(1))


def gated(model, **options):
    torch.manual_seed(7)
    return seer.attach(model, seer.GateConfig(block_size=32), min_context=0, **options)


def distil(model, batch):
    return seer.distill(model, [batch], seer.DistillConfig(steps=1)).loss


USES = {
    "distill": distil,
    "calibrate": lambda model, batch: seer.calibrate(model, [batch], density=0.5),
    "block_recall": lambda model, batch: block_recall(model, [batch], seer.TopK(0.5)),
    "eval_batches": lambda model, batch: seer.distill(model, [{"input_ids": ids_of()}], eval_batches=[batch]),
}
IDS = ids_of()
WRONG = {
    "list": ({"input_ids": IDS.tolist()}, TypeError, "input_ids must be a torch tensor.*got list.*with_format"),
    "numpy": ({"input_ids": IDS.numpy()}, TypeError, "input_ids must be a torch tensor.*got ndarray"),
    "row": ({"input_ids": IDS[0]}, ValueError, r"must be \[B, T\], got \(200,\).*input_ids\[None\]"),
    "float": ({"input_ids": IDS.float()}, TypeError, r"int64 or int32, got torch.float32"),
    "bool": ({"input_ids": IDS > 5}, TypeError, r"int64 or int32, got torch.bool"),
    "none": ({"input_ids": None}, TypeError, "None under it"),
    "no ids": ({"attention_mask": IDS}, TypeError, r"mapping with \"input_ids\".*got one with \['attention_mask'\]"),
    "string": ("a prompt", TypeError, "mapping.*got str"),
    "mask list": ({"input_ids": IDS, "attention_mask": [[1] * 200]}, TypeError, "attention_mask must be a torch ten"),
    "mask shape": ({"input_ids": IDS, "attention_mask": torch.ones(1, 100).long()}, ValueError, r"\(1, 200\).*100"),
    "mask 4-D": ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 200, 200).bool()}, ValueError, r"\(1, 200\)"),
    "mask float": ({"input_ids": IDS, "attention_mask": torch.ones(1, 200)}, TypeError, "bool or integers 0 and 1"),
    "mask numbers": ({"input_ids": IDS, "attention_mask": IDS}, ValueError, "1 at tokens and 0 at padding"),
    "mask empty": (
        {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)},
        ValueError,
        "a row without any token",
    ),
    "positions": ({"input_ids": IDS, "position_ids": torch.arange(100)[None]}, ValueError, r"position_ids must be"),
    "positions float": ({"input_ids": IDS, "position_ids": torch.arange(200.0)[None]}, TypeError, "position_ids"),
    "unknown": ({"input_ids": IDS, "token_type_ids": IDS}, ValueError, "does not take token_type_ids"),
    "image": ({"input_ids": IDS, "pixel_values": torch.zeros(1, 3, 4, 4)}, ValueError, "does not take pixel_values"),
    "cache": ({"input_ids": IDS, "use_cache": True}, ValueError, "must not hold use_cache"),
    "embeddings": ({"input_ids": IDS, "inputs_embeds": torch.zeros(1, 200, 64)}, ValueError, "must not hold inputs_em"),
    "packed": (
        {"input_ids": IDS, "position_ids": torch.arange(100).repeat(2)[None]},
        ValueError,
        "packed sequences",
    ),
}


@pytest.fixture(scope="module")
def model():
    return gated(llama())


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("batch", "error", "message"), WRONG.values(), ids=WRONG)
def test_every_use_refuses_in_one_sentence(model, use, batch, error, message):
    with pytest.raises(error, match=message):
        USES[use](model, batch)


@pytest.mark.parametrize("use", ["distill", "calibrate", "block_recall"])
def test_every_use_passes_on_what_the_model_takes(use):
    """Images reach the image tower, and positions the rotary embedding."""
    model, images, positions = gated(llava()), [], []
    model.model.vision_tower.register_forward_hook(lambda *args: images.append(1))
    model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append((*args, *kwargs.values())[-1].flatten()[0].item()),
        with_kwargs=True,
    )
    ids = IDS.clone()
    ids[:, :4] = IMAGE
    batch = {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
        "position_ids": torch.arange(5, 205)[None],
        "attention_mask": None,
        "labels": ids,
    }
    USES[use](model, batch)
    assert images
    assert set(positions) == {5}


def test_int32_and_bool_are_what_int64_and_integers_are(model):
    mask = torch.ones_like(IDS)
    mask[:, :50] = 0
    expected = block_recall(model, [{"input_ids": IDS, "attention_mask": mask}], seer.TopK(0.5))
    assert block_recall(model, [{"input_ids": IDS.int(), "attention_mask": mask.bool()}], seer.TopK(0.5)) == expected


WRAPPED = {
    "plain": llama,
    "decoder": lambda: llama().model,
    "compiled": lambda: torch.compile(llama(), backend="eager"),
    "lora": lambda: lora(llama()),
    "lora, compiled": lambda: torch.compile(lora(llama()), backend="eager"),
    "compiled, lora": lambda: lora(torch.compile(llama(), backend="eager")),
    "prompt tuning": prompt_tuned,
    "prompt tuning, compiled": lambda: torch.compile(prompt_tuned(), backend="eager"),
    "vision-language": llava,
    "offloaded": lambda: accelerate.cpu_offload(llama(), execution_device="cpu"),
}


def lora(model):
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).eval()


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_logits_of_the_last_token_only(wrap):
    model, shapes = wrap(), []
    for name, module in model.named_modules():
        if name.endswith("lm_head"):
            module.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    with torch.no_grad():
        run_prompt(model, {"input_ids": IDS})
    assert set(shapes) <= {1}
    assert shapes or not hasattr(model, "lm_head")


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@torch.no_grad()
def test_hidden_states_are_those_of_the_whole_model(wrap):
    model = wrap()
    states = last_hidden_states(model, {"input_ids": IDS})
    assert states.shape == (1, 200, 64)
    if "decoder" not in type(model).__name__ and hasattr(model, "lm_head"):
        logits = model(input_ids=IDS).logits[:, -200:]
        torch.testing.assert_close(model.get_output_embeddings()(states), logits)


def test_prompt_tuning_is_part_of_what_is_measured():
    """Rows, losses and recall are those of virtual tokens and prompt together."""
    model, seen = gated(prompt_tuned()), []
    with seer.observe(model, lambda inputs, blocks: seen.append(inputs.q.shape[2])):
        assert len(distil(model, {"input_ids": IDS})) == 1
        seer.calibrate(model, [IDS], density=0.6)
        block_recall(model, [{"input_ids": IDS}])
    assert set(seen) == {240}


@pytest.mark.parametrize("content", [200, 150])
def test_prompt_tuning_is_distilled_on_all_rows(content):
    """Virtual tokens are rows and keys like others: 40 + 200 tokens are 8 blocks of 32, the last one half full."""
    model, expected = gated(prompt_tuned()), []
    batch = {"input_ids": IDS, "attention_mask": (torch.arange(200) < content).long()[None]}
    rows = -(-(40 + content) // 32)

    def measure(inputs, blocks):
        target = pooled_attention(inputs.q, inputs.k, block_size=32, scale=inputs.scale, lengths=inputs.lengths)
        log_q = inputs.gate_logits().log_softmax(-1)
        kl = torch.where(target > 0, target * (target.clamp(min=1e-30).log() - log_q), torch.zeros(())).sum(-1)
        expected.append(kl[:, :, :rows].mean().item())

    with torch.no_grad(), seer.dense(model), seer.observe(model, measure):
        model(**batch)
    history = seer.distill(model, [batch], seer.DistillConfig(skip_rows=0.0))
    assert [losses[0] for losses in history.loss_per_layer.values()] == pytest.approx(expected, rel=1e-4)
    assert history.tokens == content


def test_the_mode_of_each_module_is_put_back():
    model = llama().train()
    model.model.layers[1].eval()
    with torch.no_grad():
        run_prompt(model, {"input_ids": IDS})
    assert model.training
    assert not model.model.layers[1].training
    assert model.model.layers[0].mlp.training


@pytest.mark.parametrize("use", ["distill", "calibrate", "block_recall"])
def test_offloaded_models(use):
    """The weights are on meta outside of a layer's forward; results are those of the model in memory."""
    offloaded, plain = accelerate.cpu_offload(llama(), execution_device="cpu"), llama()
    assert next(offloaded.parameters()).is_meta
    assert input_device(offloaded) == torch.device("cpu")
    batch = {"input_ids": IDS}
    assert USES[use](gated(offloaded), batch) == USES[use](gated(plain), batch)


def test_gates_go_where_offloaded_layers_compute(monkeypatch):
    """Before they are copied for training: outside of a forward such layers have no device of their own."""
    model = gated(accelerate.cpu_offload(llama(), execution_device="cpu"))
    placed = []
    monkeypatch.setattr(LayerState, "place_gate", lambda layer, device: placed.append((layer.index, device)))
    for device, expected in ((1, "cuda:1"), ("cuda:2", "cuda:2"), (torch.device("cpu"), "cpu")):
        for part in model.model.layers[1].modules():
            if hasattr(part, "_hf_hook"):
                part._hf_hook.execution_device = device
        placed.clear()
        place_gates(model)
        assert placed == [(0, torch.device("cpu")), (1, torch.device(expected))]
    assert module_device(torch.nn.Linear(2, 2)) == torch.device("cpu")
    assert module_device(torch.nn.Linear(2, 2, device="meta")) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("use", ["distill", "calibrate", "block_recall"])
def test_another_default_dtype_changes_nothing(use, dtype):
    batch, expected = {"input_ids": IDS}, USES[use](gated(llama()), {"input_ids": IDS})
    model = gated(llama())
    torch.set_default_dtype(dtype)
    try:
        assert USES[use](model, batch) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_calibrate_keeps_the_last_blocks_dense():
    """They are read by the model, so they count towards the density that was asked for."""
    model = gated(llama(), prefill=seer.Threshold(0.01, last_blocks_dense=2))
    mask = torch.ones(2, 600, dtype=torch.long)
    mask[1, :180] = 0
    batch = {"input_ids": ids_of(600, 2), "attention_mask": mask}
    policy = seer.calibrate(model, [batch], density=0.6, passes=3)
    assert policy.last_blocks_dense == 2
    with seer.record(model) as stats, torch.no_grad():
        model(**batch)
    assert stats.total_density == pytest.approx(0.6, abs=0.03)
    with pytest.raises(ValueError, match=r"all of the last 2 rows\) alone are"):
        seer.calibrate(model, [batch], density=0.2)


def test_the_check_alone_returns_what_will_be_passed_on(model):
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": None}
    assert list(check_batch(batch, model)) == ["input_ids"]
