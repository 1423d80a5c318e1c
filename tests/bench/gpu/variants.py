"""One call of a UNet or decoder in many forms: what makes it fast, and how long it takes to have it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gpu_worker import devices
from gpu_worker.engine import fast
from gpu_worker.engine.denoise import called
from tests.bench.gpu.child import Report
from tests.bench.gpu.driving import error, median_seconds
from tests.bench.gpu.models import parts_of

_REPEATS = 12
_COMPILE_SECONDS = 45.0  # that must be left to begin with a form that is compiled


def measure_unets(report: Report, family: str, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """Adds a row for each form and number of rows of the family's own size."""
    dtype = dtype if report.device == "cuda" else torch.float32
    unet = parts_of(family, report.tiny, report.device, dtype, dtype).unet
    given = {num_rows: inputs(unet, num_rows, report.device, dtype) for num_rows in rows}
    with torch.inference_mode():
        expected = {num_rows: called(unet, *each) for num_rows, each in given.items()}
    for name, make, captured, needs_seconds in unets(unet, dtype):
        form = _once(make)
        for num_rows in rows:
            report.attempt(
                f"{num_rows:>2} rows, {name}",
                partial(measure, report, form, called, given[num_rows], expected[num_rows], captured),
                needs_seconds,
            )


def unets(unet: Any, dtype: torch.dtype) -> Iterator[tuple[str, Any, bool, float]]:
    """Name, how it is made, whether as a graph, and how many seconds it wants."""
    yield "eager", lambda: unet, False, 3
    yield "graph", lambda: unet, True, 3
    unet.to(memory_format=torch.channels_last)
    yield "eager channels_last", lambda: unet, False, 3
    yield "graph channels_last", lambda: unet, True, 3

    def fused() -> Any:
        twin = copy.deepcopy(unet)
        twin.fuse_qkv_projections()
        return twin

    yield "graph channels_last fused qkv", fused, True, 5
    yield "graph compiled", partial(fast.unet_of, unet, True, False), True, _COMPILE_SECONDS
    if dtype != torch.float16:  # in which rows with scales do not come out
        yield "graph compiled fp8", partial(fast.unet_of, unet, True, True), True, _COMPILE_SECONDS


def measure_decoders(report: Report, family: str) -> None:
    """Adds a row for each form of the decoder, of one picture of the family's own size."""
    dtype = torch.bfloat16 if report.device == "cuda" else torch.float32
    vae = parts_of(family, report.tiny, report.device, dtype, dtype).vae
    side = 8 if report.tiny else vae.config.sample_size // 8
    given = (torch.randn(1, 4, side, side, device=report.device, dtype=dtype),)
    with torch.inference_mode():
        expected = decode(vae, *given)
    last = copy.deepcopy(vae).to(memory_format=torch.channels_last)
    for name, make, captured, needs_seconds in (
        ("eager", lambda: vae, False, 3),
        ("eager channels_last", lambda: last, False, 3),
        ("compiled", partial(fast.vae_of, vae), False, _COMPILE_SECONDS),
        ("graph compiled", partial(fast.vae_of, vae), True, 10),
    ):
        report.attempt(
            f"decoder, {name}",
            partial(measure, report, _once(make), decode, given, expected, captured),
            needs_seconds,
        )


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The picture of latents."""
    picture: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return picture


def measure(
    report: Report,
    form: Callable[[], Any],
    call: Callable[..., torch.Tensor],
    given: tuple[Any, ...],
    expected: torch.Tensor,
    captured: bool,
) -> dict[str, Any]:
    """Milliseconds of a call of the form, its distance from the plain form's, memory, and seconds until it was there,
    which are few where torch's cache of compiled code has it."""
    device = devices.of(report.device)
    began = time.perf_counter()
    made = form()
    with torch.inference_mode():
        found = call(made, *given)
        device.synchronize()
        ready = time.perf_counter() - began
        repeat: Callable[[], Any] = partial(call, made, *given)
        peak = device.peak_bytes(repeat)
        if captured and device.can_capture:
            repeat, found = device.capture(repeat, device.pool())
        seconds = median_seconds(device, repeat, 3 if report.tiny else _REPEATS)
        return {"ms": 1e3 * seconds, "error": error(found, expected), "peak_gb": peak / 1e9, "ready_seconds": ready}


def inputs(unet: Any, num_rows: int, device: str, dtype: torch.dtype) -> Any:
    """Random inputs of the UNet's own size."""
    config, options = unet.config, {"device": device, "dtype": dtype}
    x = torch.randn(num_rows, config.in_channels, config.sample_size, config.sample_size, **options)
    text = torch.randn(num_rows, 77, config.cross_attention_dim, **options)
    added = {}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(num_rows, width, **options)}
        added["time_ids"] = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * num_rows, **options)
    return x, torch.full((num_rows,), 500.0, device=device), text, added


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    found: list[Any] = []

    def made() -> Any:
        if not found:
            found.append(make())
        return found[0]

    return made
