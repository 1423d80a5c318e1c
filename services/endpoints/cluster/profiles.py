"""Owns what an `instance_type` means on a cluster: which nodes, how many GPUs, how much memory one worker gets.

A worker uses one GPU, so on a node with several there is room for as many workers, and each gets its share of the node.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
_QUANTITY = r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$"
# From size to vCPUs, GiB and GPUs (aws.amazon.com/ec2/instance-types, accelerated computing).
_G4DN = {
    "xlarge": (4, 16, 1),
    "2xlarge": (8, 32, 1),
    "4xlarge": (16, 64, 1),
    "8xlarge": (32, 128, 1),
    "12xlarge": (48, 192, 4),
    "16xlarge": (64, 256, 1),
}
_G5_G6 = {**_G4DN, "24xlarge": (96, 384, 4), "48xlarge": (192, 768, 8)}
_SHARE = 0.75  # of a node; the rest is for what else runs there, and for the system


class Profile(BaseModel):
    """What one worker asks for. `cpu` and `memory` are Kubernetes quantities; the second is a limit too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: int = Field(default=1, ge=0)
    cpu: str = Field(default="2", pattern=_QUANTITY)
    memory: str = Field(default="12Gi", pattern=_QUANTITY)
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: list[dict[str, Any]] = Field(default=[_TAINT])
    runtime_class: str | None = None


def _share(instance: str, vcpus: int, gib: int, gpus: int) -> Profile:
    return Profile(
        cpu=f"{int(1000 * vcpus * _SHARE / gpus)}m",
        memory=f"{int(1024 * gib * _SHARE / gpus)}Mi",
        node_selector={"node.kubernetes.io/instance-type": instance},
    )


AWS_PROFILES = {
    f"ml.{family}.{size}": _share(f"{family}.{size}", *shape)
    for family, sizes in {"g4dn": _G4DN, "g5": _G5_G6, "g6": _G5_G6}.items()
    for size, shape in sizes.items()
}
