"""Conditions of a Metaquery model. What its frozen language model read is remembered; queries are computed anew."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.cache import FeatureStore
from lightning_modules.networks.compute import own_precision
from lightning_modules.networks.vlm import Features, Pictures
from lightning_modules.pipelines.encoders import config_of, weights_of
from lightning_modules.pipelines.metaquery import ROWS, MetaqueryPipeline


class QueryCache:
    """Conditions by prompt and pictures; what was least recently used is forgotten first.

    Patches of pictures are made here, in the training process, and not by the data's workers. Which pictures have to be
    read at all shows only here, where what was read before is known. A worker would have to hold the model's processor,
    patch every picture, and send 4.8 MB for one of 512 x 512 (1,024 patches of 1,176 numbers) in place of 3.1. Once
    the store or the memory holds what is read, no patches are made.

    Args:
        pipeline: whose language model, queries and connector are used.
        max_bytes: memory for keys and values of prefixes.
        root: a folder of feature stores to look them up in, and to keep new ones in.
        rows: conversations that are read at a time.

    Attributes:
        hidden: give the language model's hidden states at the queries in place of embeddings, to what has the connector
            in it (Connected).
    """

    def __init__(
        self, pipeline: MetaqueryPipeline, max_bytes: int = 1 << 30, root: str | None = None, rows: int = ROWS
    ) -> None:
        self.pipeline, self.max_bytes, self.rows, self._bytes = pipeline, max_bytes, rows, 0
        self.store = None if root is None else FeatureStore(root, self.fingerprint)
        self._entries: OrderedDict[str, Features] = OrderedDict()
        self.hidden = False

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model, its words and how it is read."""
        vlm = self.pipeline.vlm
        words = sorted(vlm.processor.tokenizer.get_vocab().items())
        parts = f"{self.rows} {vlm.reading} {self.pipeline.reference} {vlm.template} {words} {config_of(vlm.model)}"
        return hashlib.sha256(f"{parts} {weights_of(vlm.model)}".encode()).hexdigest()

    def __call__(
        self, prompts: Sequence[str], pictures: Pictures | None = None
    ) -> tuple[Float[Tensor, "b n e"], Float[Tensor, "b p"]]:
        """Sequence and pooled embeddings; gradients reach queries and connector where they are asked for."""
        prefixes = self.prefixes(prompts, pictures)
        if not self.hidden:
            return self.pipeline.condition(prefixes)
        queries = self.pipeline.conditioner.meta_queries
        hidden = self.pipeline.vlm.query(queries, prefixes).to(queries.dtype)
        return hidden, hidden.new_zeros(len(hidden), 0)

    @torch.no_grad()
    def prefixes(self, prompts: Sequence[str], pictures: Pictures | None = None) -> list[Features]:
        """What the language model read of each."""
        shown = [[]] * len(prompts) if pictures is None else [list(own) for own in pictures]
        names = [name_of(*each) for each in zip(prompts, shown, strict=True)]
        found: dict[str, Features] = {name: self._entries[name] for name in names if name in self._entries}
        if self.store is not None:
            for name in dict.fromkeys(names):
                if name not in found and (features := self.store.get(name)) is not None:
                    found[name] = {key: tensor.to(self.pipeline.vlm.device) for key, tensor in features.items()}
        missing = {name: i for i, name in enumerate(names) if name not in found}
        if missing:
            rows = [*missing.values()]
            with own_precision(self.pipeline.vlm):
                fresh = self.pipeline.read([prompts[i] for i in rows], [shown[i] for i in rows], self.rows)
            for name, features in zip(missing, fresh, strict=True):
                found[name] = features
                if self.store is not None:
                    self.store.add(name, features)
        for name in names:
            self._remember(name, found[name])
        return [found[name] for name in names]

    def fill(self, prompts: Iterable[str]) -> None:
        """Nothing: whether pictures belong to a prompt shows only in a batch. The first pass over the data fills it."""

    def commit(self) -> None:
        """Writes what the store has not written yet."""
        if self.store is not None:
            self.store.commit()

    def _remember(self, name: str, features: Features) -> None:
        if name in self._entries:
            self._entries.move_to_end(name)
            return
        self._entries[name] = features
        self._bytes += sum(t.nbytes for t in features.values())
        while self._bytes > self.max_bytes and len(self._entries) > 1:
            self._bytes -= sum(t.nbytes for t in self._entries.popitem(last=False)[1].values())


def name_of(prompt: str, pictures: Sequence[Tensor]) -> str:
    """What an entry is known by: the text, and the pictures' levels as the model sees them."""
    digest = hashlib.blake2b(digest_size=16)
    for picture in pictures:
        levels = ((picture.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().contiguous()
        digest.update(f"{tuple(levels.shape)}".encode() + levels.numpy().tobytes())
    return f"{digest.hexdigest() if len(pictures) else 'no picture'} {prompt}"
