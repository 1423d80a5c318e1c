"""Ancestral samplers as diffusers schedulers, with what diffusers' own lack: `eta`, the share of the noise that a step
takes away and puts back anew, for Euler every noise schedule, and the whole of DPM++ 2S a.

The levels of a step are k-diffusion's (`get_ancestral_step` in k_diffusion/sampling.py): with eta 0 a step is that of
the sampler without noise, with 1 it is what diffusers' schedulers do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteScheduler


class EulerAncestral(EulerDiscreteScheduler):
    """A step of Euler to a lower level than the next one, and noise up to that."""

    eta = 1.0

    def step(self, model_output: Any, timestep: Any, sample: Any, *_: Any, **__: Any) -> Any:
        """The latents after an evaluation, in a tuple."""
        clean = super().step(model_output, timestep, sample, return_dict=False)[1]
        before, after = self.sigmas[self.step_index - 1], self.sigmas[self.step_index]
        down, up = _levels(before, after, self.eta)
        return (clean + (sample - clean) * (down / before) + torch.randn(sample.shape) * up,)


class DPM2Ancestral(KDPM2AncestralDiscreteScheduler):
    """diffusers' scheduler with other levels: those of each step are known when its timesteps are set."""

    eta = 1.0

    def set_timesteps(self, num_inference_steps: int, device: Any = None, num_train_timesteps: Any = None) -> None:
        """As diffusers': each level beside the one in the middle of its step, but for the last, which has none."""
        super().set_timesteps(num_inference_steps, device, num_train_timesteps)
        sigmas = self.sigmas[::2]
        down, up = _levels(sigmas[:-1], sigmas[1:], self.eta)
        middle = sigmas[:-1].log().lerp(down.log(), 0.5).exp()
        middle[-1] = 0
        self.sigmas_down, self.sigmas_up, self.sigmas_interpol = (_twice(levels) for levels in (down, up, middle))
        logarithms: Any = self.log_sigmas  # which diffusers too gives it as a tensor
        between = np.array([self._sigma_to_t(sigma, logarithms) for sigma in middle[:-1]])
        self.timesteps[1::2] = torch.from_numpy(between)


class DPM2SAncestral(DPM2Ancestral):
    """`sample_dpmpp_2s_ancestral`: as DPM2 a it looks at the level in the middle of a step, but goes there and from the
    step's beginning to its end by the clean latents, not by the slope."""

    def step(self, model_output: Any, timestep: Any, sample: Any, *_: Any, **__: Any) -> Any:
        """The latents after an evaluation, in a tuple."""
        is_first, position = self.state_in_first_order, int(self.step_index or 0)
        index = position if is_first else position - 1
        before, middle, down = self.sigmas[index], self.sigmas_interpol[index], self.sigmas_down[index]
        clean = self._clean(model_output, sample, before if is_first else middle)
        begun, self.sample = (sample, sample) if is_first else (self.sample, None)
        self._step_index: Any = position + 1
        if is_first:
            return (clean.lerp(begun, middle / before),)
        return (clean.lerp(begun, down / before) + torch.randn(sample.shape) * self.sigmas_up[index],)

    def _clean(self, prediction: Any, latents: Any, sigma: torch.Tensor) -> Any:
        """The latents without noise, by the model's prediction at that level."""
        config: Any = self.config
        if config.prediction_type == "v_prediction":
            return latents / (sigma**2 + 1) - prediction * (sigma / (sigma**2 + 1).sqrt())
        return latents - prediction * sigma


def _levels(before: torch.Tensor, after: torch.Tensor, eta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Down to which noise level a step goes, and how much noise it adds, from one level to the next."""
    up = eta * (after**2 * (before**2 - after**2) / before**2).sqrt()
    return (after**2 - up**2).clamp(min=0).sqrt(), up


def _twice(levels: torch.Tensor) -> torch.Tensor:
    """A step's level for both of its evaluations, where diffusers looks it up."""
    return torch.cat(
        [levels[:1], torch.cat([levels[1:], levels.new_zeros(1)]).repeat_interleave(2), levels.new_zeros(1)]
    )
