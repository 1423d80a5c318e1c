"""Pools at the size of a provider: a day of traffic for 1,000 endpoints against the policy, and a round of the loop.

    python -m tests.bench.scaling [--endpoints N] [--hours H]

The day is simulated with the policy's own functions in steps of the loop's sweep; arrivals are Poisson around a daily
curve with bursts, and some endpoints have a hundred times the jobs of others. The round is the real control loop on
PostgreSQL, with a Kubernetes API that keeps its objects in memory and counts requests.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from services.endpoints.scaling import Load, Scale, ScalingPolicy, decide, needed_workers
from tests.bench.memory_cluster import Round, rounds_of

NUM_ENDPOINTS = 1000
MAX_WORKERS = 10  # of an endpoint
STEP_SECONDS = 5  # the loop's sweep
JOB_SECONDS = 10.0
START_SECONDS = 30  # from the decision to the first job
_SEED = 4
_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)

Floats = NDArray[np.float64]
Counts = NDArray[np.int32]


@dataclass(frozen=True)
class Day:
    """What a policy made of a day: hours that workers existed and had work, waits in seconds, changes of size."""

    instance_hours: float
    work_hours: float
    waits: Floats
    num_changes: int
    num_largest: int
    round_milliseconds: list[float]


def traffic(num_endpoints: int, num_steps: int) -> Counts:
    """Jobs that arrive in each step (rows) at each endpoint (columns)."""
    random = np.random.default_rng(_SEED)
    busyness = np.minimum(random.lognormal(mean=-0.7, sigma=1.4, size=num_endpoints), 0.6 * MAX_WORKERS)
    peak_hour = random.normal(14, 3, size=num_endpoints)
    hours = np.arange(num_steps)[:, None] * STEP_SECONDS / 3600
    daily = 0.15 + 0.85 * np.maximum(0, np.cos((hours - peak_hour) * np.pi / 12)) ** 2
    # A burst begins every four hours on average, lasts five minutes on average and triples the load.
    begins = random.random((num_steps, num_endpoints)) < STEP_SECONDS / (4 * 3600)
    lengths = random.exponential(300 / STEP_SECONDS, size=begins.shape).astype(np.int32)
    until = np.where(begins, np.arange(num_steps)[:, None] + lengths, 0)
    is_burst = np.maximum.accumulate(until, axis=0) > np.arange(num_steps)[:, None]
    rate = busyness * daily * np.where(is_burst, 3, 1) / JOB_SECONDS
    return random.poisson(rate * STEP_SECONDS).astype(np.int32)


def simulate(arrivals: Counts, policy: ScalingPolicy | None, name: str) -> Day:
    """A day under the policy of that name; without one every pool has its largest size all day."""
    num_steps, num_endpoints = arrivals.shape
    in_start = START_SECONDS // STEP_SECONDS
    scales = [Scale(0 if policy else MAX_WORKERS)] * num_endpoints
    wanted = np.array([scale.num_workers for scale in scales], dtype=np.int32)
    history = np.tile(
        wanted, (in_start + 1, 1)
    )  # what was wanted in the last steps: a worker is live if wanted so long
    arrived = np.zeros((num_steps + 1, num_endpoints), dtype=np.int32)
    done = np.zeros_like(arrived)
    credit = np.zeros(num_endpoints)
    hours, num_changes, num_largest, milliseconds = 0.0, 0, 0, []
    for step in track(range(num_steps), name, transient=True):
        live = history.min(axis=0)
        arrived[step + 1] = arrived[step] + arrivals[step]
        waiting = arrived[step + 1] - done[step]
        credit = np.where(waiting > 0, credit + live * STEP_SECONDS / JOB_SECONDS, 0)
        served = np.minimum(waiting, np.floor(credit)).astype(np.int32)
        credit -= served
        done[step + 1] = done[step] + served
        hours += int(np.maximum(wanted, live).sum()) * STEP_SECONDS / 3600
        if policy is not None:
            began = time.perf_counter()
            num_changes += _decide_all(scales, waiting - served, wanted, policy, step)
            milliseconds.append(1000 * (time.perf_counter() - began))
        num_largest = max(num_largest, int(wanted.sum()))
        history = np.vstack([history[1:], wanted])
    work_hours = float(done[-1].sum()) * JOB_SECONDS / 3600
    return Day(hours, work_hours, _waits(arrived, done), num_changes, num_largest, milliseconds)


def _decide_all(scales: list[Scale], jobs: Counts, wanted: Counts, policy: ScalingPolicy, step: int) -> int:
    """One round of the loop, as far as it decides; answers how many pools it changes."""
    now = _EPOCH + timedelta(seconds=step * STEP_SECONDS)
    num_changes = 0
    for index, num_jobs in enumerate(jobs.tolist()):
        before = scales[index]
        needed = needed_workers(
            Load(num_queued=num_jobs, work_seconds=num_jobs * JOB_SECONDS), is_real_time=False, policy=policy
        )
        after = decide(before, needed, 0, MAX_WORKERS, now, policy)
        if after.num_workers != before.num_workers:
            num_changes += 1
            wanted[index] = after.num_workers
        scales[index] = after
    return num_changes


def _waits(arrived: Counts, done: Counts) -> Floats:
    """How long each finished job waited before it was begun, in seconds, first come first served."""
    found = []
    for endpoint in range(arrived.shape[1]):
        jobs = np.arange(done[-1, endpoint])
        came = np.searchsorted(arrived[:, endpoint], jobs, side="right")
        went = np.searchsorted(done[:, endpoint], jobs, side="right")
        found.append(np.maximum(0, (went - came) * STEP_SECONDS - JOB_SECONDS))
    return np.concatenate(found).astype(np.float64)


def day_table(num_endpoints: int, hours: float) -> tuple[Table, Day]:
    """The policy and its neighbours side by side; the ideal scaler has exactly the worker-hours of the work."""
    arrivals = traffic(num_endpoints, int(hours * 3600 / STEP_SECONDS))
    usual = ScalingPolicy()
    policies: dict[str, ScalingPolicy | None] = {
        "the default: out after 30 s, in after 15 min": usual,
        "in after 5 min": usual.model_copy(update={"in_seconds": 300.0}),
        "out at once": usual.model_copy(update={"out_seconds": 0.0}),
        "every pool at its largest": None,
    }
    days = {name: simulate(arrivals, policy, name) for name, policy in policies.items()}
    first = next(iter(days.values()))
    jobs = f"{len(first.waits):,} jobs of {JOB_SECONDS:g} s"
    title = f"{num_endpoints} endpoints, {hours:g} h, {jobs}, at most {first.num_largest:,} workers"
    table = Table(title=title, title_justify="left")
    for column in ("policy", "worker-hours", "of ideal", "p50 wait", "p99 wait", "changes/min"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    table.add_row("ideal: knows the day, starts for nothing", f"{first.work_hours:,.0f}", "1.00", "0 s", "0 s", "")
    for name, day in days.items():
        p50, p99 = np.percentile(day.waits, [50, 99])
        ratio, changes = day.instance_hours / day.work_hours, day.num_changes / (60 * hours)
        table.add_row(
            name, f"{day.instance_hours:,.0f}", f"{ratio:.2f}", f"{p50:.0f} s", f"{p99:.0f} s", f"{changes:.1f}"
        )
    return table, first


def round_table(rounds: list[Round], day: Day, hours: float) -> Table:
    """What a round of the loop takes, and how many requests follow from the day's changes."""
    table = Table(title="A round of the control loop on Kubernetes", title_justify="left")
    for column in ("round", "p50 ms", "worst ms", "requests"):
        table.add_column(column, justify="left" if column == "round" else "right")
    for found in rounds:
        worst = max(found.milliseconds)
        table.add_row(
            found.name, f"{statistics.median(found.milliseconds):.0f}", f"{worst:.0f}", f"{found.num_requests}"
        )
    deciding = f"{statistics.median(day.round_milliseconds):.1f}"
    table.add_row("  of which deciding", deciding, f"{max(day.round_milliseconds):.1f}", "", end_section=True)
    requests_of_change = sum(found.num_requests for found in rounds if found.num_changes) / sum(
        found.num_changes for found in rounds
    )
    requests = day.num_changes * requests_of_change / (60 * hours)
    table.add_row("a minute of that day, on average", "", "", f"{requests:.1f}")
    return table


def main() -> None:
    """Simulates, measures, and prints the tables."""
    parser = argparse.ArgumentParser(prog="tests.bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--endpoints", type=int, default=NUM_ENDPOINTS)
    parser.add_argument("--hours", type=float, default=24.0)
    given = parser.parse_args()
    console = Console(width=120)
    table, day = day_table(given.endpoints, given.hours)
    console.print(table)
    with tempfile.TemporaryDirectory(prefix="esd-bench-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL's user must get through, when root runs this
        rounds = asyncio.run(rounds_of(given.endpoints, MAX_WORKERS, Path(folder)))
    console.print(round_table(rounds, day, given.hours))


if __name__ == "__main__":
    main()
