"""Vision-language models, connectors and R1V's parts on the meta device, and steps through them that are counted."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.initialization import no_init_weights

from lightning_modules.networks.adapters import Lora, add_lora
from lightning_modules.networks.compute import Compute, cast_weights
from lightning_modules.networks.conditioner import Conditioner
from lightning_modules.networks.kontext_transformer import KontextTransformer
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.networks.r1v import make_language, make_projector
from lightning_modules.networks.vision import make_tower
from lightning_modules.networks.vlm import Features, Reading, Vlm

QWEN = "qwen2_5_vl"


def vlm_outline(config: Mapping[str, Any], reading: Reading, dtype: torch.dtype, lora: Lora | None) -> Vlm:
    """A Qwen2.5-VL from its config.json: frozen, or with adapters that are trained."""
    if config.get("model_type") != QWEN:
        raise CheckpointError(f"the vision-language model is a {config.get('model_type')}; expected {QWEN}")
    own = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    with torch.device("meta"), no_init_weights():
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(own)).requires_grad_(False).eval()
        cast_weights(model, dtype)
        model.tie_weights()  # which the library leaves out where weights are not drawn
        if lora is not None:
            add_lora(model, lora, 0)
    return Vlm(model, SimpleNamespace(chat_template=""), reading)


def conditioner_outline(config: Mapping[str, Any], compute: Compute, train: bool) -> Conditioner:
    """Queries and connector from a conditioner's config."""
    with torch.device("meta"):
        found = Conditioner.from_config({**config, "_class_name": Conditioner.__name__})
        cast_weights(found.requires_grad_(train).train(), compute.weights_dtype)
    return found


class QueriedStep(nn.Module):
    """A transformer's velocity from queries to a language model, as ConnectorModule computes it.

    Args:
        transformer, conditioner, vlm: of outlines.
        reads: the language model learns to read too, by adapters; else what it read is given.
    """

    def __init__(self, transformer: KontextTransformer, conditioner: Conditioner, vlm: Vlm, reads: bool) -> None:
        super().__init__()
        self.transformer, self.conditioner, self.vlm, self.reads = transformer, conditioner, vlm, reads

    def forward(self, prefix: int, images: dict[str, Any]) -> Tensor:
        """The velocity.

        Args:
            prefix: tokens that each sample's queries stand behind.
            images: arguments of the transformer; what stands for texts in it is not used.
        """
        queries, count = self.conditioner.meta_queries, len(images["hidden_states"])
        learns = self.reads or queries.requires_grad
        with torch.set_grad_enabled(learns):
            rows = [self.prefix(prefix) for _ in range(count)]
            hidden = self.vlm.query(queries, rows)
            sequence, pooled = self.conditioner(hidden.to(queries.dtype))
        given = {**images, "encoder_hidden_states": sequence, "pooled_projections": pooled}
        return self.transformer(**given, return_dict=False)[0]

    def prefix(self, tokens: int) -> Features:
        """What the language model keeps of a conversation."""
        text = self.vlm.text
        heads, size = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
        position = torch.zeros((), dtype=torch.long)
        if not self.reads:
            shape = (text.num_hidden_layers, 2, heads, tokens, size)
            return {"cache": torch.empty(shape, dtype=self.vlm.dtype), "position": position}
        cache = DynamicCache()
        self.vlm.model.model.language_model(
            inputs_embeds=torch.empty(1, tokens, text.hidden_size, dtype=self.vlm.dtype),
            position_ids=torch.zeros(3, 1, tokens, dtype=torch.long),
            past_key_values=cache,
            use_cache=True,
        )
        layers = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
        return {"cache": layers, "position": position}


class TextStep(nn.Module):
    """What a language model is trained by, behind a projector of a tower's features: the loss of a row of tokens.

    Args:
        vision, projector, language: of `r1v_outline`.
        factor: patches to a token, along a side.
    """

    def __init__(self, vision: Any, projector: nn.Module, language: Any, factor: int) -> None:
        super().__init__()
        self.vision, self.projector, self.language, self.factor = vision, projector, language, factor

    def forward(self, rows: int, length: int, tiles: int, side: int, tokens: int, learned: int) -> Tensor:
        """The loss of as many rows; `side` pixels and `tokens` are of a tile, `learned` tokens of the end of a row."""
        dtype = next(self.projector.parameters()).dtype
        trained = any(p.requires_grad for p in self.vision.parameters())
        width = self.vision.width * self.factor**2
        if trained:
            seen = self.vision(torch.empty(tiles, 3, side, side, dtype=next(self.vision.parameters()).dtype))
            features = seen.reshape(tiles * tokens, width).to(dtype)
        else:
            features = torch.empty(tiles * tokens, width, dtype=dtype)
        embedded = self.language.get_input_embeddings()(torch.zeros(rows, length, dtype=torch.long))
        places = torch.zeros(rows, length, 1, dtype=torch.bool)
        embedded = embedded.masked_scatter(places, self.projector(features).to(embedded.dtype))
        visible = torch.ones(rows, 1, length, length, dtype=torch.bool)
        positions = torch.zeros(rows, length, dtype=torch.long)
        logits = self.language(
            inputs_embeds=embedded,
            attention_mask=visible,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=learned + 1,
        ).logits
        labels = torch.zeros(rows, learned, dtype=torch.long)
        return cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels)


def r1v_outline(
    vision: Mapping[str, Any],
    language: Mapping[str, Any],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    train: list[str],
    recompute: bool,
) -> tuple[Any, nn.Module, Any]:
    """Tower, projector and language model.

    Args:
        vision, language: configs.
        dtypes: of tower, projector and language model.
        train: of "vision", "projector" and "language", those that are trained.
        recompute: the language model's activations.
    """
    own = {name: value for name, value in language.items() if name not in ("dtype", "torch_dtype", "architectures")}
    with torch.device("meta"), no_init_weights():
        tower = make_tower(vision)
        model = make_language(own)
        projector = make_projector({"downsample_ratio": 0.5}, tower.width, model.config.hidden_size)
    for name, part, dtype in zip(("vision", "projector", "language"), (tower, projector, model), dtypes, strict=True):
        cast_weights(part.requires_grad_(name in train), dtype)
    model.tie_weights()  # which the library leaves out where weights are not drawn
    if recompute:
        model.activation_checkpointing_enable()
    model.train(recompute)
    return tower, projector, model


class RatedStep(nn.Module):
    """The last token's vector of a language model, in a reader of edits whose vision tower is frozen."""

    def __init__(self, language: Any) -> None:
        super().__init__()
        self.language = language

    def forward(self, count: int, tokens: int) -> Tensor:
        """(B, d) of as many conversations."""
        weights = next(self.language.parameters())
        hidden = self.language(
            inputs_embeds=torch.empty(count, tokens, self.language.config.hidden_size, dtype=weights.dtype),
            attention_mask=torch.ones(count, tokens, dtype=torch.long),
            position_ids=torch.zeros(3, count, tokens, dtype=torch.long),
            use_cache=False,
        ).last_hidden_state
        return hidden[:, -1]
