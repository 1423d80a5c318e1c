"""Scaling, events, and checkpoints to preload."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Gives each endpoint the number of workers that it has been meant to have so far."""
    op.add_column("endpoints", sa.Column("num_workers", sa.Integer))
    op.execute(
        "UPDATE endpoints SET num_workers = CASE WHEN autoscaling "
        "THEN least(greatest(num_initial, num_min), num_max) ELSE num_initial END"
    )
    op.alter_column("endpoints", "num_workers", nullable=False)
    op.add_column("endpoints", sa.Column("need_since", sa.DateTime(timezone=True)))
    op.add_column("endpoints", sa.Column("surplus_since", sa.DateTime(timezone=True)))
    op.add_column("endpoints", sa.Column("surplus_peak", sa.Integer, nullable=False, server_default="0"))
    op.create_table(
        "events",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("endpoint_id", sa.Text, sa.ForeignKey("endpoints.id", ondelete="CASCADE"), nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("clock_timestamp()")),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
    )
    op.create_index("events_newest", "events", ["endpoint_id", "time", "id"])


def downgrade() -> None:
    """Forgets all of it."""
    op.drop_table("events")
    for name in ("surplus_peak", "surplus_since", "need_since", "num_workers"):
        op.drop_column("endpoints", name)
