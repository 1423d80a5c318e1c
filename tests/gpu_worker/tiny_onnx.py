"""Owns tiny ONNX files, written as protobuf by hand (onnx.proto3): the mask is the brightness of the picture."""

from collections.abc import Sequence

FLOAT, INT64, BOOL = 1, 7, 9  # of tensors
GRAPH, INTS = 5, 7  # of attributes


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, content: bytes | str) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _value(name: str, shape: Sequence[int], kind: int = FLOAT) -> bytes:
    dimensions = b"".join(_bytes(1, _number(1, side)) for side in shape)
    tensor = _number(1, kind) + _bytes(2, dimensions)
    return _bytes(1, name) + _bytes(2, _bytes(1, tensor))


def _node(operator: str, inputs: Sequence[str], outputs: Sequence[str], attribute: bytes = b"") -> bytes:
    names = b"".join([*(_bytes(1, name) for name in inputs), *(_bytes(2, name) for name in outputs)])
    return names + _bytes(4, operator) + (_bytes(5, attribute) if attribute else b"")


def _endless(shape: Sequence[int]) -> bytes:
    """The picture, after as many rounds as there are: a loop without a number of them or a condition."""
    body = _bytes(1, _node("Identity", ["going"], ["goes"])) + _bytes(1, _node("Identity", ["before"], ["after"]))
    body += _bytes(2, "body") + _bytes(11, _value("round", (), INT64)) + _bytes(11, _value("going", (), BOOL))
    body += _bytes(11, _value("before", shape)) + _bytes(12, _value("goes", (), BOOL))
    body += _bytes(12, _value("after", shape))
    return _node("Loop", ["", "", "picture"], ["seen"], _bytes(1, "body") + _bytes(6, body) + _number(20, GRAPH))


def brightness(side: int = 320, initializer: bytes = b"", is_endless: bool = False) -> bytes:
    """The mean over the colours, of shape (1, 1, side, side). `initializer` is a further tensor of the graph."""
    axes = _bytes(1, "axes") + _number(8, 1) + _number(20, INTS)
    graph = _bytes(1, _endless((1, 3, side, side))) if is_endless else b""
    graph += _bytes(1, _node("ReduceMean", ["seen" if is_endless else "picture"], ["mask"], axes))
    graph += _bytes(2, "brightness")
    graph += _bytes(5, initializer) if initializer else b""
    graph += _bytes(11, _value("picture", (1, 3, side, side))) + _bytes(12, _value("mask", (1, 1, side, side)))
    return _number(1, 8) + _bytes(7, graph) + _bytes(8, _bytes(1, "") + _number(2, 13))


def outside(path: str, num_bytes: int) -> bytes:
    """A tensor whose weights lie in another file."""
    entries = b"".join(_bytes(13, _bytes(1, key) + _bytes(2, value)) for key, value in (("location", path),))
    return _number(1, num_bytes // 4) + _number(2, FLOAT) + _bytes(8, "outside") + entries + _number(14, 1)
