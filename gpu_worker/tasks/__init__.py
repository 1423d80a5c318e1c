"""What jobs do with the engine: one generator for each kind of request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gpu_worker.engine.denoise import Task
from gpu_worker.engine.run import Equipment, Run
from gpu_worker.job import JobError
from gpu_worker.models.adapters import Equipped, gathered
from gpu_worker.tasks import enlarge, img2img, txt2img
from gpu_worker.tasks.steering import Crew
from services.common.payloads import Generation, Img2Img, Txt2Img
from services.common.payloads.extras import Upscale
from services.common.payloads.models import BASE, UPSCALER, find


def begin(run: Run) -> Task[list[NDArray[np.uint8]]]:
    """The task of a run whose models are here, which returns pixels of shape (height, width, 3) for each image.

    Raises:
        JobError: a refiner has latents of another family than the checkpoint before it.
    """
    request, canvas = run.request, run.canvas
    found = list(run.upscalers.values())
    files = [(UPSCALER, file.name) for file in run.upscalers]
    upscalers = {field: found[find(files, UPSCALER, name, field)] for field, name in request.upscalers}
    if isinstance(request, Upscale):
        return (yield from enlarge.generate(request, canvas, upscalers, run.on_step))
    assert isinstance(request, Generation)
    crew = _crew(request, run.equipment)
    if isinstance(request, Img2Img):
        return (yield from img2img.generate(request, canvas, crew, run.on_step))
    assert isinstance(request, Txt2Img)
    second = request.second_pass
    second_crew = _crew(second, run.equipment) if second else None
    upscaler = upscalers.get("hr_upscaler")
    return (yield from txt2img.generate(request, canvas, crew, second_crew, run.on_step, upscaler))


def _crew(request: Generation, equipment: Sequence[Equipment]) -> Crew:
    """Who paints a pass, by the names in its request."""
    files = [(BASE, one.base.name) for one in equipment]
    base = equipment[find(files, BASE, request.model_name, "checkpoint")] if request.model_name else equipment[0]
    other = equipment[find(files, BASE, request.refiner, "refiner_checkpoint")] if request.refiner else base
    if other is base:
        return Crew(_equipped(request, base))
    crew = Crew(_equipped(request, base), _equipped(request, other))
    if crew.last.is_sdxl != crew.base.models.is_sdxl:
        raise JobError(
            f"refiner_checkpoint {other.base.name} cannot go on with the latents of {base.base.name}: "
            "one is of SDXL's family, the other of Stable Diffusion 1.5's"
        )
    return crew


def _equipped(request: Generation, equipment: Equipment) -> Equipped:
    assert equipment.models is not None
    # What is compiled may differ in its last bits from one process to the next.
    fast_vae = None if request.exclusive or request.tiling else equipment.models.fast_vae
    models = replace(equipment.models, tiling=request.tiling, fast_vae=fast_vae)
    return Equipped(models, gathered(request, equipment.adapters))
