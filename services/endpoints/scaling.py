"""Owns the policy by which pools follow their load: a pure function of what was decided before, the load and the time.

A pool grows after some seconds of need, at once where it has no worker. It shrinks when it had more than it needed for
a while, to the most that it needed in that while; so one quiet moment costs nobody a warm worker, and a pool without a
job for that long has `num_min` workers. Bounds hold at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.common.settings import FromEnvironment


class ScalingPolicy(FromEnvironment):
    """How pools grow and shrink, from ESD_SCALE_…. Targets are jobs for each worker; a job counts as `job_seconds` of
    work."""

    model_config = SettingsConfigDict(env_prefix="ESD_SCALE_")

    target_async: float = Field(3.0, gt=0)
    target_real_time: float = Field(5.0, gt=0)
    job_seconds: float = Field(10.0, gt=0)
    out_seconds: float = Field(30.0, ge=0)
    in_seconds: float = Field(900.0, ge=0)

    def target(self, is_real_time: bool) -> float:
        """How many jobs a worker is to have."""
        return self.target_real_time if is_real_time else self.target_async


@dataclass(frozen=True)
class Load:
    """What the queue knows of an endpoint: its workers with a live stream, its jobs, and how long one worker would
    take for them, if it knows."""

    worker_ids: frozenset[str] = frozenset()
    num_queued: int = 0
    num_running: int = 0
    work_seconds: float | None = None

    @property
    def num_jobs(self) -> int:
        """All that have not ended."""
        return self.num_queued + self.num_running


@dataclass(frozen=True)
class Scale:
    """What was decided: how many workers, since when they are too few, or too many and what was needed since then."""

    num_workers: int
    need_since: datetime | None = None
    surplus_since: datetime | None = None
    surplus_peak: int = 0


def needed_workers(load: Load, is_real_time: bool, policy: ScalingPolicy) -> int:
    """ceil(jobs / target), where long jobs count for more than one and short ones for less if their time is known.

    Never more than there are jobs: a worker without one is of no use.
    """
    weight = float(load.num_jobs)
    if load.work_seconds is not None and load.num_jobs:
        weight = load.work_seconds / policy.job_seconds
    return min(load.num_jobs, max(math.ceil(weight / policy.target(is_real_time)), 1))


def decide(before: Scale, num_needed: int, num_min: int, num_max: int, now: datetime, policy: ScalingPolicy) -> Scale:
    """What the pool should be now. The same answer however often it is asked at one moment."""
    wanted = min(max(num_needed, num_min), num_max)
    num_workers = min(max(before.num_workers, num_min), num_max)
    if num_workers != before.num_workers:
        before = Scale(num_workers)
    if wanted > num_workers:
        since = before.need_since or now
        if num_workers == 0 or now - since >= timedelta(seconds=policy.out_seconds):
            return Scale(wanted)
        return Scale(num_workers, need_since=since)
    if wanted == num_workers:
        return Scale(num_workers)
    since = before.surplus_since or now
    peak = max(wanted, before.surplus_peak)
    if now - since >= timedelta(seconds=policy.in_seconds):
        return Scale(peak) if peak == wanted else Scale(peak, surplus_since=now, surplus_peak=wanted)
    return Scale(num_workers, surplus_since=since, surplus_peak=peak)


def seconds_until_due(scale: Scale, now: datetime, policy: ScalingPolicy) -> float | None:
    """How long until the decision is another one with the same load; None where it stays."""
    if scale.need_since is not None:
        left = scale.need_since + timedelta(seconds=policy.out_seconds) - now
    elif scale.surplus_since is not None:
        left = scale.surplus_since + timedelta(seconds=policy.in_seconds) - now
    else:
        return None
    return max(0.0, left.total_seconds())
