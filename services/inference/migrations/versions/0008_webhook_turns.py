"""The claim of webhooks looks for the next one of each owner."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Replaces the index by time."""
    op.execute("""
DROP INDEX webhook_due;
CREATE INDEX webhook_next ON webhook (owner, due_time) WHERE state = 'pending';
""")


def downgrade() -> None:
    """Brings it back."""
    op.execute("""
DROP INDEX webhook_next;
CREATE INDEX webhook_due ON webhook (due_time) WHERE state = 'pending';
""")
