"""Owns hypernetworks for the tiny model, made as A1111 makes them: a module for keys and one for values, by width."""

import io
from itertools import pairwise
from typing import Any

import torch
from torch import nn

# Of the UNet's blocks, and of the texts.
WIDTHS = (16, 32)


class Module(nn.Module):
    """Adds what its layers make of an input."""

    def __init__(
        self, width: int, structure: list[float], activation: nn.Module | None, options: dict[str, Any]
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (into, out) in enumerate(pairwise(structure)):
            layers.append(nn.Linear(int(width * into), int(width * out)))
            if activation is not None and (index < len(structure) - 2 or options.get("activate_output", True)):
                layers.append(activation)
            if options.get("is_layer_norm"):
                layers.append(nn.LayerNorm(int(width * out)))
            if options.get("use_dropout") and index < len(structure) - 2:
                layers.append(nn.Dropout(0.3))
        self.linear = nn.Sequential(*layers)
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input, changed."""
        return x + self.scale * self.linear(x)


def make(
    seed: int = 0, structure: tuple[float, ...] = (1, 2, 1), activation: nn.Module | None = None, **options: Any
) -> dict[int, tuple[Module, Module]]:
    """Modules with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = {
            width: (Module(width, [*structure], activation, options), Module(width, [*structure], activation, options))
            for width in WIDTHS
        }
    for pair in made.values():
        for module in pair:
            module.requires_grad_(False).eval()
    return made


def content(made: dict[int, tuple[Module, Module]] | None = None, **said: Any) -> bytes:
    """The file, with what it says of itself."""
    pairs = {width: tuple(m.state_dict() for m in pair) for width, pair in (made or make()).items()}
    file = io.BytesIO()
    torch.save({"step": 9, "name": "mood", "layer_structure": [1, 2, 1], **said, **pairs}, file)
    return file.getvalue()
