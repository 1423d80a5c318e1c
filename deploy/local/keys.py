"""Owns the commands `esd keys create|list|revoke`: API keys through the gateway's REST API."""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.parse import urlencode

import typer

from deploy.local.terminal import Gateway, HomeOption, KeyFileOption, UrlOption, fail

app = typer.Typer(help="API keys: make, show and revoke them.", no_args_is_help=True)


@app.command()
def create(
    username: Annotated[str, typer.Argument(help="Whose key it is; the user must exist.")],
    days: Annotated[
        int | None, typer.Option(min=1, max=3650, help="How long it is good; for ever if not given.")
    ] = None,
    impersonate: Annotated[bool, typer.Option("--impersonate", help="It may act for any user.")] = False,
    home: HomeOption = None,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
) -> None:
    """Make a key for a user and print it: it is shown this once, and alone on standard output."""
    body: dict[str, Any] = {"username": username, "impersonate": impersonate}
    made = Gateway.find(home, url, key_file).call(
        "POST", "/keys", **body, **({"expires_in_days": days} if days else {})
    )
    until = f"until {made['expires']} UTC" if made.get("expires") else "without an end"
    typer.echo(f"key {made['id']} of {username}, {until}; this is the only time that it is shown:", err=True)
    typer.echo(made["key"])


@app.command(name="list")
def list_keys(
    username: Annotated[str | None, typer.Option("--user", help="Only this user's keys.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As the API answers.")] = False,
    home: HomeOption = None,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
) -> None:
    """Show the keys that are not revoked, newest first: never their values."""
    keys = _keys(Gateway.find(home, url, key_file), username)
    if as_json:
        typer.echo(json.dumps(keys, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "user", "begins with", "acts for", "created", "last used", "ends", box=None)
    for key in keys:
        acts_for = "anybody" if key["impersonate"] else "its user"
        row = [key["id"], key["username"], key["prefix"] + "…", acts_for]
        table.add_row(*row, *(_to_the_minute(key.get(name)) for name in ("created", "last_used", "expires")))
    # As wide as it is: what a narrow terminal wraps is still there, such as the ids that `revoke` wants.
    console = Console()
    console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(table)


@app.command()
def revoke(
    ids: Annotated[list[str], typer.Argument(help="The keys' ids, as `esd keys list` shows them.")],
    home: HomeOption = None,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
) -> None:
    """End keys for good. Should one not exist, none is revoked."""
    gateway = Gateway.find(home, url, key_file)
    known = {key["id"] for key in _keys(gateway)}
    if unknown := [key_id for key_id in ids if key_id not in known]:
        fail(f"there is no key with the id {', '.join(unknown)}; `esd keys list` shows those that are")
    gateway.call("DELETE", "/keys", key_id_list=ids)
    typer.echo(f"revoked: {', '.join(ids)}")


def _keys(gateway: Gateway, username: str | None = None) -> list[dict[str, Any]]:
    query = f"?{urlencode({'username': username})}" if username else ""
    keys: list[dict[str, Any]] = gateway.call("GET", f"/keys{query}").get("keys", [])
    return keys


def _to_the_minute(time: str | None) -> str:
    return time[:16] if time else "-"
