"""The forms of API keys and of stored passwords."""

import pytest
from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from cryptography.fernet import Fernet

from services.identity.keys import is_mistyped, new_api_key, shown_prefix
from services.identity.passwords import Passwords


def test_a_key_has_160_random_bits_behind_its_prefix() -> None:
    keys = {new_api_key() for _ in range(100)}
    assert len(keys) == 100
    assert {(key[:4], len(key)) for key in keys} == {("esd_", 4 + 40 + 8)}
    int(keys.pop().removeprefix("esd_"), 16)


def test_a_mistyped_key_is_found_by_its_checksum() -> None:
    key = new_api_key()
    assert not is_mistyped(key)
    for place in range(4, len(key)):
        wrong = key[:place] + ("0" if key[place] != "0" else "1") + key[place + 1 :]
        assert is_mistyped(wrong)
    assert is_mistyped(key[:-1])
    assert is_mistyped("esd_")
    assert not is_mistyped("09876543210987654321"), "a first key may have any form"


async def test_a_password_is_hashed_with_argon2id_and_can_be_revealed_with_its_key_only() -> None:
    passwords = Passwords(Fernet.generate_key().decode())
    stored = await passwords.store("päss word")
    assert stored.hash.startswith("$argon2id$")
    PasswordHasher().verify(stored.hash, "päss word")
    with pytest.raises(VerifyMismatchError):
        PasswordHasher().verify(stored.hash, "pass word")
    assert passwords.reveal(stored.encrypted) == "päss word"
    assert "ss word" not in stored.encrypted
    assert Passwords(Fernet.generate_key().decode()).reveal(stored.encrypted) is None


def test_a_key_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="Fernet"):
        Passwords("short")


def test_what_is_shown_of_a_key_leaves_128_bits_secret() -> None:
    key = new_api_key()
    assert shown_prefix(key) == key[:12]
    for chosen in ("09876543210987654321", "esd_secret", "abc", ""):
        assert len(shown_prefix(chosen)) <= len(chosen) / 4
        assert chosen.startswith(shown_prefix(chosen))
