"""The object store's answers, and what becomes of its refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path
from uuid import uuid4

import pytest

from services.common.blobs import BlobNotFound, Blobs, BlobTooLarge, Digest
from services.common.errors import InvalidArgument, Unavailable
from tests.conftest import S3Access


async def test_an_object_is_read_up_to_a_limit_and_refused_beyond_it(blobs: Blobs) -> None:
    key = f"test/{uuid4()}"
    await blobs.put(key, b"12345")
    assert await blobs.get(key, max_bytes=5) == b"12345"
    with pytest.raises(BlobTooLarge) as refusal:
        await blobs.get(key, max_bytes=4)
    assert refusal.value.size_bytes == 5
    with pytest.raises(BlobNotFound):
        await blobs.get(key + "x", max_bytes=5)


async def test_a_digest_is_that_of_all_bytes(blobs: Blobs) -> None:
    content = bytes(range(256)) * 10_000  # more than is read at once
    for key, held in ((f"test/{uuid4()}", content), (f"test/{uuid4()}", b"")):
        await blobs.put(key, held)
        assert await blobs.digest(key) == Digest(len(held), hashlib.sha256(held).hexdigest(), held[:16])
    with pytest.raises(BlobNotFound):
        await blobs.digest(f"test/{uuid4()}")


async def test_a_store_that_refuses_the_service_is_not_the_callers_mistake(s3: S3Access, tmp_path: Path) -> None:
    wrong = tmp_path / "secret"
    wrong.write_text("not the secret")
    for changed in ({"secret_key_file": wrong}, {"bucket": "no-such-bucket"}):
        with pytest.raises(Unavailable, match="the object store does not answer at present"):
            await Blobs(s3.settings(**changed)).put("test/x", b"")


async def test_parts_that_the_store_does_not_have_are_the_callers_mistake(blobs: Blobs) -> None:
    key = f"test/{uuid4()}"
    upload_id = await blobs.create_multipart(key)
    with pytest.raises(InvalidArgument):
        await blobs.complete_multipart(key, upload_id, [(1, "0" * 32)])
    await blobs.abort_multipart(key, upload_id)


async def test_parts_are_numbered_up_to_ten_thousand_as_on_aws(blobs: Blobs) -> None:
    key = f"test/{uuid4()}"
    upload_id = await blobs.create_multipart(key)
    etag = await blobs.put_part(key, upload_id, 10_000, b"the last")
    await blobs.complete_multipart(key, upload_id, [(10_000, etag)])
    assert await blobs.get(key) == b"the last"
