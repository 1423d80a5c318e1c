"""Raw answers that are not written yet."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the column."""
    op.execute("""
ALTER TABLE job
    ADD COLUMN is_output_missing boolean NOT NULL DEFAULT false,
    ADD CONSTRAINT only_succeed_lacks_output CHECK (NOT is_output_missing OR status = 'succeed');
CREATE INDEX job_without_output ON job (complete_time) WHERE is_output_missing;
""")


def downgrade() -> None:
    """Takes it away."""
    op.execute("ALTER TABLE job DROP COLUMN is_output_missing")
