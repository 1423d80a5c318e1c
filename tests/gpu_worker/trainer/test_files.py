"""A training's files while the object store is away: a real store, behind a line that can be shut."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.credentials import Credentials

from esd.training.v1 import training_pb2 as pb
from gpu_worker.files.transfer import Transfer, Unreached, UrlExpired
from gpu_worker.trainer import files
from gpu_worker.trainer.files import Files
from services.common.blobs import Blobs
from services.common.presigning import Presigner
from tests.conftest import S3Access
from tests.line import Line

AWAY, BACK = "the object store is not reached; files wait until it is", "the object store is back"


class Stream:
    """The stream's end where URLs come from; some are old. Remembers what was told."""

    def __init__(self, s3: S3Access, address: str, num_old: int = 0) -> None:
        secret = s3.secret_key_file.read_text().strip()
        credentials = Credentials(s3.access_key, secret)
        self._signer = Presigner(f"http://{address}/{s3.bucket}", s3.region, lambda: credentials)
        self._num_old = num_old
        self.asked: list[str] = []
        self.lines: list[str] = []
        self.told = asyncio.Event()

    async def urls(self, kind: Any, names: list[str]) -> list[str]:
        self.asked += names
        age = timedelta(hours=len(self.asked) <= self._num_old)
        method = "PUT" if kind == pb.URL_KIND_UPLOAD else "GET"
        return [self._signer.url(method, name, 60, {}, at=datetime.now(UTC) - age) for name in names]

    def tell(self, *, log: pb.TrainerLog) -> None:
        self.lines.append(log.line)
        self.told.set()


@pytest.fixture
async def transfer() -> AsyncIterator[Transfer]:
    """One whose patience ends with its first failure."""
    async with Transfer(patience_seconds=0.01) as found:
        yield found


async def test_an_outage_of_the_store_costs_time_alone_and_is_told_once(
    s3: S3Access, blobs: Blobs, line: Line, transfer: Transfer, tmp_path: Path
) -> None:
    await blobs.put("a.png", b"picture")
    stream: Any = Stream(s3, line.address)
    found = Files(stream, transfer)
    line.shut()
    async with asyncio.TaskGroup() as group:
        sending = group.create_task(found.upload("zog.safetensors", b"network"))
        group.create_task(found.download(pb.URL_KIND_PICTURE, "a.png", tmp_path / "a.png"))
        await stream.told.wait()
        line.open()
    assert (sending.result().name, sending.result().size_bytes) == ("zog.safetensors", 7)
    assert (await blobs.get("zog.safetensors"), (tmp_path / "a.png").read_bytes()) == (b"network", b"picture")
    assert stream.lines == [AWAY, BACK]
    assert min(stream.asked.count("a.png"), stream.asked.count("zog.safetensors")) > 1, "each attempt has its own URL"


async def test_a_store_that_stays_away_ends_a_training_at_last(
    s3: S3Access, line: Line, transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "OUTAGE_SECONDS", 0.5)
    stream: Any = Stream(s3, line.address)
    line.shut()
    with pytest.raises(Unreached, match=r"zog\.safetensors cannot be uploaded: the object store does not answer"):
        await Files(stream, transfer).upload("zog.safetensors", b"network")


async def test_a_url_that_is_over_is_asked_for_again(
    s3: S3Access, blobs: Blobs, line: Line, transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PAUSE_SECONDS", 0)
    stream: Any = Stream(s3, line.address, num_old=1)
    await Files(stream, transfer).upload("zog.safetensors", b"network")
    assert await blobs.get("zog.safetensors") == b"network"
    assert len(stream.asked) == 2
    stream = Stream(s3, line.address, num_old=100)
    with pytest.raises(UrlExpired):
        await Files(stream, transfer).upload("zog.safetensors", b"network")
    assert len(stream.asked) == 10


async def test_a_file_of_a_dataset_with_the_name_of_a_folder_is_left_out(
    s3: S3Access, blobs: Blobs, line: Line, transfer: Transfer, tmp_path: Path
) -> None:
    names = ["10_cat", "10_cat/a.png", "10_cat/a.png/b.txt", "10_cat/c.png"]
    for name in names:
        await blobs.put(name, name.encode())
    stream: Any = Stream(s3, line.address)
    listed = [pb.InputFile(name=name) for name in names]
    await Files(stream, transfer).download_all(pb.URL_KIND_PICTURE, listed, tmp_path / "pictures")
    for name in ("10_cat/a.png/b.txt", "10_cat/c.png"):
        assert (tmp_path / "pictures" / name).read_text() == name
    assert stream.lines == [
        f"left out: {name}, as other files lie in a folder of this name" for name in ("10_cat", "10_cat/a.png")
    ]
