"""jobs, workers, clocks of the fair queue, retired endpoints."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_TABLES = """
CREATE TABLE job (
    id uuid PRIMARY KEY,
    owner text NOT NULL,
    task_type text NOT NULL,
    inference_type text NOT NULL CHECK (inference_type IN ('Async', 'Real-time')),
    status text NOT NULL CHECK (status IN ('created', 'inprogress', 'succeed', 'failed')),
    endpoint_id uuid NOT NULL,
    endpoint_name text NOT NULL,
    instance_type text NOT NULL,
    models jsonb NOT NULL,
    input_url text,
    payload_string text,
    create_time timestamptz NOT NULL,
    payload jsonb,
    payload_sha256 text,
    num_images integer NOT NULL CHECK (num_images >= 0),
    output_id uuid,
    submit_time timestamptz,
    priority_class smallint NOT NULL CHECK (priority_class IN (0, 1)),
    cost_seconds double precision NOT NULL CHECK (cost_seconds >= 0),
    virtual_start double precision,
    base_model_key text NOT NULL,
    passed_over integer NOT NULL,
    lease_id uuid,
    worker_id text,
    is_running boolean NOT NULL,
    claim_time timestamptz,
    start_time timestamptz,
    num_claims integer NOT NULL,
    num_lost integer NOT NULL,
    result_lease uuid,
    image_names jsonb,
    failure text,
    complete_time timestamptz,
    timings jsonb,
    CONSTRAINT lease_has_worker CHECK ((lease_id IS NULL) = (worker_id IS NULL)),
    CONSTRAINT only_inprogress_is_leased CHECK (lease_id IS NULL OR status = 'inprogress'),
    CONSTRAINT only_leased_runs CHECK (NOT is_running OR lease_id IS NOT NULL),
    CONSTRAINT inprogress_is_in_queue CHECK (
        status <> 'inprogress' OR (
            submit_time IS NOT NULL AND virtual_start IS NOT NULL AND complete_time IS NULL
            AND (jsonb_typeof(payload) = 'object' OR payload_sha256 IS NOT NULL))),
    CONSTRAINT succeed_has_result CHECK (
        (status = 'succeed') = (result_lease IS NOT NULL) AND (status <> 'succeed' OR image_names IS NOT NULL)),
    CONSTRAINT failed_has_reason CHECK ((status = 'failed') = (failure IS NOT NULL)),
    CONSTRAINT ended_has_time CHECK ((status IN ('succeed', 'failed')) = (complete_time IS NOT NULL))
);
CREATE INDEX job_queue ON job (endpoint_id, priority_class, virtual_start, id)
    WHERE status = 'inprogress' AND lease_id IS NULL;
CREATE UNIQUE INDEX job_lease ON job (lease_id) WHERE lease_id IS NOT NULL;
CREATE INDEX job_worker ON job (endpoint_id, worker_id) WHERE lease_id IS NOT NULL;
CREATE UNIQUE INDEX job_result ON job (result_lease) WHERE result_lease IS NOT NULL;
CREATE INDEX job_newest ON job (task_type, create_time DESC, id DESC);
CREATE INDEX job_newest_of_owner ON job (owner, task_type, create_time DESC, id DESC);

CREATE TABLE worker (
    endpoint_id uuid NOT NULL,
    worker_id text NOT NULL,
    stream_id uuid NOT NULL,
    device text NOT NULL,
    version text NOT NULL,
    last_seen timestamptz NOT NULL,
    PRIMARY KEY (endpoint_id, worker_id)
);
CREATE TABLE user_clock (
    endpoint_id uuid NOT NULL,
    username text NOT NULL,
    virtual_time double precision NOT NULL,
    PRIMARY KEY (endpoint_id, username)
);
CREATE TABLE retired_endpoint (
    endpoint_id uuid PRIMARY KEY,
    reason text NOT NULL
);
"""


def upgrade() -> None:
    """Creates everything."""
    op.execute(_TABLES)


def downgrade() -> None:
    """Drops everything."""
    op.execute("DROP TABLE retired_endpoint, user_clock, worker, job")
