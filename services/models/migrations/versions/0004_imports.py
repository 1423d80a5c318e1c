"""Imports of checkpoints by URL."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the table. A row is there as long as its import is under way; its URL may hold a key, so it goes then."""
    op.add_column("checkpoints", sa.Column("source", sa.Text))
    op.create_index("checkpoints_open", "checkpoints", ["created_at"], postgresql_where=sa.text("status = 'Initial'"))
    op.create_table(
        "imports",
        sa.Column("checkpoint_id", sa.Uuid, sa.ForeignKey("checkpoints.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("run", sa.Uuid),
        sa.Column("validator", sa.Text, nullable=False),
        sa.Column("parts", JSONB, nullable=False),
        sa.Column("bytes_done", sa.BigInteger, nullable=False),
        sa.Column("bytes_total", sa.BigInteger),
    )


def downgrade() -> None:
    """Removes the table."""
    op.drop_table("imports")
    op.drop_index("checkpoints_open", "checkpoints")
    op.drop_column("checkpoints", "source")
