"""What a payload can ask for beside a picture from a text, through REST: each with the models that it needs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.e2e.conftest import PICTURE, Studio, finished, upload
from tests.pictures import encoded, noise


def run(studio: Studio, models: dict[str, list[str]], task: str = "txt2img", **payload: Any) -> Any:
    """Runs a job to its end and answers it."""
    body = {"task_type": task, "inference_type": "Async", "models": models, "payload_string": json.dumps(payload)}
    started = studio.api.ok("POST", "/inferences", body, 202)
    return finished(studio.api, started["inference"]["inference_id"])


def pictures(studio: Studio, job: Any) -> list[Image.Image]:
    """The pictures of a job that went well."""
    assert job["status"] == "succeed", job
    return [Image.open(io.BytesIO(studio.api.get(url))) for url in job["img_presigned_urls"]]


@pytest.fixture(scope="module")
def controlnet(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny ControlNet, uploaded; its file's name."""
    from diffusers import UNet2DConditionModel

    from gpu_worker.models import tiny
    from tests.gpu_worker import tiny_controlnet

    path = tmp_path_factory.mktemp("controlnet") / "control_tiny_canny.safetensors"
    tiny_controlnet.save(tiny_controlnet.make(UNet2DConditionModel(**tiny.config()["unet"]), 0), path)
    assert upload(studio.api, path, checkpoint_type="ControlNet").status == 200
    return path.name


def test_a_controlled_picture_and_what_the_controlnet_looked_at(studio: Studio, controlnet: str) -> None:
    unit = {"module": "canny", "model": "control_tiny_canny [0123abcd]", "image": encoded(noise()), "processor_res": 64}
    scripts = {"controlnet": {"args": [unit, {"enabled": False, "module": "openpose"}]}}
    models = {"Stable-diffusion": [studio.model], "ControlNet": [controlnet]}
    job = run(studio, models, **PICTURE, alwayson_scripts=scripts)
    assert job["image_names"] == ["image_0.png", "image_1.png"]
    assert job["params"]["used_models"]["ControlNet"][0]["model_name"] == controlnet
    picture, seen = pictures(studio, job)
    assert "ControlNet 0" in picture.text["parameters"]
    assert set(seen.convert("L").tobytes()) <= {0, 255}
    body = {"task_type": "txt2img", "inference_type": "Async", "models": {"Stable-diffusion": [studio.model]}}
    body["payload_string"] = json.dumps(PICTURE | {"alwayson_scripts": scripts})
    refused = studio.api.call("POST", "/inferences", body)
    assert refused.status == 400
    assert refused.message.startswith(
        "controlnet unit 0 names control_tiny_canny [0123abcd], which is not among the job"
    )


@pytest.mark.slow
def test_another_checkpoint_refines_the_picture(studio: Studio, tmp_path: Path) -> None:
    from gpu_worker.models import tiny

    tiny.write(tmp_path / "fine.safetensors", seed=7)
    assert upload(studio.api, tmp_path / "fine.safetensors").status == 200
    models = {"Stable-diffusion": [studio.model, "fine.safetensors"]}
    plain, refined = (
        pictures(studio, run(studio, models, **PICTURE, **extra))[0]
        for extra in ({}, {"alwayson_scripts": {"refiner": {"args": [True, "fine.safetensors", 0.5]}}})
    )
    assert plain.tobytes() != refined.tobytes()
    assert "Refiner: fine [" in refined.text["parameters"]


@pytest.mark.slow
def test_uploaded_tools_make_pictures_larger_and_cut_them_out(studio: Studio, tmp_path: Path) -> None:
    from tests.gpu_worker import tiny_esrgan, tiny_onnx

    tiny_esrgan.write(tmp_path / "4x-tiny.pth")
    (tmp_path / "bright.onnx").write_bytes(tiny_onnx.brightness())
    assert upload(studio.api, tmp_path / "4x-tiny.pth", checkpoint_type="ESRGAN").status == 200
    assert upload(studio.api, tmp_path / "bright.onnx", checkpoint_type="rembg").status == 200
    image = encoded(noise(48, 32))
    # Models of other types are ignored for these tasks, as by the original.
    models = {"ESRGAN": ["4x-tiny.pth"], "Stable-diffusion": ["not there"]}
    larger = {"image": image, "upscaler_1": "4x-tiny", "upscaling_resize": 4}
    job = run(studio, models, "extra-single-image", **larger)
    assert "used_models" not in job["params"]
    assert pictures(studio, job)[0].size == (192, 128)
    models = {"rembg": ["bright.onnx"]}
    (cut,) = pictures(studio, run(studio, models, "rembg", input_image=image, model="bright"))
    assert (cut.size, cut.mode) == ((48, 32), "RGBA")
    body = {"task_type": "extra-single-image", "inference_type": "Async", "models": {}}
    refused = studio.api.call("POST", "/inferences", body | {"payload_string": json.dumps(larger)})
    assert refused.status == 400
    assert refused.message == (
        "upscaler_1 names 4x-tiny, which is not among the job's models of type ESRGAN; there: none; "
        "built in: None, Lanczos, Nearest"
    )
