"""Qwen2.5-VL as MetaQuery has it: learnable queries behind a conversation, whose hidden states are conditions.

The language model is causal, so what stands before the queries does not depend on them. Its keys and values are
computed once (`prefix`) and can be kept; only the queries pass through the layers in each step (`query`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoProcessor, DynamicCache, Qwen2_5_VLForConditionalGeneration

from lightning_modules.networks.adapters import has_adapters, merged_state
from lightning_modules.networks.compute import own_precision
from lightning_modules.networks.loading import CheckpointError, load_text_encoder

# The system turn that Qwen2.5-VL's template adds by itself; UniPic 2.0's scripts cut it out of the template.
SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
)
PIXELS_A_TOKEN = 32  # a picture's sides are scaled by 28/32 for patches of 14, two by two of which are one token
ROUND = 8  # lengths are padded to multiples of it: few geometries
Features = dict[str, Tensor]
Pictures = Sequence[Sequence[Float[Tensor, "3 _ _"]]]


@dataclass(frozen=True)
class Reading:
    """How a model is queried.

    Attributes:
        positions: "2d" gives image tokens their rows and columns, as Qwen2.5-VL was trained; "1d" counts them on, as
            UniPic 2.0's edit script does with the release of transformers that it pins.
        layers: whose hidden states are stacked on channels, -1 the last after its norm, -2 the last but one's output;
            DeepGen (arXiv 2602.12205) takes every sixth.
    """

    positions: Literal["2d", "1d"] = "2d"
    layers: list[int] = field(default_factory=lambda: [-1])


class Vlm(nn.Module):
    """A Qwen2.5-VL of transformers with its processor.

    Args:
        model: Qwen2_5_VLForConditionalGeneration.
        processor: of it, with a chat template.
        reading: how it is queried.
        folder: where it was loaded from, if it was.
    """

    def __init__(self, model: Any, processor: Any, reading: Reading = Reading(), folder: Path | None = None) -> None:
        super().__init__()
        self.model, self.processor, self.reading, self.folder = model, processor, reading, folder
        self.text: Any = model.config.get_text_config()
        self.template = processor.chat_template.replace(SYSTEM, "")
        depth = self.text.num_hidden_layers
        if not reading.layers or not all(-depth - 1 <= layer <= -1 for layer in reading.layers):
            raise CheckpointError(f"layers are {reading.layers}; expected numbers from -1 to {-depth - 1}")

    @classmethod
    def from_pretrained(cls, folder: Path, reading: Reading = Reading(), dtype: torch.dtype | None = None) -> Vlm:
        """A folder of transformers, safetensors only; frozen."""
        model = load_text_encoder(Qwen2_5_VLForConditionalGeneration, folder, dtype)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        if not getattr(processor, "chat_template", None):
            raise CheckpointError(f"{folder} has no chat template; expected a vision-language model tuned to chat")
        return cls(model.requires_grad_(False).eval(), processor, reading, folder)

    def save_pretrained(self, folder: Path) -> None:
        """Writes the folder; adapters are merged into the weights, which stay as they are here."""
        model = self.model
        if has_adapters(model):
            model = type(self.model)(self.model.config)
            model.load_state_dict(merged_state(self.model))
            model.generation_config = self.model.generation_config
            model.to(self.model.dtype)
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

    @property
    def width(self) -> int:
        """Of a hidden state."""
        return self.text.hidden_size

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return self.text.max_position_embeddings

    @property
    def cell(self) -> int:
        """Pixels of a token's side, as the vision tower sees them."""
        vision = self.model.config.vision_config
        return vision.patch_size * vision.spatial_merge_size

    def conversation(self, text: str, pictures: int, template: str | None = None) -> str:
        """One user turn, its pictures first, and the opening of the answer."""
        content = [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]
        turns = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(
            turns, chat_template=template or self.template, tokenize=False, add_generation_prompt=True
        )

    def patches(self, picture: Float[Tensor, "3 h w"], scaled: bool = True) -> tuple[Tensor, Int[Tensor, " 3"]]:
        """Patches (N, p) of a picture in [-1, 1], and their grid; any picture has at least one token.

        `scaled` brings it to 28/32 of its size, as for generation; otherwise the processor's own limits decide.
        """
        height, width = picture.shape[-2:]
        scale = self.cell / PIXELS_A_TOKEN
        pixels = int(height * scale * width * scale)
        size = {"size": {"shortest_edge": pixels, "longest_edge": pixels}} if scaled else {}
        levels = ((picture.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
        try:
            found = self.processor.image_processor(levels, return_tensors="pt", **size)
        except ValueError as error:
            raise CheckpointError(f"a picture of {height} x {width} pixels does not fit the VLM: {error}") from error
        return found["pixel_values"], found["image_grid_thw"][0]

    def tokens(self, conversation: str, grids: Sequence[Tensor], room: int) -> Int[Tensor, " t"]:
        """Ids of a conversation; `room` tokens are to follow."""
        mark = self.processor.image_token
        pieces = conversation.split(mark)
        counts = [int(grid.prod()) // self.model.config.vision_config.spatial_merge_size**2 for grid in grids]
        expanded = pieces[0] + "".join(mark * n + piece for n, piece in zip(counts, pieces[1:], strict=True))
        ids = self.processor.tokenizer(expanded, return_tensors="pt", truncation=False).input_ids[0]
        if len(ids) + room > self.context:
            raise CheckpointError(
                f"the text {conversation[:60]!r}... and its pictures are {len(ids)} tokens, {room} more must follow: "
                f"the VLM's context has {self.context}; shorten the text, or take smaller pictures or fewer queries"
            )
        return ids

    def positions(self, ids: Int[Tensor, " t"], grids: Sequence[Tensor]) -> Int[Tensor, "3 t"]:
        """Time, row and column of each token."""
        if not grids or self.reading.positions == "1d":
            return torch.arange(len(ids)).expand(3, -1)
        kinds = (ids == self.model.config.image_token_id).int()
        return self.model.model.get_rope_index(ids[None], kinds[None], image_grid_thw=torch.stack(list(grids)))[0][:, 0]

    def prefix(self, conversations: Sequence[str], pictures: Pictures, queries: int, rows: int) -> list[Features]:
        """Of each conversation its keys and values {"cache": (layers, 2, heads, T, d)} and the "position" after it.

        Conversations are read `rows` at a time, filled up where there are fewer, those of one geometry together: so the
        same one gives the same bits whatever is beside it. As the model is causal, padding behind changes nothing.
        On a GPU, which one picture keeps busy, each that shows some is read alone.
        """
        found: list[Features | None] = [None] * len(conversations)
        seen = [[self.patches(picture) for picture in own] for own in pictures]
        grids = [[grid for _, grid in own] for own in seen]
        ids = [self.tokens(*each, queries) for each in zip(conversations, grids, strict=True)]
        shapes = [
            (-(-len(own) // ROUND) * ROUND, [grid.tolist() for grid in row])
            for own, row in zip(ids, grids, strict=True)
        ]
        for shape in [shape for i, shape in enumerate(shapes) if shape not in shapes[:i]]:
            length, alike = shape[0], [i for i, own in enumerate(shapes) if own == shape]
            together = 1 if self.device.type == "cuda" and shape[1] else rows
            for start in range(0, len(alike), together):
                chunk = alike[start : start + together]
                full = chunk + [chunk[0]] * (together - len(chunk))
                places = [self.positions(ids[i], grids[i]) for i in full]
                layers = self._read([ids[i] for i in full], [seen[i] for i in full], places, length)
                for row, i in enumerate(chunk):
                    cache = torch.stack([torch.stack([k[row], v[row]]) for k, v in layers])[..., : len(ids[i]), :]
                    found[i] = {"cache": cache.contiguous(), "position": (places[row].max() + 1).to(self.device)}
        return [features for features in found if features is not None]

    def _read(
        self, ids: list[Tensor], seen: list[list[tuple[Tensor, Tensor]]], places: list[Tensor], length: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (rows, heads, length, d)."""
        padded = torch.stack([F.pad(own, (0, length - len(own))) for own in ids]).to(self.device)
        embedded = self.model.get_input_embeddings()(padded)
        patches = [patch for own in seen for patch in own]
        if patches:
            pixels, grids = (torch.cat([p for p, _ in patches]), torch.stack([g for _, g in patches]))
            images = self.model.get_image_features(pixels.to(self.device), grids.to(self.device)).pooler_output
            mask = (padded == self.model.config.image_token_id)[..., None].expand_as(embedded)
            # Padding is of id 0, which is text in every vocabulary of Qwen's.
            embedded = embedded.masked_scatter(mask, torch.cat(list(images)).to(embedded))
        positions = torch.stack([F.pad(own, (0, length - own.shape[1])) for own in places], dim=1).to(self.device)
        cache = DynamicCache()
        self.model.model.language_model(
            inputs_embeds=embedded, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return [(layer.keys, layer.values) for layer in cache.layers]

    def query(self, queries: Float[Tensor, "n d"], prefixes: Sequence[Features]) -> Float[Tensor, "b n e"]:
        """Hidden states at the queries behind each prefix; gradients reach the queries. Padding is seen by nothing."""
        lengths = [own["cache"].shape[-2] for own in prefixes]
        longest, count = max(lengths), len(queries)
        dtype = self.model.dtype
        cached = [F.pad(own["cache"], (0, 0, 0, longest - t)) for own, t in zip(prefixes, lengths, strict=True)]
        stacked = torch.stack(cached, dim=2).to(self.device, dtype)  # (layers, 2, B, heads, T, d)
        spans = torch.tensor(lengths, device=self.device)
        kept = torch.arange(longest, device=self.device) < spans[:, None]
        mask = F.pad(kept, (0, count), value=True).long()
        begin = torch.stack([own["position"] for own in prefixes]).to(self.device)
        positions = (begin[:, None] + torch.arange(count, device=self.device)).expand(3, -1, -1)
        with own_precision(self):
            output = self.model.model.language_model(
                inputs_embeds=queries.to(self.device, dtype).expand(len(prefixes), -1, -1),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=DynamicCache([(k, v) for k, v in stacked]),
                use_cache=True,
                output_hidden_states=self.reading.layers != [-1],
            )
        if self.reading.layers == [-1]:
            return output.last_hidden_state
        return torch.cat([output.hidden_states[layer] for layer in self.reading.layers], dim=-1)

    @torch.no_grad()
    def answer(
        self, questions: Sequence[str], pictures: Pictures, max_new_tokens: int, temperature: float = 0.0
    ) -> list[str]:
        """The model's own answers, with its own template and sizes of pictures; greedy at temperature 0."""
        seen = [[self.patches(picture, scaled=False) for picture in own] for own in pictures]
        template = self.processor.chat_template
        ids = [
            self.tokens(self.conversation(question, len(own), template), [grid for _, grid in own], max_new_tokens)
            for question, own in zip(questions, seen, strict=True)
        ]
        longest = max(map(len, ids))
        padded = torch.stack([F.pad(own, (longest - len(own), 0)) for own in ids]).to(self.device)
        lengths = torch.tensor([len(own) for own in ids], device=self.device)
        inputs = {"attention_mask": (torch.arange(longest, device=self.device) >= longest - lengths[:, None]).long()}
        patches = [patch for own in seen for patch in own]
        if patches:
            inputs["pixel_values"] = torch.cat([p for p, _ in patches]).to(self.device)
            inputs["image_grid_thw"] = torch.stack([g for _, g in patches]).to(self.device)
            inputs["mm_token_type_ids"] = (padded == self.model.config.image_token_id).int()
        sampling = {"do_sample": temperature > 0, **({"temperature": temperature} if temperature > 0 else {})}
        self.model.model.rope_deltas = None  # those of an earlier batch would be taken for this one's
        output = self.model.generate(padded, max_new_tokens=max_new_tokens, **inputs, **sampling)
        texts = self.processor.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        return [text.strip() for text in texts]
