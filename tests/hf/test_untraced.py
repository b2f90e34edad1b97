"""Functions that Dynamo does not look into: as they are where nothing is compiled, and never compiled elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from seerattention.hf.untraced import untraced


def traced_in() -> bool:
    """Whether the caller's frames are Dynamo's to compile."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    seen.clear()
    yield
    torch._dynamo.reset()


seen: list[bool] = []


@untraced("it is for the test")
def twice(x):
    """A docstring."""
    seen.append(traced_in())
    return inner(x) * 2


@untraced("so is this")
def inner(x):
    return x.sin()


def test_a_plain_call_is_the_function():
    x = torch.randn(3)
    assert torch.equal(twice(x), x.sin() * 2)
    assert seen == [False]
    assert twice.__doc__ == "A docstring."
    assert twice.__name__ == "twice"


def test_it_is_not_compiled():
    counter, x = CompileCounter(), torch.randn(3)

    def whole(x):
        return twice(x + 1) - 1

    compiled = torch.compile(whole, backend=counter)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), (x + 1).sin() * 2 - 1)
    assert counter.op_count == 2  # what is around it
    assert seen == [False] * 3  # below it nothing is looked at either


def test_it_is_not_compiled_below_frames_that_are_passed_over():
    """Dynamo gives up on a generator's frame, runs it as it is, and would begin again in the next one."""
    counter, x = CompileCounter(), torch.randn(3)

    def passed_over(x):
        yield twice(x)

    torch.compile(lambda x: list(passed_over(x)), backend=counter)(x)
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = torch.compile(lambda x: twice(x), backend=counter, dynamic=False)
        for length in (3, 4, 5, 6):
            compiled(torch.randn(length))
    assert len(seen) == 5
    assert not any(seen)
    assert counter.op_count == 0


def test_errors_are_those_of_the_function():
    @untraced("it fails")
    def fails():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fails()
