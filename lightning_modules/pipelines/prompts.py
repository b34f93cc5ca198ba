"""Text embeddings, remembered: a prompt gives the same bits whenever, and next to whatever, it is encoded."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.cache import Features, FeatureStore, locked
from lightning_modules.pipelines.encoders import TextEncoder
from lightning_modules.pipelines.kontext import TEXT_ENCODERS, KontextPipeline

logger = logging.getLogger(__name__)
CHUNK = 256  # prompts embedded ahead at a time
Pictures = Sequence[Sequence[Float[Tensor, "3 _ _"]]]  # of each prompt, in [-1, 1]


@runtime_checkable
class Prompts(Protocol):
    """What makes conditions of prompts, and of the pictures that they speak of."""

    def __call__(self, prompts: Sequence[str], pictures: Pictures | None = None) -> tuple[Tensor, Tensor]:
        """Sequence (B, T, d) and pooled (B, p) embeddings."""
        ...

    def fill(self, prompts: Iterable[str]) -> None:
        """Does ahead of need what the prompts alone decide."""
        ...


class PromptCache:
    """Embeddings by prompt, the least recently used forgotten first.

    Args:
        pipeline: whose frozen text encoders are used.
        max_bytes: memory for embeddings.
        root: a folder of feature stores to look them up in, and to keep new ones in.
    """

    def __init__(self, pipeline: KontextPipeline, max_bytes: int = 1 << 29, root: str | None = None) -> None:
        self.pipeline, self.max_bytes, self._bytes = pipeline, max_bytes, 0
        self.encoder = TextEncoder(pipeline)
        self.store = None if root is None else FeatureStore.of(root, self.encoder)
        self._entries: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], pictures: Pictures | None = None
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b p"]]:
        """Sequence and pooled embeddings of the prompts; text encoders see no `pictures`."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._entries]
        fresh = {prompt: (found["sequence"], found["pooled"]) for prompt, found in self._features(missing).items()}
        rows = [fresh.get(prompt) or self._entries[prompt] for prompt in prompts]
        for prompt in prompts:
            self._remember(prompt, fresh)
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    def _features(self, prompts: list[str]) -> dict[str, Features]:
        """Features from the store, of the others from the encoder."""
        if self.store is None:
            return dict(zip(prompts, self.encoder.encode(prompts), strict=True))
        found: dict[str, Features] = {}
        for prompt in prompts:
            if (features := self.store.get(prompt)) is not None:
                found[prompt] = {name: value.to(self.pipeline.device) for name, value in features.items()}
        unknown = [prompt for prompt in prompts if prompt not in found]
        for prompt, features in zip(unknown, self.encoder.encode(unknown), strict=True):
            self.store.add(prompt, features)
            found[prompt] = features
        return found

    def fill(self, prompts: Iterable[str]) -> None:
        """Embeds prompts ahead of need, as many as fit in memory, and says how many T5 reads in part only.

        With a folder, one process encodes what is not there, the others wait and find it; then the text encoders are
        let go, where they can be loaded again.
        """
        cut, seen = 0, 0
        with ExitStack() as alone:
            encoding = self.store is None
            for chunk in self._chunks(prompts):
                if self.store is not None and not encoding and any(prompt not in self.store for prompt in chunk):
                    alone.enter_context(locked(self.store.folder / ".lock"))
                    encoding = True
                sequence, pooled = self(chunk)
                seen, cut = seen + len(chunk), cut + self._longer_than_t5(chunk)
                if self._bytes + sequence.nbytes + pooled.nbytes > self.max_bytes:
                    break
            if self.store is not None:
                self.store.commit()
        if self.store is not None:
            self.pipeline.let_go(TEXT_ENCODERS)
        if cut:
            logger.warning(
                "%d of %d texts are longer than %d T5 tokens and are cut", cut, seen, self.pipeline.t5_tokens
            )

    def _chunks(self, prompts: Iterable[str]) -> Iterator[list[str]]:
        """Distinct prompts that are not remembered yet."""
        chunk: dict[str, None] = {}
        for prompt in prompts:
            if prompt not in self._entries:
                chunk[prompt] = None
            if len(chunk) == CHUNK:
                yield list(chunk)
                chunk.clear()
        if chunk:
            yield list(chunk)

    def _longer_than_t5(self, prompts: Sequence[str]) -> int:
        tokenizer = self.pipeline.tokenizer_3
        return 0 if tokenizer is None else sum(len(t) > self.pipeline.t5_tokens for t in tokenizer(prompts).input_ids)

    def _remember(self, prompt: str, fresh: dict[str, tuple[Tensor, Tensor]]) -> None:
        if prompt in self._entries:
            self._entries.move_to_end(prompt)
        elif prompt in fresh:
            self._entries[prompt] = fresh[prompt]
            self._bytes += sum(t.nbytes for t in fresh[prompt])
            while self._bytes > self.max_bytes and len(self._entries) > 1:
                self._bytes -= sum(t.nbytes for t in self._entries.popitem(last=False)[1])
