"""Owns the command `esd audit verify`: whether the services' audits are as they were written."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.local.home import AUDITED, Home
from deploy.local.terminal import HomeOption, fail, folder

if TYPE_CHECKING:
    from services.common.audit import Head

app = typer.Typer(help="The record of who changed what.", no_args_is_help=True)

_MAX_SHOWN = 20


@app.callback()
def _group() -> None:
    """The record of who changed what."""


@app.command()
def verify(
    service: Annotated[
        list[str] | None, typer.Option(help=f"Only this service: {', '.join(AUDITED)}. May be repeated.")
    ] = None,
    log: Annotated[
        list[Path] | None, typer.Option(help="A log of the services, with the heads that they logged. May be repeated.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Check the audits of the stack that runs here. Exits with 1 if anything is wrong.

    Every row that was altered, taken out, moved or slipped in is named. Rows cut off at the end are noticed by the
    heads in the log (each service logs its own once a minute, at its start and at its end): so give the logs, and keep
    them where whoever can write to the database cannot. What was cut off after the last logged head cannot be seen.
    """
    from deploy.local.stack import read_state
    from services.common.audit import logged_heads

    services = service or list(AUDITED)
    if unknown := [name for name in services if name not in AUDITED]:
        fail(f"--service {unknown[0]}: there is no such audit (possible: {', '.join(AUDITED)})")
    heads: dict[str, set[Head]] = {}
    for file in log or []:
        try:
            found = logged_heads(file.read_text(errors="replace"))
        except OSError as error:
            fail(f"--log {file}: {error.strerror}")
        for name, logged in found.items():
            heads.setdefault(name, set()).update(logged)
    state = read_state(folder(home))
    if state is None:
        fail(f"no stack runs in {folder(home)}: start one with `esd up`")
    port = state.processes["postgres"].port or 0
    verdicts = [asyncio.run(_verify(Home(folder(home)), port, name, heads.get(name, set()))) for name in services]
    raise typer.Exit(0 if all(verdicts) else 1)


async def _verify(home: Home, port: int, service: str, heads: set[Head]) -> bool:
    from deploy.local.postgres import Postgres
    from services.common.audit import verify
    from services.common.database import Database
    from services.common.errors import Unavailable

    database = Database(Postgres(home, port).url(service), pool_size=1)
    try:
        key = home.audit_key_file(service).read_text().strip()
        verdict = await verify(database, key, heads)
    except Unavailable as error:
        fail(f"{service}: {error}")
    finally:
        await database.dispose()
    if heads:
        known = f"the log's last head is row {max(sequence for sequence, _ in heads)}"
    else:
        known = "no head of it was given (--log), so rows cut off at the end cannot be seen"
    typer.echo(f"{service}: {verdict.num_rows} rows; {known}")
    for problem in verdict.problems[:_MAX_SHOWN]:
        typer.echo(f"  {problem}")
    if len(verdict.problems) > _MAX_SHOWN:
        typer.echo(f"  … and {len(verdict.problems) - _MAX_SHOWN} more")
    typer.echo("  broken" if verdict.problems else "  whole")
    return not verdict.problems
