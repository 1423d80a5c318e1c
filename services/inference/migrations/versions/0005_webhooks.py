"""Webhooks: what a job says of its own, and a row for each job that has ended with one."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the columns, the table, and the trigger that fills it within whatever transaction ends a job."""
    op.execute("""
ALTER TABLE job ADD COLUMN webhook text, ADD COLUMN webhook_secret text;
ALTER TABLE job ADD CONSTRAINT webhook_is_signed CHECK ((webhook IS NULL) = (webhook_secret IS NULL));
CREATE TABLE webhook (
    job_id uuid PRIMARY KEY REFERENCES job (id) ON DELETE CASCADE,
    owner text NOT NULL,
    url text NOT NULL,
    message_id uuid NOT NULL,
    state text NOT NULL CHECK (state IN ('pending', 'delivered', 'dead')),
    create_time timestamptz NOT NULL,
    since_time timestamptz NOT NULL,
    due_time timestamptz NOT NULL,
    num_attempts integer NOT NULL,
    last_error text,
    end_time timestamptz,
    CONSTRAINT pending_has_no_end CHECK ((state = 'pending') = (end_time IS NULL))
);
CREATE INDEX webhook_due ON webhook (due_time) WHERE state = 'pending';
CREATE INDEX webhook_newest ON webhook (owner, create_time DESC, job_id DESC);

CREATE FUNCTION webhook_of_ended_job() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook (job_id, owner, url, message_id, state, create_time, since_time, due_time, num_attempts)
    VALUES (NEW.id, NEW.owner, NEW.webhook, gen_random_uuid(), 'pending', now(), now(), now(), 0)
    ON CONFLICT (job_id) DO UPDATE SET
        message_id = excluded.message_id, state = 'pending', since_time = now(), due_time = now(), num_attempts = 0,
        last_error = NULL, end_time = NULL;
    PERFORM pg_notify('webhooks_due', NEW.id::text);
    RETURN NULL;
END $$;
CREATE TRIGGER job_ended_with_webhook AFTER UPDATE OF status ON job FOR EACH ROW
    WHEN (NEW.webhook IS NOT NULL AND NEW.status IN ('succeed', 'failed') AND OLD.status NOT IN ('succeed', 'failed'))
    EXECUTE FUNCTION webhook_of_ended_job();
""")


def downgrade() -> None:
    """Removes them."""
    op.execute("""
DROP TRIGGER job_ended_with_webhook ON job;
DROP FUNCTION webhook_of_ended_job;
DROP TABLE webhook;
ALTER TABLE job DROP COLUMN webhook, DROP COLUMN webhook_secret;
""")
