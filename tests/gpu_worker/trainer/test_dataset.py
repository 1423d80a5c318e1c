"""Folders of pictures: repeats, captions, regularisation, and every file that cannot be used named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gpu_worker.job import JobError
from gpu_worker.trainer import dataset
from gpu_worker.trainer.dataset import Dataset
from services.common.payloads.training import check_training
from tests.gpu_worker.trainer.conftest import draw


def read(folder: Path, log: Any = lambda _: None, **fields: Any) -> Dataset:
    return dataset.read(check_training({"train_data_dir": str(folder), "resolution": "64,64"} | fields), log)


def reason(folder: Path, **fields: Any) -> str:
    with pytest.raises(JobError) as caught:
        read(folder, **fields)
    return str(caught.value)


def test_a_folder_says_how_often_its_pictures_come(tmp_path: Path) -> None:
    draw(tmp_path / "3_cat" / "a.png")
    draw(tmp_path / "1_dog" / "b.png")
    found = read(tmp_path)
    assert sorted(picture.path.name for picture in found.epoch) == ["a.png"] * 3 + ["b.png"]
    assert found.counts(regularisation=False) == {"1_dog": (1, 1), "3_cat": (3, 1)}


def test_a_caption_is_the_first_line_beside_the_picture_or_the_concept(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        draw(tmp_path / "1_sks cat" / f"{name}.png")
    (tmp_path / "1_sks cat" / "a.txt").write_text("a red cat \nsecond line")
    (tmp_path / "1_sks cat" / "b.caption").write_text("another cat")
    found = read(tmp_path, caption_extension=".txt")
    assert [picture.caption for picture in found.pictures] == ["a red cat", "another cat", "sks cat"]


def test_captions_may_be_utf_16_and_never_have_nul(tmp_path: Path) -> None:
    for name, content in (("a", "é zog\nmore".encode("utf-16")), ("b", b"z\0og"), ("c", "\ufeffé zog".encode())):
        draw(tmp_path / "1_zog" / f"{name}.png")
        (tmp_path / "1_zog" / f"{name}.txt").write_bytes(content)
    assert [picture.caption for picture in read(tmp_path).pictures] == ["é zog", "zog", "é zog"]


def test_pictures_without_a_caption_and_captions_in_another_encoding_are_told(tmp_path: Path) -> None:
    for index in range(7):
        draw(tmp_path / "1_zog" / f"{index}.png")
    (tmp_path / "1_zog" / "0.txt").write_bytes("café, zog".encode("latin-1"))
    lines: list[str] = []
    assert read(tmp_path, lines.append).pictures[0].caption == "caf\ufffd, zog"
    assert lines == [
        "without a caption file, so the concept of the folder is the caption: "
        "1_zog/1.png, 1_zog/2.png, 1_zog/3.png, 1_zog/4.png, 1_zog/5.png and 1 more",
        "captions that are not UTF-8, and lack what could not be read: 1_zog/0.png",
    ]


@pytest.mark.parametrize(
    ("extension", "captions"),
    [(".txt", ["by txt", "by caption"]), (".caption", ["by caption"] * 2), (".tags", ["by tags", "cat"])],
)
def test_captions_have_the_configured_ending_or_if_it_is_a_usual_one_the_other(
    tmp_path: Path, extension: str, captions: list[str]
) -> None:
    for name, endings in (("a", ("txt", "caption", "tags")), ("b", ("caption",))):
        draw(tmp_path / "1_cat" / f"{name}.png")
        for ending in endings:
            (tmp_path / "1_cat" / f"{name}.{ending}").write_text(f"by {ending}")
    assert [picture.caption for picture in read(tmp_path, caption_extension=extension).pictures] == captions


def test_there_are_as_many_regularisation_pictures_as_others(tmp_path: Path) -> None:
    for name in "abc":
        draw(tmp_path / "own" / "4_cat" / f"{name}.png")
    for name in "xy":
        draw(tmp_path / "others" / "1_animal" / f"{name}.png")
    found = read(tmp_path / "own", reg_data_dir=str(tmp_path / "others"))
    epoch = [(picture.is_regularisation, picture.path.stem) for picture in found.epoch]
    assert sum(is_regularisation for is_regularisation, _ in epoch) == 12
    assert {name: epoch.count((True, name)) for name in "xy"} == {"x": 6, "y": 6}


def test_regularisation_pictures_beyond_the_number_of_others_are_told(tmp_path: Path) -> None:
    draw(tmp_path / "own" / "2_cat" / "a.png")
    (tmp_path / "own" / "2_cat" / "a.txt").write_text("a cat")
    for name in "xyz":
        draw(tmp_path / "others" / "1_animal" / f"{name}.png")
    lines: list[str] = []
    found = read(tmp_path / "own", lines.append, reg_data_dir=str(tmp_path / "others"))
    assert [picture.path.name for picture in found.epoch] == ["a.png", "a.png", "x.png", "y.png"]
    assert lines == ["of 3 regularisation pictures only 2 are trained, as many as there are others"]


def test_each_file_that_cannot_be_used_is_named_with_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "own" / "1_cat"
    draw(folder / "good.png", (80, 64))
    draw(folder / "small.png", (12, 12))
    (folder / "nonsense.png").write_bytes(b"nonsense")
    (folder / "half.png").write_bytes((folder / "good.png").read_bytes()[:60])
    Image.new("1", (8000, 8000)).save(folder / "bomb.png")
    with (folder / "huge.png").open("wb") as huge:
        huge.truncate(2**28 + 1)
    others = tmp_path / "others" / "1_animal"
    others.mkdir(parents=True)
    (others / "z.png").write_bytes(b"nonsense")
    lines: list[str] = []
    found = read(tmp_path / "own", lines.append, reg_data_dir=str(tmp_path / "others"))
    assert [picture.path.name for picture in found.pictures] == ["good.png"]
    assert lines[:-1] == [f"left out: {sentence}" for sentence in found.rejected]
    assert found.rejected == (
        "1_cat/bomb.png has 8000x8000 pixels; at most 33554432 pixels are possible",
        "1_cat/half.png is damaged or truncated: it cannot be read as PNG",
        "1_cat/huge.png has more than 268435456 bytes",
        "1_cat/nonsense.png is no picture that can be read; possible: PNG, JPEG, WEBP, BMP, GIF",
        "1_cat/small.png is too small: 12x12 pixels would be enlarged 5.3 times to 64x64; at most 4 times is possible, "
        "so give a larger picture or a lower resolution",
        "1_animal/z.png is no picture that can be read; possible: PNG, JPEG, WEBP, BMP, GIF",
    )


def test_a_dataset_without_a_usable_picture_says_what_is_wrong_with_each(tmp_path: Path) -> None:
    (tmp_path / "1_cat").mkdir()
    (tmp_path / "1_cat" / "a.png").write_bytes(b"nonsense")
    assert reason(tmp_path).startswith("no picture of the dataset can be used: 1_cat/a.png is no picture")


def test_a_dataset_without_concept_folders_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "cats" / "b.png")
    lines: list[str] = []
    with pytest.raises(JobError, match=r"such as 10_technic/1\.png; it has a\.png, cats/"):
        read(tmp_path, lines.append)
    assert lines == ["left out: the folder cats is not named <repeats>_<concept>, with 1 repeat or more"]


def test_a_folder_that_is_not_there_is_named_with_its_key(tmp_path: Path) -> None:
    draw(tmp_path / "own" / "1_cat" / "a.png")
    nowhere = tmp_path / "nowhere"
    assert reason(nowhere) == f"train_data_dir '{nowhere}' is no folder"
    assert reason(tmp_path / "own", reg_data_dir=str(nowhere)) == f"reg_data_dir '{nowhere}' is no folder"
    assert reason(tmp_path, train_data_dir="") == "train_data_dir '' is no folder"


def test_a_folder_of_no_repeats_is_left_out(tmp_path: Path) -> None:
    draw(tmp_path / "0_cat" / "a.png")
    assert reason(tmp_path).endswith("it has 0_cat/")
    draw(tmp_path / "010_dog" / "b.png")
    assert len(read(tmp_path).epoch) == 10


def test_a_picture_covers_its_bucket_and_loses_its_edges_evenly(tmp_path: Path) -> None:
    wide = Image.new("RGB", (160, 64), (255, 0, 0))
    wide.paste((0, 0, 255), (48, 0, 112, 64))
    (tmp_path / "1_cat").mkdir()
    wide.save(tmp_path / "1_cat" / "a.png")
    [picture] = read(tmp_path).pictures
    assert (picture.bucket, picture.scaled, picture.crop) == ((64, 64), (160, 64), (48, 0))
    assert picture.read().getcolors() == [(64 * 64, (0, 0, 255))]


def test_a_pixel_of_a_picture_that_shrinks_is_the_mean_of_those_that_it_covers(tmp_path: Path) -> None:
    (tmp_path / "1_cat").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (192, 128, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1_cat" / "a.png")
    [picture] = read(tmp_path, resolution="64,96").pictures
    assert picture.bucket == (64, 96)
    means = pixels.reshape(96, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(picture.read()) - means).max() <= 0.5


def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (128, 64), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6
    (tmp_path / "1_cat").mkdir()
    image.save(tmp_path / "1_cat" / "a.jpg", exif=exif)
    [picture] = read(tmp_path).pictures
    assert picture.size == (64, 128)
    assert picture.read().size == (64, 64)
