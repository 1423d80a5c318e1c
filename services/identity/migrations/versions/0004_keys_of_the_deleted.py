"""Keys outlive their owners, revoked."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Lets the keys of deleted users stay as rows: the first key must not come back at the next start."""
    op.drop_constraint("api_keys_owner_fkey", "api_keys", type_="foreignkey")


def downgrade() -> None:
    """Removes the keys of deleted users."""
    op.execute("DELETE FROM api_keys WHERE owner NOT IN (SELECT username FROM users)")
    op.create_foreign_key("api_keys_owner_fkey", "api_keys", "users", ["owner"], ["username"], ondelete="CASCADE")
