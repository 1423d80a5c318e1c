"""Names of deleted datasets, kept for their owners."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the table. A row is there as long as URLs may be valid that upload into the folder of the dataset."""
    op.create_table(
        "kept_dataset_names",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("owners", sa.ARRAY(sa.Text), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
    )


def downgrade() -> None:
    """Removes the table."""
    op.drop_table("kept_dataset_names")
