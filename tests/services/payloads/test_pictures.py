"""Pictures in a payload: what is no picture, and what would be too large a one."""

import base64
import io
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from services.common.errors import InvalidArgument
from services.common.payloads import check, pictures
from services.common.payloads.img2img import Img2Img


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def bomb(width: int, height: int) -> str:
    """A PNG of a few bytes that says it is that large."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return base64.b64encode(content).decode()


def many_scans(count: int) -> str:
    """A JPEG whose last scan comes so many times more."""
    content = base64.b64decode(encoded(Image.new("L", (64, 64)), "JPEG", progressive=True))
    return base64.b64encode(content[:-2] + content[content.rindex(b"\xff\xda") : -2] * count + content[-2:]).decode()


PICTURE = Image.linear_gradient("L")  # 256x256
PNG = encoded(PICTURE)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"init_images": ["!!!"]}, "init_images[0] is not base64"),
        ({"init_images": [PNG, "data:image/png;base64,%%%"]}, "init_images[1] is not base64"),
        ({"init_images": ["aGVsbG8="]}, "init_images[0] is no picture that can be read; possible: PNG, JPEG, "),
        ({"init_images": [""]}, "init_images[0] is no picture that can be read"),
        ({"init_images": ["https://example.org/a.png"]}, "init_images[0] is a URL; the picture itself is needed"),
        ({"init_images": [bomb(60000, 60000)]}, "init_images[0] has 60000x60000 pixels; at most 33554432 pixels are"),
        ({"init_images": [PNG[: len(PNG) // 2 // 4 * 4]]}, "init_images[0] is damaged or truncated"),
        ({"init_images": [many_scans(1000)]}, "scans; at most 100 are possible"),
        ({"init_images": [PNG], "mask": bomb(100000, 1000)}, "mask has 100000x1000 pixels"),
        ({"init_images": [PNG], "mask": "nonsense!"}, "mask is not base64"),
        ({"init_images": [PNG], "latent_mask": PNG}, "latent_mask is not supported; use mask"),
        ({"init_images": []}, "init_images []: list should have at least 1 item, not 0"),
        ({}, "init_images is missing"),
        ({"init_images": [PNG] * 9}, "init_images"),
        ({"init_images": [3]}, "init_images[0] 3: input should be a valid string"),
        ({"init_images": [PNG], "denoising_strength": 1.5}, "denoising_strength 1.5 is out of range: 0 to 1 is"),
        ({"init_images": [PNG], "resize_mode": 4}, "resize_mode 4 is out of range: 0 to 3 is possible"),
        ({"init_images": [PNG], "inpainting_fill": -1}, "inpainting_fill -1 is out of range: 0 to 3 is possible"),
        ({"init_images": [PNG], "mask_blur": 1000}, "mask_blur_x 1000 is out of range: 0 to 64 is possible"),
    ],
)
def test_what_cannot_be_painted_on_is_refused_with_its_field(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check("img2img", fields, "job")
    assert sentence in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("kind", pictures.FORMATS)
def test_a_picture_may_be_bare_base64_or_a_data_uri_in_any_format(kind: str) -> None:
    text = encoded(PICTURE, kind)
    wrapped = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    for given in (text, f"data:image/{kind.lower()};base64,{text}", wrapped):
        assert pictures.decode(given, "image").size == (256, 256)


def test_a_photo_is_turned_as_its_camera_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is on the right
    assert pictures.decode(encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif), "image").size == (10, 20)


def test_a_photo_may_come_scan_by_scan() -> None:
    assert pictures.decode(many_scans(20), "image").size == (64, 64)


def test_a_truncated_photo_is_found_when_it_is_decoded() -> None:
    text = encoded(Image.effect_noise((256, 256), 50), "JPEG")
    with pytest.raises(pictures.Damaged, match="image is damaged or truncated: it cannot be read as JPEG"):
        pictures.decode(text[: len(text) // 2 // 4 * 4], "image")


def test_defaults_are_those_of_a1111_and_a_batch_has_a_picture_for_each_row() -> None:
    request = check("img2img", {"init_images": [PNG, PNG], "mask_blur": None, "mask": "", "latent_mask": ""}, "job")
    assert isinstance(request, Img2Img)
    assert (request.batch_size, request.denoising_strength, request.num_steps) == (2, 0.75, 38)
    assert (request.mask, request.mask_blur_x, request.inpaint_full_res) == (None, 4, True)
    again = check("img2img", request.model_dump(), "job")
    assert again == request
    assert request.echo()["init_images"] is None
