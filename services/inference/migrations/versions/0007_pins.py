"""Checkpoints that the workers of an endpoint keep ready."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Creates the table."""
    op.execute("CREATE TABLE pinned_models (endpoint_id uuid PRIMARY KEY, names jsonb NOT NULL)")


def downgrade() -> None:
    """Removes it."""
    op.execute("DROP TABLE pinned_models")
