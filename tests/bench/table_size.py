"""Claim and finish with a full table against an almost empty one.

    python -m tests.bench.table_size [--rows 1000000] [--jobs 500]

One worker, one job at a time, straight at the stores: what PostgreSQL does, without gateway and streams. Both tables
are measured in turns, in one server.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from uuid import UUID, uuid4

from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from deploy.local.home import Home
from deploy.local.ports import free_port
from deploy.local.postgres import Postgres
from services.common.database import Database
from services.inference.queue.store import LeaseStore
from services.inference.rows import Worker, now
from tests.processes import process_environment, running

_SMALL = 1000
_REPEATS = 5
_TARGET = 0.8
_WORKER = "worker"
# Jobs of 1,000 users: such as wait in the queue of one endpoint, and such as ended over the last weeks.
_JOB = """
INSERT INTO job (id, owner, task_type, inference_type, endpoint_id, endpoint_name, instance_type, models, create_time,
    payload, payload_sha256, num_images, submit_time, cost_seconds, virtual_start, base_model_key, priority_class,
    passed_over, is_running, num_lost, is_cancelled, num_claims, status {columns})
SELECT gen_random_uuid(), 'user' || n % 1000, 'txt2img', 'Async', :endpoint, 'bench', 'local', '[]', at,
    '{{"prompt": "a picture"}}', '00', 1, at, 1, n, 'model', 1, 0, false, 0, false, {values}
FROM (SELECT n, now() - n * interval '3 seconds' AS at FROM generate_series(1, :number) AS n) AS numbered
"""
_QUEUED = _JOB.format(columns="", values="0, 'inprogress'")
_ENDED = _JOB.format(
    columns=", claim_time, start_time, complete_time, result_lease, image_names",
    values="1, 'succeed', at, at, at, gen_random_uuid(), '[\"image_0.png\"]'",
)
console = Console(width=110)


class Pool:
    """One database with one endpoint."""

    def __init__(self, url: str) -> None:
        self.database = Database(url)
        self._leases = LeaseStore(self.database)
        self._endpoint, self._stream = uuid4(), uuid4()

    async def fill(self, num_rows: int) -> None:
        """Makes so many ended jobs."""
        await self.database.migrate("inference")
        await self._execute(_ENDED, num_rows)
        worker = Worker(
            endpoint_id=self._endpoint,
            worker_id=_WORKER,
            stream_id=self._stream,
            device="cpu",
            version="bench",
            last_seen=now(),
        )
        await self._leases.welcome(worker, [])
        async with self.database.engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text("VACUUM ANALYZE"))  # as autovacuum has done long since where so many are

    async def rate(self, num_jobs: int) -> float:
        """Jobs per second that are claimed and finished."""
        await self._execute(_QUEUED, num_jobs)
        began = time.perf_counter()
        for _ in range(num_jobs):
            (job,) = await self._leases.claim(self._endpoint, _WORKER, self._stream, 1, ["model"])
            await self._leases.start(self._endpoint, _lease(job.lease_id))
            ended = await self._leases.succeed(self._endpoint, _lease(job.lease_id), [], {})
            assert ended is not None
        return num_jobs / (time.perf_counter() - began)

    async def _execute(self, statement: str, number: int) -> None:
        async with self.database.transaction() as session:
            await session.execute(text(statement), {"endpoint": self._endpoint, "number": number})


def _lease(lease_id: UUID | None) -> UUID:
    assert lease_id is not None
    return lease_id


async def bench(postgres: Postgres, num_rows: int, num_jobs: int) -> None:
    """Measures and prints."""
    sizes = {"small": _SMALL, "large": num_rows}
    postgres.bootstrap(sizes)
    pools = {}
    for name, size in sizes.items():
        pools[name] = Pool(postgres.url(name))
        with console.status(f"{size:,} rows are made"):
            await pools[name].fill(size)
    rates: dict[str, list[float]] = {name: [] for name in pools}
    for _ in range(_REPEATS):
        for name, pool in pools.items():
            rates[name].append(await pool.rate(num_jobs))
    for pool in pools.values():
        await pool.database.dispose()
    table = Table("ended jobs in the table", "claimed and finished", "ratio", "target", title="Claim and finish")
    small = statistics.median(rates["small"])
    for name, size in sizes.items():
        rate = statistics.median(rates[name])
        target = f"≥ {_TARGET}" if name == "large" else ""
        table.add_row(f"{size:,}", f"{rate:.0f} jobs/s", f"{rate / small:.2f}", target)
    console.print(table)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="esd-bench-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL's user must get through, when root runs this
        postgres = Postgres(Home(Path(folder) / "home"), free_port())
        postgres.prepare()
        with running(postgres.command(), process_environment()):
            postgres.wait_until_up()
            asyncio.run(bench(postgres, options.rows, options.jobs))


if __name__ == "__main__":
    main()
