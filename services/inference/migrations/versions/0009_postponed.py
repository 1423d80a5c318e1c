"""Since when a job is given back because the object store is away."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the column."""
    op.execute("ALTER TABLE job ADD COLUMN postponed_since timestamptz")


def downgrade() -> None:
    """Takes it away."""
    op.execute("ALTER TABLE job DROP COLUMN postponed_since")
