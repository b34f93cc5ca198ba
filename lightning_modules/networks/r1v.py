"""R1V: a vision tower, a light projector and any causal language model of transformers (arXiv 2504.05599)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from lightning_modules.networks.loading import (
    CheckpointError,
    compare_shapes,
    load_text_encoder,
    read_json,
    stored_shapes,
)
from lightning_modules.networks.vision import make_tower, pixel_unshuffle

IMAGE, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"
CLOSE = "</think>"
PARTS = ("vision_model", "mlp1", "language_model")
# What a folder may leave out: a single tile of the tower's size.
TILING = {"min_dynamic_patch": 1, "max_dynamic_patch": 1, "use_thumbnail": True}


class R1VModel(nn.Module):
    """Pictures and words to words.

    Args:
        vision: a tower of `networks.vision`.
        projector: LayerNorm, Linear, GELU, Linear: what R1V trains (`mlp1`).
        language: a causal language model of transformers.
        tokenizer: its tokenizer; one that has the picture's tokens.
        config: as in a released folder; `downsample_ratio`, `force_image_size` and the tiling are read.
    """

    def __init__(
        self, vision: nn.Module, projector: nn.Module, language: Any, tokenizer: Any, config: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.vision, self.projector, self.language, self.tokenizer = vision, projector, language, tokenizer
        self.config = {**TILING, **config}
        self.image_token = token_id(tokenizer, IMAGE)

    @property
    def factor(self) -> int:
        """Patches to a token, along a side."""
        return round(1 / self.config["downsample_ratio"])

    @property
    def image_size(self) -> int:
        """Side of a tile in pixels."""
        return tile_side(self.config)

    @property
    def tokens_per_tile(self) -> int:
        """Tokens that stand for a tile."""
        return tile_tokens(self.config)

    def image_features(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n tokens d"]:
        """Tiles, normalised as `layout.tiles` does, to embeddings of the language model."""
        patch = self.config["vision_config"]["patch_size"]
        grid = pixel_values.shape[2] // patch, pixel_values.shape[3] // patch
        frozen = not any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            patches = self.vision(pixel_values.to(next(self.vision.parameters()).dtype))
        tokens = pixel_unshuffle(patches, grid, self.factor)
        return self.projector(tokens.to(next(self.projector.parameters()).dtype))

    def embeddings(self, input_ids: Int[Tensor, "b l"], image_features: Tensor | None) -> Float[Tensor, "b l d"]:
        """Those of the tokens; image features take the places of the picture's tokens, in order."""
        embedded = self.language.get_input_embeddings()(input_ids)
        places = input_ids == self.image_token
        wanted, given = int(places.sum()), 0 if image_features is None else image_features.flatten(0, -2).shape[0]
        if wanted != given:
            raise CheckpointError(
                f"{wanted} tokens {IMAGE} for {given} image features; lay the texts out with networks.layout"
            )
        if image_features is None:
            return embedded
        return embedded.masked_scatter(places[..., None], image_features.to(embedded.dtype))

    def forward(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Int[Tensor, "b l"],
        image_features: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Float[Tensor, "*places v"]:
        """Logits.

        Args:
            input_ids: tokens.
            attention_mask: 0 where padded; else the number of a token's sample, from 1 in each row: samples
                that are packed into a row do not see one another.
            image_features: (tiles, tokens, d) or (tokens, d), in the order of their tokens; None for words alone.
            places: where logits are wanted, which take most of the memory where a vocabulary is large: columns (k,),
                which gives (B, k, V), or a mask (B, L), which gives (n, V) row after row; None takes all.
        """
        embedded = self.embeddings(input_ids, image_features)
        mask = attention_mask
        if attention_mask.max() > 1:
            mask = visible(attention_mask)
            if self.language.config._attn_implementation == "eager":  # adds its mask, where others take a boolean one
                mask = torch.zeros_like(mask, dtype=embedded.dtype).masked_fill(~mask, torch.finfo(embedded.dtype).min)
        return self.language(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=positions(attention_mask),
            use_cache=False,
            logits_to_keep=0 if places is None else places,
        ).logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Int[Tensor, "b l"],
        image_features: Tensor | None = None,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        repetition_penalty: float = 1.0,
        end_bias: float = 0.0,
    ) -> Int[Tensor, "b new"]:
        """Answers, up to and including the end of the turn, then padding.

        Args:
            input_ids: prompts, padded on the left.
            attention_mask: 0 where padded.
            image_features: as `forward` takes them.
            max_new_tokens: at most, of an answer.
            temperature: of the draws; 0 takes the likeliest token.
            top_p: draw from the likeliest tokens that have this probability together.
            seed: of the draws; the global random state is left as it was.
            repetition_penalty: divides the logits of tokens that the answer has (CTRL, arXiv 1909.05858); above 1
                answers become shorter. The prompt's tokens are not counted.
            end_bias: added to the logits of the tokens that end thoughts (`end_of_thoughts`): above 0 thoughts become
                shorter.
        """
        ends = end_of_thoughts(self.tokenizer) if end_bias else []
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
            repetition_penalty=repetition_penalty,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.pad_token,
            **({"sequence_bias": [[[token], float(end_bias)] for token in ends]} if ends else {}),
            suppress_tokens=[self.image_token],  # which stands for a picture, and never for an answer
            cache_implementation="static",
            disable_compile=True,
        )
        embedded = self.embeddings(input_ids, image_features)
        devices = [embedded.device] if embedded.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return self.language.generate(
                inputs_embeds=embedded, attention_mask=attention_mask.clamp(max=1), generation_config=settings
            )

    @property
    def pad_token(self) -> int:
        """What follows the end of an answer."""
        found = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if found is None else found)

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype | None = None) -> R1VModel:
        """A folder in R1V's released layout, or one that `save_pretrained` wrote; safetensors only."""
        folder = Path(folder)
        config = read_json(folder / "config.json")
        for name in ("vision_config", "llm_config", "downsample_ratio"):
            if name not in config:
                raise CheckpointError(f"{folder / 'config.json'} has no {name}; expected R1V's released layout")
        for name, known in (("select_layer", -1), ("ps_version", "v2")):
            if config.get(name, known) != known:
                raise CheckpointError(
                    f"{folder / 'config.json'} has {name} {config[name]!r}; R1V's models have {known!r}"
                )
        # The folder's own config is of a class that transformers lacks; the tokenizer's names the tokenizer.
        tokenizer = AutoTokenizer.from_pretrained(folder, config=PreTrainedConfig(), local_files_only=True)
        with no_init_weights():
            vision, language = make_tower(config["vision_config"]), make_language(config["llm_config"], dtype)
            projector = make_projector(config, vision.width, language.config.hidden_size)
        model = cls(vision, projector, language, tokenizer, config)
        model.load_released(folder, dtype)
        return model.eval()

    @classmethod
    def from_parts(
        cls,
        vision: str | Path,
        language: str | Path,
        projector: str | Path | None = None,
        seed: int = 0,
        max_dynamic_patch: int = 1,
        downsample_ratio: float = 0.5,
        dtype: torch.dtype | None = None,
    ) -> R1VModel:
        """Plugs parts together, as R1V's re-assembly does, with no training.

        Args:
            vision: a tower's folder, whose config.json is a `vision_config`, or a whole R1V's, whose tower is taken.
            language: a causal language model of transformers with its tokenizer.
            projector: a whole R1V's folder, whose projector is taken; None draws one.
            seed: of a projector that is drawn.
            max_dynamic_patch: tiles of a picture, at most; the thumbnail is one more.
            downsample_ratio: tokens to patches, along a side.
            dtype: of the weights; None keeps those of the files.
        """
        vision, language = Path(vision), Path(language)
        config = assembled(vision, language, max_dynamic_patch, downsample_ratio)
        model = load_text_encoder(AutoModelForCausalLM, language, dtype)
        tokenizer = tokenizer_of(language, model.config.vocab_size)
        tower = make_tower(config["vision_config"])
        prefix = "vision_model." if "vision_config" in read_json(vision / "config.json") else ""
        tower.load_released(fitting(vision, tower.released_state(), prefix, dtype))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mlp = make_projector(config, tower.width, model.config.hidden_size)
        if projector is not None:
            mlp.load_state_dict(fitting(Path(projector), mlp.state_dict(), "mlp1.", dtype), assign=True)
        return cls(tower, mlp, model, tokenizer, config).eval()

    def load_released(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Takes all weights of a folder, after comparing their names and shapes with the model's."""
        expected = {name: tuple(tensor.shape) for name, tensor in self.released_state().items()}
        tied = [
            n for n in expected if n == "language_model.lm_head.weight" and self.language.config.tie_word_embeddings
        ]
        compare_shapes(folder, expected, stored_shapes(folder), tied)
        state = read_tensors(folder, "", dtype)
        own = {
            part: {n.removeprefix(f"{part}."): t for n, t in state.items() if n.startswith(f"{part}.")}
            for part in PARTS
        }
        self.vision.load_released(own["vision_model"])  # type: ignore[operator]
        self.projector.load_state_dict(own["mlp1"], assign=True)
        self.language.load_state_dict(own["language_model"], assign=True, strict=not tied)
        self.language.tie_weights()

    def released_state(self) -> dict[str, Tensor]:
        """All weights by their released names."""
        states = (self.vision.released_state(), self.projector.state_dict(), self.language.state_dict())  # type: ignore[operator]
        return {f"{part}.{name}": t for part, state in zip(PARTS, states, strict=True) for name, t in state.items()}

    def save_pretrained(self, folder: str | Path, safe_serialization: bool = True) -> None:
        """Writes R1V's released layout: config, tokenizer and weights under the released names."""
        if not safe_serialization:
            raise CheckpointError("R1V's folders are written as safetensors only")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.released_state().items()}
        if self.language.config.tie_word_embeddings:
            state.pop("language_model.lm_head.weight", None)
        save_torch_state_dict(state, folder)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        self.tokenizer.save_pretrained(folder)


def assembled(
    vision: Path, language: Path, max_dynamic_patch: int = 1, downsample_ratio: float = 0.5
) -> dict[str, Any]:
    """The config of an R1V of two folders, as `R1VModel.from_parts` takes them."""
    found = read_json(vision / "config.json")
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "vision_config": found.get("vision_config", found),
        "llm_config": read_json(language / "config.json"),
        "downsample_ratio": downsample_ratio,
        "select_layer": -1,
        "ps_version": "v2",
        "force_image_size": found.get("force_image_size", found.get("image_size")),
        "dynamic_image_size": True,
        **TILING,
        "max_dynamic_patch": max_dynamic_patch,
    }


def tokenizer_of(language: Path, rows: int) -> Any:
    """A language model's tokenizer with the picture's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(language, local_files_only=True)
    add_image_tokens(tokenizer, rows)
    return tokenizer


def tile_side(config: Mapping[str, Any]) -> int:
    """Side of a tile in pixels."""
    return int(config.get("force_image_size") or config["vision_config"]["image_size"])


def tile_tokens(config: Mapping[str, Any]) -> int:
    """Tokens that stand for a tile."""
    return (tile_side(config) // config["vision_config"]["patch_size"] // round(1 / config["downsample_ratio"])) ** 2


def make_language(config: Mapping[str, Any], dtype: torch.dtype | None = None) -> Any:
    """The causal language model that an `llm_config` describes."""
    if "model_type" not in config:
        raise CheckpointError(
            "llm_config names no model_type; expected that of a causal language model of transformers"
        )
    try:
        own = AutoConfig.for_model(**config)
        return AutoModelForCausalLM.from_config(own, **({} if dtype is None else {"dtype": dtype}))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"llm_config describes no causal language model: {str(error).splitlines()[0]}") from error


def make_projector(config: Mapping[str, Any], vision_width: int, language_width: int) -> nn.Sequential:
    """InternVL's `mlp1`."""
    width = vision_width * round(1 / config["downsample_ratio"]) ** 2
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, language_width), nn.GELU(), nn.Linear(language_width, language_width)
    )


def read_tensors(folder: Path, prefix: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of a folder whose names begin with a prefix."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                if name.startswith(prefix):
                    tensor = stored.get_tensor(name)
                    found[name] = tensor if dtype is None else tensor.to(dtype)
    return found


def fitting(folder: Path, expected: Mapping[str, Tensor], prefix: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a folder below a prefix, which must be those of a part."""
    shapes = {name: shape for name, shape in stored_shapes(folder).items() if name.startswith(prefix)}
    compare_shapes(folder, {f"{prefix}{name}": tuple(t.shape) for name, t in expected.items()}, shapes)
    return {name.removeprefix(prefix): tensor for name, tensor in read_tensors(folder, prefix, dtype).items()}


def add_image_tokens(tokenizer: Any, rows: int) -> None:
    """Adds the picture's tokens where a tokenizer lacks them; `rows` are those of the model's embedding.

    The language model is frozen, so that its embedding must have spare rows, as Qwen2.5's has.
    """
    missing = [t for t in (IMAGE, IMAGE_START, IMAGE_END) if t not in tokenizer.get_vocab()]
    if missing and len(tokenizer) + len(missing) > rows:
        raise CheckpointError(
            f"the tokenizer {tokenizer.name_or_path} lacks {', '.join(missing)}, and its model's embedding has {rows} "
            f"rows for {len(tokenizer)} tokens: none to spare; take a model whose embedding is padded, or enlarge it"
        )
    tokenizer.add_tokens(missing, special_tokens=True)


def token_id(tokenizer: Any, token: str) -> int:
    """The number of a token that must be there."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == tokenizer.unk_token_id or tokenizer.convert_ids_to_tokens(found) != token:
        raise CheckpointError(
            f"the tokenizer {tokenizer.name_or_path} lacks the token {token}; add it with R1VModel.from_parts, which "
            "finds a row of the embedding for it"
        )
    return int(found)


def end_of_thoughts(tokenizer: Any) -> list[int]:
    """The end of the last line of thoughts, and `</think>`, which must be one token.

    Whether a chain goes on is decided by the first: a model says the full stop with the line's end only where it might
    have thought enough, and a bias on `</think>` alone comes after that.
    """
    close = token_id(tokenizer, CLOSE)
    line = tokenizer.encode(f".\n{CLOSE}", add_special_tokens=False)[-2]
    return [line, close] if "\n" in tokenizer.decode([line]) else [close]


def positions(attention_mask: Int[Tensor, "b l"]) -> Int[Tensor, "b l"]:
    """Position of each token in its own sample: 0 at the first one; 0 where padded."""
    before = torch.cat([torch.zeros_like(attention_mask[:, :1]), attention_mask[:, :-1]], dim=1)
    index = torch.arange(attention_mask.shape[1], device=attention_mask.device).expand_as(attention_mask)
    first = torch.where(attention_mask != before, index, 0).cummax(dim=1).values
    return (index - first) * (attention_mask > 0)


def visible(attention_mask: Int[Tensor, "b l"]) -> Tensor:
    """Which tokens each token attends to, (B, 1, L, L): those before it in its own sample. Padding sees itself."""
    length = attention_mask.shape[1]
    same = attention_mask[:, :, None] == attention_mask[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    return (same & causal)[:, None]
