"""Owns the journal that PostgreSQL keeps of every change of a job's row, and says which changes may be."""

from services.inference.rows import LAST_ATTEMPT, MAX_LOST, Job
from services.inference.states import TRANSITIONS, State

MAX_QUEUED = 3  # jobs of one user; the service must have the same quota
DEADLINE_SECONDS = 0.3  # of jobs that have one
LEASED = {State.HELD, State.RUNNING}
CHANGES = {(old, new) for olds, news in TRANSITIONS.values() for old in olds for new in news}
# `waiting`: the owner's jobs that wait since their start. `beside`: what else their worker holds.
JOURNAL = """
CREATE TABLE journal (number bigserial, old jsonb, new jsonb, waiting bigint, beside bigint);
CREATE FUNCTION write_journal() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO journal (old, new, waiting, beside) VALUES (to_jsonb(OLD), to_jsonb(NEW),
        (SELECT count(*) FROM job WHERE owner = NEW.owner AND status = 'inprogress' AND num_claims = 0),
        (SELECT count(*) FROM job WHERE endpoint_id = NEW.endpoint_id AND worker_id = NEW.worker_id AND id <> NEW.id));
    RETURN NULL;
END $$;
CREATE TRIGGER journal AFTER INSERT OR UPDATE OR DELETE ON job FOR EACH ROW EXECUTE FUNCTION write_journal();
"""


def judge(old: Job | None, new: Job, waiting: int, beside: int, said: str) -> None:
    """Whether a change of a job's row is one that may be; the first one makes the row. `said` are the last words that
    its worker had for the lease, whether they were heard or not."""
    if old is not None and old.state == new.state:
        for name in ("lease_id", "worker_id", "result_lease", "image_names", "failure", "num_claims", "num_lost"):
            assert getattr(old, name) == getattr(new, name), name
        return
    assert (old.state if old else State.CREATED, new.state) in CHANGES | {(State.CREATED, State.CREATED)}
    if old is None or (new.state == State.QUEUED and old.state not in LEASED):
        assert (new.num_claims, new.num_lost) == (0, 0)
        assert waiting <= MAX_QUEUED
        return
    reason = new.failure or ""
    is_loss = "worker was lost" in reason or new.state == State.QUEUED
    counts = old.state == State.RUNNING or not old.is_last_attempt
    may_be_given_back = said in {"cancelled", "postponed", "declined"} or old.is_last_attempt
    assert new.num_lost == old.num_lost + (is_loss and counts) or (may_be_given_back and new.num_lost == old.num_lost)
    assert new.num_claims == old.num_claims + (new.state == State.HELD)
    if new.state == State.RUNNING:
        assert new.lease_id == old.lease_id
        assert beside == 0 or new.num_lost < LAST_ATTEMPT
    if new.state == State.SUCCEED:
        assert new.result_lease == old.lease_id
    if new.state == State.FAILED:
        assert (reason == f"the job was cancelled by {new.owner}") == new.is_cancelled
        assert "worker was lost" not in reason or new.num_lost == MAX_LOST
        assert "broke" not in reason or reason == f"{old.lease_id} broke"
        assert "deadline" not in reason or new.deadline_seconds == DEADLINE_SECONDS
