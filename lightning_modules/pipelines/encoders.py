"""Encoders that data_pipeline's cache is given: its protocol on this side of the border."""

from __future__ import annotations

import hashlib

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lightning_modules.networks.autoencoder import encode_moments


class LatentEncoder:
    """Posterior moments under an autoencoder; the fingerprint is a hash of its config and weights."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        digest = hashlib.sha256(repr(sorted(vae.config.items())).encode())
        for name, tensor in sorted(vae.encoder.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, 2C, h, w), fp32 on the CPU."""
        return encode_moments(self.vae, pixels.to(self.vae.device)).cpu()
