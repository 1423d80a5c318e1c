"""Which endpoint a job goes to and which files its models are, as far as its user may use them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.payloads.models import (
    BASE,
    CONTROLNET,
    EMBEDDING,
    HYPERNETWORK,
    LORA,
    PSEUDO_VAES,
    REMBG,
    UPSCALER,
    VAE,
)
from services.common.viewer import Viewer
from services.inference.peers import Endpoint, Model, Peers
from services.inference.rows import ASYNC, REAL_TIME

SIMPLE_TASKS = ["txt2img", "img2img"]
EXTRA_TASKS = ["extra-single-image", "extra-batch-images", "rembg"]
# Types of models that an extra task may have; others are ignored there, as by the original.
_EXTRA_TYPES = {UPSCALER, REMBG}
# The order in which a worker loads (contract 10.2); JSON objects arrive in none.
_MODEL_TYPES = [BASE, HYPERNETWORK, LORA, CONTROLNET, EMBEDDING, VAE, UPSCALER, REMBG]
# The original refuses jobs that name an endpoint while it grows or shrinks; here that is every day's business.
_USABLE = {"InService", "Updating"}
_MAX_MODELS = 1000  # clients name all embeddings that they see


@dataclass(frozen=True)
class Draft:
    """A job as asked for. `models` maps checkpoint types to lists of file names.

    A deadline counts from the start. With an idempotency key goes the SHA-256 of the request that came with it.
    """

    task_type: str
    inference_type: str
    models: dict[str, Any]
    payload_string: str | None
    endpoint_name: str
    priority: int = 0
    deadline_seconds: float | None = None
    idempotency_key: str = ""
    body_sha256: str = ""
    webhook: str = ""
    webhook_secret: str = ""

    @property
    def models_of_task(self) -> dict[str, Any]:
        """The models that count for the task."""
        if self.task_type in SIMPLE_TASKS:
            return self.models
        return {kind: names for kind, names in self.models.items() if kind in _EXTRA_TYPES}


class Choices:
    """Asks the other services."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    async def choose_endpoint(self, draft: Draft, user: Viewer) -> Endpoint:
        """The endpoint that the draft names, or any that the user may use.

        Raises:
            InvalidArgument: there is none of this name. FailedPrecondition: none can take the job.
        """
        found = await self._peers.find_endpoints(draft.inference_type, user, draft.endpoint_name)
        if draft.endpoint_name:
            if not found:
                raise InvalidArgument(f"sagemaker endpoint with name {draft.endpoint_name} is not found")
            if found[0].status not in _USABLE:
                raise FailedPrecondition(f"sagemaker endpoint is not ready with status: {found[0].status}")
        if draft.inference_type not in {ASYNC, REAL_TIME} or not found:
            raise FailedPrecondition(f'no available {draft.inference_type} endpoints for user "{user.name}"')
        return random.choice(found)  # noqa: S311 - load, not secrets

    async def find_models(self, models: dict[str, Any], user: Viewer) -> list[Model]:
        """The files behind the names, in the order in which a worker loads them.

        Raises:
            InvalidArgument: one is not there, or not for this user, or there are too many.
        """
        names: list[tuple[str, str]] = []
        for kind, files in sorted(models.items(), key=_loading_order):
            if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
                raise InvalidArgument(f"models: {kind} is not a list of file names")
            names += [(kind, name) for name in dict.fromkeys(files)]
        if len(names) > _MAX_MODELS:
            raise InvalidArgument(f"models names {len(names)} files; at most {_MAX_MODELS} are possible")
        real = [(kind, name) for kind, name in names if kind != VAE or name not in PSEUDO_VAES]
        found: list[Model] = []
        if real:
            found, missing = await self._peers.resolve_checkpoints(real, user)
            if missing:
                texts = (f"checkpoint with name {name}, type {kind} is not found" for kind, name in missing)
                raise InvalidArgument(" ".join(texts))
        resolved = {(model.type, model.name): model for model in found}
        return [resolved.get((kind, name)) or _pseudo_vae(name) for kind, name in names]


def _loading_order(item: tuple[str, Any]) -> tuple[int, str]:
    kind = item[0]
    return _MODEL_TYPES.index(kind) if kind in _MODEL_TYPES else len(_MODEL_TYPES), kind


def _pseudo_vae(name: str) -> Model:
    """The VAE that is part of the base checkpoint, as the original prints it (`s3` is the text None)."""
    return Model(type=VAE, name=name, id="VAE", all_names=[name], s3_location="None")
