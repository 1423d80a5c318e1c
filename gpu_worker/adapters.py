"""What a job adds to its checkpoint: the LoRAs of its prompt and the embeddings that its prompts mention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpu_worker import embeddings, lora
from gpu_worker.cache import CachedModel
from gpu_worker.embeddings import Embedding
from gpu_worker.lora import Network
from gpu_worker.weights import Models
from services.common.payloads import Generation
from services.common.payloads.models import LORA, stem
from services.common.payloads.prompts import Lora

Adapter = Network | Embedding


@dataclass(frozen=True, eq=False)
class Adapters:
    """LoRAs with their scales, and embeddings by the word that stands for them."""

    networks: tuple[tuple[Network, Lora], ...] = ()
    embeddings: Mapping[str, Embedding] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Equipped:
    """A checkpoint in memory and what the job adds to it."""

    models: Models
    adapters: Adapters = Adapters()


def load(file: CachedModel, models: Models, base_name: str) -> Adapter:
    """Reads a LoRA or an embedding for these models.

    Raises:
        JobError: the file is damaged, or made for another architecture than the checkpoint's.
    """
    kind = lora if file.type == LORA else embeddings
    found: Adapter = kind.load(file, models, base_name)
    return found


def gathered(request: Generation, loaded: Mapping[CachedModel, Adapter]) -> Adapters:
    """The adapters that the request names, out of those that its checkpoint can have."""
    by_name = {name: found for file, found in loaded.items() for name in (stem(file.name), file.name)}
    uses = [(by_name.get(use.name) or by_name.get(stem(use.name)), use) for use in request.loras]
    return Adapters(
        tuple((network, use) for network, use in uses if isinstance(network, Network)),
        {stem(file.name): found for file, found in loaded.items() if isinstance(found, Embedding)},
    )
