"""Weights in one piece of memory."""

import pytest
import torch

from gpu_worker.models import packed
from gpu_worker.models.packed import Block


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Two convolutions of different layout, a norm with numbers of two types, a matrix in half precision. Its memory
    cannot be locked: there is no GPU."""
    monkeypatch.setattr(packed, "_pin", lambda _: False)
    first = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    made = torch.nn.Sequential(first, torch.nn.Conv2d(5, 2, 1), torch.nn.BatchNorm2d(2), torch.nn.Linear(7, 3).half())
    return made.requires_grad_(False).eval()


CPU = torch.device("cpu")


def test_tensors_move_together_and_come_back_as_they_were(module: torch.nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parameters = dict(module.named_parameters())
    block = Block([module], CPU, moves=True)
    in_host = addresses(module)
    block.enter()
    assert not set(in_host) & set(addresses(module))
    assert max(addresses(module)) - min(addresses(module)) < block.num_bytes
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype
        assert tensor.stride() == before[name].stride()
    assert all(parameters[name] is parameter for name, parameter in module.named_parameters())
    block.leave()
    assert addresses(module) == in_host


def test_where_nothing_moves_nothing_is_copied(module: torch.nn.Module) -> None:
    before = addresses(module)
    block = Block([module], CPU, moves=False)
    block.enter()
    block.leave()
    block.forget()
    assert addresses(module) == before


def test_without_its_copy_what_leaves_stays_where_it_was(module: torch.nn.Module) -> None:
    block = Block([module], CPU, moves=True)
    block.enter()
    before = addresses(module)
    block.forget()
    block.leave()
    assert addresses(module) == before


def addresses(module: torch.nn.Module) -> list[int]:
    """Of the tensors' memory."""
    return [tensor.data_ptr() for tensor in module.state_dict().values()]
