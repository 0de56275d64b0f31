"""Which device a name means, on machines with any number of GPUs."""

from __future__ import annotations

import pytest
import torch

from infoprune_export.compress.devices import device_with_room, find_device
from infoprune_export.errors import InputError, MissingRequirement, NotEnough


@pytest.fixture
def gpus(monkeypatch):
    """Makes PyTorch see so many GPUs."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


@pytest.mark.parametrize(
    ("count", "name", "found"), [(0, None, "cpu"), (2, None, "cuda:0"), (2, "cuda", "cuda:0"), (2, "cuda:1", "cuda:1"), (2, "cpu", "cpu")]
)
def test_names(gpus, count, name, found):
    gpus(count)
    assert find_device(name) == torch.device(found)


@pytest.mark.parametrize("name", [None, "cuda"])
def test_each_process_of_a_launch_takes_a_gpu_of_its_own(gpus, monkeypatch, name):
    gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device(name) == torch.device("cuda:1")
    gpus(1)
    with pytest.raises(MissingRequirement, match=r"cuda:1: PyTorch sees 1 NVIDIA GPU here"):
        find_device(name)


@pytest.mark.parametrize(("name", "error"), [("gpu", "no device 'gpu'"), ("mps", "mps is not supported"), ("", "no device ''")])
def test_other_names_are_refused(gpus, name, error):
    gpus(0)
    with pytest.raises(InputError, match=error) as refused:
        find_device(name)
    assert refused.value.mend == "name cpu, cuda or cuda:N"


def test_a_gpu_without_room_is_refused_by_name_and_passed_over_without(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 8 * 2**30))
    told = []
    assert device_with_room(None, 3 * 2**30, told.append) == torch.device("cuda:0") and not told
    assert device_with_room(None, 4 * 2**30, told.append) == torch.device("cpu")
    assert told == ["this takes about 4.0 GiB on cuda:0, where 3.0 GiB are free: computing on the CPU"]
    with pytest.raises(NotEnough, match=r"about 4\.0 GiB on cuda:0") as refused:
        device_with_room("cuda", 4 * 2**30, told.append)
    assert refused.value.exit_code == 4 and "--device cpu" in refused.value.mend


def test_the_cpu_is_not_asked_how_much_it_has(gpus):
    gpus(0)
    assert device_with_room(None, 2**60, print) == torch.device("cpu")
