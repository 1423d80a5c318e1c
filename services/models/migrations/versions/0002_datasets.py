"""Datasets and their files."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the tables. A file is identified by its object, so that uploading it again replaces it."""
    op.create_table(
        "datasets",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("prefix", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("owners", sa.ARRAY(sa.Text), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("params", JSONB, nullable=False),
    )
    op.create_index("datasets_newest", "datasets", [sa.text("created_at DESC"), sa.text("name DESC")])
    op.create_index("datasets_owners", "datasets", ["owners"], postgresql_using="gin")
    op.create_table(
        "dataset_items",
        sa.Column("dataset_name", sa.Text, sa.ForeignKey("datasets.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("params", JSONB, nullable=False),
    )


def downgrade() -> None:
    """Removes the tables."""
    op.drop_table("dataset_items")
    op.drop_table("datasets")
