"""Priorities, deadlines, quotas, idempotent submits, results with their SHA-256, retention."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds columns, tables and indices; the queue's index learns of priorities."""
    op.execute("""
ALTER TABLE job
    ADD COLUMN priority smallint NOT NULL DEFAULT 0,
    ADD COLUMN deadline_seconds double precision CHECK (deadline_seconds > 0),
    ADD COLUMN deadline_time timestamptz,
    ADD COLUMN result_objects jsonb,
    ADD CONSTRAINT inprogress_has_its_deadline
        CHECK (status <> 'inprogress' OR (deadline_seconds IS NULL) = (deadline_time IS NULL)),
    ADD CONSTRAINT failure_is_told CHECK (failure <> ''),
    ADD CONSTRAINT only_succeed_has_result_objects CHECK (result_objects IS NULL OR status = 'succeed'),
    ADD CONSTRAINT held_was_claimed CHECK (lease_id IS NULL OR claim_time IS NOT NULL),
    ADD CONSTRAINT running_was_started CHECK (NOT is_running OR start_time IS NOT NULL);
DROP INDEX job_queue;
CREATE INDEX job_queue ON job (endpoint_id, priority_class, priority DESC, virtual_start, id)
    WHERE status = 'inprogress' AND lease_id IS NULL;
CREATE INDEX job_queue_of_owner ON job (owner) WHERE status = 'inprogress' AND lease_id IS NULL;
CREATE INDEX job_deadline ON job (deadline_time) WHERE status = 'inprogress' AND deadline_time IS NOT NULL;
CREATE INDEX job_age ON job ((coalesce(complete_time, create_time))) WHERE status <> 'inprogress';

CREATE TABLE submission (
    owner text NOT NULL,
    key text NOT NULL,
    body_sha256 text NOT NULL,
    job_id uuid NOT NULL REFERENCES job ON DELETE CASCADE,
    create_time timestamptz NOT NULL,
    PRIMARY KEY (owner, key)
);
CREATE INDEX submission_job ON submission (job_id);
CREATE INDEX submission_age ON submission (create_time);
CREATE TABLE usage (
    owner text NOT NULL,
    minute timestamptz NOT NULL,
    gpu_seconds double precision NOT NULL,
    PRIMARY KEY (owner, minute)
);
""")


def downgrade() -> None:
    """Takes them away."""
    op.execute("""
DROP TABLE usage, submission;
DROP INDEX job_queue, job_queue_of_owner, job_age;
ALTER TABLE job
    DROP CONSTRAINT failure_is_told,
    DROP CONSTRAINT held_was_claimed,
    DROP CONSTRAINT running_was_started,
    DROP COLUMN priority, DROP COLUMN deadline_seconds, DROP COLUMN deadline_time, DROP COLUMN result_objects;
CREATE INDEX job_queue ON job (endpoint_id, priority_class, virtual_start, id)
    WHERE status = 'inprogress' AND lease_id IS NULL;
""")
