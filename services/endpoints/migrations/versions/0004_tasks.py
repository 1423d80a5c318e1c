"""Tasks."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the table, and the index by which the control loop finds what it has to do."""
    op.create_table(
        "tasks",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("service", sa.Text, nullable=False),
        sa.Column("instance_type", sa.Text, nullable=False),
        sa.Column("max_attempts", sa.Integer, nullable=False),
        sa.Column("deadline_seconds", sa.BigInteger),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("stop_requested", sa.Boolean, nullable=False),
        sa.Column("num_attempts", sa.Integer, nullable=False),
        sa.Column("creation_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("begin_time", sa.DateTime(timezone=True)),
        sa.Column("end_time", sa.DateTime(timezone=True)),
        sa.Column("is_cleared", sa.Boolean, nullable=False),
        sa.Column("pid", sa.Integer),
        sa.Column("start_time", sa.Text),
        sa.Column("gpu", sa.Text),
    )
    op.create_index("tasks_uncleared", "tasks", ["creation_time"], postgresql_where=sa.text("NOT is_cleared"))


def downgrade() -> None:
    """Forgets all tasks."""
    op.drop_table("tasks")
