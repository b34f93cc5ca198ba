"""Encoders that data_pipeline's cache is given: its protocol on this side of the border.

Each encodes so many inputs at a time, padded where there are fewer: one geometry, so that an input gives the same bits
whenever, and beside whatever, it is encoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batches import ImageBatch, collate_references
from data_pipeline.cache import Features, FeatureStore
from data_pipeline.counters import draw
from lightning_modules.networks.autoencoder import encode_moments, sample_latents
from lightning_modules.networks.compute import Compute, Precision, own_precision
from lightning_modules.networks.loading import check_weights
from lightning_modules.pipelines.kontext import FROZEN, TEXT_ENCODERS, TOKENIZERS, KontextPipeline
from lightning_modules.pipelines.later import origin_of

CHUNK = 8  # pictures, and on a GPU texts
TEXTS = 32


def config_of(module: Any) -> str:
    """A model's settings, in one order."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    return repr(sorted((name, repr(value)) for name, value in config.items() if not name.startswith("_")))


def weights_of(*modules: nn.Module) -> str:
    """A hash of all weights, bit for bit."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + bits.numpy().tobytes())
    return digest.hexdigest()


class LatentEncoder:
    """Posterior moments under an autoencoder, in its own precision, {"moments": (2C, h, w)}.

    Args:
        vae: the autoencoder, or what loads it when it is needed.
        folder: of the checkpoint that it is loaded from.

    Attributes:
        store: where `encode_batch` keeps what it encoded, if anywhere.
    """

    def __init__(self, vae: AutoencoderKL | Callable[[], AutoencoderKL], folder: Path | None = None) -> None:
        self._load, self.folder = vae, folder
        self.store: FeatureStore | None = None
        self._place: torch.device | str | None = None

    @classmethod
    def of(cls, pipeline: KontextPipeline) -> LatentEncoder:
        """A pipeline's autoencoder, which may be loaded later."""
        folder = pipeline.origin[0] if pipeline.origin is not None and "vae" in pipeline.put_off_parts else None
        return cls(pipeline.vae if folder is None else lambda: pipeline.vae, folder)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The autoencoder, loaded if it was not yet."""
        vae = self._load if isinstance(self._load, nn.Module) else self._load()
        return vae if self._place is None else vae.to(self._place)

    @cached_property
    def config(self) -> Any:
        """The autoencoder's settings, without its weights."""
        if self.folder is None:
            return self.vae.config
        with torch.device("meta"):
            return AutoencoderKL.from_config(AutoencoderKL.load_config(self.folder, subfolder="vae")).config

    @property
    def origin(self) -> str | None:
        """What says, without loading it, which autoencoder this is, if anything does."""
        return None if self.folder is None else origin_of(self.folder, ["vae"], f"{CHUNK}")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the autoencoder's config and of the weights that encode, made when it is needed."""
        vae = self.vae
        parts = [vae.encoder] if vae.quant_conv is None else [vae.encoder, vae.quant_conv]
        return hashlib.sha256(f"{CHUNK} {config_of(vae)} {weights_of(*parts)}".encode()).hexdigest()

    def to(self, device: torch.device | str) -> LatentEncoder:
        """The encoder, moved to a device, or to be there once it is loaded."""
        self._place = device
        if "vae" in self.__dict__ or isinstance(self._load, nn.Module):
            self.vae.to(device)
        return self

    @classmethod
    def from_pretrained(cls, folder: str) -> LatentEncoder:
        """The autoencoder of a checkpoint folder, checked now and loaded when it is needed."""
        check_weights(AutoencoderKL, Path(folder, "vae"), {"AutoencoderKL"})
        return cls(partial(AutoencoderKL.from_pretrained, folder, subfolder="vae", use_safetensors=True), Path(folder))

    @torch.no_grad()
    def encode(self, inputs: Sequence[Float[Tensor, "3 _ _"]]) -> list[Features]:
        """Moments of pixels in [-1, 1], on the autoencoder's device; those of one shape are encoded together."""
        found: list[Features] = [{} for _ in inputs]
        for shape in dict.fromkeys(picture.shape for picture in inputs):
            alike = [i for i, picture in enumerate(inputs) if picture.shape == shape]
            for start in range(0, len(alike), CHUNK):
                chunk = alike[start : start + CHUNK]
                pixels = torch.zeros(CHUNK, *shape, device=self.vae.device)
                pixels[: len(chunk)] = torch.stack([inputs[i] for i in chunk]).to(self.vae.device)
                with own_precision(self.vae):
                    moments = encode_moments(self.vae, pixels).to(self.vae.dtype)
                for i, row in zip(chunk, moments, strict=False):
                    found[i] = {"moments": row}
        return found

    def encode_batch(self, batch: ImageBatch) -> ImageBatch:
        """The batch with moments (fp32) in place of pixels; one that holds moments is returned as it is.

        What has no target has none after.
        """
        if batch.encoded:
            return batch
        references = batch.references
        if isinstance(references, Tensor):
            references = [list(images) for images in references]
        images = references or [[] for _ in batch.keys]
        targets = [[target] if batch.has_targets else [] for target in batch.target]
        rows = [[*target, *more] for target, more in zip(targets, images, strict=True)]
        found = iter(self.encode([picture for row in rows for picture in row]))
        moments = [[next(found)["moments"] for _ in row] for row in rows]
        if self.store is not None and batch.contents is not None:
            for names, row in zip(batch.contents, moments, strict=True):
                for name, value in zip(names, row, strict=True):
                    self.store.add(name, {"moments": value})
        target = torch.stack([row.pop(0) for row in moments]).float() if batch.has_targets else batch.target
        references = collate_references([[value.float() for value in row] for row in moments])
        return replace(batch, target=target, references=references, encoded=True, pictures=batch.references)

    def sample(
        self, moments: Float[Tensor, "b c2 h w"], seed: int, purpose: str, batch: ImageBatch
    ) -> Float[Tensor, "b c h w"]:
        """Latents from moments of a batch's pictures, with noise of each sample and epoch."""
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        noise = draw(torch.randn, shape, seed, f"posterior {purpose}", batch.epochs, batch.sample_ids)
        return sample_latents(self, moments, noise.to(moments.device))

    def references(self, batch: ImageBatch, seed: int) -> Any:
        """Posterior samples of an encoded batch's references, as the transformer takes them: None, (B, C, h, w) for one
        each, or lists over samples."""
        references = batch.references
        if references is None:
            return None
        if isinstance(references, Tensor):
            samples = [self.sample(each, seed, f"reference {r}", batch) for r, each in enumerate(references.unbind(1))]
            return samples[0] if len(samples) == 1 else [list(s) for s in torch.stack(samples, dim=1)]
        return [
            [self.sample(image[None], seed, f"reference {r}", batch.sample(i))[0] for r, image in enumerate(images)]
            for i, images in enumerate(references)
        ]


class TextEncoder:
    """Text embeddings of a pipeline, {"sequence": (T, d), "pooled": (p,)}, in the encoders' own precision.

    They are kept with their padding: as released, SD3's encoders attend to it without a mask and the transformer reads
    it, so what stands there is of the text and cannot be made from anything else.
    """

    def __init__(self, pipeline: KontextPipeline) -> None:
        self.pipeline = pipeline

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the encoders' configs and weights, the tokenizers' words and the lengths, made when needed."""
        pipeline = self.pipeline
        encoders = [
            e for e in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3) if e is not None
        ]
        tokenizers = [t for t in (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3) if t is not None]
        lengths = (pipeline.tokenizer_max_length, pipeline.t5_tokens)
        words = [sorted(tokenizer.get_vocab().items()) for tokenizer in tokenizers]
        parts = f"{lengths} {words} {[config_of(e) for e in encoders]} {weights_of(*encoders)}"
        return hashlib.sha256(parts.encode()).hexdigest()

    @property
    def origin(self) -> str | None:
        """What says, without loading them, which encoders these are, if anything does."""
        if self.pipeline.origin is None:
            return None
        folder, settings = self.pipeline.origin
        parts = [*TEXT_ENCODERS, *TOKENIZERS]
        lengths = (self.pipeline.tokenizer_max_length, self.pipeline.t5_tokens)
        return origin_of(folder, parts, f"{lengths} {settings}")

    def to(self, device: torch.device | str) -> TextEncoder:
        """The encoder, moved to a device."""
        self.pipeline.to(device)
        return self

    @classmethod
    def from_pretrained(cls, folder: str, precision: Precision = "float32") -> TextEncoder:
        """The text encoders of a checkpoint folder, as a run has them."""
        dtype = Compute(frozen=precision).frozen_dtype
        return cls(KontextPipeline.from_pretrained(folder, text_dtype=dtype, later=(*FROZEN, "transformer")))

    @torch.no_grad()
    def encode(self, inputs: Sequence[str]) -> list[Features]:
        """Sequence and pooled embeddings of distinct texts."""
        found: list[Features] = []
        texts = CHUNK if self.pipeline.device.type == "cuda" else TEXTS  # a GPU is busy with fewer, and a batch has few
        for start in range(0, len(inputs), texts):
            chunk = list(inputs[start : start + texts])
            padding = [f"{i}" for i in range(texts - len(chunk))]
            with own_precision(self.pipeline):
                sequence, pooled = self.pipeline.encode_unique([*chunk, *padding])
            found += [{"sequence": sequence[i].clone(), "pooled": pooled[i].clone()} for i in range(len(chunk))]
        return found
