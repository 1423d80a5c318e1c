"""The model cache against a real HTTP server."""

import asyncio
import errno
import hashlib
import io
import os
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from esd.worker.v1 import worker_pb2
from gpu_worker.files.cache import ModelCache
from gpu_worker.files.transfer import DiskFailed, Transfer, Unreached
from gpu_worker.job import JobError
from tests.gpu_worker.conftest import ObjectStore
from tests.services.models.files import sparse_tars


def model(store: ObjectStore, name: str, content: bytes, **fields: str) -> worker_pb2.ModelFile:
    fields = {"cache_key": f"id/{name}"} | fields
    return worker_pb2.ModelFile(
        type="Stable-diffusion", name=name, url=store.put(name, content), size_bytes=len(content), **fields
    )


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def cache(tmp_path: Path, transfer: Transfer) -> ModelCache:
    return ModelCache(tmp_path, 2500, transfer)


async def test_the_same_content_is_fetched_once_also_under_another_name(store: ObjectStore, cache: ModelCache) -> None:
    sha256 = hashlib.sha256(b"weights").hexdigest()
    one = model(store, "one.safetensors", b"weights", cache_key=sha256, sha256=sha256)
    two = model(store, "two.safetensors", b"weights", cache_key=sha256, sha256=sha256)

    async def use(file: worker_pb2.ModelFile) -> bytes:
        async with cache.hold(file) as held:
            assert held.sha256 == sha256
            return held.path.read_bytes()

    assert await asyncio.gather(use(one), use(two), use(one)) == [b"weights"] * 3
    assert store.requests == [("GET", "one.safetensors")]


async def test_a_cache_is_found_again_by_the_next_process(
    store: ObjectStore, cache: ModelCache, transfer: Transfer, tmp_path: Path
) -> None:
    file = model(store, "one.ckpt", b"weights")
    async with cache.hold(file):
        pass
    async with ModelCache(tmp_path, 2500, transfer).hold(file):
        pass
    assert len(store.requests) == 1


async def test_the_least_recently_used_goes_first_and_what_is_in_use_stays(
    store: ObjectStore, cache: ModelCache
) -> None:
    files = [model(store, f"{name}.ckpt", bytes(1000)) for name in "abc"]
    async with cache.hold(files[0]) as first:
        os.utime(first.path.parent, (0, 0))  # oldest, but in use
        async with cache.hold(files[1]) as second:
            os.utime(second.path.parent, (1, 1))
        async with cache.hold(files[2]) as third:
            assert first.path.exists()
            assert not second.path.exists()
            assert third.path.exists()


async def test_what_another_worker_of_the_machine_uses_stays(
    store: ObjectStore, cache: ModelCache, transfer: Transfer, tmp_path: Path
) -> None:
    files = [model(store, f"{name}.ckpt", bytes(1000)) for name in "abc"]
    other = ModelCache(tmp_path, 2500, transfer)
    async with other.hold(files[0]) as first:
        os.utime(first.path.parent, (1, 1))
        async with cache.hold(files[1]), cache.hold(files[2]):
            assert first.path.exists()
    os.utime(first.path.parent, (1, 1))
    async with cache.hold(model(store, "d.ckpt", bytes(1000))):
        assert not first.path.exists()


async def test_room_is_made_before_a_download_and_beside_those_of_others(store: ObjectStore, tmp_path: Path) -> None:
    kept: list[int] = []
    began = {"c.ckpt": asyncio.Event(), "d.ckpt": asyncio.Event()}

    class Noting(Transfer):
        async def download(self, url: str, path: Path, name: str, size_bytes: int = 0, sha256: str = "") -> str:
            kept.append(sum(file.stat().st_size for file in (tmp_path / "models").rglob("model")))
            if name in began:
                began[name].set()
                await began["d.ckpt"].wait()
            return await super().download(url, path, name, size_bytes, sha256)

    async def use(cache: ModelCache, name: str, size: int) -> None:
        async with cache.hold(model(store, name, bytes(size))):
            pass

    async with Noting() as transfer:
        cache, other = (ModelCache(tmp_path, 2500, transfer) for _ in range(2))
        await use(cache, "a.ckpt", 1000)
        await use(cache, "b.ckpt", 1000)
        third = asyncio.create_task(use(cache, "c.ckpt", 1200))
        await began["c.ckpt"].wait()
        await use(other, "d.ckpt", 1200)
        await third
    assert kept == [0, 1000, 1000, 0]


class SmallDisk:
    """Takes the place of shutil.disk_usage(): a disk of so many bytes that has nothing but the folder."""

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total = folder, total

    def __call__(self, _: Path) -> SimpleNamespace:
        return SimpleNamespace(free=self.total - sum(path.stat().st_size for path in self.folder.rglob("model")))


async def test_a_disk_that_is_smaller_than_the_bound_bounds_the_cache(
    store: ObjectStore, transfer: Transfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", SmallDisk(tmp_path, 2500))
    cache = ModelCache(tmp_path, 10**9, transfer)
    files = [model(store, f"{name}.ckpt", bytes(1000)) for name in "abc"]
    async with cache.hold(files[0]) as first, cache.hold(files[1]):
        with pytest.raises(DiskFailed, match=r"c\.ckpt cannot be downloaded: the worker's disk is full"):
            async with cache.hold(files[2]):
                pass
    assert ("GET", "c.ckpt") not in store.requests  # the disk is not filled to its end first
    async with cache.hold(files[2]):
        assert not first.path.exists()


async def test_a_disk_that_others_fill_meanwhile_costs_unused_models_before_it_costs_a_job(
    store: ObjectStore, tmp_path: Path
) -> None:
    class Filled(Transfer):
        num_failures = 0

        async def _get(self, *about: Any) -> tuple[int, str]:
            if self.num_failures:
                self.num_failures -= 1
                raise OSError(errno.ENOSPC, "no space left on device")
            return await super()._get(*about)

    async with Filled() as transfer:
        cache = ModelCache(tmp_path, 2500, transfer)
        async with cache.hold(model(store, "a.ckpt", bytes(1000))) as unused:
            pass
        transfer.num_failures = 1
        async with cache.hold(model(store, "b.ckpt", bytes(1000))):
            assert not unused.path.exists()
            transfer.num_failures = 1
            with pytest.raises(DiskFailed, match=r"c\.ckpt cannot be downloaded: the worker's disk is full"):
                async with cache.hold(model(store, "c.ckpt", bytes(1000))):
                    pass
    assert not list((tmp_path / "partial").iterdir())


@pytest.mark.parametrize("lost", ["entry.json", "model"])
async def test_half_an_entry_is_replaced(store: ObjectStore, cache: ModelCache, lost: str, tmp_path: Path) -> None:
    file = model(store, "one.ckpt", b"weights")
    async with cache.hold(file) as held:
        (held.path.parent / lost).unlink()
    async with cache.hold(file) as held:
        assert held.path.read_bytes() == b"weights"
    assert len(store.requests) == 2
    assert not list((tmp_path / "partial").iterdir())


async def test_half_an_entry_that_nobody_asks_for_makes_room(store: ObjectStore, cache: ModelCache) -> None:
    async with cache.hold(model(store, "one.ckpt", b"weights")) as damaged:
        damaged.path.write_bytes(b"half")
    async with cache.hold(model(store, "two.ckpt", b"weights")) as sound:
        assert not damaged.path.parent.exists()
        assert sound.path.exists()


async def test_a_tar_gives_its_inner_file_whatever_its_name(store: ObjectStore, cache: ModelCache) -> None:
    members = {"models/Stable-diffusion/x.yaml": b"a: 1", "models/Stable-diffusion/x.safetensors": b"inner"}
    async with cache.hold(model(store, "x.safetensors", tar_of(members))) as held:
        assert held.path.read_bytes() == b"inner"
        assert held.sha256 == hashlib.sha256(b"inner").hexdigest()


async def test_a_tar_that_points_outside_writes_nothing_there(
    store: ObjectStore, cache: ModelCache, tmp_path: Path
) -> None:
    async with cache.hold(model(store, "x.safetensors", tar_of({"../../escaped.safetensors": b"inner"}))) as held:
        assert held.path.read_bytes() == b"inner"
        assert tmp_path in held.path.parents
    assert not list(tmp_path.parent.rglob("escaped*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_of({"readme.txt": b"hello"}), "tar archive without a model"),
        (tar_of({"x.safetensors": bytes(5000)})[:3000], "tar archive that is damaged or truncated"),
        *((content, "tar archive of sparse files") for content in sparse_tars("x.safetensors", b"inner").values()),
    ],
)
async def test_a_bad_tar_is_refused_by_name(
    store: ObjectStore, cache: ModelCache, content: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=f"x.safetensors is a {message}"):
        async with cache.hold(model(store, "x.safetensors", content)):
            pass
    assert not list((tmp_path / "models").iterdir())
    assert not list((tmp_path / "partial").iterdir())


async def test_another_sha256_or_size_is_refused_and_nothing_is_kept(
    store: ObjectStore, cache: ModelCache, tmp_path: Path
) -> None:
    other = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(JobError, match=r"the SHA-256 of x\.ckpt in the store is [0-9a-f]+, not"):
        async with cache.hold(model(store, "x.ckpt", b"weights", sha256=other)):
            pass
    short = model(store, "x.ckpt", b"weights")
    short.size_bytes = 8
    with pytest.raises(JobError, match="has 7 bytes in the store, not the 8"):
        async with cache.hold(short):
            pass
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("refusal", [403, 408, 429, 503])
async def test_a_busy_store_is_asked_again_and_a_missing_object_is_not(
    store: ObjectStore, cache: ModelCache, refusal: int
) -> None:
    store.failures, store.refusal = 1, refusal
    async with cache.hold(model(store, "x.ckpt", b"weights")):
        assert len(store.requests) == 2
    gone = model(store, "gone.ckpt", b"weights")
    del store.objects["gone.ckpt"]
    with pytest.raises(JobError, match=r"gone\.ckpt cannot be downloaded: the object store answers 404"):
        async with cache.hold(gone):
            pass
    assert len(store.requests) == 3


async def test_a_store_that_stays_down_is_given_up_in_bounded_time(store: ObjectStore, transfer: Transfer) -> None:
    store.failures = 10**6
    with pytest.raises(Unreached, match=r"image_0\.png cannot be uploaded: the object store answers 503"):
        await transfer.upload(f"{store.url}/image_0.png", b"png", "image_0.png")
    with pytest.raises(Unreached, match="the object store does not answer"):
        await transfer.upload("http://127.0.0.1:1/x", b"png", "image_0.png")


async def test_a_store_that_answers_and_takes_nothing_is_not_away(store: ObjectStore, transfer: Transfer) -> None:
    store.is_full = True
    with pytest.raises(JobError, match=r"image_0\.png cannot be uploaded: the object store answers 503") as failed:
        await transfer.upload(f"{store.url}/image_0.png", b"png", "image_0.png")
    assert not isinstance(failed.value, Unreached)


async def test_of_many_jobs_that_wait_for_a_model_one_asks_a_store_that_stays_down(
    store: ObjectStore, cache: ModelCache, transfer: Transfer
) -> None:
    wanted = model(store, "x.ckpt", b"weights")
    store.failures = 10**6

    async def hold() -> None:
        async with cache.hold(wanted):
            pass

    with pytest.raises(Unreached, match="the object store answers 503"):
        await hold()
    store.requests.clear()
    assert transfer.reach.away_since is not None
    await asyncio.sleep(transfer.reach.away_since + 1 - time.monotonic())  # the patience of all of them
    with pytest.raises(Unreached, match=r"x\.ckpt cannot be downloaded: the object store has not answered for a while"):
        await hold()
    assert not store.requests
