"""Answers sampled from a model that sees: with the weights that are trained, or by vLLM at full scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from data_pipeline.errors import InputError
from lightning_modules.networks.layout import Sample, prompts
from lightning_modules.networks.r1v import R1VModel, end_of_thoughts

TILES = 64  # that the tower looks at together: 64 of 448 x 448 are 22 GiB in one layer of InternViT-6B


@dataclass(frozen=True)
class Decoding:
    """How answers are sampled.

    Attributes:
        max_new_tokens: of an answer.
        temperature: 0 takes the likeliest token.
        top_p: the likeliest tokens that have this probability together.
        repetition_penalty: divides the logits of tokens that the answer has already; 1 changes nothing.
        end_bias: added to the logits of the end of thoughts, before and after they end.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    end_bias: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise InputError(
                "decoding: max_new_tokens and repetition_penalty above 0, temperature at least 0, top_p above 0 and at "
                f"most 1; got {self}"
            )


@runtime_checkable
class Engine(Protocol):
    """Samples answers. Annotate an implementation with these very types: configs are checked against them."""

    def answers(
        self, model: R1VModel, samples: Sequence[Sample], count: int, decoding: Decoding, seed: int
    ) -> list[Tensor]:
        """`count` answers to each prompt, prompt after prompt: tokens (T,) up to and with the end of the turn."""


@dataclass
class TransformersEngine:
    """The live weights through transformers' generate, with a static cache. Each picture is looked at once."""

    def answers(
        self, model: R1VModel, samples: Sequence[Sample], count: int, decoding: Decoding, seed: int
    ) -> list[Tensor]:
        rows = prompts([sample for sample in samples for _ in range(count)], model.pad_token)
        device = model.language.get_input_embeddings().weight.device
        with torch.no_grad():
            each = features(model, samples, device)
            repeated = [f for f in each for _ in range(count)]
            seen = torch.cat(repeated) if any(map(len, repeated)) else None
            tokens = model.generate(
                rows.input_ids.to(device),
                rows.attention_mask.to(device),
                seen,
                max_new_tokens=decoding.max_new_tokens,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                seed=seed,
                repetition_penalty=decoding.repetition_penalty,
                end_bias=decoding.end_bias,
            )
        return [until_end(row, model.tokenizer.eos_token_id) for row in tokens]


def features(model: R1VModel, samples: Sequence[Sample], device: torch.device) -> list[Tensor]:
    """Features of each prompt's tiles, (n, tokens, d); n is 0 for words alone."""
    counts = [len(sample.tiles) for sample in samples]
    if not sum(counts):
        return [torch.empty(0, device=device) for _ in samples]
    tiles = torch.cat([s.tiles for s in samples if len(s.tiles)]).split(TILES)
    return list(torch.cat([model.image_features(part.to(device)) for part in tiles]).split(counts))


def until_end(tokens: Tensor, end: int) -> Tensor:
    """Tokens up to and with the first end of a turn; all where there is none."""
    ends = (tokens == end).nonzero()
    return tokens[: int(ends[0]) + 1] if len(ends) else tokens


@dataclass
class VllmEngine:
    """vLLM, which is installed apart, with the frozen language model of a folder.

    Prompts are handed over as embeddings, made by the projector as it is now: what R1V trains never has to be copied to
    vLLM, and what vLLM has loaded never changes. Log-probabilities are computed anew by the code that trains, because
    vLLM rounds otherwise.

    Args:
        language: folder of the language model alone, the one that is trained with.
        options: further ones of vllm.LLM, such as tensor_parallel_size or gpu_memory_utilization.
    """

    language: str
    options: dict[str, Any] = field(default_factory=dict)
    _engine: Any = field(default=None, init=False, repr=False, compare=False)

    def answers(
        self, model: R1VModel, samples: Sequence[Sample], count: int, decoding: Decoding, seed: int
    ) -> list[Tensor]:
        if any(p.requires_grad for p in model.language.parameters()):
            raise InputError(
                "VllmEngine samples from a frozen language model, and this one is trained; train: [projector]"
            )
        vllm, engine = self.loaded()
        device = model.language.get_input_embeddings().weight.device
        with torch.no_grad():
            seen = features(model, samples, device)
            embedded = [
                model.embeddings(torch.tensor([s.input_ids], device=device), f if len(f) else None)[0]
                for s, f in zip(samples, seen, strict=True)
            ]
        ends = end_of_thoughts(model.tokenizer) if decoding.end_bias else []
        settings = vllm.SamplingParams(
            n=count,
            max_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            repetition_penalty=decoding.repetition_penalty,
            seed=seed,
            logit_bias={model.image_token: -100.0, **dict.fromkeys(ends, decoding.end_bias)},
        )
        found = engine.generate([{"prompt_embeds": each.cpu()} for each in embedded], settings)
        return [torch.tensor(output.token_ids, device=device) for request in found for output in request.outputs]

    def loaded(self) -> tuple[Any, Any]:
        """The library and its engine, started when it is first needed."""
        try:
            vllm = import_module("vllm")
        except ImportError as error:
            raise InputError("VllmEngine needs vLLM, which is installed apart: pip install vllm") from error
        if self._engine is None:
            several = torch.distributed.is_initialized()  # then each process has an engine, on its own device
            own = {"distributed_executor_backend": "external_launcher"} if several else {}
            self._engine = vllm.LLM(model=self.language, enable_prompt_embeds=True, **{**own, **self.options})
        return vllm, self._engine
