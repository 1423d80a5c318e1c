"""trainings, what was noted of them, their loss curves, objects to be removed."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_TABLES = """
CREATE TABLE training (
    id uuid PRIMARY KEY,
    owner text NOT NULL,
    status text NOT NULL CHECK (status IN
        ('Initial', 'Starting', 'Downloading', 'Training', 'Uploading', 'Completed', 'Failed', 'Stopped')),
    create_time timestamptz NOT NULL,
    params jsonb NOT NULL,
    config jsonb NOT NULL,
    fm_type text NOT NULL CHECK (fm_type IN ('sd_1_5', 'sd_xl')),
    instance_type text NOT NULL,
    deadline_seconds integer CHECK (deadline_seconds > 0),
    base jsonb NOT NULL,
    dataset_prefix text NOT NULL,
    regularisation_prefix text NOT NULL,
    session uuid,
    num_kept bigint NOT NULL,
    state jsonb,
    files jsonb NOT NULL,
    progress jsonb,
    waits_for text NOT NULL,
    outcome text CHECK (outcome IN ('Completed', 'Failed', 'Stopped')),
    reason text NOT NULL,
    end_time timestamptz,
    is_settled boolean NOT NULL,
    CONSTRAINT ended_has_time CHECK ((outcome IS NULL) = (end_time IS NULL)),
    CONSTRAINT only_ended_is_settled CHECK (NOT is_settled OR outcome IS NOT NULL),
    CONSTRAINT settled_shows_outcome CHECK (NOT is_settled OR status = outcome),
    CONSTRAINT ended_shows_outcome CHECK (
        (status IN ('Completed', 'Failed', 'Stopped')) <= (outcome IS NOT NULL AND status = outcome))
);
CREATE INDEX training_owner ON training (owner, create_time DESC, id DESC);
CREATE INDEX training_newest ON training (create_time DESC, id DESC);
CREATE INDEX training_unsettled ON training (create_time) WHERE NOT is_settled;

CREATE TABLE training_event (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    training_id uuid NOT NULL REFERENCES training ON DELETE CASCADE,
    kind text NOT NULL CHECK (kind IN ('log', 'saved', 'preview')),
    data jsonb NOT NULL,
    time timestamptz NOT NULL
);
CREATE INDEX training_event_order ON training_event (training_id, id);

CREATE TABLE training_metric (
    training_id uuid NOT NULL REFERENCES training ON DELETE CASCADE,
    step integer NOT NULL CHECK (step > 0),
    epoch integer NOT NULL,
    loss double precision NOT NULL,
    average_loss double precision NOT NULL,
    learning_rates jsonb NOT NULL,
    PRIMARY KEY (training_id, step)
);

CREATE TABLE leftover (
    prefix text PRIMARY KEY,
    due_time timestamptz NOT NULL,
    final_time timestamptz NOT NULL
);
CREATE INDEX leftover_due ON leftover (due_time);
"""


def upgrade() -> None:
    """Makes the tables."""
    op.execute(_TABLES)


def downgrade() -> None:
    """Removes them."""
    op.execute("DROP TABLE training_metric, training_event, training, leftover")
