"""The autoencoder's border: pixels to posterior moments, moments to latents, latents to pixels."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor


def encode_moments(vae: AutoencoderKL, pixels: Float[Tensor, "b 3 hh ww"]) -> Float[Tensor, "b c2 h w"]:
    """Posterior mean and log variance, stacked on channels, of pixels in [-1, 1]."""
    moments = vae.encoder(pixels.to(vae.dtype))
    if vae.quant_conv is not None:
        moments = vae.quant_conv(moments)
    return moments.float()


@runtime_checkable
class Scaled(Protocol):
    """An autoencoder, or what has its settings alone."""

    @property
    def config(self) -> Any:
        """With shift_factor and scaling_factor."""


def sample_latents(
    vae: Scaled, moments: Float[Tensor, "b c2 h w"], noise: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """Latents of unit scale: (mean + std noise - shift) scale, with the released shift_factor and scaling_factor."""
    mean, log_variance = moments.chunk(2, dim=1)
    sample = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise  # diffusers' clamp of the log variance
    return (sample - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 hh ww"]:
    """Pixels in [-1, 1]."""
    unscaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(unscaled.to(vae.dtype)).sample.float().clamp(-1, 1)
