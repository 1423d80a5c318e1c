"""Tokens, and who may what (the table of contract 0.15)."""

import time

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from services.common.auth import Absence, Caller, Kind, Profile, Signer, UsernameStatus, Verifier
from services.common.errors import EsdError, InvalidArgument, PermissionDenied, Unauthenticated, Unavailable
from tests.serving import Tokens

ANN = Caller(
    kind=Kind.USER,
    name="änn",
    roles=["r"],
    permissions=["train:all"],
    profile=Profile.WEBUI,
    username_status=UsernameStatus.ABSENT,
    impersonate=True,
    key_owner="api",
)
TOKENS = Tokens()
D, W = Profile.DOCUMENT, Profile.WEBUI
NAMED, ABSENT, UNKNOWN, FOREIGN, UNREADABLE = UsernameStatus
REFUSED, OWNER, ALLOWED = Absence


def test_a_token_says_who_is_asking() -> None:
    assert TOKENS.verifier().verify(TOKENS.signer.sign(ANN, "esd", 30)) == ANN


def _forged(**claims: object) -> str:
    good = jwt.decode(TOKENS.signer.sign(ANN, "esd", 30), options={"verify_signature": False})
    header = jwt.get_unverified_header(TOKENS.signer.sign(ANN, "esd", 30))
    return jwt.encode({**good, **claims}, "s" * 32, algorithm="HS256", headers={"kid": header["kid"]})


@pytest.mark.parametrize(
    "token",
    [
        "",
        "a.b.c",
        TOKENS.signer.sign(ANN, "inference", 30),
        TOKENS.signer.sign(Caller(Kind.SERVICE, "models"), "esd", -1),
        Tokens().signer.sign(ANN, "esd", 30),
        jwt.encode({"sub": "x", "aud": "esd", "iss": "esd", "exp": time.time() + 9}, None, algorithm="none"),
        _forged(sub="api"),
        TOKENS.signer.sign(ANN, "esd", 30)[:-8],
    ],
    ids=["empty", "garbage", "other audience", "over", "other key", "unsigned", "other algorithm", "cut"],
)
def test_a_token_that_is_not_for_this_service_is_refused(token: str) -> None:
    with pytest.raises(Unauthenticated, match="the token is not valid"):
        TOKENS.verifier().verify(token)


def test_a_users_token_that_ran_out_while_the_request_waited_is_no_fault_of_the_user() -> None:
    late = TOKENS.signer.sign(ANN, "esd", -1)
    with pytest.raises(Unavailable, match="try again"):
        TOKENS.verifier().verify(late)
    assert not TOKENS.verifier().holds(late)


def test_an_audience_is_accepted_beside_that_of_services() -> None:
    verifier = TOKENS.verifier("inference")
    for audience in ("esd", "inference"):
        assert verifier.verify(TOKENS.signer.sign(ANN, audience, 30)) == ANN
    with pytest.raises(Unauthenticated):
        verifier.verify(TOKENS.signer.sign(ANN, "training", 30))


def test_several_keys_are_accepted_while_they_rotate() -> None:
    old, new = Tokens(), Tokens()
    verifier = Verifier(f"{old.public_key_pem}\n{new.public_key_pem}")
    for tokens in (old, new):
        assert verifier.verify(tokens.signer.sign(ANN, "esd", 30)) == ANN


def test_a_signing_key_of_another_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    for pem in (key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), b"no key"):
        with pytest.raises(SystemExit):
            Signer(pem)
        assert "ESD_SIGNING_KEY_FILE: the signing key is not an Ed25519 private key" in capsys.readouterr().err


@pytest.mark.parametrize("pem", ["", "-----BEGIN PUBLIC KEY-----\nno key\n-----END PUBLIC KEY-----"])
def test_with_a_verifying_key_that_is_none_nobody_starts(pem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Verifier(pem)
    assert "setting ESD_VERIFYING_KEY_FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("profile", "status", "impersonate", "absence", "holds", "refusal"),
    [
        (D, NAMED, False, REFUSED, True, None),
        (D, NAMED, False, REFUSED, False, PermissionDenied),
        (W, NAMED, True, ALLOWED, False, PermissionDenied),
        # Nobody is named: the owner of the key acts in the document profile.
        (D, ABSENT, False, REFUSED, True, None),
        (D, ABSENT, True, ALLOWED, False, PermissionDenied),
        # In webui the RPC decides.
        (W, ABSENT, True, REFUSED, True, Unauthenticated),
        (W, ABSENT, False, REFUSED, True, Unauthenticated),
        (W, ABSENT, True, OWNER, True, None),
        (W, ABSENT, True, OWNER, False, PermissionDenied),
        (W, ABSENT, True, ALLOWED, False, None),
        # A legacy Authorization that is no name.
        (D, UNREADABLE, True, ALLOWED, True, InvalidArgument),
        (W, UNREADABLE, False, OWNER, False, InvalidArgument),
        (W, ABSENT, False, ALLOWED, False, PermissionDenied),
        (W, ABSENT, False, ALLOWED, True, None),
        # Named, but nobody, or nobody whom the key may act for.
        (D, UNKNOWN, True, REFUSED, False, Unauthenticated),
        (W, UNKNOWN, True, ALLOWED, False, Unauthenticated),
        (D, FOREIGN, False, REFUSED, False, PermissionDenied),
        (W, FOREIGN, False, ALLOWED, False, PermissionDenied),
    ],
)
def test_who_may_what(
    profile: Profile,
    status: UsernameStatus,
    impersonate: bool,
    absence: Absence,
    holds: bool,
    refusal: type[EsdError] | None,
) -> None:
    caller = Caller(
        Kind.USER, "ann", permissions=["role:list"] if holds else ["train:all"],
        profile=profile, username_status=status, impersonate=impersonate, key_owner="ann",
    )  # fmt: skip
    if refusal is None:
        caller.enforce(["role:all", "role:list"], absence)
    else:
        with pytest.raises(refusal):
            caller.enforce(["role:all", "role:list"], absence)


def test_the_refusal_names_user_and_permissions_as_the_contract_does() -> None:
    with pytest.raises(PermissionDenied) as failure:
        Caller(Kind.USER, "ann").enforce(["role:all", "role:list"])
    assert str(failure.value) == "User ann has no permissions: ['role:all', 'role:list']"
