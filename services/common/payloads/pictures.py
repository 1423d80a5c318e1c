"""Pictures inside a payload: base64, bare or as a data URI. Their size is known before a pixel is decoded."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib

from PIL import Image, ImageOps

MAX_PIXELS = 2**25  # about 5800x5800
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
_MAX_SCANS = 100  # of a JPEG, of a few bytes each, and each goes over all pixels; a photo has about ten
_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"
# Pillow's own bound is for all callers in the process, and half a warning; MAX_PIXELS takes its place here.
Image.MAX_IMAGE_PIXELS = None
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


class Damaged(ValueError):
    """A picture cannot be read. The message is one sentence that names its field."""


def check(text: str, name: str) -> tuple[int, int]:
    """The width and height of the picture in a text, if it can be decoded. `name` is its field.

    Raises:
        Damaged: it cannot.
    """
    image = _opened(text, name)
    try:
        image.verify()  # checksums, where the format has them
    except _DAMAGED:
        raise Damaged(f"{name} is damaged or truncated: it cannot be read as {image.format}") from None
    return image.size


def decode(text: str, name: str) -> Image.Image:
    """The picture, turned as its camera says.

    Raises:
        Damaged: there is none, it is too large, or it is damaged.
    """
    return loaded(_opened(text, name), name)


def loaded(image: Image.Image, name: str) -> Image.Image:
    """An opened picture with its pixels, turned as its camera says.

    Raises:
        Damaged: it is damaged.
    """
    kind = image.format
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except _DAMAGED:
        raise Damaged(f"{name} is damaged or truncated: it cannot be read as {kind}") from None


def opened(content: bytes, name: str) -> Image.Image:
    """The picture in a file's content as its header describes it, not decoded yet.

    Raises:
        Damaged: it is none, or has too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except _DAMAGED:
        raise Damaged(f"{name} is no picture that can be read; possible: {', '.join(FORMATS)}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Damaged(f"{name} has {width}x{height} pixels; at most {MAX_PIXELS} pixels are possible")
    if content.startswith(_JPEG) and (num_scans := content.count(_SCAN)) > _MAX_SCANS:
        raise Damaged(f"{name} has {num_scans} scans; at most {_MAX_SCANS} are possible")
    return image


def _opened(text: str, name: str) -> Image.Image:
    if text.startswith(("http://", "https://")):
        raise Damaged(f"{name} is a URL; the picture itself is needed, in base64")
    head, comma, tail = text.partition(",")
    encoded = tail if comma and head.startswith("data:") else text
    try:
        content = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Damaged(f"{name} is not base64") from None
    return opened(content, name)
