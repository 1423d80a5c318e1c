"""Shapes and batches: no picture is lost, no batch mixes shapes, no shape is larger than the resolution."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.trainer.buckets import Buckets, Fit, batches
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
    assert found.fit((1000, 1000)).bucket == (512, 512)
    assert found.fit((1920, 1080)).bucket == (640, 384)
    assert found.fit((300, 1200)).bucket == (256, 1024)
    assert found.fit((448, 576)).bucket == (448, 576)


def test_without_buckets_all_pictures_have_the_resolution() -> None:
    found = Buckets.of(check_training({"resolution": "512,384"}))
    assert found.fit((100, 900)).bucket == (512, 384)


@pytest.mark.parametrize(
    ("size", "scaled", "bucket"),
    [
        ((300, 200), (300, 200), (256, 192)),  # it is cut, not shrunk
        ((2000, 2000), (512, 512), (512, 512)),
        ((2000, 1000), (640, 320), (640, 320)),  # 704 wide would be 320 high, which is another ratio
        ((700, 380), (589, 320), (576, 320)),  # the shape of the nearest ratio, 640x384, would have it grow
        ((40, 80), (64, 128), (64, 64)),  # nothing is smaller than a step
    ],
)
def test_a_picture_that_must_not_grow_is_shrunk_to_the_area_and_cut_in_steps_as_kohya_does(
    size: tuple[int, int], scaled: tuple[int, int], bucket: tuple[int, int]
) -> None:
    assert buckets(resolution="512,512", bucket_no_upscale=True).fit(size) == Fit(scaled, bucket)


@given(size=st.tuples(st.integers(64, 5000), st.integers(64, 5000)))
def test_a_picture_that_must_not_grow_does_not(size: tuple[int, int]) -> None:
    found = buckets(resolution="512,512", bucket_no_upscale=True).fit(size)
    if size[0] * size[1] <= 512 * 512:
        assert found.scaled == size
    if max(size) / min(size) < 16:  # of narrower ones not even a step would be left
        assert all(new <= old for new, old in zip(found.scaled, size, strict=True))
    assert all(cut <= side for cut, side in zip(found.bucket, found.scaled, strict=True))


def test_bounds_between_two_steps_are_widened_as_kohya_does() -> None:
    found = buckets(resolution="512,512", min_bucket_reso=300, max_bucket_reso=1000)
    assert list(found.shapes) == KOHYA_512


@given(
    side=st.integers(64, 1024),
    other=st.integers(64, 1024),
    step=st.sampled_from([32, 64]),
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
)
def test_a_shape_is_in_steps_and_no_larger_than_the_resolution(
    side: int, other: int, step: int, size: tuple[int, int]
) -> None:
    shape = buckets(resolution=[side, other], bucket_reso_steps=step).fit(size).bucket
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
