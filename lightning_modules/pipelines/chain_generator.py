"""The model that is being trained as a generator of chains for the data pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from data_pipeline.counters import counter_seed
from data_pipeline.errors import InputError
from data_pipeline.index import sample_id
from data_pipeline.length_control import Brevity
from data_pipeline.records import ReasoningRecord, Record
from data_pipeline.steps.distill_chains import Generated
from data_pipeline.steps.pixels import pixels
from lightning_modules.networks.layout import Layout, LayoutError, Sample
from lightning_modules.networks.r1v import R1VModel
from lightning_modules.pipelines.answering import Decoding, Engine, VllmEngine
from lightning_modules.pipelines.scorers import folder_fingerprint


@dataclass
class ChainGenerator:
    """Answers conversations' last questions.

    Records of nearly one control are sampled together: penalties are rounded to multiples of `penalty_step`, biases of
    `bias_step`.

    Args:
        pretrained: folder in R1V's layout, such as a run's export.
        engine: what samples, as in reinforcement: answering.TransformersEngine, or VllmEngine with the same language
            model, beside which only what makes its embeddings goes to `device`.
        decoding: how answers are sampled; each record's penalty is multiplied onto its `repetition_penalty`, its bias
            added to its `end_bias`.
        context: tokens of a question and its answer, at most; a longer question cannot be asked.
        penalty_step: how finely penalties differ.
        bias_step: how finely biases differ.
        samples: at a time, whose keys and values must fit beside the model.
        seed: of the draws.
        device: where it runs.
    """

    pretrained: str
    engine: Engine
    decoding: Decoding = field(default_factory=Decoding)
    context: int = 16384
    penalty_step: float = 0.05
    bias_step: float = 0.5
    samples: int = 64
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        steps = min(self.penalty_step, self.bias_step)
        if steps <= 0 or self.samples < 1 or self.context <= self.decoding.max_new_tokens:
            raise InputError(
                "chain generator: penalty_step and bias_step above 0, samples at least 1, context above "
                f"max_new_tokens; got {self.penalty_step}, {self.bias_step}, {self.samples}, {self.context} and "
                f"{self.decoding.max_new_tokens}"
            )

    @cached_property
    def fingerprint(self) -> str:
        """The name and a hash of the weights."""
        return folder_fingerprint(self.pretrained, "ChainGenerator.pretrained")

    @cached_property
    def _model(self) -> R1VModel:
        assert self.fingerprint  # a missing folder is named before a library looks for it
        model = R1VModel.from_folder(self.pretrained).requires_grad_(False)
        if isinstance(self.engine, VllmEngine):
            for part in (model.vision, model.projector, model.language.get_input_embeddings()):
                part.to(self.device)
            return model
        return model.to(self.device)

    @cached_property
    def _layout(self) -> Layout:
        return Layout.of(self._model, self.context - self.decoding.max_new_tokens)

    def generate(self, records: Sequence[Record], brevities: Sequence[Brevity]) -> list[Generated]:
        """An answer to each record, or why it cannot be asked."""
        found: dict[int, Generated] = {}
        groups: dict[Decoding, list[tuple[int, Sample]]] = {}
        for i, (record, brevity) in enumerate(zip(records, brevities, strict=True)):
            try:
                groups.setdefault(self._decoding(brevity), []).append((i, self._asked(record)))
            except LayoutError as error:
                found[i] = Generated(refused=str(error))
        for decoding, members in groups.items():
            for start in range(0, len(members), self.samples):
                part = members[start : start + self.samples]
                seed = counter_seed(self.seed, "chain", 0, sample_id(records[part[0][0]].key))
                said = self._said([sample for _, sample in part], decoding, seed)
                found |= {i: each for (i, _), each in zip(part, said, strict=True)}
        return [found[i] for i in range(len(records))]

    def _decoding(self, brevity: Brevity) -> Decoding:
        own, steps = self.decoding, (self.penalty_step, self.bias_step)
        wanted = own.repetition_penalty * brevity.penalty, own.end_bias + brevity.end_bias
        penalty, bias = (round(value / step) * step for value, step in zip(wanted, steps, strict=True))
        return replace(own, repetition_penalty=penalty, end_bias=bias)

    def _asked(self, record: Record) -> Sample:
        if not isinstance(record, ReasoningRecord):
            raise LayoutError("no conversation", f"a record of kind {record.kind}")
        shown = [torch.from_numpy(pixels(image).copy()).permute(2, 0, 1) for image in record.pictures]
        return self._layout.prompt(record.turns, shown)

    def _said(self, samples: Sequence[Sample], decoding: Decoding, seed: int) -> list[Generated]:
        """Answers under one control."""
        tokenizer = self._model.tokenizer
        found = []
        for tokens in self.engine.answers(self._model, samples, 1, decoding, seed):
            ended = bool(len(tokens)) and int(tokens[-1]) == tokenizer.eos_token_id
            text = tokenizer.decode(tokens[:-1].tolist() if ended else tokens.tolist(), skip_special_tokens=False)
            found.append(Generated(str(text), len(tokens), ended))
        return found
