"""Text-to-image and editing with a Kontext transformer: the released inference, on a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from data_pipeline.transforms import fit_size, to_tensor
from lightning_modules.networks import KontextTransformer
from lightning_modules.networks.adapters import adapter_state, has_adapters
from lightning_modules.networks.autoencoder import decode_latents, encode_moments, sample_latents
from lightning_modules.networks.loading import (
    CheckpointError,
    check_text_encoder,
    check_tokenizer,
    check_weights,
    load_text_encoder,
    read_json,
    require_parts,
    stored_shapes,
)
from lightning_modules.pipelines.later import LaterParts
from lightning_modules.samplers.guidance import guide
from lightning_modules.samplers.ode import euler
from lightning_modules.samplers.timesteps import schedule

# The negative prompt of UniPic2's editing script; text-to-image uses "".
EDIT_NEGATIVE_PROMPT = (
    "blurry, low quality, low resolution, distorted, deformed, broken content, missing parts, damaged details, "
    "artifacts, glitch, noise, pixelated, grainy, compression artifacts, bad composition, wrong proportion, "
    "incomplete editing, unfinished, unedited areas."
)
STOCK_PIPELINE = "StableDiffusion3Pipeline"
STOCK_TRANSFORMER = ["diffusers", "SD3Transformer2DModel"]
TEXT_ENCODERS = {
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
FROZEN = (*TEXT_ENCODERS, "vae")
OUTPUTS = ("pil", "np", "pt", "latent")
Images = Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]]
Generators = torch.Generator | list[torch.Generator] | None


class KontextPipeline(LaterParts, StableDiffusion3Pipeline):
    """StableDiffusion3Pipeline whose transformer also takes reference pictures."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        text_dtype: torch.dtype | None = None,
        later: Collection[str] = (),
        **kwargs: Any,
    ) -> KontextPipeline:
        """Loads a checkpoint folder or hub id, `transformer/` always as KontextTransformer, safetensors only.

        Args:
            pretrained_model_name_or_path: the folder.
            text_dtype: of the text encoders, where it is not that of all.
            later: parts of a folder that are checked now and loaded when they are asked for.
            kwargs: as diffusers takes them.
        """
        folder, loaders = Path(pretrained_model_name_or_path), dict[str, Callable[[], Any]]()
        # Anything but a hub id, which is owner/name; where the owner's part is a folder here, a path was meant.
        if folder.exists() or len(folder.parts) != 2 or Path(folder.parts[0]).is_dir():
            if (folder / "conditioner").is_dir():
                raise CheckpointError(
                    f"{folder} is a Metaquery model, which has no text encoders; open it with MetaqueryPipeline, and "
                    "train it with lightning_modules.connector.ConnectorModule (configs/joint.yaml) or reinforcement"
                )
            require_parts(folder, ("transformer", "vae", "scheduler"))
            for check in (*part_checks(folder), *text_checks(folder, later)):
                check()
            all_parts = part_loaders(folder, text_dtype, kwargs.get("torch_dtype"))
            loaders = {part: load for part, load in all_parts.items() if part in later and part not in kwargs}
            kwargs |= dict.fromkeys(loaders)
            kwargs |= {part: load() for part, load in all_parts.items() if part in TEXT_ENCODERS and part not in kwargs}
        if "transformer" not in kwargs:
            kwargs["transformer"] = KontextTransformer.from_pretrained(
                pretrained_model_name_or_path, subfolder="transformer", torch_dtype=kwargs.get("torch_dtype")
            )
        diffusers_logging.disable_progress_bar()
        pipeline: KontextPipeline = super().from_pretrained(
            pretrained_model_name_or_path, use_safetensors=True, **kwargs
        )
        if "vae" in loaders:
            channels = AutoencoderKL.load_config(folder, subfolder="vae")["block_out_channels"]
            pipeline.vae_scale_factor = 2 ** (len(channels) - 1)
            pipeline.image_processor = VaeImageProcessor(vae_scale_factor=pipeline.vae_scale_factor)
        if loaders:
            pipeline.put_off(loaders, (folder, f"{text_dtype} {kwargs.get('torch_dtype')}"))
        return pipeline

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes a checkpoint folder that names only classes of diffusers and transformers; adapters are merged into
        its weights, and lie in lora/ too, as diffusers' `load_lora_weights` reads them."""
        self.load_all()
        super().save_pretrained(str(save_directory), **kwargs)
        self.save_adapters(Path(save_directory))
        path = Path(save_directory, "model_index.json")
        index = read_json(path)
        index |= {"_class_name": STOCK_PIPELINE, "transformer": STOCK_TRANSFORMER}
        path.write_text(json.dumps(index, indent=2) + "\n")

    def save_adapters(self, folder: Path) -> None:
        """Writes lora/, if there are adapters."""
        if has_adapters(self.transformer):
            weights, settings = adapter_state(self.transformer)
            self.save_lora_weights(
                str(folder / "lora"), transformer_lora_layers=weights, transformer_lora_adapter_metadata=settings
            )

    @property
    def size_multiple(self) -> int:
        """What both sides of a picture must be multiples of."""
        return self.vae_scale_factor * self.transformer.config.patch_size

    def require_sizes(self, multiple: int, sizes: Iterable[int]) -> None:
        """Refuses resolutions of data that the transformer has no tokens or no positions for."""
        limit = self.size_multiple * self.transformer.config.pos_embed_max_size
        if multiple % self.size_multiple or max(sizes) > limit:
            raise CheckpointError(
                f"data: size_multiple {multiple} and image_size {max(sizes)} do not fit this model: it takes multiples "
                f"of {self.size_multiple} pixels up to {limit}; no sample would fit a bucket"
            )

    @property
    def t5_tokens(self) -> int:
        """Length of the T5 sequence: the folder's tokenizer_3 tells, at most the released default of 256."""
        return 256 if self.tokenizer_3 is None else min(256, self.tokenizer_3.model_max_length)

    def limit_t5(self, tokens: int) -> None:
        """Shortens the T5 sequence; what is saved from here on keeps the length."""
        if self.tokenizer_3 is None or not 1 <= tokens <= self.t5_tokens:
            raise CheckpointError(
                f"max_sequence_length is {tokens}; this folder's T5 takes 1 to {self.t5_tokens} tokens"
            )
        self.tokenizer_3.model_max_length = tokens

    @property
    def text_tokens(self) -> int:
        """Length of the whole text sequence."""
        return self.tokenizer_max_length + self.t5_tokens

    def encode_unique(
        self, prompts: Sequence[str], max_sequence_length: int | None = None
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b p"]]:
        """Sequence and pooled embeddings; equal prompts are encoded once. As released: CLIP tokens, then T5's."""
        unique = list(dict.fromkeys(prompts))
        sequence, _, pooled, _ = self.encode_prompt(
            unique,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length or self.t5_tokens,
        )
        rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=sequence.device)
        return sequence[rows], pooled[rows]

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: Images | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.5,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        max_sequence_length: int | None = None,
        return_dict: bool = True,
    ) -> StableDiffusion3PipelineOutput | tuple[Any]:
        """Pictures of the prompts, or edits of the pictures by them.

        Args:
            prompt: texts, or none where embeddings are given.
            image: one reference; a list, one for each prompt; or a list of lists, each prompt's references. One
                reference is brought to the output's size, several keep theirs (rounded to `size_multiple`).
            height, width: pixels; default the first picture's size, else the folder's sample_size.
            num_inference_steps: Euler steps.
            guidance_scale: s of classifier-free guidance; 1 runs the positive branch alone.
            negative_prompt: default "" for text-to-image and the released text for edits.
            prompt_embeds, pooled_prompt_embeds: instead of prompts.
            negative_prompt_embeds, negative_pooled_prompt_embeds: instead of negative prompts.
            generator: of the noise and of the references' posterior samples; or a list, one for each prompt.
            latents: initial noise (B, C, h, w).
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent".
            max_sequence_length: T5 tokens.
            return_dict: whether to wrap the pictures as diffusers does.
        """
        if output_type not in OUTPUTS or num_inference_steps < 1:
            raise CheckpointError(
                f"output_type is {output_type!r} and num_inference_steps {num_inference_steps}; expected one of "
                f"{', '.join(OUTPUTS)} and at least 1 step"
            )
        given = prompt if prompt_embeds is None else list(prompt_embeds)
        count = len(given) if isinstance(given, list) else 1
        references = group_references(image, count)
        height, width = self._output_size(height, width, references)
        pictures = self._pictures(references, (height, width))
        length = max_sequence_length
        positive = self._embeddings(prompt, pictures, prompt_embeds, pooled_prompt_embeds, length, "prompt")
        device = positive[0].device
        negative = None
        if guidance_scale != 1:
            if negative_prompt is None:
                negative_prompt = EDIT_NEGATIVE_PROMPT if references else ""
            texts = [negative_prompt] * count if isinstance(negative_prompt, str) else negative_prompt
            given_negative = negative_prompt_embeds, negative_pooled_prompt_embeds
            negative = self._embeddings(texts, pictures, *given_negative, length, "negative_prompt")
        encoded = None if pictures is None else self._encode_references(pictures, generator)
        if latents is None:
            shape = (count, self.transformer.config.in_channels, *self._latent_size(height, width))
            latents = randn_tensor(shape, generator=generator, device=device)
        velocity = self._velocity(positive, negative, encoded, guidance_scale)
        sigmas = schedule(num_inference_steps, self.scheduler.config.shift, self.scheduler.config.num_train_timesteps)
        x = euler(velocity, latents.to(device), sigmas)
        made = x if output_type == "latent" else to_output(decode_latents(self.vae, x), output_type)
        return StableDiffusion3PipelineOutput(images=made) if return_dict else (made,)

    def _embeddings(
        self,
        texts: str | list[str] | None,
        pictures: list[list[Tensor]] | None,
        embeds: Tensor | None,
        pooled: Tensor | None,
        length: int | None,
        name: str,
    ) -> tuple[Tensor, Tensor]:
        if embeds is not None:
            if pooled is None:
                raise ValueError(f"{name}_embeds were given without their pooled embeddings; give both")
            return embeds, pooled
        if texts is None:
            raise ValueError(f"give {name} or {name}_embeds with their pooled embeddings")
        return self._encode_prompts([texts] if isinstance(texts, str) else texts, pictures, length)

    def _encode_prompts(
        self, prompts: list[str], pictures: list[list[Tensor]] | None, length: int | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of prompts; text encoders see no pictures."""
        return self.encode_unique(prompts, length)

    def _pictures(self, references: list[list[Image.Image]] | None, size: tuple[int, int]) -> list[list[Tensor]] | None:
        """References (3, h, w) in [-1, 1]; one of a prompt at the output's size, several at their own."""
        if references is None:
            return None
        sizes = [[size] if len(images) == 1 else [self._own_size(image) for image in images] for images in references]
        return [
            [to_tensor(image.convert("RGB"), own) for image, own in zip(images, row, strict=True)]
            for images, row in zip(references, sizes, strict=True)
        ]

    def _latent_size(self, height: int, width: int) -> tuple[int, int]:
        return height // self.vae_scale_factor, width // self.vae_scale_factor

    def _output_size(
        self, height: int | None, width: int | None, references: list[list[Image.Image]] | None
    ) -> tuple[int, int]:
        """The size asked for, else the first reference's (rounded), else the folder's default."""
        default = self.transformer.config.sample_size * self.vae_scale_factor
        first = next((images[0] for images in references or [] if images), None)
        if height is None and width is None and first is not None:
            return fit_size(first.height, first.width, max(first.size), self.size_multiple)
        height, width = height or default, width or default
        if height % self.size_multiple or width % self.size_multiple:
            near = tuple(max(1, round(s / self.size_multiple)) * self.size_multiple for s in (height, width))
            raise CheckpointError(
                f"height {height} and width {width} must be multiples of {self.size_multiple} "
                f"(autoencoder factor x patch size); use {near[0]} and {near[1]}"
            )
        return height, width

    def _encode_references(self, pictures: list[list[Tensor]], generator: Generators) -> Any:
        """Sampled posterior latents, as released: (B, C, h, w) for one each, else lists."""
        if all(len(images) == 1 for images in pictures):
            return self._sample(torch.stack([images[0] for images in pictures]), generator)
        rows = []
        for i, images in enumerate(pictures):
            draws = generator[i] if isinstance(generator, list) else generator
            rows.append([self._sample(pixels[None], draws)[0] for pixels in images])
        return rows

    def _own_size(self, image: Image.Image) -> tuple[int, int]:
        return fit_size(image.height, image.width, max(image.size), self.size_multiple)

    def _sample(self, pixels: Tensor, generator: Generators) -> Tensor:
        moments = encode_moments(self.vae, pixels.to(self._execution_device))
        mean = moments.chunk(2, dim=1)[0]
        noise = randn_tensor(mean.shape, generator=generator, device=mean.device)
        return sample_latents(self.vae, moments, noise)

    def _velocity(
        self, positive: tuple[Tensor, Tensor], negative: tuple[Tensor, Tensor] | None, references: Any, scale: float
    ) -> Any:
        """velocity(x, sigma) under guidance; both branches see the references, only the text differs."""
        sequence, pooled = positive
        if negative is not None:
            sequence, pooled = torch.cat([negative[0], sequence]), torch.cat([negative[1], pooled])
            if references is not None:
                twice = isinstance(references, Tensor)
                references = torch.cat([references] * 2) if twice else [*references, *references]

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            copies = 1 if negative is None else 2
            v = self.transformer(
                hidden_states=torch.cat([x] * copies).to(self.transformer.dtype),
                ref_hidden_states=references,
                encoder_hidden_states=sequence,
                pooled_projections=pooled,
                timestep=1000 * torch.cat([sigma] * copies),
                return_dict=False,
            )[0].float()
            if negative is None:
                return v
            v_negative, v_positive = v.chunk(2)
            return guide(v_negative, v_positive, scale)

        return velocity


def part_loaders(
    folder: Path, text_dtype: torch.dtype | None, dtype: torch.dtype | None
) -> dict[str, Callable[[], Any]]:
    """What loads each of a folder's models."""
    texts = {part: encoder for part, encoder in TEXT_ENCODERS.items() if (folder / part).is_dir()}
    whole = {"pretrained_model_name_or_path": folder, "torch_dtype": dtype}
    return {
        **{part: partial(load_text_encoder, each, folder / part, text_dtype or dtype) for part, each in texts.items()},
        "vae": partial(AutoencoderKL.from_pretrained, subfolder="vae", use_safetensors=True, **whole),
        "transformer": partial(KontextTransformer.from_pretrained, subfolder="transformer", **whole),
    }


def part_checks(folder: Path) -> list[Callable[[], object]]:
    """What is checked of a folder before anything of it is loaded; the transformer checks itself."""
    texts = [part for part in TEXT_ENCODERS if (folder / part).is_dir()]
    words = [part for part in TOKENIZERS if (folder / part).is_dir()]
    return [
        partial(check_scheduler, folder / "scheduler"),
        partial(check_weights, AutoencoderKL, folder / "vae", {"AutoencoderKL"}),
        *(partial(stored_shapes, folder / part) for part in texts),
        *(partial(check_tokenizer, folder / part) for part in words),
    ]


def text_checks(folder: Path, parts: Collection[str] = tuple(TEXT_ENCODERS)) -> list[Callable[[], object]]:
    """What is checked of text encoders that are not loaded at once, which would tell."""
    return [
        partial(check_text_encoder, encoder, folder / part)
        for part, encoder in TEXT_ENCODERS.items()
        if part in parts and (folder / part).is_dir()
    ]


def check_scheduler(folder: Path) -> None:
    """Checks that a scheduler is the Euler scheduler of rectified flow with a fixed shift, as sampling here has it."""
    config = read_json(folder / "scheduler_config.json")
    found = (config.get("_class_name"), config.get("shift"), bool(config.get("use_dynamic_shifting")))
    if found[0] != "FlowMatchEulerDiscreteScheduler" or not isinstance(found[1], int | float) or found[2]:
        raise CheckpointError(
            f"{folder / 'scheduler_config.json'} describes a {found[0]} with shift {found[1]}, dynamic shifting "
            f"{found[2]}; expected FlowMatchEulerDiscreteScheduler with a fixed shift"
        )


def group_references(image: Images | None, count: int) -> list[list[Image.Image]] | None:
    """References of each of `count` prompts, or None where there are none at all."""
    if image is None:
        return None
    if isinstance(image, Image.Image):
        return [[image]] * count
    groups = [[entry] if isinstance(entry, Image.Image) else list(entry) for entry in image]
    if len(groups) != count:
        raise ValueError(f"expected references for each of {count} prompts, got {len(groups)}; nest several in a list")
    return groups if any(groups) else None


def to_output(pixels: Float[Tensor, "b 3 h w"], output_type: str) -> Any:
    """Pixels in [-1, 1] to the form asked for."""
    unit = (pixels / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return unit
    array = unit.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(picture) for picture in np.rint(array * 255).astype(np.uint8)]
