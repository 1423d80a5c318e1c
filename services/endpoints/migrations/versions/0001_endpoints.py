"""Endpoints and their workers."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "endpoints",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("instance_type", sa.Text, nullable=False),
        sa.Column("autoscaling", sa.Boolean, nullable=False),
        sa.Column("num_initial", sa.Integer, nullable=False),
        sa.Column("num_min", sa.Integer, nullable=False),
        sa.Column("num_max", sa.Integer, nullable=False),
        sa.Column("num_live", sa.Integer, nullable=False),
        sa.Column("owners", sa.ARRAY(sa.Text), nullable=False),
        sa.Column("creator", sa.Text, nullable=False),
        sa.Column("custom_extensions", sa.Text, nullable=False),
        sa.Column("custom_docker_image_uri", sa.Text, nullable=False),
        sa.Column("start_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("end_time", sa.DateTime(timezone=True)),
        sa.Column("error", sa.Text),
        sa.Column("is_retired", sa.Boolean, nullable=False),
    )
    op.create_index(
        "endpoints_live_name", "endpoints", ["name"], unique=True, postgresql_where=sa.text("status <> 'Deleting'")
    )
    op.create_table(
        "workers",
        sa.Column("endpoint_id", sa.Text, sa.ForeignKey("endpoints.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("slot", sa.Integer, primary_key=True),
        sa.Column("num_launches", sa.Integer, nullable=False),
        sa.Column("num_failures", sa.Integer, nullable=False),
        sa.Column("was_live", sa.Boolean, nullable=False),
        sa.Column("pid", sa.Integer),
        sa.Column("start_time", sa.Text),
        sa.Column("gpu", sa.Text),
    )


def downgrade() -> None:
    op.drop_table("workers")
    op.drop_table("endpoints")
