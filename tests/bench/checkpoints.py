"""What checkpoints cost: uploads in parts and imports beside boto3's own upload, and pages of long lists.

    python -m tests.bench.checkpoints [upload] [import] [pages] [--megabytes N] [--rows N]

The three ways of bringing the same bytes into the same store are timed one after another in one run, so that their
ratios hold on any machine.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
from rich.console import Console
from rich.table import Table

from deploy.local.home import S3_BUCKET, Home
from deploy.local.postgres import Postgres
from deploy.local.stack import Stack
from deploy.local.store import Store

console = Console(width=110)
MIB = 2**20
PART_BYTES = 64 * MIB
THREADS = 10  # as many as boto3's upload_file has
KIND = "Stable-diffusion"
ADD_ROWS = """
WITH added AS (
  INSERT INTO checkpoints (id, type, status, owners, created_at, params)
  SELECT gen_random_uuid(), 'Lora', 'Active', ARRAY['IT Operator'], now() - n * interval '1 second',
         jsonb_build_object('creator', 'api', 'message', 'row ' || n)
  FROM generate_series(%(first)s::int, %(last)s::int) AS n RETURNING id, params)
INSERT INTO checkpoint_files (checkpoint_id, position, name, key, upload_id, parts_number, complete, reserved,
                              size_bytes, sha256)
SELECT id, 0, (params->>'message') || '.safetensors', 'Lora/checkpoint/custom/' || id, '', 1, true, true, 1, ''
FROM added
"""


class Api:
    """The few requests of these benchmarks."""

    def __init__(self, stack: Stack) -> None:
        self._http = httpx.Client(base_url=stack.url, headers={"x-api-key": stack.api_key}, timeout=600)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One request that must succeed; answers the decoded body."""
        answer = self._http.request(method, path, content=None if body is None else json.dumps(body))
        if answer.is_error:
            raise SystemExit(f"{method} {path} answers {answer.status_code}: {answer.text}")
        return answer.json() if answer.content else None

    def wait_until_active(self, name: str) -> dict[str, Any]:
        """The checkpoint of this file name, once it is Active."""
        while True:
            listed = self.call("GET", "/checkpoints?per_page=1000")["data"]["checkpoints"]
            for row in listed:
                if row["name"] == [name] and row["status"] == "Active":
                    found: dict[str, Any] = row
                    return found
                if row["name"] == [name] and row["status"] == "Disabled":
                    raise SystemExit(row["params"]["error"])
            time.sleep(0.02)


def make_file(path: Path, megabytes: int) -> None:
    """A sound safetensors file of about this size."""
    size = megabytes * MIB
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"model.diffusion_model.weight": entry}).encode()
    block = os.urandom(MIB)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(megabytes):
            file.write(block)


def boto3_upload(stack: Stack, path: Path) -> float:
    """Seconds that boto3's upload_file takes, straight to the store."""
    client: Any = Store(Home(stack.home), stack.ports()["swift"]).client()
    began = time.perf_counter()
    client.upload_file(str(path), S3_BUCKET, "bench/boto3.safetensors")
    seconds = time.perf_counter() - began
    client.delete_object(Bucket=S3_BUCKET, Key="bench/boto3.safetensors")
    return seconds


def upload(api: Api, path: Path, name: str) -> tuple[float, float]:
    """Seconds until the completion is answered, and until the checkpoint is Active."""
    size = path.stat().st_size
    starts = range(0, size, PART_BYTES)
    began = time.perf_counter()
    files = [{"filename": name, "parts_number": len(starts)}]
    opened = api.call("POST", "/checkpoints", {"checkpoint_type": KIND, "filenames": files, "params": {}})["data"]

    def put(client: httpx.Client, url: str, start: int) -> str:
        with path.open("rb") as file:
            file.seek(start)
            answer = client.put(url, content=file.read(PART_BYTES))
        return str(answer.raise_for_status().headers["etag"])

    with httpx.Client(timeout=600) as client, ThreadPoolExecutor(THREADS) as threads:
        etags = list(threads.map(partial(put, client), opened["s3PresignUrl"][name], starts))
    tags = [{"ETag": etag, "PartNumber": number} for number, etag in enumerate(etags, 1)]
    body = {"status": "Active", "multi_parts_tags": {name: tags}}
    api.call("PUT", f"/checkpoints/{opened['checkpoint']['id']}", body)
    answered = time.perf_counter() - began
    api.wait_until_active(name)
    return answered, time.perf_counter() - began


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A web server of the folder in a process of its own; the URL that it has."""
    command = [sys.executable, "-m", "tests.bench.checkpoints", "--serve", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.terminate()


def serve(folder: str) -> None:
    """Serves a folder on a free port, which it prints."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    print(server.server_address[1], flush=True)
    server.serve_forever()


class Memory:
    """Watches how far the resident memory of a process grows during the block."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self.grown_bytes = 0

    def __enter__(self) -> Memory:
        before = self._process.memory_info().rss

        def watch() -> None:
            while not self._over.wait(0.02):
                self.grown_bytes = max(self.grown_bytes, self._process.memory_info().rss - before)

        self._thread = threading.Thread(target=watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def bench_transfers(stack: Stack, folder: Path, megabytes: int, chosen: set[str]) -> None:
    """Uploads and imports beside boto3's upload_file."""
    api, path = Api(stack), folder / "bench.safetensors"
    make_file(path, megabytes)
    table = Table(title=f"{megabytes} MiB into the store", title_justify="left")
    for column in ("way", "seconds", "MiB/s", "ratio", "target"):
        table.add_column(column, justify="left" if column in {"way", "target"} else "right")
    base = boto3_upload(stack, path)

    def row(name: str, seconds: float, target: str = "") -> None:
        table.add_row(name, f"{seconds:.2f}", f"{megabytes / seconds:.0f}", f"{base / seconds:.2f}", target)

    row("boto3 upload_file, straight to the store", base)
    if "upload" in chosen:
        answered, active = upload(api, path, "parts.safetensors")
        row("parts by presigned URLs, to the end of completion", answered, "≥ 0.8")
        row("… and until it is Active", active)
    if "import" in chosen:
        pid = stack.processes()["models"]
        with serving(folder) as url, Memory(pid) as memory:
            began = time.perf_counter()
            body = {"checkpoint_type": KIND, "urls": [f"{url}/{path.name}"], "params": {}}
            api.call("POST", "/checkpoints", body)
            api.wait_until_active(path.name)
            row("import by URL, until it is Active", time.perf_counter() - began, "≥ 0.5")
        table.add_row("… growth of the service's memory, MiB", "", "", f"{memory.grown_bytes / MIB:.0f}", "≤ 64")
    console.print(table)


def bench_pages(stack: Stack, rows: int) -> None:
    """One page of ten out of 100 and out of many, through the gateway."""
    postgres = Postgres(Home(stack.home), stack.ports()["postgres"])
    url = postgres.url("models").replace("+psycopg", "")
    Api(stack).call("POST", "/users", {"username": "reader", "password": "p", "roles": ["IT Operator"]})
    results: dict[int, list[float]] = {}
    with psycopg.connect(url, autocommit=True) as connection:
        have = 0
        for count in (100, rows):
            connection.execute(ADD_ROWS, {"first": have + 1, "last": count})
            connection.execute("VACUUM ANALYZE checkpoints")
            connection.execute("VACUUM ANALYZE checkpoint_files")
            have = count
            results[count] = page_times(stack)
    table = Table(title="GET /checkpoints?per_page=10 through the gateway, one connection", title_justify="left")
    for column in ("checkpoints", "p50 ms", "ratio", "target"):
        table.add_column(column, justify="right")
    for count, times in results.items():
        ratio = statistics.median(times) / statistics.median(results[100])
        table.add_row(f"{count:,}", f"{statistics.median(times):.1f}", f"{ratio:.2f}", "≤ 3" if count > 100 else "")
    console.print(table)


def page_times(stack: Stack, count: int = 200) -> list[float]:
    """Milliseconds of each request, after a few to warm up."""
    connection = HTTPConnection(stack.url.removeprefix("http://"))
    times = []
    for index in range(count + 20):
        began = time.perf_counter()
        connection.request("GET", "/checkpoints?per_page=10", headers={"x-api-key": stack.api_key})
        response = connection.getresponse()
        shown = len(json.loads(response.read())["data"]["checkpoints"])
        if shown != 10:
            raise SystemExit(f"a page of 10 holds {shown}")
        if index >= 20:
            times.append(1000 * (time.perf_counter() - began))
    return times


def main() -> None:
    """Runs the benchmarks named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", choices=["upload", "import", "pages", []], help="default: all")
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the file (default 1024)")
    parser.add_argument("--rows", type=int, default=100_000, help="checkpoints of the long list (default 100000)")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    chosen = set(options.what or ["upload", "import", "pages"])
    with tempfile.TemporaryDirectory(prefix="esd-bench-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # PostgreSQL's user must get through, when root runs this
        settings = {"ESD_IMPORT_ALLOWED_NETWORKS": '["127.0.0.0/8"]'}
        with Stack(folder / "home", env_overrides=settings) as stack:
            if chosen & {"upload", "import"}:
                (folder / "files").mkdir()
                bench_transfers(stack, folder / "files", options.megabytes, chosen)
            if "pages" in chosen:
                bench_pages(stack, options.rows)


if __name__ == "__main__":
    main()
