"""Cancelled jobs, and objects that wait to be removed."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the column and the table."""
    op.execute("""
ALTER TABLE job ADD COLUMN is_cancelled boolean NOT NULL DEFAULT false;
ALTER TABLE job ADD CONSTRAINT cancelled_is_failed CHECK (NOT is_cancelled OR status = 'failed');
CREATE TABLE leftover (
    prefix text PRIMARY KEY,
    due_time timestamptz NOT NULL,
    final_time timestamptz NOT NULL
);
CREATE INDEX leftover_due ON leftover (due_time);
""")


def downgrade() -> None:
    """Takes them away."""
    op.execute("DROP TABLE leftover; ALTER TABLE job DROP COLUMN is_cancelled")
