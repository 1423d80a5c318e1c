"""Which trainers had a training before."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nobody knows of those that there were."""
    op.add_column("training", sa.Column("earlier_sessions", JSONB, nullable=False, server_default="[]"))


def downgrade() -> None:
    """Removes it."""
    op.drop_column("training", "earlier_sessions")
