"""Judges every accepted job by what is left: the database, its history, the object store and the client's memory."""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from uuid import UUID

import numpy as np
from botocore.exceptions import ClientError, WaiterError
from numpy.typing import NDArray
from PIL import Image

from deploy.local.home import S3_BUCKET
from services.common import payloads
from services.common.payloads import Generation
from tests.chaos.clients import Submission
from tests.chaos.history import Change, History

Pixels = NDArray[np.uint8]
# (what was asked for, which picture of it, the picture found) → whether it is the one
IsRight = Callable[[Generation, int, Pixels], bool]


@dataclass
class Verdict:
    """Numbers of the accepted jobs, and what is wrong with which."""

    num_accepted: int = 0
    num_succeeded: int = 0
    num_claims: int = 0
    failures: list[str] = field(default_factory=list)
    # Submission → what is wrong, by kind.
    wrong: dict[str, list[tuple[Submission, str]]] = field(default_factory=lambda: {kind: [] for kind in WRONGS})
    unaccounted: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether the proof holds."""
        return not any(self.wrong.values()) and not self.unaccounted


WRONGS = (
    "never accepted",
    "not ended",
    "lost",
    "doubled",
    "failed without a reason",
    "results missing",
    "SHA-256 differs",
    "picture differs",
    "answers that no client should get",
)


class Judge:
    """Reads what is left, once everything is at rest."""

    def __init__(self, history: History, s3: Any, is_right: IsRight) -> None:
        self._s3 = s3
        self._is_right = is_right
        self._rows = history.jobs()
        self.changes = history.changes()
        self._leftovers = history.leftovers()
        self._by_prompt: dict[str, list[UUID]] = defaultdict(list)
        for job_id, row in self._rows.items():
            if row["payload"] is not None:
                self._by_prompt[row["payload"]["prompt"]].append(job_id)

    def judge(self, submissions: list[Submission]) -> Verdict:
        """Looks at every job."""
        verdict = Verdict()
        for submission in submissions:
            self._judge(submission, verdict)
        verdict.unaccounted = self._unaccounted()
        return verdict

    def _judge(self, submission: Submission, verdict: Verdict) -> None:
        def wrong(kind: str, what: str) -> None:
            verdict.wrong[kind].append((submission, what))

        for surprise in submission.surprises:
            wrong("answers that no client should get", surprise)
        if submission.accepted_at is None:
            wrong("never accepted", "the client gave up")
            return
        verdict.num_accepted += 1
        job_id = UUID(submission.job_id)
        row = self._rows.get(job_id)
        if row is None:
            wrong("lost", "its row is gone")
            return
        verdict.num_claims += row["num_claims"]
        if row["status"] not in {"succeed", "failed"} or submission.seen is None:
            wrong("not ended", f"its status is {row['status']}")
            return
        for what in self._doubled(submission, row, self.changes[job_id]):
            wrong("doubled", what)
        if row["status"] == "failed":
            verdict.failures.append(row["failure"])
            if not row["failure"]:
                wrong("failed without a reason", "")
            return
        verdict.num_succeeded += 1
        for kind, what in self._wrong_results(submission, row):
            wrong(kind, what)

    def _doubled(self, submission: Submission, row: dict[str, Any], changes: list[Change]) -> list[str]:
        """In which ways the job counts for more than one."""
        if not (changes and changes[-1].is_end):
            return ["its history does not reach its end, so nobody can tell"]
        found = []
        others = [job_id for job_id in self._by_prompt[submission.prompt] if str(job_id) != submission.job_id]
        if others:
            found.append(f"the same submission ran as {', '.join(map(str, others))} too")
        for before, after in pairwise(changes):
            if (
                before.is_end
                and after.is_end
                and (before.status, before.result_lease)
                != (
                    after.status,
                    after.result_lease,
                )
            ):
                found.append(f"it ended twice: {before}; {after}")
        num_ends = sum(after.is_end and not before.is_end for before, after in pairwise(changes))
        if num_ends > submission.num_starts:
            found.append(f"it ended {num_ends} times and was started {submission.num_starts} times")
        seen = submission.seen or {}
        if submission.num_starts == 1 and seen["status"] != row["status"]:
            found.append(f"its client saw it end as {seen['status']}, now it is {row['status']}")
        return found

    def _wrong_results(self, submission: Submission, row: dict[str, Any]) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        request = payloads.check("txt2img", submission.payload, submission.job_id)
        prefix = f"out/{row['id']}/result/{row['result_lease']}/"
        told = {result["name"]: result for result in row["result_objects"]}
        expected = [f"image_{number}.png" for number in range(request.num_images)]
        param_name = f"{row['id']}_param.json"
        if row["image_names"] != expected or set(told) != {*expected, param_name}:
            found.append(("results missing", f"its row names {row['image_names']} and {sorted(told)}"))
        contents = {name: self._read(prefix + name) for name in (*expected, param_name)}
        for name, content in contents.items():
            if content is None:
                found.append(("results missing", prefix + name))
            elif name in told and hashlib.sha256(content).hexdigest() != told[name]["sha256"]:
                found.append(("SHA-256 differs", prefix + name))
        for number, name in enumerate(expected):
            content = contents[name]
            if content is not None and not self._is_right(request, number, _pixels(content)):
                found.append(("picture differs", prefix + name))
        param = contents[param_name]
        if param is not None and json.loads(json.loads(param)["info"])["prompt"] != submission.prompt:
            found.append(("picture differs", f"{prefix}{param_name} is of another job"))
        if submission.inference_type == "Async" and not self._comes(f"sagemaker_output/{row['output_id']}.out"):
            found.append(("results missing", f"sagemaker_output/{row['output_id']}.out"))
        return found

    def _read(self, key: str) -> bytes | None:
        try:
            content: bytes = self._s3.get_object(Bucket=S3_BUCKET, Key=key)["Body"].read()
        except ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchKey":
                raise
            return None
        return content

    def _comes(self, key: str) -> bool:
        """Whether the object is there, or comes: what is still owed, a sweep writes every 30 s."""
        patience = {"Delay": 1, "MaxAttempts": 120}
        try:
            self._s3.get_waiter("object_exists").wait(Bucket=S3_BUCKET, Key=key, WaiterConfig=patience)
        except WaiterError:
            return False
        return True

    def _unaccounted(self) -> list[str]:
        """Prefixes with results that count for no job and that the cleaner does not know of."""
        leases = [(row["id"], lease) for row in self._rows.values() for lease in (row["result_lease"], row["lease_id"])]
        counted = {f"out/{job_id}/result/{lease}/" for job_id, lease in leases}
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=S3_BUCKET, Prefix="out/")
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        prefixes = {key.rpartition("/")[0] + "/" for key in keys}
        return sorted(prefixes - counted - self._leftovers)


def _pixels(content: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
