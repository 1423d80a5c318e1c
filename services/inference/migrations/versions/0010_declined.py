"""Which workers have no room for a job on their disks."""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the column."""
    op.execute("ALTER TABLE job ADD COLUMN declined_by text[] NOT NULL DEFAULT '{}'")


def downgrade() -> None:
    """Takes it away."""
    op.execute("ALTER TABLE job DROP COLUMN declined_by")
