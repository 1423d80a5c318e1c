import re
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from services.common.errors import FailedPrecondition
from services.inference.rows import Job, now
from services.inference.states import TRANSITIONS, State

ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"
IMAGE = {"name": "image_0.png", "size_bytes": 8, "sha256": "00"}
CHANGES: dict[str, tuple[Any, ...]] = {
    "queue": ({"steps": 1}, "00", 1, 1.0, now(), None, {}),
    "move": (uuid4(), "esd-async-other", "any"),
    "lose": (),
    "give_back": (),
    "decline": ("x.ckpt does not fit", {"w", "another"}),
    "postpone": ("the store is away", now(), 60.0),
    "succeed": ([IMAGE], {}),
    "fail": ("broken",),
    "cancel": ("not wanted",),
}


def job_in(state: State) -> Job:
    """A job that went the ordinary way into the state."""
    job = Job(
        id=uuid4(),
        owner="ann",
        task_type="txt2img",
        inference_type="Async",
        endpoint_id=uuid4(),
        endpoint_name="esd-async-test",
        instance_type="any",
        models=[],
    )
    if state != State.CREATED:
        job.queue(*CHANGES["queue"])
    if state in {State.HELD, State.RUNNING, State.SUCCEED}:
        job.lease_id, job.worker_id = uuid4(), "w"  # what the claim does
    if state == State.RUNNING:
        job.is_running, job.start_time = True, now()  # what the start does
    if state == State.SUCCEED:
        job.succeed(*CHANGES["succeed"])
    if state == State.FAILED:
        job.fail(*CHANGES["fail"])
    assert job.state == state
    return job


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("state", State)
def test_a_change_leads_where_the_table_says_or_is_refused_and_changes_nothing(state: State, change: str) -> None:
    sources, targets = TRANSITIONS[change]
    job = job_in(state)
    before = job.model_dump()
    if state in sources:
        getattr(job, change)(*CHANGES[change])
        assert job.state in targets
    else:
        with pytest.raises(FailedPrecondition, match=str(job.id)):
            getattr(job, change)(*CHANGES[change])
        assert job.model_dump() == before


def test_every_change_of_the_table_is_a_method_or_a_statement() -> None:
    assert set(TRANSITIONS) == {*CHANGES, "claim", "start"}


def test_architecture_has_the_same_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \|", ARCHITECTURE.read_text(), re.MULTILINE)
    told = {change: (set(sources.split(", ")), set(targets.split(", "))) for change, sources, targets in rows}
    assert told == {change: (set(sources), set(targets)) for change, (sources, targets) in TRANSITIONS.items()}


def test_a_job_is_postponed_for_so_long_and_fails_then_with_the_reason_whatever_it_was_lost_for() -> None:
    job, first = job_in(State.RUNNING), now()
    for seconds in (0, 30, 59):
        job.postpone(
            "x.ckpt cannot be downloaded: the object store answers 503", first + timedelta(seconds=seconds), 60.0
        )
        assert (job.state, job.num_lost) == (State.QUEUED, 0)
        job.lease_id, job.worker_id, job.is_running = uuid4(), "w", True
    job.postpone("x.ckpt cannot be downloaded: the object store answers 503", first + timedelta(seconds=60), 60.0)
    assert job.state == State.FAILED
    assert job.failure == (
        "the object store could not be reached for 60 s; "
        "the last attempt: x.ckpt cannot be downloaded: the object store answers 503"
    )
