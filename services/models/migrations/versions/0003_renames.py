"""Where an object goes that is being renamed."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the column."""
    op.add_column("checkpoint_files", sa.Column("next_key", sa.Text))


def downgrade() -> None:
    """Removes the column."""
    op.drop_column("checkpoint_files", "next_key")
