"""What each picture says of its making: what was asked for, with which files, on which engine. For `esd verify`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from typing import Any

from gpu_worker import VERSION
from gpu_worker.files.cache import CachedModel
from services.common.payloads import Payload

CHUNK = "esd"  # of a PNG


@dataclass(frozen=True)
class Provenance:
    """The making of a job's pictures. `device` is the engine's, such as `cuda: NVIDIA H100, float16`."""

    job_id: str
    task_type: str
    request: Payload
    files: list[CachedModel]
    device: str

    @property
    def engine(self) -> dict[str, str]:
        """What may change a picture's last bits beside its request and models."""
        return {"esd": VERSION, **_versions(), "device": self.device}

    @cached_property
    def _digests(self) -> dict[str, str]:
        return self.request.digests()

    def of(self, image: int) -> str:
        """The JSON text in the chunk `esd` of a picture of that number; of the client's own pictures, their hashes."""
        content: dict[str, Any] = {
            "job": self.job_id,
            "image": image,
            "task_type": self.task_type,
            "request": self.request.echo(),
            "digests": self._digests,
            "models": [{"type": file.type, "name": file.name, "sha256": file.sha256} for file in self.files],
            "engine": self.engine,
        }
        return json.dumps(content)


@cache
def _versions() -> dict[str, str]:
    """Of the libraries. Their metadata is long, and reading it takes milliseconds."""
    return {name: version(name) for name in ("torch", "diffusers")}
