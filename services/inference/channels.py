"""The channels of the database's notifications (services/common/notifications.py).

`jobs_queued`: an endpoint's id, there is something to claim. `job_ended`: a job's id. `leases_lost`: a worker's id,
some of its jobs were taken back. `deadline_set`: a job's id, it must end in time. `pools_changed`: a worker came or
went; everyone who watches pools hears it. `jobs_watched` and `jobs_moved` belong to watching/hub.py: ids of jobs that
somebody looks at, or that got further. `webhooks_due`: a job's id, whose webhook is to be called. `models_pinned`: an
endpoint's id, its workers are to keep other checkpoints ready.
"""

from __future__ import annotations

JOBS_QUEUED = "jobs_queued"
JOB_ENDED = "job_ended"
LEASES_LOST = "leases_lost"
POOLS_CHANGED = "pools_changed"
JOBS_WATCHED = "jobs_watched"
JOBS_MOVED = "jobs_moved"
DEADLINE_SET = "deadline_set"
WEBHOOKS_DUE = "webhooks_due"
MODELS_PINNED = "models_pinned"
CHANNELS = [
    JOBS_QUEUED,
    JOB_ENDED,
    LEASES_LOST,
    POOLS_CHANGED,
    JOBS_WATCHED,
    JOBS_MOVED,
    DEADLINE_SET,
    WEBHOOKS_DUE,
    MODELS_PINNED,
]
