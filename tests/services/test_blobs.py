"""The object store's answers, and what becomes of its refusals."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from services.common.blobs import BlobNotFound, Blobs, BlobTooLarge
from services.common.errors import InvalidArgument, Unavailable
from services.common.settings import BlobSettings
from tests.conftest import S3Access


def blobs_of(s3: S3Access, secret_key_file: Path | None = None, bucket: str = "") -> Blobs:
    return Blobs(
        BlobSettings(
            bucket=bucket or s3.bucket,
            region=s3.region,
            endpoint_url=s3.endpoint_url,
            access_key=s3.access_key,
            secret_key_file=secret_key_file or s3.secret_key_file,
        )
    )


async def test_an_object_is_read_up_to_a_limit_and_refused_beyond_it(s3: S3Access) -> None:
    blobs, key = blobs_of(s3), f"test/{uuid4()}"
    await blobs.put(key, b"12345")
    assert await blobs.get(key, max_bytes=5) == b"12345"
    with pytest.raises(BlobTooLarge) as refusal:
        await blobs.get(key, max_bytes=4)
    assert refusal.value.size_bytes == 5
    with pytest.raises(BlobNotFound):
        await blobs.get(key + "x", max_bytes=5)


async def test_a_store_that_refuses_the_service_is_not_the_callers_mistake(s3: S3Access, tmp_path: Path) -> None:
    wrong = tmp_path / "secret"
    wrong.write_text("not the secret")
    for blobs in (blobs_of(s3, wrong), blobs_of(s3, bucket="no-such-bucket")):
        with pytest.raises(Unavailable, match="the object store does not answer at present"):
            await blobs.put("test/x", b"")


async def test_parts_that_the_store_does_not_have_are_the_callers_mistake(s3: S3Access) -> None:
    blobs, key = blobs_of(s3), f"test/{uuid4()}"
    upload_id = await blobs.create_multipart(key)
    with pytest.raises(InvalidArgument):
        await blobs.complete_multipart(key, upload_id, [(1, "0" * 32)])
    await blobs.abort_multipart(key, upload_id)
