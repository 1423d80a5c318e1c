"""Checkpoints that the workers of an endpoint keep ready."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the columns. Nothing is pinned so far, and there is nothing to tell."""
    op.add_column("endpoints", sa.Column("pinned", sa.ARRAY(sa.Text), nullable=False, server_default="{}"))
    op.add_column("endpoints", sa.Column("are_pins_told", sa.Boolean, nullable=False, server_default="true"))


def downgrade() -> None:
    """Forgets them."""
    op.drop_column("endpoints", "are_pins_told")
    op.drop_column("endpoints", "pinned")
