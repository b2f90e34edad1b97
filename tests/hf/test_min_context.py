"""Below which length prompts are dense by default: by table, by what was saved on this machine, by device type."""

from __future__ import annotations

import json

import pytest
import torch

import seerattention as seer
from seerattention.hf import min_context
from seerattention.hf.crossings import CROSSINGS as COMMITTED
from seerattention.hf.min_context import Shape, crossing, default_min_context

CPU = torch.device("cpu")
TABLE = [("small", 100, 10, 9000), ("middle", 1000, 10, 5000), ("wide", 1000, 100, 3000)]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(min_context, "CROSSINGS", {})


def sparse_from(model, ids_of, lengths):
    found = []
    for length in lengths:
        with seer.record(model) as stats, torch.no_grad():
            model(ids_of(length))
        found.append(stats.sparse_calls > 0)
    return found


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (Shape(100, 10), 9000),
        (Shape(1000, 10), 5000),
        (Shape(5000, 99), 5000),
        (Shape(1000, 100), 3000),
        (Shape(10**9, 10**4), 3000),
        (Shape(999, 1000), 9000),
        (Shape(99, 1000), 9000),  # smaller than all: the longest of them
    ],
)
def test_a_table_says_what_holds_for_no_larger_model(shape, expected):
    assert crossing(TABLE, shape, CPU) == expected


def test_the_nearest_measurements_count():
    later = [*TABLE, ("wide, more work", 2000, 100, 4000), ("narrow, more work", 5000, 10, 2000)]
    assert crossing(later, Shape(2000, 100), CPU) == 4000  # as measured, although smaller ones paid from 3000 on
    assert crossing(later, Shape(4000, 200), CPU) == 4000
    assert crossing(later, Shape(1500, 100), CPU) == 3000
    assert crossing(later, Shape(5000, 100), CPU) == 2000  # the shortest of two that do not contain each other


def test_measured_shapes_get_what_was_measured():
    for table in COMMITTED.values():
        for _, work, width, length in table:
            assert crossing(table, Shape(work, width), CPU) == length


def test_without_a_table_the_type_of_the_device_decides():
    assert crossing([], Shape(1, 1), CPU) is None
    assert default_min_context(Shape(1, 1), CPU) == default_min_context(None, CPU) == 2048
    assert default_min_context(None, torch.device("mps")) == 4096


def test_an_attached_model_goes_by_its_shape(model_of, ids_of, monkeypatch):
    shape = Shape.of(model_of().config)
    monkeypatch.setattr(min_context, "CROSSINGS", {"cpu": [("this", *shape, 100)]})
    model = seer.attach(model_of(), seer.GateConfig(block_size=32), prefill=seer.TopK(0.3))
    assert sparse_from(model, ids_of, (99, 100)) == [False, True]


def test_what_was_saved_is_for_this_machine_and_shape_only(model_of, ids_of, monkeypatch):
    shape = Shape.of(model_of().config)
    path = min_context.save(shape, CPU, 120, {"density": 0.2})
    min_context.save(Shape(7, 7), CPU, 5, {})
    assert default_min_context(shape, CPU) == 120
    assert default_min_context(Shape(7, 7), CPU) == 5
    assert default_min_context(Shape(7, 8), CPU) == 2048
    model = seer.attach(model_of(), seer.GateConfig(block_size=32), prefill=seer.TopK(0.3))
    assert sparse_from(model, ids_of, (119, 120)) == [False, True]
    monkeypatch.setattr(min_context.platform, "node", lambda: "another machine")
    assert default_min_context(shape, CPU) == 2048
    assert len(json.loads(path.read_text())["machines"]) == 1


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 99, "machines": {}}', '{"format": 1, "machines": {"x": {"y": 3}}}']
)
def test_a_damaged_file_is_said_and_not_used(content, caplog):
    path = min_context.saved_path()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    min_context._read_once.cache_clear()
    assert default_min_context(Shape(1, 1), CPU) == 2048
    assert "seer bench --save" in caplog.text
    min_context.save(Shape(1, 1), CPU, 77, {})
    assert default_min_context(Shape(1, 1), CPU) == 77


def test_shapes_of_models(model_of):
    config = model_of().config
    width = config.num_attention_heads * config.head_dim
    key_width = config.num_key_value_heads * config.head_dim
    work = config.hidden_size * (2 * width + 2 * key_width) + 3 * config.hidden_size * config.intermediate_size
    assert Shape.of(config) == (work, width)
