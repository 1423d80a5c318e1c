"""Generates the Python code and the gateway's descriptor set from the protos.

The package's build hook (`pip install` runs it) and a command: `python protos/generate.py`. Nothing of the output is
committed. Output follows the path of a file, not its package, so Envoy's ext_authz messages land under `esd/` too and
cannot clash with the Envoy wheel's own `envoy` package.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
DESCRIPTOR_SET = ROOT / "esd" / "descriptors.binpb"
VALIDATE = "buf/validate/validate.proto"


def generate() -> None:
    """Writes `esd/**/*_pb2*.py[i]`, `buf/validate/validate_pb2.py` and the descriptor set with comments left in.

    Raises:
        SystemExit: a proto does not compile; protoc has printed why.
    """
    import google.api
    import grpc_tools

    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    includes = [PROTOS, Path(next(iter(google.api.__path__))).parents[1], Path(grpc_tools.__file__).parent / "_proto"]
    with tempfile.TemporaryDirectory() as folder:
        validate = Path(folder) / "validate.binpb"
        validate.write_bytes(_validate_descriptors())
        DESCRIPTOR_SET.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "grpc_tools.protoc", *(f"-I{include}" for include in includes)]
        command += [f"--descriptor_set_in={validate}", f"--descriptor_set_out={DESCRIPTOR_SET}"]
        command += ["--include_imports", "--include_source_info"]
        command += [f"--python_out={ROOT}", f"--pyi_out={ROOT}", f"--grpc_python_out={ROOT}"]
        if subprocess.run([*command, VALIDATE, *sources], check=False).returncode:
            raise SystemExit("the protos do not compile: see the messages above")


def _validate_descriptors() -> bytes:
    """A FileDescriptorSet of protovalidate's rules: its wheel carries them as a Python descriptor, not as a .proto."""
    from google.protobuf import descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2
    from protovalidate._gen.buf.validate import validate_pb

    files = descriptor_pb2.FileDescriptorSet()
    for module in (descriptor_pb2, duration_pb2, timestamp_pb2, field_mask_pb2):
        module.DESCRIPTOR.CopyToProto(files.file.add())
    files.file.add().ParseFromString(validate_pb.desc().proto.to_binary())
    return files.SerializeToString()


class GenerateHook(BuildHookInterface):  # type: ignore[type-arg]
    """Hatchling calls this before it builds a wheel or an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generates, and lets the build take the ignored output along."""
        generate()
        build_data["artifacts"] += ["/esd/**", "/buf/**"]


if __name__ == "__main__":
    generate()
