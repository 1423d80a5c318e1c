"""Checkpoints that a training makes."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Their objects have a folder of their own, that of the training."""
    op.add_column("checkpoints", sa.Column("folder", sa.Text))


def downgrade() -> None:
    """Removes the column."""
    op.drop_column("checkpoints", "folder")
