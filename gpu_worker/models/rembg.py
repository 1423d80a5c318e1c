"""Background removal by a model in ONNX, as the program rembg prepares its pictures and reads the answer.

onnxruntime is optional. It runs on the CPU, beside the GPU thread.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gpu_worker.files.cache import CachedModel
from gpu_worker.job import JobError
from services.common.payloads.models import stem

_SIDE = 320  # of what U²-Net looks at (Qin et al. 2020), where a model does not say
# Means and deviations of red, green and blue: ImageNet's, and those of IS-Net (Qin et al. 2022).
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_ISNET = ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
_NUM_THREADS = 2
_MAX_SECONDS = 300.0  # of a picture: a hostile model has loops without end
# The key under which a tensor names the file of its weights (onnx.proto3, TensorProto.external_data). onnxruntime
# opens any path, so a hostile model could read this worker's secrets into a picture.
_OTHER_FILE = b"location"


def mask_of(image: Image.Image, file: CachedModel) -> Image.Image:
    """How much each pixel belongs to the foreground, 0 to 255, at the picture's size.

    Raises:
        JobError: onnxruntime is not there, or the file is no model of this kind, or too slow.
    """
    session = _session(file)
    given = session.get_inputs()[0]
    sides = [side if isinstance(side, int) else _SIDE for side in given.shape[2:4]]
    if len(given.shape) != 4 or len(sides) != 2:
        raise JobError(f"{file.name} does not look at pictures: its input has shape {given.shape}")
    options: Any = importlib.import_module("onnxruntime").RunOptions()
    timer = threading.Timer(_MAX_SECONDS, setattr, (options, "terminate", True))
    timer.start()
    try:
        found = np.asarray(session.run(None, {given.name: _prepared(image, sides[1], sides[0], file)}, options)[0])
    except Exception as error:
        why = f"it takes more than {_MAX_SECONDS:g} s for a picture" if options.terminate else _first_line(error)
        raise JobError(f"{file.name} cannot be run: {why}") from None
    finally:
        timer.cancel()
    if found.ndim < 2 or not np.isfinite(found).all():
        raise JobError(f"{file.name} does not answer with a mask of numbers")
    plane = found.reshape(-1, *found.shape[-2:])[0]
    spread = plane.max() - plane.min()
    values = (plane - plane.min()) / (spread or 1) * 255
    return Image.fromarray(values.astype(np.uint8)).resize(image.size, Image.Resampling.LANCZOS)


def _prepared(image: Image.Image, width: int, height: int, file: CachedModel) -> NDArray[np.float32]:
    """The picture as the model looks at it, of shape (1, 3, height, width)."""
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    means, deviations = _ISNET if "isnet" in stem(file.name).lower() else _IMAGENET
    scaled = pixels / max(float(pixels.max()), 1e-6)
    normal = (scaled - np.array(means, np.float32)) / np.array(deviations, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None], dtype=np.float32)


def _session(file: CachedModel) -> Any:
    if importlib.util.find_spec("onnxruntime") is None:
        raise JobError(
            f"{file.name} needs the library onnxruntime, which this worker does not have; "
            "without a model of type rembg, GrabCut removes the background"
        )
    onnxruntime: Any = importlib.import_module("onnxruntime")
    content = file.path.read_bytes()
    if _OTHER_FILE in content:
        raise JobError(f"{file.name} has weights in other files; a model must be a single file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _NUM_THREADS
    options.log_severity_level = 4
    # Which runs what does not depend on the picture, for as long as it takes.
    disabled = ["ConstantFolding"]
    try:
        return onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"], disabled_optimizers=disabled)
    except Exception as error:
        raise JobError(f"{file.name} is damaged, or no ONNX model: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
