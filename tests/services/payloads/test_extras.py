"""Payloads of extras and rembg."""

from typing import Any

import pytest

from services.common.errors import InvalidArgument
from services.common.payloads import check, used
from services.common.payloads.extras import UpscaleMany, UpscaleOne
from tests.pictures import encoded, noise

IMAGE = encoded(noise(64, 48))


def test_what_the_original_client_sends_is_understood() -> None:
    given = {
        "image": f"data:image/png;base64,{IMAGE}",
        "resize_mode": 0,
        "show_extras_results": True,
        "gfpgan_visibility": 0,
        "codeformer_visibility": 0,
        "codeformer_weight": 0,
        "upscaling_resize": 1.5,
        "upscaler_1": "Lanczos",
        "upscaler_2": "None",
        "extras_upscaler_2_visibility": None,
        "upscale_first": False,
    }
    request = check("extra-single-image", given, "job")
    assert isinstance(request, UpscaleOne)
    assert request.size_of(64, 48) == (96, 72)
    assert request.num_images == 1
    assert check("extra-single-image", request.model_dump(), "job") == request
    assert request.echo()["image"] is None
    many = check("extra-batch-images", {"imageList": [{"data": IMAGE, "name": "a.png"}] * 3}, "job")
    assert isinstance(many, UpscaleMany)
    assert many.num_images == 3
    assert check("extra-batch-images", many.model_dump(), "job") == many
    assert many.echo()["imageList"] == [{"name": "a.png"}] * 3
    background = check("rembg", {"input_image": IMAGE, "model": "u2net_human_seg", "return_mask": True}, "job")
    assert check("rembg", background.model_dump(), "job") == background


@pytest.mark.parametrize(
    ("task_type", "fields", "sentence"),
    [
        ("extra-single-image", {"gfpgan_visibility": 0.5}, "gfpgan_visibility 0.5: faces are not restored here"),
        ("extra-single-image", {"codeformer_visibility": 1}, "codeformer_visibility 1: faces are not restored here"),
        ("extra-single-image", {"upscaling_resize": 100}, "upscaling_resize 100 is out of range: 1 to 8 is possible"),
        ("extra-single-image", {"image": "%"}, "image is not base64"),
        ("extra-single-image", {"image": None}, "image is missing"),
        (
            "extra-single-image",
            {"image": encoded(noise(2048, 1024)), "upscaler_1": "Lanczos", "upscaling_resize": 8},
            "image would have 16384x8192 pixels; at most 33554432 pixels are possible",
        ),
        ("extra-batch-images", {"imageList": []}, "imageList []: list should have at least 1 item"),
        ("extra-batch-images", {"imageList": [{"name": "x"}]}, "imageList[0].data is missing"),
        (
            "extra-batch-images",
            {"imageList": [{"data": "aGVsbG8="}]},
            "imageList[0].data is no picture that can be read",
        ),
        ("rembg", {"alpha_matting": True}, "alpha_matting true: edges are not matted here; set it to false"),
        ("rembg", {"input_image": IMAGE[:-40]}, "input_image is damaged or truncated"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(task_type: str, fields: dict[str, Any], sentence: str) -> None:
    good = {"extra-single-image": {"image": IMAGE}, "extra-batch-images": {}, "rembg": {"input_image": IMAGE}}
    with pytest.raises(InvalidArgument) as refused:
        check(task_type, good[task_type] | fields, "job")
    assert sentence in str(refused.value)


MODELS = [
    ("rembg", "u2net.onnx"),
    ("ESRGAN", "RealESRGAN_x4plus.pth"),
    ("ESRGAN", "4x-sharp.safetensors"),
    ("rembg", "isnet.onnx"),
]


def used_by(task: str, **fields: Any) -> list[int]:
    return used(check(task, fields, "job"), MODELS)


def test_the_models_of_an_edit_are_the_jobs() -> None:
    single = {"image": IMAGE, "upscaler_2": "4x-sharp", "extras_upscaler_2_visibility": 0.5}
    assert used_by("extra-single-image", **single, upscaler_1="R-ESRGAN 4x+") == [1, 2]
    assert used_by("extra-single-image", **single, upscaler_1="Lanczos") == [2]
    assert used_by("extra-single-image", **single | {"upscaler_2": "gone"}, upscaler_1="None") == []
    assert used_by("extra-single-image", image=IMAGE, upscaler_1="4x-sharp", upscaler_2="gone") == [2]
    assert used_by("rembg", input_image=IMAGE, model="isnet") == [3]
    assert used_by("rembg", input_image=IMAGE) == [0]
    assert used(check("rembg", {"input_image": IMAGE, "model": "u2net"}, "job"), MODELS[1:3]) == []
    costs = [check("extra-single-image", single | {"upscaler_1": name}, "job").cost_seconds for name in ("None", "4x")]
    assert costs == [1.0, 9.0]


@pytest.mark.parametrize(
    ("task", "fields", "sentence"),
    [
        (
            "extra-single-image",
            {"image": IMAGE, "upscaler_1": "SwinIR 4x"},
            "upscaler_1 names SwinIR 4x, which is not among the job's models of type ESRGAN; there: "
            "RealESRGAN_x4plus.pth, 4x-sharp.safetensors; built in: None, Lanczos, Nearest",
        ),
        (
            "rembg",
            {"input_image": IMAGE, "model": "silueta"},
            "model names silueta, which is not among the job's models of",
        ),
    ],
)
def test_a_model_that_the_job_does_not_have_is_refused_by_name(
    task: str, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        used_by(task, **fields)
    assert sentence in str(refused.value)
