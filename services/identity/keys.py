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


def shown_prefix(key: str) -> str:
    """The beginning of a key that may be shown to tell it from others: 32 of its bits, so that 128 stay secret.

    Of a first key chosen by hand it is at most a quarter.
    """
    is_ours = key.startswith(_PREFIX) and len(key) == len(_PREFIX) + 40 + _CHECKSUM_DIGITS and not is_mistyped(key)
    return key[: len(_PREFIX) + 8] if is_ours else key[: min(4, len(key) // 4)]


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):0{_CHECKSUM_DIGITS}x}"
