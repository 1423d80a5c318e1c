"""What a job adds to its checkpoint: LoRAs, hypernetworks and embeddings that its prompts name, and the ControlNets of
its units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpu_worker.files.cache import CachedModel
from gpu_worker.models import controlnet, embeddings, hypernetwork, lora
from gpu_worker.models.controlnet import ControlNet
from gpu_worker.models.embeddings import Embedding
from gpu_worker.models.lora import Network
from gpu_worker.models.weights import Models
from services.common.payloads import Generation
from services.common.payloads.models import CONTROLNET, EMBEDDING, HYPERNETWORK, LORA, NETWORK_TYPES, find, stem
from services.common.payloads.prompts import NetworkTag

Adapter = Network | Embedding | ControlNet
_KINDS: dict[str, Callable[[CachedModel, Models, str], Adapter]] = {
    LORA: lora.load,
    HYPERNETWORK: hypernetwork.load,
    EMBEDDING: embeddings.load,
    CONTROLNET: controlnet.load,
}


@dataclass(frozen=True, eq=False)
class Loaded:
    """What a file holds, on the device, which it leaves for good; `on_leave` is called before its memory is free."""

    content: Any
    num_bytes: int
    on_leave: Callable[[], None]

    def enter(self) -> None:
        """It is there."""

    def leave(self) -> None:
        """Leaves the device."""
        self.on_leave()

    def forget(self) -> None:
        """There is no copy in the host's memory."""


@dataclass(frozen=True, eq=False)
class Adapters:
    """LoRAs and hypernetworks with their scales, embeddings by their words, and the ControlNet of each unit."""

    networks: tuple[tuple[Network, NetworkTag], ...] = ()
    embeddings: Mapping[str, Embedding] = field(default_factory=dict)
    controlnets: tuple[ControlNet, ...] = ()


@dataclass(frozen=True, eq=False)
class Equipped:
    """A checkpoint in memory and what the job adds to it."""

    models: Models
    adapters: Adapters = Adapters()


def load(file: CachedModel, models: Models, base_name: str) -> Adapter:
    """Reads a LoRA, a hypernetwork, an embedding or a ControlNet for these models.

    Raises:
        JobError: the file is damaged, or made for another architecture than the checkpoint's and no embedding.
    """
    return _KINDS[file.type](file, models, base_name)


def gathered(request: Generation, loaded: Mapping[CachedModel, Adapter]) -> Adapters:
    """The adapters that the request names, out of those that its checkpoint can have."""

    def named(kind: str, names: Iterable[str]) -> list[Any]:
        files = [file for file in loaded if file.type == kind]
        models = [(kind, file.name) for file in files]
        return [loaded[files[find(models, kind, name, kind)]] for name in names] if files else []

    networks = [(found, tag) for tag in request.networks for found in named(NETWORK_TYPES[tag.kind], [tag.name])]
    return Adapters(
        tuple(networks),
        {stem(file.name): found for file, found in loaded.items() if isinstance(found, Embedding) and found.vectors},
        tuple(named(CONTROLNET, (unit.model for unit in request.controlnet))),
    )


def unfit(loaded: Mapping[CachedModel, Adapter]) -> list[CachedModel]:
    """The embeddings among them that were made for another architecture."""
    return [file for file, found in loaded.items() if isinstance(found, Embedding) and not found.vectors]
