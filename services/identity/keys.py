"""Owns the form of an API key: `esd_`, 160 random bits in hexadecimal, and a checksum that catches typing errors."""

import secrets
import zlib

_PREFIX = "esd_"
_CHECKSUM_DIGITS = 8


def new_api_key() -> str:
    """Returns a new API key. It is shown once; only its SHA-256 is kept."""
    body = secrets.token_hex(20)
    return f"{_PREFIX}{body}{_checksum(body)}"


def is_mistyped(key: str) -> bool:
    """Says whether this starts like a key made here and cannot be one; a first key chosen by hand may have any form."""
    body, checksum = key.removeprefix(_PREFIX)[:-_CHECKSUM_DIGITS], key[-_CHECKSUM_DIGITS:]
    return key.startswith(_PREFIX) and checksum != _checksum(body)


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):0{_CHECKSUM_DIGITS}x}"
