"""Whether a training has begun."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Those that there are have begun."""
    op.add_column("training", sa.Column("is_begun", sa.Boolean, nullable=False, server_default=sa.true()))


def downgrade() -> None:
    """Removes it."""
    op.drop_column("training", "is_begun")
