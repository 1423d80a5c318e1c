"""Presigned URLs are those of botocore, byte by byte."""

from datetime import UTC, datetime
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from services.common.presigning import Presigner

BASES = [
    "http://127.0.0.1:8080/esd",
    "https://bucket.s3.eu-central-1.amazonaws.com",
    "http://store:80/a",
    "http://[::1]:81/b",
]
CREDENTIALS = [Credentials("account:user", "secret+/"), Credentials("AKIA", "secret", "temporary/token==")]
# S3 keys are of any characters; a slash at the end of the base is none of the key's.
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def reference(method: str, base: str, key: str, seconds: int, query: dict[str, str], credentials: Credentials) -> str:
    request = AWSRequest(method, f"{base}/{quote(key, safe='/~')}", params=query)
    S3SigV4QueryAuth(credentials, "s3", "eu-central-1", expires=seconds).add_auth(request)
    return str(request.url)


def parts(url: str) -> tuple[str, dict[str, list[str]]]:
    """Where the URL leads, and its parameters, whose order is free."""
    split = urlsplit(url)
    return f"{split.scheme}://{split.netloc}{split.path}", parse_qs(split.query, strict_parsing=True)


@pytest.mark.parametrize("base", BASES)
@given(method=st.sampled_from(["GET", "PUT"]), key=KEYS, credentials=st.sampled_from(CREDENTIALS), upload=st.text())
def test_a_presigned_url_is_the_one_of_botocore(
    base: str, method: str, key: str, credentials: Credentials, upload: str
) -> None:
    query = {"partNumber": "7", "uploadId": upload} if upload else {}
    expected = parts(reference(method, base, key, 3600, query, credentials))
    (moment,) = expected[1]["X-Amz-Date"]
    at = datetime.strptime(moment, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    presigner = Presigner(base, "eu-central-1", credentials.get_frozen_credentials)
    assert parts(presigner.url(method, key, 3600, query, at)) == expected


def test_a_presigned_url_tells_the_time_of_now() -> None:
    presigner = Presigner(BASES[0], "eu-central-1", CREDENTIALS[0].get_frozen_credentials)
    (moment,) = parts(presigner.url("GET", "key", 60, {}))[1]["X-Amz-Date"]
    signed_at = datetime.strptime(moment, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - signed_at).total_seconds()) < 60
