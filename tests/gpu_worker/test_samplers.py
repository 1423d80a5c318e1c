"""Samplers by the names in a payload."""

import pytest
import torch

from gpu_worker import samplers
from services.common.payloads import samplers as names

MODEL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def test_every_sampler_that_a_payload_may_name_is_there() -> None:
    assert samplers.SAMPLERS.keys() == names.SAMPLERS.keys()
    assert samplers.SCHEDULES.keys() == {schedule for known in names.SAMPLERS.values() for schedule in known.schedules}


@pytest.mark.parametrize("num_steps", [1, 2, 3, 60])
@pytest.mark.parametrize("name", names.names())
def test_every_sampler_stays_finite_in_any_number_of_steps(name: str, num_steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sampling = samplers.create(name, MODEL, num_steps, [generator])
    latents = sampling.latents(torch.randn((1, 4, 8, 8), generator=generator))
    for index in range(len(sampling.timesteps)):
        x = sampling.scaled(latents, index)
        assert torch.isfinite(x).all()
        latents = sampling.step(torch.zeros_like(x), index, latents)
    assert torch.isfinite(latents).all()
