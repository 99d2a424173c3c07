"""Devices of several processes: each has a GPU of its own, by one rule for training and evaluation."""
import pytest
import torch

from transfusion.device import launched, own_device


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs, and no launcher."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize("rank,size,expected", [
    (None, None, (0, 1)), ("", "", (0, 1)), ("1", "2", (1, 2)), ("0", "8", (0, 8)), ("0", "1", (0, 1)),
])
def test_a_launcher_says_which_process_of_how_many_this_is(rank, size, expected, monkeypatch):
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert launched() == expected


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_of_several_processes_takes_the_gpu_of_its_place(name, two_gpus, monkeypatch):
    assert [str(own_device("train", name, rank, 2)) for rank in range(2)] == ["cuda:0", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(own_device("train", name, 5, 8)) == "cuda:1", "the place is that on this machine"


def test_one_process_takes_what_is_named_and_the_cpu_is_everybodys(two_gpus):
    assert str(own_device("train", "cuda:1", 0, 1)) == "cuda:1"
    assert {str(own_device("train", "cpu", rank, 8)) for rank in range(8)} == {"cpu"}


def test_no_two_processes_share_a_gpu(two_gpus):
    with pytest.raises(ValueError, match="eval draw: device is 'cuda:0' and there are 2 processes, each of which takes "
                                         "a GPU of its own; 'cuda' fits"):
        own_device("eval draw", "cuda:0", 1, 2)
    with pytest.raises(ValueError, match="eval draw: device is 'cuda' and process 2 has no GPU of its own, for this "
                                         "machine has 2; as many processes fit, or 'cpu'"):
        own_device("eval draw", "cuda", 2, 3)
