"""The embedded object store: signatures are checked, data lasts, browsers may upload."""

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from deploy.local.home import S3_ACCESS_KEY, S3_BUCKET, S3_REGION, Home
from deploy.local.ports import free_port
from deploy.local.store import Store
from tests.conftest import S3Access
from tests.gpu_worker.tables import slow
from tests.processes import ROOT, process_environment, running

PUBLIC = "http://images.example:8080"  # the address of the gateway, which passes Host on unchanged
FORBIDDEN = HTTPStatus.FORBIDDEN


def presign(s3: S3Access, operation: str, key: str, seconds: int = 300, **more: object) -> str:
    client = s3.store.client(PUBLIC)
    url: str = client.generate_presigned_url(operation, {"Bucket": s3.bucket, "Key": key, **more}, ExpiresIn=seconds)
    return url


def send(s3: S3Access, method: str, url: str, content: bytes | None = None, **headers: str) -> httpx.Response:
    """Sends what a client would send to the public address, as the gateway hands it on."""
    parts = urlsplit(url)
    target = f"{s3.endpoint_url}{parts.path}?{parts.query}"
    return httpx.request(method, target, content=content, headers={"host": parts.netloc, **headers})


def test_presigned_put_and_get_work_for_the_public_host(s3: S3Access) -> None:
    assert send(s3, "PUT", presign(s3, "put_object", "a/b c.txt"), b"hello").status_code == 200
    got = send(s3, "GET", presign(s3, "get_object", "a/b c.txt"))
    assert (got.status_code, got.content) == (200, b"hello")
    part = send(s3, "GET", presign(s3, "get_object", "a/b c.txt"), range="bytes=1-2")
    assert (part.status_code, part.content) == (206, b"el")


def test_a_large_file_goes_up_in_presigned_parts(s3: S3Access) -> None:
    client = s3.store.client()
    parts = [b"x" * (5 << 20), b"end"]
    upload = client.create_multipart_upload(Bucket=s3.bucket, Key="large")["UploadId"]
    etags = []
    for number, content in enumerate(parts, start=1):
        answer = send(s3, "PUT", presign(s3, "upload_part", "large", UploadId=upload, PartNumber=number), content)
        assert answer.status_code == 200
        etags.append({"PartNumber": number, "ETag": answer.headers["etag"]})
    client.complete_multipart_upload(Bucket=s3.bucket, Key="large", UploadId=upload, MultipartUpload={"Parts": etags})
    assert client.head_object(Bucket=s3.bucket, Key="large")["ContentLength"] == sum(map(len, parts))


def test_urls_that_were_not_signed_so_are_refused(s3: S3Access) -> None:
    url = presign(s3, "put_object", "mine")
    assert send(s3, "PUT", url[:-4] + "0000", b"x").status_code == FORBIDDEN
    assert send(s3, "PUT", url.replace("/mine?", "/yours?"), b"x").status_code == FORBIDDEN
    assert send(s3, "GET", url).status_code == FORBIDDEN
    assert send(s3, "PUT", url.replace("X-Amz-Expires=300", "X-Amz-Expires=3000"), b"x").status_code == FORBIDDEN


@pytest.mark.parametrize(
    "header", ["x-amz-copy-source", "x-copy-from", "x-object-manifest", "x-symlink-target", "x-amz-meta-a"]
)
def test_a_url_to_write_with_reads_no_other_object(s3: S3Access, header: str) -> None:
    secret = f"{s3.bucket}/secret"
    assert send(s3, "PUT", presign(s3, "put_object", "secret"), b"secret").status_code == 200
    source = f"/{secret}" if "copy" in header else secret
    answer = send(s3, "PUT", presign(s3, "put_object", "mine"), b"", **{header: source})
    assert answer.status_code in {200, FORBIDDEN}
    assert b"secret" not in send(s3, "GET", presign(s3, "get_object", "mine")).content


def test_a_part_is_not_copied_from_another_object_and_not_written_after_the_end(s3: S3Access) -> None:
    client = s3.store.client()
    client.put_object(Bucket=s3.bucket, Key="secret", Body=b"secret")
    upload = client.create_multipart_upload(Bucket=s3.bucket, Key="parts")["UploadId"]
    url = presign(s3, "upload_part", "parts", UploadId=upload, PartNumber=1)
    copied = send(s3, "PUT", url, b"", **{"x-amz-copy-source": f"/{s3.bucket}/secret"})
    assert copied.status_code == FORBIDDEN
    etag = send(s3, "PUT", url, b"first").headers["etag"]
    parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
    client.complete_multipart_upload(Bucket=s3.bucket, Key="parts", UploadId=upload, MultipartUpload=parts)
    assert send(s3, "PUT", url, b"other").status_code == 404
    assert client.get_object(Bucket=s3.bucket, Key="parts")["Body"].read() == b"first"


def test_the_store_tells_strangers_nothing_of_itself(s3: S3Access) -> None:
    for path in ("/info", "/healthcheck", "/auth/v1.0", "/v1/AUTH_esd", "/", f"/{s3.bucket}", f"/{s3.bucket}/secret"):
        answer = httpx.get(s3.endpoint_url + path)
        assert answer.status_code >= 400, path
        assert version("swift") not in answer.text


@pytest.mark.parametrize(
    ("method", "query"), [("PUT", "extract-archive=tar"), ("PUT", "extract-archive=tar.bz2"), ("POST", "bulk-delete")]
)
def test_the_store_reads_nothing_of_a_stranger(s3: S3Access, method: str, query: str) -> None:
    """An archive that it unpacked would keep it, or its memory, busy before anybody asks for a signature."""
    for path in (f"/{s3.bucket}/a", f"/{s3.bucket}/a/b", f"/{s3.bucket}"):
        assert httpx.request(method, f"{s3.endpoint_url}{path}?{query}", content=b"x").status_code >= 400, path


def test_a_deleted_object_leaves_nothing_on_the_disk(s3: S3Access, esd_home: Home) -> None:
    client, node, size = s3.store.client(), esd_home.swift / "node" / "d1", (5 << 20) + 1
    names = {"Bucket": s3.bucket, "Key": "gone"}
    upload = client.create_multipart_upload(**names)["UploadId"]
    part = client.upload_part(**names, UploadId=upload, PartNumber=1, Body=b"x" * size)
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    client.complete_multipart_upload(**names, UploadId=upload, MultipartUpload=parts)
    client.put_object(Bucket=s3.bucket, Key="stays", Body=b"here")

    client.delete_object(**names)
    assert client.list_objects_v2(Bucket=s3.bucket, Prefix="gone")["KeyCount"] == 0  # and so the list was written
    assert not [file for file in node.rglob("*.data") if file.stat().st_size == size], "its part is still there"

    command = "import sys, pathlib; from deploy.local.swift_sweep import sweep; sweep(pathlib.Path(sys.argv[1]), 0)"
    subprocess.run([sys.executable, "-c", command, str(node.parent)], check=True)
    assert not list(node.rglob("*.ts"))
    for database in node.glob("containers/**/*.db"):
        with closing(sqlite3.connect(database)) as connection:
            assert connection.execute("SELECT count(*) FROM object WHERE deleted").fetchone() == (0,)
    assert client.get_object(Bucket=s3.bucket, Key="stays")["Body"].read() == b"here"


def test_expired_urls_are_refused(s3: S3Access, monkeypatch: pytest.MonkeyPatch) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda *_: yesterday)
    assert send(s3, "PUT", presign(s3, "put_object", "late"), b"x").status_code == FORBIDDEN


def test_a_wrong_secret_key_is_refused(s3: S3Access, tmp_path: Path) -> None:
    stranger = Store(Home(tmp_path), s3.store.port)  # another home has another secret
    url = stranger.client().generate_presigned_url("get_object", {"Bucket": s3.bucket, "Key": "a"})
    assert send(s3, "GET", url).status_code == FORBIDDEN


def test_browsers_may_upload_parts_from_any_origin(s3: S3Access) -> None:
    url = presign(s3, "put_object", "from-browser")
    asked = {"origin": "http://webui.example", "access-control-request-method": "PUT"}
    preflight = send(s3, "OPTIONS", url, **asked, **{"access-control-request-headers": "content-type"})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] in {"*", asked["origin"]}
    assert "PUT" in preflight.headers["access-control-allow-methods"]
    assert "content-type" in preflight.headers["access-control-allow-headers"]
    answer = send(s3, "PUT", url, b"x", origin=asked["origin"])
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] in {"*", asked["origin"]}
    assert "etag" in answer.headers["access-control-expose-headers"].lower()


def test_a_bucket_is_there_as_soon_as_it_is_made_and_no_longer_than_it_is(s3: S3Access) -> None:
    client = s3.store.client()
    another = replace(s3, bucket="another")

    def put() -> int:
        return send(s3, "PUT", presign(another, "put_object", "a"), b"x").status_code

    assert put() == 404
    client.create_bucket(Bucket="another")
    assert put() == 200
    client.delete_object(Bucket="another", Key="a")
    client.delete_bucket(Bucket="another")
    assert put() == 404


@pytest.fixture
def store_home(esd_home: Home) -> Home:
    return Home(esd_home.path / "store")


@pytest.mark.parametrize("name", ["a#b", *slow(["%(here)s", "a%20b"])])
def test_a_folder_that_its_configuration_cannot_name_is_refused(tmp_path: Path, name: str) -> None:
    store = Store(Home(tmp_path / name), free_port())
    environment = process_environment() | store.environment()
    refused = subprocess.run(store.command(), cwd=ROOT, env=environment, capture_output=True, check=False)
    assert refused.returncode == 2
    assert f"the object store cannot be in {tmp_path / name}" in refused.stderr.decode()


def test_objects_and_their_metadata_survive_a_kill(store_home: Home) -> None:
    store = Store(store_home, free_port())
    environment = process_environment()
    with running(store.command(), environment | store.environment()) as process:
        store.wait_until_up()
        store.bootstrap(S3_BUCKET)
        put = store.client().put_object(Bucket=S3_BUCKET, Key="kept", Body=b"123", Metadata={"sha256": "abc"})
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = Store(store_home, free_port())
    with running(again.command(), environment | again.environment()):
        again.wait_until_up()
        again.bootstrap(S3_BUCKET)  # and twice is once
        got = again.client().get_object(Bucket=S3_BUCKET, Key="kept")
        assert got["Body"].read() == b"123"
        assert (got["ETag"], got["Metadata"]) == (put["ETag"], {"sha256": "abc"})


@pytest.mark.slow
def test_uploads_leave_a_reserve_of_the_disk_and_what_is_there_can_be_read_and_deleted(
    store_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reserve in ("0", "100%"):
        monkeypatch.setenv("ESD_SWIFT_RESERVE", reserve)
        store = Store(store_home, free_port())
        with running(store.command(), process_environment() | store.environment()):
            store.wait_until_up()
            store.bootstrap(S3_BUCKET)
            access = S3Access(store.url, S3_BUCKET, S3_REGION, S3_ACCESS_KEY, store_home.s3_secret_key_file, store)
            if reserve == "0":
                assert send(access, "PUT", presign(access, "put_object", "kept"), b"123").status_code == 200
                continue
            for content in (b"x", b""):
                answer = send(access, "PUT", presign(access, "put_object", "more"), content)
                assert answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE
            assert send(access, "GET", presign(access, "get_object", "kept")).content == b"123"
            assert send(access, "DELETE", presign(access, "delete_object", "kept")).status_code == 204
            assert send(access, "GET", presign(access, "get_object", "kept")).status_code == 404
