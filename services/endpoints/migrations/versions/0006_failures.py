"""How many attempts of a task have failed."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the column. The attempts of a task that is under way are counted from here on."""
    op.add_column("tasks", sa.Column("num_failed", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    """Forgets them."""
    op.drop_column("tasks", "num_failed")
