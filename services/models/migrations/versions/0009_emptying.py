"""Folders of deleted datasets that are being emptied."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Until when somebody empties the folder of a kept name; null: it is empty."""
    op.add_column("kept_dataset_names", sa.Column("emptying_until", sa.DateTime(timezone=True)))
    # From now on a name is kept only while no dataset has it.
    op.execute("DELETE FROM kept_dataset_names WHERE name IN (SELECT name FROM datasets)")


def downgrade() -> None:
    """Removes the column."""
    op.drop_column("kept_dataset_names", "emptying_until")
