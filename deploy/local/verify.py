"""Owns the command `esd verify`: makes a picture again from what it says of its making, and says what differs."""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.local.terminal import Gateway, HomeOption, KeyFileOption, UrlOption, fail

CHUNK = "esd"  # of a PNG, as the worker writes it
# What company, another device or another version may change: a peak signal-to-noise ratio of at least this.
MIN_PSNR = 30.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Making:
    """What a picture says of its making (gpu_worker/pictures/provenance.py)."""

    job: str
    image: int
    task_type: str
    request: dict[str, Any]
    models: list[dict[str, str]]
    engine: dict[str, str]
    digests: dict[str, str] = field(default_factory=dict)  # of the client's own pictures, by their field


@dataclass(frozen=True)
class Difference:
    """How far two pictures of one size are from each other. `psnr` is in dB, infinite for equal ones."""

    largest: int
    num_pixels: int
    share: float
    psnr: float


def verify(
    picture: Annotated[Path, typer.Argument(help="A PNG file that this service made.")],
    payload: Annotated[
        Path | None, typer.Option(help="The payload of its job, for one that began with pictures of its own.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="The endpoint to make it on; any Async one if not given.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="Who asks; default: the key's owner.")] = None,
    home: HomeOption = None,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
) -> None:
    """Make a picture again, by itself, on an Async endpoint, and compare. Exits with 1 if it is another picture.

    On the same device and versions, a picture whose job was `exclusive` comes out bit for bit; otherwise it may differ
    as long as the peak signal-to-noise ratio stays at 30 dB or more.
    """
    before = _read(picture)
    making = _making(before, picture)
    request = _request(making, payload)
    gateway = Gateway.find(home, url, key_file, user)
    after = _made_again(gateway, making, request, endpoint)
    differences = _differences(making, _making(after, picture))
    for line in differences:
        typer.echo(line)
    is_repeatable = not differences and making.request.get("exclusive") is True
    if before.size != after.size:
        fail(f"{picture.name}: another picture: {after.width}x{after.height} instead of {before.width}x{before.height}")
    found = difference(before, after)
    told = (
        f"{found.num_pixels} pixels ({found.share:.2%}) differ, by at most {found.largest} of 255; "
        f"PSNR {found.psnr:.1f} dB"
    )
    if not found.largest:
        typer.echo(f"{picture.name}: bit-equal")
    elif is_repeatable:
        fail(f"{picture.name}: another picture: it must be bit-equal on the same device and versions, but {told}")
    elif found.psnr < MIN_PSNR:
        fail(f"{picture.name}: another picture: {told}, where at least {MIN_PSNR:.0f} dB are wanted")
    else:
        typer.echo(f"{picture.name}: the same within the tolerance of {MIN_PSNR:.0f} dB: {told}")


def difference(before: Any, after: Any) -> Difference:
    """Between two Pillow images of one size and mode."""
    from math import inf, log10

    from PIL import ImageChops, ImageStat

    apart = ImageChops.difference(before, after)
    statistics = ImageStat.Stat(apart)
    mean_square = sum(statistics.sum2) / max(1, sum(statistics.count))
    any_band = apart.split()[0]
    for band in apart.split()[1:]:
        any_band = ImageChops.lighter(any_band, band)
    num_pixels = sum(any_band.histogram()[1:])
    return Difference(
        max(high for _, high in statistics.extrema),
        num_pixels,
        num_pixels / (apart.width * apart.height),
        10 * log10(255**2 / mean_square) if mean_square else inf,
    )


def _read(path: Path) -> Any:
    from PIL import Image

    try:
        image = Image.open(path, formats=["PNG"])
        image.load()
    except (OSError, SyntaxError) as error:
        fail(f"{path}: this is no PNG file that can be read ({error})")
    return image


def _making(image: Any, path: Path) -> Making:
    text = image.info.get(CHUNK)
    if text is None:
        fail(f"{path}: it does not say how it was made: the PNG chunk `{CHUNK}` is missing")
    try:
        told = {"digests": {}} | json.loads(text)
        return Making(**{name: told[name] for name in Making.__dataclass_fields__})
    except (ValueError, TypeError, KeyError):
        fail(f"{path}: what it says of its making cannot be read")


def _request(making: Making, payload: Path | None) -> dict[str, Any]:
    """The request to make again: that in the picture, or with a payload that one, if it is the same beside pictures of
    its own."""
    from services.common import payloads
    from services.common.errors import InvalidArgument

    if payload is None:
        if _begins_with_pictures(making):
            fail(
                f"job {making.job} began with pictures of its own, which are not in this one: "
                "name its payload with --payload"
            )
        return making.request
    try:
        request = payloads.check(making.task_type, payloads.parse(payload.read_bytes()), making.job)
    except OSError as error:
        fail(f"--payload {payload}: {error.strerror}")
    except InvalidArgument as error:
        fail(f"--payload {payload}: {error}")
    echo = json.loads(json.dumps(request.echo()))
    others = [name for name in making.request if making.request[name] != echo.get(name) and name != "exclusive"]
    found = request.digests()
    others += [name for name in making.digests if making.digests[name] != found.get(name)]
    if others:
        fail(f"--payload {payload} is not that of job {making.job}: {', '.join(others)} differ")
    return request.model_dump()


def _begins_with_pictures(making: Making) -> bool:
    return making.task_type != "txt2img" or bool(making.request.get("controlnet"))


def _made_again(gateway: Gateway, making: Making, request: dict[str, Any], endpoint: str | None) -> Any:
    """The picture of a new job, which shares no step with others."""
    models: dict[str, list[str]] = {}
    for model in making.models:
        models.setdefault(model["type"], []).append(model["name"])
    again = request | ({"exclusive": True} if "exclusive" in request else {})
    body: dict[str, Any] = {
        "task_type": making.task_type,
        "inference_type": "Async",
        "models": models,
        "payload_string": json.dumps(again),
    }
    if endpoint is not None:
        body["sagemaker_endpoint_name"] = endpoint
    job_id = gateway.call("POST", "/inferences", **body)["inference"]["inference_id"]
    typer.echo(f"job {job_id} makes image {making.image} of job {making.job} again", err=True)
    while (job := gateway.call("GET", f"/inferences/{job_id}"))["status"] == "inprogress":
        time.sleep(_POLL_SECONDS)
    if job["status"] != "succeed":
        fail(f"job {job_id} failed: {job['sagemakerRaw']}")
    return _read_bytes(gateway.download(job["img_presigned_urls"][making.image]))


def _read_bytes(content: bytes) -> Any:
    from PIL import Image

    image = Image.open(io.BytesIO(content), formats=["PNG"])
    image.load()
    return image


def _differences(before: Making, after: Making) -> list[str]:
    """What was another thing when the picture was made again, a sentence for each."""
    found = []
    hashes = [
        {(model["type"], model["name"]): model["sha256"] for model in making.models} for making in (before, after)
    ]
    for kind, name in sorted(hashes[0].keys() | hashes[1].keys()):
        then, now = (known.get((kind, name), "none") for known in hashes)
        if then != now:
            found.append(f"model {name} ({kind}) was another file: SHA-256 {then[:16]} then, {now[:16]} now")
    for part in sorted(before.engine.keys() | after.engine.keys()):
        then, now = before.engine.get(part, "none"), after.engine.get(part, "none")
        if then != now:
            found.append(f"{part} was another: {then} then, {now} now")
    return found
