"""SD3's MMDiT with reference latents, as Skywork UniPic 2.0 released it: no parameter beyond SD3.5's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from jaxtyping import Float
from torch import Tensor

from lightning_modules.networks.adapters import has_adapters, merged_state
from lightning_modules.networks.attention import KontextAttnProcessor
from lightning_modules.networks.loading import CheckpointError, check_weights, require_parts

STOCK_CLASS = "SD3Transformer2DModel"  # the name that stock diffusers loads
CONDITIONS = ("in_channels", "joint_attention_dim", "pooled_projection_dim")  # what a model is asked with
KNOWN_CLASSES = {STOCK_CLASS, "SD3Transformer2DKontextModel", "KontextTransformer"}

References = Float[Tensor, "b c _ _"] | Sequence[Sequence[Float[Tensor, "c _ _"]]]  # of sizes of their own


class KontextTransformer(SD3Transformer2DModel):
    """Image tokens are [references, target]; all get the same positional table and the target's timestep."""

    @wraps(SD3Transformer2DModel.__init__)  # type: ignore[misc]  # diffusers reads the config's fields off this signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_attn_processor(KontextAttnProcessor())

    def forward(
        self,
        hidden_states: Float[Tensor, "b c h w"],
        encoder_hidden_states: Float[Tensor, "b t d"],
        pooled_projections: Float[Tensor, "b p"],
        timestep: Float[Tensor, " b"],
        ref_hidden_states: References | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity of the target's latents, (B, C, h, w).

        Args:
            hidden_states: noisy target latents.
            encoder_hidden_states: text embeddings.
            pooled_projections: pooled text embeddings.
            timestep: 1000 x sigma.
            ref_hidden_states: clean reference latents: one a sample, or per sample a list of any number and size.
            return_dict: whether to wrap the result as diffusers does.
        """
        height, width = hidden_states.shape[-2:]
        target = self.embed(hidden_states)
        dtype = self.pos_embed.proj.weight.dtype  # the timestep stays float32 until it is embedded
        encoder_hidden_states, pooled_projections = encoder_hidden_states.to(dtype), pooled_projections.to(dtype)
        references, mask = self.embed_references(ref_hidden_states, target)
        image = target if references is None else torch.cat([references, target], dim=1)
        temb = self.time_text_embed(timestep, pooled_projections)
        text = self.context_embedder(encoder_hidden_states)
        attention = {} if mask is None else {"attention_mask": mask}
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                text, image = self._gradient_checkpointing_func(block, image, text, temb, attention)
            else:
                text, image = block(image, text, temb, attention)
        image = self.proj_out(self.norm_out(image[:, -target.shape[1] :], temb))
        velocity = self.unpatchify(image, height, width)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def embed(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Patches with the centre-cropped positional table."""
        patch, (height, width) = self.config.patch_size, latents.shape[-2:]
        limit = self.config.pos_embed_max_size * patch
        if height % patch or width % patch or max(height, width) > limit:
            raise CheckpointError(
                f"latents of {height} x {width} do not fit this transformer: both sides must be multiples of its patch "
                f"size {patch} and at most {limit}; choose another image size"
            )
        return self.pos_embed(latents.to(self.pos_embed.proj.weight.dtype)).contiguous()

    def embed_references(
        self, references: References | None, target: Float[Tensor, "b n d"]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Reference tokens (B, R, d), and a mask (B, R + N) over references and target where samples differ."""
        if references is None:
            return None, None
        if isinstance(references, Tensor):
            return self.embed(references), None
        if len(references) != len(target):
            raise CheckpointError(
                f"expected a list of references for each of {len(target)} samples, got {len(references)}"
            )
        shapes = [[tuple(image.shape) for image in images] for images in references]
        if all(own == shapes[0] for own in shapes):
            if not shapes[0]:
                return None, None
            stacked = [torch.stack([images[r] for images in references]) for r in range(len(shapes[0]))]
            return torch.cat([self.embed(images) for images in stacked], dim=1), None
        rows = [
            torch.cat([self.embed(image[None])[0] for image in images]) if images else target[0, :0]
            for images in references
        ]
        longest = max(len(row) for row in rows)
        padded = target.new_zeros(len(rows), longest, target.shape[-1])
        mask = torch.ones(len(rows), longest + target.shape[1], dtype=torch.bool, device=target.device)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
            mask[i, len(row) : longest] = False
        return padded, mask

    def unpatchify(self, tokens: Float[Tensor, "b n p"], height: int, width: int) -> Float[Tensor, "b c h w"]:
        """Output patches back to latents."""
        patch = self.config.patch_size
        grid = tokens.unflatten(-1, (patch, patch, self.out_channels)).unflatten(1, (height // patch, width // patch))
        return torch.einsum("nhwpqc->nchpwq", grid).reshape(len(tokens), self.out_channels, height, width)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> KontextTransformer:
        """Loads SD3.5's or UniPic2's `transformer/` folder; names every missing or misshapen key if it does not fit."""
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            cls.check(folder)
        return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **kwargs})

    @classmethod
    def check(cls, folder: Path) -> None:
        """Refuses a `transformer/` folder whose weights are not those of its config, or of another architecture."""
        check_weights(cls, folder, KNOWN_CLASSES, optional={"pos_embed.pos_embed"})

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Writes a `transformer/` folder; adapters are merged in float32, and the weights stay as they are here."""
        if not has_adapters(self):
            super().save_pretrained(save_directory, **kwargs)
            return
        plain = type(self).from_config(self.config)
        plain.load_state_dict(merged_state(self))
        plain.save_pretrained(save_directory, **kwargs)

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes the config under the stock class's name, so that stock diffusers loads the folder too."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        path = Path(save_directory, self.config_name)
        path.write_text(
            path.read_text().replace(f'"_class_name": "{type(self).__name__}"', f'"_class_name": "{STOCK_CLASS}"')
        )


def load_frozen(folder: Path, like: KontextTransformer) -> KontextTransformer:
    """The transformer of another checkpoint folder, frozen; it must take the latents and embeddings of this one."""
    require_parts(folder, ("transformer",))
    found = KontextTransformer.from_pretrained(folder, subfolder="transformer")
    for name in CONDITIONS:
        if found.config[name] != like.config[name]:
            raise CheckpointError(
                f"{folder} has {name} {found.config[name]}, and the trained model {like.config[name]}"
            )
    return found.requires_grad_(False).eval()
