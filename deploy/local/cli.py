"""Owns the command `esd`: up, status, demo; keys, audit and verify are files of their own."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.local import audit, environment, keys, verify
from deploy.local.home import SERVICES, CannotRunError
from deploy.local.terminal import Gateway, HomeOption, fail, folder

if TYPE_CHECKING:
    from deploy.local.stack import State

app = typer.Typer(help="A self-hosted Stable Diffusion service on one machine.", no_args_is_help=True)
app.add_typer(keys.app, name="keys")
app.add_typer(audit.app, name="audit")
app.command()(verify.verify)

ListenOption = Annotated[
    str, typer.Option(envvar="ESD_LISTEN", help="The gateway's host:port; port 0 takes a free one.")
]
WebuiOption = Annotated[
    int | None, typer.Option(envvar="ESD_WEBUI_PORT", min=0, max=65535, help="A second port, for WebUI clients.")
]
ReplicasOption = Annotated[int, typer.Option(envvar="ESD_REPLICAS", min=1, max=8, help="Processes of each service.")]
InsecureOption = Annotated[bool, typer.Option(envvar="ESD_INSECURE", help="Listen beyond loopback without TLS.")]

SMALL_PART_BYTES = 5 * 2**20  # the smallest that S3 takes, so that the demo's own checkpoint needs several


def main() -> None:
    """The console script."""
    environment.settle()
    app()


@app.command()
def up(
    home: HomeOption = None,
    listen: ListenOption = "127.0.0.1:8080",
    webui_port: WebuiOption = None,
    insecure: InsecureOption = False,
    replicas: ReplicasOption = 1,
) -> None:
    """Run the whole stack in the foreground, until Ctrl-C."""
    from deploy.local.plan import Options
    from deploy.local.stack import run

    host, colon, port = listen.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 2**16):
        fail(f"ESD_LISTEN={listen}: host:port is wanted, with a port up to 65535, such as 127.0.0.1:8080")
    try:
        run(Options(folder(home), listen, webui_port, insecure, replicas))
    except CannotRunError as error:
        fail(str(error))


@app.command()
def status(home: HomeOption = None) -> None:
    """Show each process, its port and whether it works, and how full the disk is. Exits with 1 if something fails."""
    from rich.console import Console
    from rich.table import Table

    from deploy.local.stack import read_state

    state = read_state(folder(home))
    if state is None:
        fail(f"no stack runs in {folder(home)}: start one with `esd up`")
    health = asyncio.run(_health(state))
    typer.echo(f"{state.url} · key in {state.api_key_file}")
    has_room, room = _room(folder(home), state.reserve)
    typer.echo(room)
    table = Table()
    for column in ("process", "pid", "port", "state", "health"):
        table.add_column(column, justify="right" if column in {"pid", "port"} else "left")
    table.add_row("esd", str(state.pid), "", "RUNNING", "[green]ok[/]")
    for name, process in state.processes.items():
        sign = "[green]ok[/]" if health[name] else "[red]does not answer[/]"
        table.add_row(name, str(process.pid or ""), str(process.port or ""), process.state, sign)
    for name, pid in _workers(state.pid):
        table.add_row(name, str(pid), "", "RUNNING", "")
    Console().print(table)
    raise typer.Exit(0 if has_room and all(health.values()) else 1)


@app.command()
def demo(
    checkpoint: Annotated[
        Path | None, typer.Option(help="A .safetensors file; default: a tiny one, which draws coloured shapes.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw; there is one for either checkpoint.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels; default: 512, or 64 for the tiny checkpoint.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the pictures go; default: demo/ in the home.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the stack running afterwards, until Ctrl-C.")] = False,
    home: HomeOption = None,
    listen: ListenOption = "127.0.0.1:8080",
) -> None:
    """Start the stack (unless it runs) and draw a picture through its REST API."""
    from deploy.local.stack import Stack, StackFailedError, read_state

    if checkpoint is not None and not checkpoint.is_file():
        fail(f"--checkpoint {checkpoint}: there is no such file")
    path = folder(home)
    output = output or path / "demo"
    if (state := read_state(path)) is not None and not state.ready:
        typer.echo(f"waiting for the stack that is starting (pid {state.pid}); its log says how far it is")
    while state is not None and not state.ready:
        time.sleep(0.1)  # the state is a file of another process
        state = read_state(path)
    if state is not None:
        gateway = Gateway(state.probe_url, Path(state.api_key_file), this_machine=True)
        gateway.call("GET", "/ping")  # a key that was revoked or removed ends it here, in a sentence
        _draw(state.url, Path(state.api_key_file).read_text(), checkpoint, prompt, size, output)
        return
    stack = Stack(path, listen)
    typer.echo(f"starting the stack in {path} (log: {stack.log_file})")
    try:
        with stack:
            _draw(stack.url, stack.api_key, checkpoint, prompt, size, output)
            if keep:
                typer.echo(f"the stack keeps running at {stack.url} until Ctrl-C")
                signal.pause()
    except StackFailedError as error:
        fail(str(error))
    except KeyboardInterrupt:
        typer.echo("stopped")


def _draw(url: str, api_key: str, checkpoint: Path | None, prompt: str | None, size: int | None, output: Path) -> None:
    """The demo proper, and how to go on."""
    import httpx
    from rich.console import Console

    from deploy.local.demo import PART_BYTES, DemoFailed, Picture, run
    from gpu_worker import demo_model

    console = Console()
    part_bytes, usual_prompt, usual_size = PART_BYTES, "a lighthouse at dusk, oil painting", 512
    if checkpoint is None:
        checkpoint, part_bytes = demo_model.CHECKPOINT, SMALL_PART_BYTES
        usual_prompt, usual_size = demo_model.PROMPT, demo_model.SIDE
    size = size or usual_size
    picture = Picture(prompt or usual_prompt, size, size)
    try:
        files = run(url, api_key, checkpoint, picture, output, console, part_bytes)
    except DemoFailed as error:
        fail(str(error))
    except httpx.TransportError as error:  # it was stopped meanwhile
        fail(f"the stack at {url} does not answer any more: {error}")
    console.print(
        f"\n{len(files)} files in {output}\n"
        f"the API was at {url}; `esd up` keeps it there, and `esd status` shows the first key's file",
        soft_wrap=True,
    )


async def _health(state: State) -> dict[str, bool]:
    from deploy.local.health import accepts, gateway_opens, serving

    async def ask(name: str, port: int | None) -> bool:
        if name == "gateway":
            return await gateway_opens(state.probe_url, "any key") is not None
        return await serving(f"127.0.0.1:{port}") if name.partition("-")[0] in SERVICES else accepts(port or 0)

    answers = await asyncio.gather(*(ask(name, process.port) for name, process in state.processes.items()))
    return dict(zip(state.processes, answers, strict=True))


def _room(home: Path, reserve: str) -> tuple[bool, str]:
    """Whether the object store takes anything more, which leaves a reserve of its disk, and that in words."""
    from deploy.local.store import reserved_bytes

    disk = shutil.disk_usage(home)
    reserve_bytes = reserved_bytes(reserve, disk.total)
    words = f"{disk.free / 2**30:.1f} GiB of {disk.total / 2**30:.1f} are free on the disk of {home}"
    if disk.free >= reserve_bytes:
        return True, words
    return False, f"{words}: no upload is taken, and results wait, until there are {reserve_bytes / 2**30:.1f}"


def _workers(launcher: int) -> list[tuple[str, int]]:
    """What the workers and trainers of this machine are called, and their pids."""
    import psutil

    found = []
    with suppress(psutil.Error):  # the stack is ending
        for child in psutil.Process(launcher).children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                command = child.cmdline()
                if command[1:3] == ["-m", "gpu_worker"]:
                    found.append(("trainer" if command[3:] == ["train"] else "worker", child.pid))
    return found


if __name__ == "__main__":
    main()
