"""One UNet call in many forms: what makes it fast, and how long it takes to have it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_worker import devices
from gpu_worker.engine import fast
from gpu_worker.engine.denoise import called
from tests.bench.gpu.child import Report
from tests.bench.gpu.driving import error, median_seconds
from tests.bench.gpu.models import parts_of

_REPEATS = 12
_COMPILE_SECONDS = 45.0  # that must be left to begin with a form that is compiled


def measure_variants(report: Report, family: str, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """Adds a row for each form and number of rows."""
    is_cuda = report.device == "cuda"
    dtype = dtype if is_cuda else torch.float32
    unet = parts_of(family, report.tiny, report.device, dtype, dtype).unet
    device = devices.of(report.device)
    given = {num_rows: inputs(unet, num_rows, report.device, dtype) for num_rows in rows}
    with torch.inference_mode():
        expected = {num_rows: called(unet, *each) for num_rows, each in given.items()}

    def measure(make: Callable[[], Any], captured: bool, context: Any, num_rows: int) -> dict[str, Any]:
        began = time.perf_counter()
        form = make()

        def call() -> torch.Tensor:
            with context():
                return called(form, *given[num_rows])

        with torch.inference_mode():
            found = call()
            ready = time.perf_counter() - began
            if captured and is_cuda:
                replay, output = device.capture(call, device.pool())
                seconds = median_seconds(device, replay, _REPEATS)
                found = output
            else:
                seconds = median_seconds(device, call, 3 if report.tiny else _REPEATS)
            wrong = error(found, expected[num_rows])
        return {"ms": 1e3 * seconds, "per_second": 1 / seconds, "error": wrong, "ready_seconds": ready}

    last = copy.deepcopy  # of a form, made from the UNet with its layout changed
    for name, make, captured, context, needs in forms(unet, last, dtype):
        for num_rows in rows:
            report.attempt(
                f"{num_rows:>2} rows, {name}",
                lambda args=(make, captured, context, num_rows): measure(*args),
                needs_seconds=needs,
            )
        if is_cuda:
            torch.cuda.empty_cache()


def forms(unet: Any, twin: Any, dtype: torch.dtype) -> Iterator[tuple[str, Any, bool, Any, float]]:
    """Name, how it is made, whether as a graph, in which context, and how much time it wants."""
    is_cuda = next(unet.parameters()).device.type == "cuda"
    yield "eager", lambda: unet, False, nullcontext, 3
    yield "graph", lambda: unet, True, nullcontext, 3
    unet.to(memory_format=torch.channels_last)
    yield "eager channels_last", lambda: unet, False, nullcontext, 3
    yield "graph channels_last", lambda: unet, True, nullcontext, 3
    if is_cuda:
        yield "graph channels_last cudnn.benchmark", lambda: unet, True, _benchmark, 5
        yield "graph channels_last cudnn attention", lambda: unet, True, _cudnn_attention, 5
    compiled = _once(lambda: fast.made(unet, is_compiled=True, is_fp8=False))
    yield "graph compiled blocks", compiled, True, nullcontext, _COMPILE_SECONDS

    def fused() -> Any:
        found = twin(unet)
        found.fuse_qkv_projections()
        return found

    yield "graph channels_last fused qkv", _once(fused), True, nullcontext, 5
    if dtype == torch.bfloat16 or not is_cuda:
        quantised = _once(lambda: fast.made(unet, is_compiled=True, is_fp8=True))
        yield "graph compiled blocks fp8", quantised, True, nullcontext, _COMPILE_SECONDS
    whole = _once(lambda: torch.compile(twin(unet), fullgraph=True, dynamic=False))
    yield "graph compiled whole", whole, True, nullcontext, 1.5 * _COMPILE_SECONDS


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


@contextmanager
def _benchmark() -> Iterator[None]:
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


@contextmanager
def _cudnn_attention() -> Iterator[None]:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        yield
