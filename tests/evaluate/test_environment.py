"""What a measurement says that it ran on."""

import pytest
import torch

from seerattention.evaluate.environment import environment, machine_name


@pytest.mark.parametrize(
    ("devices", "name"),
    [
        ([], "a processor"),
        (["NVIDIA H200"], "NVIDIA H200"),
        (["NVIDIA H200", "NVIDIA H200"], "2 x NVIDIA H200"),
        (["NVIDIA H200", "NVIDIA H100", "NVIDIA H200"], "2 x NVIDIA H200, NVIDIA H100"),
    ],
)
def test_a_machine_is_named_by_its_gpus_or_else_its_processor(devices, name):
    assert machine_name({"processor": "a processor", "devices": [{"name": device} for device in devices]}) == name


def test_files_that_say_nothing_of_a_machine_have_no_name_for_it():
    assert machine_name({}) == ""


def test_this_machine_has_a_name_that_holds_what_it_found():
    facts = environment()
    found = facts["devices"][0]["name"] if torch.cuda.is_available() else facts["processor"]
    assert found in machine_name(facts)
