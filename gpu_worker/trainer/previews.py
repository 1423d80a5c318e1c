"""Pictures that the models make with the network as it is, between two epochs, by the engine's own txt2img."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gpu_worker.engine.denoise import predict
from gpu_worker.job import JobError
from gpu_worker.models.adapters import Equipped
from gpu_worker.models.weights import Models
from gpu_worker.pictures import results
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.tasks import txt2img
from gpu_worker.tasks.steering import Crew
from gpu_worker.trainer.buckets import Size
from gpu_worker.trainer.dataset import Dataset
from gpu_worker.trainer.listening import Listener
from services.common import payloads
from services.common.errors import InvalidArgument
from services.common.payloads import Txt2Img
from services.common.payloads.showing import shown
from services.common.payloads.training import Training, sampler_name

_MAX_ROWS = 2
# kohya's options behind a prompt, with the payload's fields.
_OPTIONS = {
    "n": "negative_prompt", "w": "width", "h": "height", "d": "seed", "l": "cfg_scale", "s": "steps",
    "ss": "sampler_name",
}  # fmt: skip
_DEFAULTS = {"steps": 20, "cfg_scale": 7.5, "seed": 1}


class Previews:
    """The pictures of a training: those that the configuration asks for, else one of the first picture's caption.

    Raises:
        JobError: a prompt asks for something impossible; the message says which.
    """

    def __init__(self, config: Training, models: Models, dataset: Dataset, folder: Path, listener: Listener) -> None:
        self._config = config
        self._models = models
        self._folder = folder / "sample"
        self._listener = listener
        self._requests: list[Txt2Img] = []
        if config.sample_every_n_epochs != 0:
            first = next(picture for picture in dataset.pictures if not picture.is_regularisation)
            self._requests = (
                _requests(config) if config.sample_prompts else _of_caption(first.caption, config, listener)
            )

    def draw(self, epoch: int, *, is_saved: bool, is_last: bool) -> None:
        """Draws what is due after an epoch: after every n-th, else whenever a network was saved.

        That one cannot be drawn is no reason to end a training.
        """
        every = self._config.sample_every_n_epochs
        if not self._requests or not (is_last or (epoch % every == 0 if every else is_saved)):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with _at_rest(self._models):
            for index, request in enumerate(self._requests):
                try:
                    content = draw(self._models, request, lambda: self._listener.wants_stop)
                except (JobError, torch.OutOfMemoryError) as error:
                    self._listener.log(f"no preview of {request.prompt!r}: {error}")
                    continue
                if content is None:
                    return
                path = self._folder / _file_name(self._config, epoch, index, request.seed)
                path.write_bytes(content)
                self._listener.drawn(path, epoch, request.prompt)


def draw(models: Models, request: Txt2Img, wants_stop: Callable[[], bool] = lambda: False) -> bytes | None:
    """The picture as PNG, with its parameters; None where somebody wanted the end before it was done.

    Raises:
        JobError: the prompt is too long, or the models make NaN.
    """
    mixed = torch.autocast(models.device.type, models.dtype, enabled=models.dtype != torch.float32)
    task = txt2img.generate(request, Canvas(), Crew(Equipped(models)), None, lambda _: None)
    with torch.no_grad():
        try:
            with mixed:  # encodes the texts
                wish = task.send(None)
            while True:
                if wants_stop():
                    return None
                prediction = None
                if wish is not None:
                    with mixed:
                        prediction = predict([wish], _MAX_ROWS)[0]
                wish = task.send(prediction)  # decodes at the end, in the decoder's own precision
        except StopIteration as end:
            pixels = end.value[0]
    return results.png(Image.fromarray(pixels), infotext=_parameters(request))


@contextmanager
def _at_rest(models: Models) -> Iterator[None]:
    """The models as they are used, not trained: without dropout, and with the decoder on the device."""
    device = models.vae.device
    models.vae.to(models.device)
    trained = [part for part in (models.unet, *(encoder.model for encoder in models.text_encoders)) if part.training]
    for part in trained:
        part.eval()
    try:
        yield
    finally:
        models.vae.to(device)
        for part in trained:
            part.train()


def _requests(config: Training) -> list[Txt2Img]:
    """What the configuration's prompts ask for, each with options in kohya's way: `a cat --w 512 --h 512 --d 1`."""
    found = []
    for line in config.sample_prompts:
        prompt, *options = line.split(" --")
        try:
            found.append(_request(prompt, config, _options(options)))
        except InvalidArgument as error:
            raise JobError(f"sample_prompts {shown(line)}: {error}") from None
    return found


def _of_caption(caption: str, config: Training, listener: Listener) -> list[Txt2Img]:
    """What a caption asks for as a prompt, where brackets would be weights; nobody has chosen it as one, so that it
    cannot be one is no reason to end a training."""
    try:
        return [_request(re.sub(r"[\\()\[\]]", r"\\\g<0>", caption), config, {})]
    except InvalidArgument as error:
        listener.log(f"no preview of {caption!r}: {error}")
        return []


def _request(prompt: str, config: Training, options: dict[str, Any]) -> Txt2Img:
    width, height = _size(config.resolution)
    fields = {"prompt": prompt, "width": width, "height": height, "sampler_name": config.sample_sampler}
    request = payloads.check("txt2img", _DEFAULTS | fields | options, "preview")
    assert isinstance(request, Txt2Img)
    return request


def _file_name(config: Training, epoch: int, index: int, seed: int) -> str:
    """kohya's name for a preview."""
    return f"{config.output_name}_e{epoch:06d}_{index:02d}_{time.strftime('%Y%m%d%H%M%S')}_{seed}.png"


def _options(options: Sequence[str]) -> dict[str, Any]:
    """The payload's fields of what stands behind a prompt."""
    fields: dict[str, Any] = {}
    for option in options:
        given, _, value = option.partition(" ")
        name = _OPTIONS.get(given.lower())
        if name is None:
            raise InvalidArgument(
                f"--{given} is not possible; possible: {', '.join(f'--{known}' for known in _OPTIONS)}"
            )
        fields[name] = sampler_name(value.strip()) if name == "sampler_name" else value.strip()
    return fields


def _size(resolution: Size) -> Size:
    return resolution[0] // 8 * 8, resolution[1] // 8 * 8


def _parameters(request: Txt2Img) -> str:
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(
        f"Steps: {request.steps}, Sampler: {request.sampler_name}, CFG scale: {request.cfg_scale}, "
        f"Seed: {request.seed}, Size: {request.width}x{request.height}"
    )
    return "\n".join(lines)
