"""Shapes and batches: no picture is lost, no batch mixes shapes, no shape is larger than the resolution."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.trainer.buckets import Buckets, batches
from services.common.payloads.training import check_training

# The shapes that kohya logs for 512x512 with its own bounds: width x height.
KOHYA_512 = [
    (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576), (512, 512),
    (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256),
]  # fmt: skip


@dataclass(frozen=True)
class Item:
    number: int
    bucket: tuple[int, int]


def buckets(**fields: object) -> Buckets:
    return Buckets.of(check_training({"enable_bucket": True} | fields))


def test_the_shapes_of_512_are_kohyas() -> None:
    assert list(buckets(resolution="512,512").shapes) == KOHYA_512


def test_a_picture_goes_where_its_ratio_is_nearest() -> None:
    found = buckets(resolution="512,512")
    assert found.shape_of((1000, 1000)) == (512, 512)
    assert found.shape_of((1920, 1080)) == (640, 384)
    assert found.shape_of((300, 1200)) == (256, 1024)
    assert found.shape_of((448, 576)) == (448, 576)


def test_without_buckets_all_pictures_have_the_resolution() -> None:
    found = Buckets.of(check_training({"resolution": "512,384"}))
    assert found.shape_of((100, 900)) == (512, 384)


def test_a_picture_that_must_not_grow_keeps_its_size_in_steps() -> None:
    found = buckets(resolution="512,512", bucket_no_upscale=True)
    assert found.shape_of((300, 200)) == (256, 192)
    assert found.shape_of((2000, 2000)) == (512, 512)


@given(
    side=st.integers(64, 1024),
    other=st.integers(64, 1024),
    step=st.sampled_from([32, 64]),
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
)
def test_a_shape_is_in_steps_and_no_larger_than_the_resolution(
    side: int, other: int, step: int, size: tuple[int, int]
) -> None:
    shape = buckets(resolution=[side, other], bucket_reso_steps=step).shape_of(size)
    assert all(length % step == 0 and length >= step for length in shape)
    assert shape[0] * shape[1] <= side * other or shape == (step, step)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_batches_have_every_item_once_and_one_shape_each(size: int) -> None:
    items = [Item(number, (64, 64) if number % 3 else (32, 128)) for number in range(17)]
    found = batches(items, size, random.Random(1))
    assert sorted(item.number for batch in found for item in batch) == list(range(17))
    assert all(len({item.bucket for item in batch}) == 1 and len(batch) <= size for batch in found)
    assert found == batches(items, size, random.Random(1))
    assert found != batches(items, size, random.Random(2))
