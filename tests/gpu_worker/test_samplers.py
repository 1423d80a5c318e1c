"""The names in a payload."""

import pytest
import torch

from gpu_worker import samplers
from gpu_worker.job import JobError
from services.inference import payload

MODEL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def test_the_service_and_the_worker_know_the_same_names() -> None:
    assert {name: (sampler.schedules, sampler.automatic) for name, sampler in samplers.SAMPLERS.items()} == {
        name: (sampler.schedules, sampler.automatic) for name, sampler in payload.SAMPLERS.items()
    }
    assert samplers.REFUSED == payload.REFUSED_SAMPLERS


@pytest.mark.parametrize("num_steps", [1, 2, 3, 60])
@pytest.mark.parametrize("name", samplers.names())
def test_every_sampler_stays_finite_in_any_number_of_steps(name: str, num_steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sampling = samplers.create(name, "", MODEL, num_steps, [generator])
    latents = sampling.latents(torch.randn((1, 4, 8, 8), generator=generator))
    for index in range(len(sampling.timesteps)):
        x = sampling.scaled(latents, index)
        assert torch.isfinite(x).all()
        latents = sampling.step(torch.zeros_like(x), index, latents)
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize(
    ("name", "schedule", "expected"),
    [
        ("DPM++ 2M", "", "Uniform"),
        ("DPM++ 2M", "Automatic", "Karras"),
        ("DPM++ 2M", "karras", "Karras"),
        ("DPM++ 2M Karras", "Automatic", "Karras"),
        ("dpm++ 2m karras", "", "Karras"),
        ("DPM++ 2M SDE SGM Uniform", "", "SGM Uniform"),
        ("DPM++ 2M SDE", "Automatic", "Exponential"),
        ("euler", "Automatic", "Uniform"),
        ("Euler", "Beta", "Beta"),
        ("Euler a", "SGM Uniform", "SGM Uniform"),
    ],
)
def test_the_schedule_comes_from_the_name_or_the_field(name: str, schedule: str, expected: str) -> None:
    assert samplers.find(name, schedule)[1] == expected


def test_an_unknown_sampler_is_refused_with_what_is_possible() -> None:
    with pytest.raises(JobError, match=r"sampler 'Magic' is not known; possible: Euler, .*DPM\+\+ 2M, "):
        samplers.find("Magic", "")
    for name in ("Restart", "DPM adaptive", "restart", "Restart Karras"):
        with pytest.raises(JobError, match=f"sampler '{name}' cannot be run here; possible: "):
            samplers.find(name, "")
    with pytest.raises(JobError, match="'Euler a' has no scheduler 'Karras'; possible: Automatic, Uniform, "):
        samplers.find("Euler a", "Karras")
    with pytest.raises(JobError, match="has no scheduler 'Polyexponential'"):
        samplers.find("Euler", "Polyexponential")
