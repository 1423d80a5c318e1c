"""What is shown of a key, when it was last used, and when it ends."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the columns. A revoked key's row stays, so that the first key does not come back at the next start."""
    op.add_column("api_keys", sa.Column("prefix", sa.Text, nullable=False, server_default=""))
    op.add_column("api_keys", sa.Column("last_used_at", sa.DateTime(timezone=True)))
    op.add_column("api_keys", sa.Column("expires_at", sa.DateTime(timezone=True)))
    op.add_column("api_keys", sa.Column("revoked_at", sa.DateTime(timezone=True)))


def downgrade() -> None:
    """Removes the columns, and the keys that must not work again."""
    op.execute("DELETE FROM api_keys WHERE revoked_at IS NOT NULL OR expires_at IS NOT NULL")
    for column in ("prefix", "last_used_at", "expires_at", "revoked_at"):
        op.drop_column("api_keys", column)
