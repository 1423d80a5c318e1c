"""How far watched jobs are, between replicas; the last successes of an endpoint, for estimates."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Creates the table and the index."""
    op.execute("""
        CREATE UNLOGGED TABLE job_progress (
            job_id uuid PRIMARY KEY,
            lease_id uuid NOT NULL,
            step integer NOT NULL,
            num_steps integer NOT NULL,
            preview bytea NOT NULL,
            num_previews integer NOT NULL,
            update_time timestamptz NOT NULL
        );
        CREATE INDEX job_last_successes ON job (endpoint_id, complete_time DESC) WHERE status = 'succeed';
    """)


def downgrade() -> None:
    """Drops both."""
    op.execute("DROP INDEX job_last_successes; DROP TABLE job_progress")
