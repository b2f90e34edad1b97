"""Tiny random models of every supported family, as fixtures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from plan_cases import on_a_gpu, ordinary, real_kernels, repeated  # noqa: F401  (fixtures)
from seerattention.hf import decoding
from tiny_models import CONFIGS, make_ids, make_model


@pytest.fixture
def model_of() -> Callable[..., nn.Module]:
    return make_model


@pytest.fixture
def ids_of() -> Callable[..., torch.Tensor]:
    return make_ids


@pytest.fixture(params=sorted(CONFIGS))
def family(request) -> str:
    return request.param


@pytest.fixture
def rebuilds(monkeypatch):
    """How often the cached keys of a layer are encoded from scratch."""
    counted = []
    make = decoding._encode_cache
    monkeypatch.setattr(decoding, "_encode_cache", lambda *args: counted.append(1) or make(*args))
    return counted
