"""Checkpoints and their files."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the first tables. A name belongs to one file of all checkpoints, as long as that file is wanted."""
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("owners", sa.ARRAY(sa.Text), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("params", JSONB, nullable=False),
        sa.Column("error", sa.Text),
    )
    op.create_index("checkpoints_newest", "checkpoints", [sa.text("created_at DESC"), sa.text("id DESC")])
    op.create_index("checkpoints_owners", "checkpoints", ["owners"], postgresql_using="gin")
    op.create_table(
        "checkpoint_files",
        sa.Column("checkpoint_id", sa.Uuid, sa.ForeignKey("checkpoints.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("upload_id", sa.Text, nullable=False),
        sa.Column("parts_number", sa.Integer, nullable=False),
        sa.Column("complete", sa.Boolean, nullable=False),
        sa.Column("reserved", sa.Boolean, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
    )
    op.create_index(
        "checkpoint_files_name", "checkpoint_files", ["name"], unique=True, postgresql_where=sa.text("reserved")
    )


def downgrade() -> None:
    """Removes the tables."""
    op.drop_table("checkpoint_files")
    op.drop_table("checkpoints")
