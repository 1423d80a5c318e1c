"""Owns how tests read the TensorBoard files that a training leaves."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """From each tag of the event files to its values by step (TensorFlow's record format)."""
    found: dict[str, dict[int, float]] = {}
    for path in folder.rglob("events.out.tfevents.*"):
        for record in _records(path.read_bytes()):
            event = Event.FromString(record)
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def _records(content: bytes) -> Iterator[bytes]:
    while content:
        length = struct.unpack("<Q", content[:8])[0]
        yield content[12 : 12 + length]
        content = content[12 + length + 4 :]
