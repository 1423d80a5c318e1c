"""The object store: boto3 in threads, one bucket, URLs presigned for the address that clients use."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import boto3
import structlog
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError

from services.common.errors import InvalidArgument, NotFound, Unavailable
from services.common.presigning import Presigner
from services.common.settings import BlobSettings, read_secret

log = structlog.get_logger()

HOUR = 3600
DAY = 24 * HOUR
MIB = 1024**2
GIB = 1024**3
_CHUNK_BYTES = 1 * MIB
_NUM_FIRST_BYTES = 16
_AT_ONCE = 4  # of many alike; others want to ask too
_MAX_COPIED_PARTS = 1000
STORE_IS_AWAY = "the object store does not answer at present; try again later"
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Blob:
    """What the store knows of an object. `etag` is without its quotes."""

    key: str
    size_bytes: int
    etag: str


@dataclass(frozen=True)
class Digest:
    """What is in an object: how many bytes, their SHA-256 in hex, and the first of them, by which formats are known."""

    size_bytes: int
    sha256: str
    first_bytes: bytes


@dataclass(frozen=True)
class Upload:
    """An open multipart upload."""

    key: str
    upload_id: str
    opened_at: datetime


class BlobNotFound(NotFound):
    """There is no object under the key."""


class BlobTooLarge(InvalidArgument):
    """The object has more bytes than the reader wants."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(f"the object has {size_bytes} bytes")
        self.size_bytes = size_bytes


class Blobs:
    """One bucket. Methods that talk to the store are coroutines; presigning is local arithmetic and is not."""

    def __init__(self, settings: BlobSettings) -> None:
        """Raises SystemExit where there are no credentials; they may come, as those of a cloud's machine do."""
        self.bucket = settings.bucket
        session = _session(settings)
        self._client = _client(session, settings.endpoint_url)
        if (credentials := session.get_credentials()) is None:
            raise SystemExit(
                "there are no credentials for the object store: set ESD_S3_ACCESS_KEY and ESD_S3_SECRET_KEY_FILE, or "
                "provide those that AWS's SDK finds by itself"
            )
        # The client knows how buckets are addressed there.
        signer = _client(session, settings.public_url) if settings.public_url else self._client
        probe: str = signer.generate_presigned_url("get_object", Params={"Bucket": self.bucket, "Key": "-"})
        self._presigner = Presigner(probe.partition("/-?")[0], settings.region, credentials.get_frozen_credentials)
        self._threads = ThreadPoolExecutor(16, thread_name_prefix="blobs")

    def url(self, key: str) -> str:
        """`s3://<bucket>/<key>`."""
        return f"s3://{self.bucket}/{key}"

    def presign_get(self, key: str, seconds: int = HOUR) -> str:
        """A URL that reads the object."""
        return self._presigner.url("GET", key, seconds, {})

    def presign_put(self, key: str, seconds: int = HOUR) -> str:
        """A URL that writes the object, with whatever headers the client sends."""
        return self._presigner.url("PUT", key, seconds, {})

    def presign_part(self, key: str, upload_id: str, part_number: int, seconds: int = DAY) -> str:
        """A URL that writes one part of a multipart upload."""
        return self._presigner.url("PUT", key, seconds, {"partNumber": str(part_number), "uploadId": upload_id})

    async def head(self, key: str) -> Blob:
        """Size and ETag of an object.

        Raises:
            BlobNotFound: there is none.
        """
        answer = await self._run(self._client.head_object, Key=key)
        return Blob(key, answer["ContentLength"], answer["ETag"].strip('"'))

    async def get(
        self, key: str, first: int | None = None, last: int | None = None, max_bytes: int | None = None
    ) -> bytes:
        """The object's bytes, or those from `first` to `last`, both included.

        Raises:
            BlobNotFound: there is none. BlobTooLarge: it has more than `max_bytes`; none of them is read then.
        """
        ranged = {} if first is None else {"Range": f"bytes={first}-{'' if last is None else last}"}

        def read(**names: Any) -> bytes:
            answer = self._client.get_object(**names)
            if max_bytes is not None and answer["ContentLength"] > max_bytes:
                answer["Body"].close()
                raise BlobTooLarge(answer["ContentLength"])
            content: bytes = answer["Body"].read()
            return content

        content: bytes = await self._run(read, Key=key, **ranged)
        return content

    async def digest(self, key: str) -> Digest:
        """Reads an object, with little of it in memory at once.

        Raises:
            BlobNotFound: there is none.
        """
        digest: Digest = await self._run(self._digest, Key=key)
        return digest

    async def put(self, key: str, content: bytes) -> None:
        """Writes an object."""
        await self._run(self._client.put_object, Key=key, Body=content)

    async def copy(self, key: str, target: str, max_single_bytes: int = 128 * MIB, part_bytes: int = 64 * MIB) -> None:
        """Copies an object within the store; a large one by parts, several at a time. The store is silent while it
        copies one, and must have done so before we take it for dead: within a minute, on the slowest disk.

        Raises:
            BlobNotFound: there is no such object.
        """
        size_bytes = (await self.head(key)).size_bytes
        source = {"Bucket": self.bucket, "Key": key}
        if size_bytes <= max_single_bytes:
            await self._run(self._client.copy_object, Key=target, CopySource=source)
            return
        part_bytes = max(part_bytes, -(-size_bytes // _MAX_COPIED_PARTS))
        upload_id = await self.create_multipart(target)
        names = {"Key": target, "UploadId": upload_id, "CopySource": source}

        async def copy_part(numbered: tuple[int, int]) -> tuple[int, str]:
            number, first = numbered
            span = f"bytes={first}-{min(first + part_bytes, size_bytes) - 1}"
            answer = await self._run(self._client.upload_part_copy, PartNumber=number, CopySourceRange=span, **names)
            return number, answer["CopyPartResult"]["ETag"].strip('"')

        try:
            # All have ended before the upload does: the store would keep a part that comes later.
            parts = await _each(copy_part, enumerate(range(0, size_bytes, part_bytes), 1))
            await self.complete_multipart(target, upload_id, sorted(parts))
        except BaseException:
            await asyncio.shield(self.abort_multipart(target, upload_id))
            raise

    async def delete(self, key: str) -> None:
        """Deletes an object, if there is one."""
        await self._run(self._client.delete_object, Key=key)

    async def find(self, prefix: str) -> list[Blob]:
        """All objects below a prefix."""
        blobs: list[Blob] = await self._run(self._find, prefix=prefix)
        return blobs

    async def delete_prefix(self, prefix: str) -> int:
        """Deletes all objects below a prefix and answers how many there were."""
        return len(await _each(self.delete, [blob.key for blob in await self.find(prefix)]))

    async def create_multipart(self, key: str) -> str:
        """Opens a multipart upload and answers its id."""
        answer: dict[str, str] = await self._run(self._client.create_multipart_upload, Key=key)
        return answer["UploadId"]

    async def list_parts(self, key: str, upload_id: str) -> dict[int, str]:
        """The parts of an open upload (at most 1,000): number and ETag without its quotes.

        Raises:
            BlobNotFound: there is no such upload, or it is complete.
        """
        answer = await self._run(self._client.list_parts, Key=key, UploadId=upload_id)
        return {part["PartNumber"]: part["ETag"].strip('"') for part in answer.get("Parts", [])}

    async def put_part(self, key: str, upload_id: str, number: int, content: bytes | bytearray) -> str:
        """Writes one part of an open upload, and answers its ETag without its quotes.

        Raises:
            BlobNotFound: there is no such upload.
        """
        names = {"Key": key, "UploadId": upload_id, "PartNumber": number, "Body": content}
        answer = await self._run(self._client.upload_part, **names)
        etag: str = answer["ETag"].strip('"')
        return etag

    async def complete_multipart(self, key: str, upload_id: str, parts: list[tuple[int, str]]) -> None:
        """Completes an upload from (part number, ETag) pairs in order.

        Raises:
            InvalidArgument: the store does not have such a part. BlobNotFound: there is no such upload.
        """
        listed = [{"PartNumber": number, "ETag": etag} for number, etag in parts]
        await self._run(
            self._client.complete_multipart_upload, Key=key, UploadId=upload_id, MultipartUpload={"Parts": listed}
        )

    async def abort_multipart(self, key: str, upload_id: str) -> None:
        """Gives up an upload and its parts; one that is gone already is fine."""
        try:
            await self._run(self._client.abort_multipart_upload, Key=key, UploadId=upload_id)
        except BlobNotFound:
            return

    async def find_uploads(self, prefix: str) -> list[Upload]:
        """All open uploads below a prefix."""
        uploads: list[Upload] = await self._run(self._find_uploads, prefix=prefix)
        return uploads

    async def abort_uploads(self, prefix: str) -> None:
        """Gives up all open uploads below a prefix."""
        for upload in await self.find_uploads(prefix):
            await self.abort_multipart(upload.key, upload.upload_id)

    def _digest(self, **names: str) -> Digest:
        body = self._client.get_object(**names)["Body"]
        sha256, size_bytes, first = hashlib.sha256(), 0, b""
        while chunk := body.read(_CHUNK_BYTES):
            first = first or chunk[:_NUM_FIRST_BYTES]
            sha256.update(chunk)
            size_bytes += len(chunk)
        return Digest(size_bytes, sha256.hexdigest(), first)

    def _find_uploads(self, prefix: str, **bucket: str) -> list[Upload]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Prefix=prefix, **bucket)
        return [
            Upload(item["Key"], item["UploadId"], item["Initiated"])
            for page in pages
            for item in page.get("Uploads", [])
        ]

    def _find(self, prefix: str, **bucket: str) -> list[Blob]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Prefix=prefix, **bucket)
        return [
            Blob(item["Key"], item["Size"], item["ETag"].strip('"'))
            for page in pages
            for item in page.get("Contents", [])
        ]

    async def _run(self, call: Callable[..., Any], **names: Any) -> Any:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, lambda: call(Bucket=self.bucket, **names))
        except ClientError as error:
            raise _error(error, names.get("Key", "")) from error
        except BotoCoreError as error:
            raise Unavailable(STORE_IS_AWAY) from error


async def _each(work: Callable[[U], Awaitable[T]], items: Iterable[U]) -> list[T]:
    """Does the work for all items, some at once, and answers what came of it in any order.

    Where one fails no other begins, and those under way have ended before its error is raised.
    """
    left, done = deque(items), list[T]()

    async def take() -> None:
        while left:
            try:
                done.append(await work(left.popleft()))
            except BaseException:
                left.clear()
                raise

    ends = await asyncio.gather(*(take() for _ in range(_AT_ONCE)), return_exceptions=True)
    for error in filter(None, ends):
        raise error
    return done


def _session(settings: BlobSettings) -> boto3.Session:
    secret = read_secret(settings.secret_key_file) if settings.secret_key_file else None
    return boto3.Session(settings.access_key, secret, region_name=settings.region)


def _client(session: boto3.Session, endpoint_url: str | None) -> Any:
    return session.client(
        "s3",
        endpoint_url=endpoint_url,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path" if endpoint_url else "auto"},
            max_pool_connections=16,
            connect_timeout=10,
            retries={"mode": "standard", "max_attempts": 4},
            # Newer checksum headers are not known to every S3 that is not AWS's.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def _error(error: ClientError, key: str) -> Exception:
    code = error.response["Error"]["Code"]
    if code in {"404", "NoSuchKey", "NoSuchUpload", "NotFound"}:
        return BlobNotFound(f"there is no object {key}")
    if code in {"InvalidPart", "InvalidPartOrder", "EntityTooSmall", "MalformedXML"}:
        reason = error.response["Error"]["Message"].rstrip(".")
        return InvalidArgument(f"the object store refuses the parts of {key}: {reason}")
    # Whatever else the store dislikes (our key, the bucket, the load) no caller can mend.
    log.error("the object store refuses", key=key, code=code, operation=error.operation_name)
    return Unavailable(STORE_IS_AWAY)
