"""A folder of pictures as kohya lays it out: `<repeats>_<concept>/` with pictures and a caption file beside each.

A picture without a caption file has its folder's concept as caption. What cannot be used is left out and named.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from gpu_worker.job import JobError
from gpu_worker.trainer.buckets import Buckets, Size
from services.common.payloads import pictures
from services.common.payloads.training import Training

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_USUAL_ENDINGS = (".caption", ".txt")  # of captions
_FOLDER = re.compile(r"0*([1-9]\d{0,5})_(.+)")
_UNREAD = "\ufffd"  # what a codec puts in the place of bytes that it cannot read
_MAX_CAPTION = 3000  # characters; of 225 tokens no caption needs more
_MAX_BYTES = 2**28  # of a picture's file
_MAX_ENLARGEMENT = 4.0  # a picture that would have to grow more than this shows nothing but its pixels


@dataclass(frozen=True)
class Picture:
    """A picture of the dataset. `size` is its own (width, height), `scaled` the one to which it is brought, `bucket`
    that of its middle, which is trained."""

    path: Path
    caption: str
    size: Size
    scaled: Size
    bucket: Size
    repeats: int
    is_regularisation: bool

    @property
    def name(self) -> str:
        """Its folder and file."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def crop(self) -> tuple[int, int]:
        """Left and top of the part of the scaled picture that is trained: its middle."""
        return (self.scaled[0] - self.bucket[0]) // 2, (self.scaled[1] - self.bucket[1]) // 2

    def read(self) -> Image.Image:
        """The picture as it is trained, RGB."""
        image = pictures.loaded(_opened(self.path, self.path.name), self.path.name).convert("RGB")
        if image.size != self.scaled:
            image = _resized(image, self.scaled)
        left, top = self.crop
        return image.crop((left, top, left + self.bucket[0], top + self.bucket[1]))


@dataclass(frozen=True)
class Concept:
    """A folder `<repeats>_<concept>`."""

    path: Path
    repeats: int
    name: str


@dataclass(frozen=True)
class Dataset:
    """The pictures of a training, those of each concept in order, and what was left out."""

    pictures: tuple[Picture, ...]
    rejected: tuple[str, ...] = ()

    @property
    def epoch(self) -> list[Picture]:
        """The pictures of one epoch: each as often as its folder says, and regularisation pictures in turn until there
        are as many of them as of the others."""
        own = [picture for picture in self.pictures if not picture.is_regularisation for _ in range(picture.repeats)]
        others = [picture for picture in self.pictures if picture.is_regularisation for _ in range(picture.repeats)]
        return own + [others[index % len(others)] for index in range(len(own) if others else 0)]

    def counts(self, *, regularisation: bool) -> dict[str, tuple[int, int]]:
        """From each folder to its repeats and number of pictures."""
        folders = [item.path.parent.name for item in self.pictures if item.is_regularisation == regularisation]
        repeats = {item.path.parent.name: item.repeats for item in self.pictures}
        return {name: (repeats[name], count) for name, count in Counter(folders).items()}


def read(config: Training, log: Callable[[str], None]) -> Dataset:
    """The dataset of a configuration. Files that cannot be used are told to `log` and left out, and captions that are
    not what their owner may think are told.

    Raises:
        JobError: no picture is left; the message says what was looked for and found.
    """
    buckets = Buckets.of(config)
    found: list[Picture] = []
    rejected: list[str] = []
    uncaptioned: list[str] = []
    folders = (("train_data_dir", config.train_data_dir, False), ("reg_data_dir", config.reg_data_dir, True))
    for key, folder, is_regularisation in folders:
        if not folder and is_regularisation:
            continue
        if not folder or not Path(folder).is_dir():
            raise JobError(f"{key} {folder!r} is no folder")
        for concept in _concepts(Path(folder), log):
            for path in _files(concept.path):
                caption = _caption(path, config.caption_extension)
                try:
                    found.append(_picture(path, concept, caption, buckets, is_regularisation))
                except pictures.Damaged as error:
                    rejected.append(str(error))
                    log(f"left out: {error}")
                else:
                    uncaptioned += [found[-1].name] if caption is None and not is_regularisation else []
    if not any(not picture.is_regularisation for picture in found):
        raise JobError(_nothing(Path(config.train_data_dir), rejected))
    if uncaptioned:
        log(f"without a caption file, so the concept of the folder is the caption: {_some(uncaptioned)}")
    if unread := [picture.name for picture in found if _UNREAD in picture.caption]:
        log(f"captions that are not UTF-8, and lack what could not be read: {_some(unread)}")
    num_own, num_others = (
        sum(picture.repeats for picture in found if picture.is_regularisation == which) for which in (False, True)
    )
    if num_others > num_own:
        log(f"of {num_others} regularisation pictures only {num_own} are trained, as many as there are others")
    return Dataset(tuple(found), tuple(rejected))


def _concepts(folder: Path, log: Callable[[str], None]) -> Iterator[Concept]:
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            continue
        if match := _FOLDER.fullmatch(path.name):
            yield Concept(path, int(match[1]), match[2])
        else:
            log(f"left out: the folder {path.name} is not named <repeats>_<concept>, with 1 repeat or more")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())


def _picture(path: Path, concept: Concept, caption: str | None, buckets: Buckets, is_regularisation: bool) -> Picture:
    """Checks a picture by reading it whole.

    Raises:
        Damaged: it cannot be used.
    """
    name = f"{concept.path.name}/{path.name}"
    size = pictures.loaded(_opened(path, name), name).size
    fit = buckets.fit(size)
    enlargement = max(fit.scaled[0] / size[0], fit.scaled[1] / size[1])
    if enlargement > _MAX_ENLARGEMENT:
        raise pictures.Damaged(
            f"{name} is too small: {size[0]}x{size[1]} pixels would be enlarged {enlargement:.1f} times to "
            f"{fit.bucket[0]}x{fit.bucket[1]}; at most {_MAX_ENLARGEMENT:.0f} times is possible, so "
            "give a larger picture or a lower resolution"
        )
    text = concept.name if caption is None else caption
    return Picture(path, text, size, fit.scaled, fit.bucket, concept.repeats, is_regularisation)


def _resized(image: Image.Image, size: Size) -> Image.Image:
    """The picture at a size as kohya makes it: where it shrinks each pixel is the mean of what it covers
    (library/train_util.py, trim_and_resize_if_required)."""
    if image.width > size[0] and image.height > size[1]:
        return Image.fromarray(cv2.resize(np.asarray(image), size, interpolation=cv2.INTER_AREA))
    return image.resize(size, Image.Resampling.LANCZOS)


def _opened(path: Path, name: str) -> Image.Image:
    if path.stat().st_size > _MAX_BYTES:
        raise pictures.Damaged(f"{name} has more than {_MAX_BYTES} bytes")
    return pictures.opened(path.read_bytes(), name)


def _caption(path: Path, extension: str) -> str | None:
    """The first line of the caption file. Of the usual endings either will do; whoever gives another one means it."""
    for ending in (extension, *_USUAL_ENDINGS) if extension in _USUAL_ENDINGS else (extension,):
        file = path.with_suffix(ending)
        if file.is_file():
            with file.open("rb") as content:
                return _first_line(content.read(4 * _MAX_CAPTION))
    return None


def _first_line(content: bytes) -> str:
    """The first line of a text in UTF-8, or in UTF-16 as Windows writes it, without what no text has."""
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_wide else "utf-8-sig", errors="replace").replace("\0", "")
    return text.partition("\n")[0][:_MAX_CAPTION].strip()


def _some(names: list[str]) -> str:
    """The first ones of many."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"


def _nothing(folder: Path, rejected: list[str]) -> str:
    if rejected:
        more = f" and {len(rejected) - 3} more" if len(rejected) > 3 else ""
        return f"no picture of the dataset can be used: {'; '.join(rejected[:3])}{more}"
    listed = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    shown = ", ".join(listed[:5]) + ("…" if len(listed) > 5 else "")
    return (
        "the dataset has no picture in a folder <repeats>_<concept>, such as 10_technic/1.png; it has "
        f"{shown or 'no files'}"
    )
