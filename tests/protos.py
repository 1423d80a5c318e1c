"""Owns how tests read the protos: the descriptor set with its comments, and the RPCs in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from google.api import annotations_pb2
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from esd.endpoints.v1 import endpoints_pb2
from esd.identity.v1 import ext_authz_pb2, identity_pb2
from esd.inference.v1 import externalscaler_pb2, inference_pb2
from esd.models.v1 import models_pb2
from esd.options.v1 import options_pb2
from esd.training.v1 import training_pb2
from esd.worker.v1 import worker_pb2

ROOT = Path(__file__).parents[1]
MODULES = (
    options_pb2,
    ext_authz_pb2,
    identity_pb2,
    models_pb2,
    endpoints_pb2,
    externalscaler_pb2,
    inference_pb2,
    training_pb2,
    worker_pb2,
)


@dataclass(frozen=True)
class Route:
    """The REST side of an RPC. `body` is the field that the body fills, `*` for the message, empty for none."""

    verb: str
    path: str
    body: str


def descriptor_set() -> FileDescriptorSet:
    """Our own files of the generated set, with their comments."""
    files = FileDescriptorSet.FromString((ROOT / "esd" / "descriptors.binpb").read_bytes())
    return FileDescriptorSet(file=[file for file in files.file if file.name.startswith("esd/")])


def methods() -> Iterator[MethodDescriptor]:
    """Every RPC, with its options."""
    assert {module.DESCRIPTOR.name for module in MODULES} == {file.name for file in descriptor_set().file}
    for module in MODULES:
        file: FileDescriptor = descriptor_pool.Default().FindFileByName(module.DESCRIPTOR.name)
        for service in file.services_by_name.values():
            yield from service.methods


def route(method: MethodDescriptor) -> Route | None:
    """The RPC's http rule, None for an RPC that is not public."""
    options = method.GetOptions()
    if not options.HasExtension(annotations_pb2.http):
        return None
    rule = options.Extensions[annotations_pb2.http]
    verb = rule.WhichOneof("pattern")
    return Route(verb.upper(), getattr(rule, verb), rule.body)


def commented_things(file: FileDescriptorProto) -> Iterator[tuple[str, str]]:
    """Name and comment of each service, RPC, message, field, enum and enum value of a file."""
    for location in file.source_code_info.location:
        name = _name_at(file, list(location.path))
        if name is not None:
            yield name, location.leading_comments.strip()


def _name_at(file: FileDescriptorProto, path: list[int]) -> str | None:
    """The dotted name of what stands at a path of descriptor.proto's source info; None for anything without one."""
    named = {"message_type", "nested_type", "field", "enum_type", "value", "service", "method", "extension"}
    here: object = file
    names = []
    while path:
        if len(path) < 2:
            return None
        number, index, *path = path
        descriptor = here.DESCRIPTOR.fields_by_number[number]  # type: ignore[attr-defined]
        if descriptor.name not in named:
            return None
        here = getattr(here, descriptor.name)[index]
        names.append(here.name)  # type: ignore[attr-defined]
    return ".".join(names) or None
