"""Alembic's environment for every service: one transaction under an advisory lock, for replicas that start at once."""

from alembic import context
from sqlalchemy import create_engine, pool, text

config = context.config
engine = create_engine(config.attributes["url"], poolclass=pool.NullPool)
with engine.connect() as connection, connection.begin():
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": config.attributes["lock"]})
    context.configure(connection=connection, target_metadata=None)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
