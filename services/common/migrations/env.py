"""Alembic's environment for every service: one transaction under an advisory lock, for replicas that start at once.

A schema that a newer version has made is left as it is: this one may be the replica that is upgraded last, or what a
rollback brings back.
"""

import structlog
from alembic import context
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, pool, text

config = context.config
engine = create_engine(config.attributes["url"], poolclass=pool.NullPool)
with engine.connect() as connection, connection.begin():
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": config.attributes["lock"]})
    current = MigrationContext.configure(connection).get_current_revision()
    if current is None or current in {script.revision for script in context.script.walk_revisions()}:
        context.configure(connection=connection, target_metadata=None)
        with context.begin_transaction():
            context.run_migrations()
    else:
        structlog.get_logger().warning("the database is of a newer version of this service", revision=current)
engine.dispose()
