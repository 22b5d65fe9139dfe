"""torch's process-wide settings come back."""

import torch

from stages.training.device import default_device, seeded, torch_threads


def test_seeded_leaves_the_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded(7):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(7):
        assert torch.equal(torch.rand(3), inside)


def test_threads_come_back_after_an_error() -> None:
    before = torch.get_num_threads()
    try:
        with torch_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise ValueError
    except ValueError:
        pass
    assert torch.get_num_threads() == before
    with torch_threads(None):
        assert torch.get_num_threads() == before


def test_the_device_is_one_that_is_there() -> None:
    assert torch.ones(1, device=default_device()).item() == 1
