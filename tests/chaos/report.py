"""Prints what a run found: the table, and the story of each job with which something is wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from rich.console import Console
from rich.table import Table

from tests.chaos.clients import Submission
from tests.chaos.run import Outcome

_MAX_STORIES = 5
_NAME = re.compile(r"[0-9a-f-]{36}|image_\d+")  # what makes every reason another
_MAX_LINES = 80
_BEFORE = timedelta(seconds=10)


def report(outcome: Outcome, folder: Path, console: Console) -> None:
    """Prints everything."""
    verdict = outcome.verdict
    table = Table(title="What became of the jobs", title_justify="left")
    table.add_column("what")
    table.add_column("number", justify="right")
    table.add_column("must be")
    table.add_row("accepted", str(verdict.num_accepted), str(len(outcome.submissions)))
    table.add_row("succeeded", str(verdict.num_succeeded))
    table.add_row("failed with a reason", str(sum(map(bool, verdict.failures))))
    reasons = (_NAME.sub("…", reason) for reason in verdict.failures)
    for reason, number in Counter(reasons).items():
        table.add_row(f"  {reason}", str(number))
    for kind, found in verdict.wrong.items():
        table.add_row(kind, str(len(found)), "0")
    table.add_row("results that nobody accounts for", str(len(verdict.unaccounted)), "0")
    console.print(table)
    told = ", ".join(f"{number} x {kind}" for kind, number in sorted(outcome.faults.counts.items()))
    retries = sum(submission.num_retries for submission in outcome.submissions)
    console.print(f"faults: {told}")
    console.print(
        f"{outcome.seconds:.0f} s; {retries} requests repeated by clients; {verdict.num_claims} leases for "
        f"{verdict.num_accepted} jobs"
    )
    for prefix in verdict.unaccounted[:_MAX_STORIES]:
        console.print(f"nobody accounts for {prefix}")
    bad = {id(submission): submission for found in verdict.wrong.values() for submission, _ in found}
    for submission in list(bad.values())[:_MAX_STORIES]:
        console.rule(f"job {submission.job_id or submission.number}")
        for kind, found in verdict.wrong.items():
            for other, what in found:
                if other is submission:
                    console.print(f"{kind}: {what}", soft_wrap=True)
        for line in _story(submission, outcome, folder):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    if not verdict.is_good:
        console.print(f"logs and data are in {folder}")


def _story(submission: Submission, outcome: Outcome, folder: Path) -> Iterator[str]:
    """The job's changes in the database and the faults around them in order, then what the logs have of it."""
    changes = outcome.changes.get(UUID(submission.job_id), []) if submission.job_id else []
    events = [(change.at, f"database  {change}") for change in changes]
    if changes:
        begin, end = changes[0].at - _BEFORE, changes[-1].at + _BEFORE
        events += [(at, f"fault     {what}") for at, what in outcome.faults.log if begin <= at <= end]
    if submission.accepted_at is not None:
        events.append((submission.accepted_at, "client    the job was accepted"))
    if submission.ended_at is not None:
        events.append((submission.ended_at, f"client    saw it end as {(submission.seen or {}).get('status')}"))
    yield f"asked for {submission.inference_type}, {submission.payload}, {submission.num_starts} starts"
    for at, what in sorted(events):
        yield f"{at:%H:%M:%S.%f} {what}"
    names = {str(change.lease_id) for change in changes if change.lease_id} | {submission.job_id or submission.prompt}
    lines = [line for line in _log_lines(folder) if any(name in line for name in names)]
    yield from lines[:_MAX_LINES]


def _log_lines(folder: Path) -> Iterator[str]:
    for file in [folder / "home" / "stack.log", *sorted(folder.glob("worker-*.log"))]:
        for line in file.read_text(errors="replace").splitlines():
            yield f"{file.stem:14} {line}"
