"""The audit."""

from alembic import op

from services.common import audit

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the table, to which rows can only be added."""
    for statement in audit.CREATE_TABLE:
        op.execute(statement)


def downgrade() -> None:
    """Removes the table."""
    for statement in audit.DROP_TABLE:
        op.execute(statement)
