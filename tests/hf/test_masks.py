"""The mask of an attached model: padding for sparse attention, and the untouched model's mask for everybody else."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface

import seerattention as seer
from seerattention.hf.masks import SeerMask
from tiny_models import attach


@torch.inference_mode()
def logits_of(model, ids, **inputs):
    return model(ids, use_cache=False, **inputs).logits


def padding_of(batch=1, length=200):
    """Left padding in the first row, right padding in the second."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :40] = 0
    mask[1:, 150:] = 0
    return mask


def masks_of(model, ids, mask):
    """What the attention modules get, and what the untouched model would have given them."""
    seen = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    logits_of(model, ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture(params=["sdpa", "eager"])
def pair(request, model_of, ids_of):
    """The mask of an attached model, and that of the untouched one."""
    model, ids, mask = model_of(attn_implementation=request.param), ids_of(200, batch=2), padding_of(2)
    wanted = masks_of(model, ids, mask)[0]
    attach(model, seer.TokenBudget(32))
    got = masks_of(model, ids, mask)
    assert got[0] is got[1]
    return got[0], wanted


def test_it_has_no_storage_until_somebody_looks(pair):
    got, wanted = pair
    assert isinstance(got, SeerMask)
    assert (got.shape, got.dtype, got.device, got.dim()) == (wanted.shape, wanted.dtype, wanted.device, 4)
    assert torch.equal(got.padding, padding_of(2).bool())
    assert not got.recipe.made
    assert "padding" in repr(got)
    assert not got.recipe.made


USES = {
    "op": lambda x: x + 0 if x.is_floating_point() else x & True,
    "method": lambda x: x.expand(2, 3, -1, -1),
    "slice": lambda x: x[:, :, :, :150],
    "where": lambda x: torch.where(x == 0, 1.0, 2.0),
    "sum": lambda x: x.sum(),
    "cast": lambda x: x.to(torch.float64),
    "clone": lambda x: x.clone(),
    "copy": copy.deepcopy,
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "list": lambda x: torch.tensor(x.tolist()),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "item": lambda x: torch.tensor(x[0, 0, 199, 199].item()),
    "stack": lambda x: torch.cat((x, x)),
    "sdpa": lambda x: torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 2, 4, 200, 8), attn_mask=x),
}


@pytest.mark.parametrize("use", USES)
def test_whoever_looks_sees_the_mask_of_the_untouched_model(pair, use):
    got, wanted = (USES[use](mask) for mask in pair)
    assert not isinstance(got, SeerMask)
    assert torch.equal(got, wanted)


def test_it_moves_between_devices_without_storage(pair):
    mask, _ = pair
    for moved in (mask.to("meta"), mask.to(torch.device("meta"), non_blocking=True), mask.to(device="meta")):
        assert isinstance(moved, SeerMask)
        assert (moved.device.type, moved.padding.device.type, moved.shape) == ("meta", "meta", mask.shape)
    assert not mask.recipe.made


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_layer_that_came_after_attach(model_of, ids_of, implementation, batch):
    """It has a config of its own, and no gate."""
    model, ids, mask = model_of(attn_implementation=implementation), ids_of(200, batch=batch), padding_of(batch)
    added = copy.deepcopy(model.model.layers[1])
    added.self_attn.layer_idx = 2
    model.model.layers.append(added)
    model.config.num_hidden_layers = 3
    expected = logits_of(model, ids, attention_mask=mask)
    del model.model.layers[2]
    attach(model, seer.TokenBudget(32))
    model.model.layers.append(added)
    with seer.dense(model), pytest.warns(UserWarning, match="layers 2 are not attended sparsely"):
        assert torch.equal(logits_of(model, ids, attention_mask=mask), expected)
    with seer.record(model) as stats:
        logits_of(model, ids, attention_mask=mask)
    assert set(stats.per_layer) == {0, 1}
    seer.detach(model)
    assert torch.equal(logits_of(model, ids, attention_mask=mask), expected)


@pytest.mark.filterwarnings("ignore:seerattention. layers 2")
def test_a_layer_copied_from_an_attached_one(model_of, ids_of):
    """The copy has hooks of nobody: it is dense, obeys the model's contexts, and detach leaves nothing in it."""
    model, ids, mask = model_of(), ids_of(200, batch=2), padding_of(2)
    attach(model, seer.TokenBudget(32))
    added = copy.deepcopy(model.model.layers[1])
    added.self_attn.layer_idx = 2
    model.model.layers.append(added)
    model.config.num_hidden_layers = 3
    with seer.dense(model):
        dense = logits_of(model, ids, attention_mask=mask)
    seer.detach(model)
    assert torch.equal(logits_of(model, ids, attention_mask=mask), dense)
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"sdpa"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:seerattention. layers 2")
def test_layers_of_several_configs_are_all_attached(model_of, ids_of):
    model, ids, mask = model_of(), ids_of(200, batch=2), padding_of(2)
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    model.model.layers[2].self_attn.layer_idx = 2
    model.config.num_hidden_layers = 3
    expected = logits_of(model, ids, attention_mask=mask)
    attach(model, seer.TokenBudget(32))
    with seer.record(model) as stats:
        logits_of(model, ids, attention_mask=mask)
    assert stats.sparse_calls == 3
    with seer.dense(model):
        assert torch.equal(logits_of(model, ids, attention_mask=mask), expected)
    model.set_attn_implementation("eager")  # of the model's config only; then for all layers or none
    with pytest.warns(UserWarning, match="'eager'"):
        got = logits_of(model, ids, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_detach_in_the_middle_of_a_forward(model_of, ids_of, implementation, padded):
    model, ids = model_of(attn_implementation=implementation, num_hidden_layers=3), ids_of(200, batch=2)
    inputs = {"attention_mask": padding_of(2)} if padded else {}
    expected = logits_of(model, ids, **inputs)
    for sparse in (False, True):
        attach(model, seer.TokenBudget(32), min_context=0 if sparse else 2048)
        hook = model.model.layers[0].register_forward_hook(lambda *_: (seer.detach(model), None)[1])
        if sparse:  # half of the layers would be dense
            with pytest.raises(RuntimeError, match="detached while this forward"):
                logits_of(model, ids, **inputs)
        else:
            assert torch.equal(logits_of(model, ids, **inputs), expected)
        hook.remove()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert torch.equal(logits_of(model, ids, **inputs), expected)


def test_attach_and_detach_while_another_thread_computes(model_of, ids_of):
    """Each forward is dense as a whole, sparse as a whole, or an error."""
    model, ids, mask = model_of(), ids_of(200, batch=2), padding_of(2)
    rows = mask.bool()
    dense = logits_of(model, ids, attention_mask=mask)[rows]
    attach(model, seer.TokenBudget(32))
    sparse = logits_of(model, ids, attention_mask=mask)[rows]
    seer.detach(model)
    done = threading.Event()

    def change():
        while not done.is_set():
            attach(model, seer.TokenBudget(32))
            seer.detach(model)

    thread = threading.Thread(target=change)
    thread.start()
    wrong, errors = 0, []
    try:
        for _ in range(60):
            try:
                got = logits_of(model, ids, attention_mask=mask)[rows]
            except RuntimeError as error:
                errors.append(str(error))
                continue
            wrong += min((got - dense).abs().max(), (got - sparse).abs().max()) > 1e-3
    finally:
        done.set()
        thread.join()
    assert wrong == 0
    assert all("run it again" in error for error in errors)
    assert torch.equal(logits_of(model, ids, attention_mask=mask)[rows], dense)


def test_a_change_of_the_implementation_in_the_middle_of_a_forward_is_an_error(model_of, ids_of):
    """The mask was made for another one: eager attends to the future where sdpa needs no mask."""
    model = model_of()
    attach(model, seer.TokenBudget(32))
    model.model.layers[0].register_forward_hook(lambda *_: (model.set_attn_implementation("eager"), None)[1])
    with pytest.raises(RuntimeError, match="changed to 'eager' while a forward"):
        logits_of(model, ids_of(200))


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_models_get_the_mask_through_their_graphs(model_of, ids_of, padded):
    model, ids = model_of(attn_implementation="eager"), ids_of(200, batch=2)
    inputs = {"attention_mask": padding_of(2)} if padded else {}
    attach(model, seer.TokenBudget(32))
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(ids, **inputs).logits
        with seer.record(model) as stats:
            logits = torch.compile(model, backend="eager")(ids, **inputs).logits
    assert torch.equal(logits, expected)
    assert stats.sparse_calls == 2


def test_masks_of_a_decoding_step_are_the_originals(model_of, ids_of):
    """generate with padding, a mask of ones, and none."""
    model, ids = model_of(attn_implementation="eager"), ids_of(100, batch=2)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for mask in (padding_of(2, 100), torch.ones(2, 100, dtype=torch.long)):
        expected = model.generate(ids, attention_mask=mask, **options)
        attach(model, seer.TopK(1.0))
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)
        seer.detach(model)


def test_a_mask_function_of_the_users_own(model_of, ids_of):
    """Its mask may be anything; what it means is known from what transformers asked it for."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def own(*args, **kwargs):
        return (sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False}),)

    def attend(module, query, key, value, mask, **kwargs):
        assert isinstance(mask[0], Tensor)
        out, weights = sdpa_attention_forward(module, query, key, value, mask[0], **kwargs)
        return 1.5 * out, weights  # nobody else computes that

    AttentionInterface.register("in_a_tuple", attend)
    AttentionMaskInterface.register("in_a_tuple", own)
    model, ids, mask = model_of(attn_implementation="in_a_tuple"), ids_of(200, batch=2), padding_of(2)
    expected = [logits_of(model, ids), logits_of(model, ids, attention_mask=mask)]
    sdpa = attach(model_of(), seer.TokenBudget(32))
    sparse = [logits_of(sdpa, ids), logits_of(sdpa, ids, attention_mask=mask)]
    attach(model, seer.TokenBudget(32))
    got = [logits_of(model, ids), logits_of(model, ids, attention_mask=mask)]
    with seer.dense(model):
        dense = [logits_of(model, ids), logits_of(model, ids, attention_mask=mask)]
    assert all(map(torch.equal, dense, expected))
    assert all(map(torch.equal, got, sparse))
