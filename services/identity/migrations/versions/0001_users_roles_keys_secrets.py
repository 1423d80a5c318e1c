"""Users, roles, API keys and secrets."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the first tables. Keys and secrets are stored as the SHA-256 of their value, in hexadecimal."""
    op.create_table(
        "roles",
        sa.Column("role_name", sa.Text, primary_key=True),
        sa.Column("creator", sa.Text, nullable=False),
        sa.Column("permissions", sa.ARRAY(sa.Text), nullable=False),
    )
    op.create_table(
        "users",
        sa.Column("username", sa.Text, primary_key=True),
        sa.Column("roles", sa.ARRAY(sa.Text), nullable=False),
        sa.Column("creator", sa.Text, nullable=False),
        sa.Column("password_hash", sa.Text),
        sa.Column("password_encrypted", sa.Text),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("key_hash", sa.Text, nullable=False, unique=True),
        sa.Column("owner", sa.Text, sa.ForeignKey("users.username", ondelete="CASCADE"), nullable=False, index=True),
        sa.Column("impersonate", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    )
    op.create_table(
        "secrets",
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("subject", sa.Text, primary_key=True),
        sa.Column("secret_hash", sa.Text, nullable=False, unique=True),
    )


def downgrade() -> None:
    """Removes the tables."""
    for table in ("secrets", "api_keys", "users", "roles"):
        op.drop_table(table)
