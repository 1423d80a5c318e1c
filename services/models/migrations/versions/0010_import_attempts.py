"""What the attempts at an import have come to."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """When the first attempt began, and how many have failed since the last part that came."""
    op.add_column("imports", sa.Column("began_at", sa.DateTime(timezone=True)))
    op.add_column("imports", sa.Column("num_failures", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    """Removes the columns."""
    op.drop_column("imports", "num_failures")
    op.drop_column("imports", "began_at")
