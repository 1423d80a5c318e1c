"""Counts of checkpoints, so that a list knows its number of pages without reading all of it."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# In the order of the key, so that two changes at once wait for each other instead of for one another in a ring.
_COUNT = """
CREATE FUNCTION count_checkpoints() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'TRUNCATE' THEN
    DELETE FROM checkpoint_counts;
  ELSIF TG_OP = 'INSERT' THEN
    {add} SELECT md5(owners::text), type, status, owners, count(*) FROM added
    GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3 {merge};
  ELSIF TG_OP = 'DELETE' THEN
    {add} SELECT md5(owners::text), type, status, owners, -count(*) FROM removed
    GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3 {merge};
  ELSE
    {add} SELECT md5(owners::text), type, status, owners, sum(n)
    FROM (SELECT *, 1 AS n FROM added UNION ALL SELECT *, -1 AS n FROM removed) AS changed
    GROUP BY 1, 2, 3, 4 HAVING sum(n) <> 0 ORDER BY 1, 2, 3 {merge};
  END IF;
  RETURN NULL;
END $$
""".format(  # noqa: S608 - two pieces of our own
    add="INSERT INTO checkpoint_counts AS kept (owners_md5, type, status, owners, num)",
    merge="ON CONFLICT (owners_md5, type, status) DO UPDATE SET num = kept.num + excluded.num",
)
_TRIGGER = """
CREATE TRIGGER count_{event} AFTER {event} ON checkpoints {tables}
FOR EACH STATEMENT EXECUTE FUNCTION count_checkpoints()
"""
_TABLES = {
    "INSERT": "REFERENCING NEW TABLE AS added",
    "DELETE": "REFERENCING OLD TABLE AS removed",
    "UPDATE": "REFERENCING OLD TABLE AS removed NEW TABLE AS added",
    "TRUNCATE": "",
}


def upgrade() -> None:
    """Makes the counts, and the index for lists of one type."""
    op.create_index(
        "checkpoints_newest_of_type", "checkpoints", ["type", sa.text("created_at DESC"), sa.text("id DESC")]
    )
    op.create_table(
        "checkpoint_counts",
        sa.Column("owners_md5", sa.Text, primary_key=True),  # the owners themselves may be too long for an index
        sa.Column("type", sa.Text, primary_key=True),
        sa.Column("status", sa.Text, primary_key=True),
        sa.Column("owners", sa.ARRAY(sa.Text), nullable=False),
        sa.Column("num", sa.BigInteger, nullable=False),
    )
    op.execute("""
        INSERT INTO checkpoint_counts (owners_md5, type, status, owners, num)
        SELECT md5(owners::text), type, status, owners, count(*) FROM checkpoints GROUP BY 1, 2, 3, 4
    """)
    op.execute(_COUNT)
    for event, tables in _TABLES.items():
        op.execute(_TRIGGER.format(event=event, tables=tables))


def downgrade() -> None:
    """Removes them."""
    for event in _TABLES:
        op.execute(f"DROP TRIGGER count_{event} ON checkpoints")
    op.execute("DROP FUNCTION count_checkpoints")
    op.drop_table("checkpoint_counts")
    op.drop_index("checkpoints_newest_of_type", "checkpoints")
