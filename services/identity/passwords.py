"""Owns the stored forms of a password: an Argon2id hash, and an encrypted copy for the one client that must show it.

NOTE: the encrypted copy is against the convention. The WebUI extension feeds its own login from the clear text
(contract 3.5), so passwords are encrypted with a key that lies outside the database, and shown in that profile only.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog
from argon2 import PasswordHasher
from cryptography.fernet import Fernet, InvalidToken

log = structlog.get_logger()


@dataclass(frozen=True)
class StoredPassword:
    """What is kept of a password."""

    hash: str
    encrypted: str


class Passwords:
    """Makes the stored forms and reads them again."""

    def __init__(self, key: str) -> None:
        """`key` is a Fernet key.

        Raises:
            ValueError: it is none.
        """
        self._fernet = Fernet(key)
        self._hasher = PasswordHasher()  # Argon2id with the parameters of RFC 9106, low memory

    async def store(self, password: str) -> StoredPassword:
        """The stored forms; hashing takes tens of milliseconds in a thread."""
        hashed = await asyncio.to_thread(self._hasher.hash, password)
        return StoredPassword(hashed, self._fernet.encrypt(password.encode()).decode())

    def reveal(self, encrypted: str) -> str | None:
        """The clear text; None when it was encrypted with another key."""
        try:
            return self._fernet.decrypt(encrypted).decode()
        except InvalidToken:
            log.warning("a stored password cannot be decrypted: was ESD_PASSWORD_KEY_FILE changed?")
            return None
