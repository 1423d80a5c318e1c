"""Owns the form of an API key: `esd_`, 160 random bits in hexadecimal, and a checksum against mistyping."""

import secrets
import zlib

_PREFIX = "esd_"
_CHECKSUM_DIGITS = 8


def new_api_key() -> str:
    """Returns a new API key. It is shown once; only its SHA-256 is kept."""
    body = secrets.token_hex(20)
    return f"{_PREFIX}{body}{_checksum(body)}"


def looks_like_api_key(text: str) -> bool:
    """Says whether the text has the form of a key made here; it says nothing about whether the key exists."""
    body, checksum = text.removeprefix(_PREFIX)[:-_CHECKSUM_DIGITS], text[-_CHECKSUM_DIGITS:]
    return text.startswith(_PREFIX) and len(body) == 40 and checksum == _checksum(body)


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):0{_CHECKSUM_DIGITS}x}"
