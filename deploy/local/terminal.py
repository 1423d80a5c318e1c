"""Owns what the commands of `esd` share: the home, the gateway and the way they fail."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from deploy.local.home import default_home

HomeOption = Annotated[Path | None, typer.Option("--home", help="Data and secrets; ESD_HOME, else ~/.esd.")]
UrlOption = Annotated[
    str | None, typer.Option("--url", help="The gateway of another machine; default: that of the stack that runs here.")
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option("--key-file", help="The file with the API key to ask with; default: the home's first key."),
]
_SECONDS = 30.0


def fail(message: str) -> NoReturn:
    """Says what is wrong, and ends with 1."""
    typer.echo(message, err=True)
    raise typer.Exit(1)


def folder(home: Path | None) -> Path:
    """The home that is meant."""
    return home.expanduser().resolve() if home is not None else default_home()


@dataclass(frozen=True)
class Gateway:
    """A gateway and a key to ask it with, for its owner or for another user.

    What goes to `this_machine` is asked past proxies, and its certificate is not looked at.
    """

    url: str
    key_file: Path
    this_machine: bool = False
    username: str | None = None

    @classmethod
    def find(cls, home: Path | None, url: str | None, key_file: Path | None, username: str | None = None) -> Gateway:
        """The one that is named, else that of the stack that runs on the home."""
        from deploy.local.stack import read_state

        if url is not None:
            if key_file is None:
                fail("--url needs --key-file: a file with an API key of that gateway")
            return cls(url.rstrip("/"), key_file, username=username)
        state = read_state(folder(home))
        if state is None:
            fail(
                f"no stack runs in {folder(home)}: start one with `esd up`, or name a gateway with --url and --key-file"
            )
        return cls(state.probe_url, key_file or Path(state.api_key_file), this_machine=True, username=username)

    def call(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """The data of the answer; what is refused ends the command with the service's own sentence."""
        import httpx

        try:
            headers = {"x-api-key": self.key_file.read_text().strip()}
            if self.username is not None:
                headers["username"] = self.username
            answer = httpx.request(method, self.url + path, json=body or None, headers=headers, **self._way())
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--key-file {self.key_file}: {getattr(error, 'strerror', None) or 'this is no text'}")
        except (httpx.TransportError, httpx.InvalidURL) as error:
            fail(f"the gateway at {self.url} does not answer: {error}")
        try:
            envelope: dict[str, Any] = answer.json() if answer.content else {}
        except ValueError:
            fail(f"{self.url} is no ESD gateway: {method} {path} was answered with {answer.status_code} and no JSON")
        if answer.status_code == httpx.codes.FORBIDDEN and envelope.get("message") == "Forbidden":
            fail(f"the key in {self.key_file} does not open {self.url}: it is wrong, revoked or over")
        if answer.is_error:
            fail(f"{envelope.get('message', 'refused')} ({answer.status_code})")
        data: dict[str, Any] = envelope.get("data") or {}
        return data

    def download(self, url: str) -> bytes:
        """What lies behind a presigned URL."""
        import httpx

        try:
            answer = httpx.get(url, **self._way()).raise_for_status()
        except httpx.HTTPError as error:
            fail(f"the result cannot be had: {error}")
        return answer.content

    def _way(self) -> dict[str, Any]:
        return {"verify": not self.this_machine, "trust_env": not self.this_machine, "timeout": _SECONDS}
