"""R1V: sight for a reasoning language model that stays as it is, by a projector alone (arXiv 2504.05599)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.chat import Chat, in_batches, sizes
from data_pipeline.chat_batches import ChatBatch
from data_pipeline.errors import InputError
from lightning_modules.evaluation.questions import answer_of
from lightning_modules.folders import planned_r1v, r1v_folder
from lightning_modules.gradients import GradientHooks, Gradients
from lightning_modules.losses.tokens import Normalisation, answer_nll, before_learned, token_weights
from lightning_modules.needs.language import chat_needs
from lightning_modules.networks.footprint import Needs
from lightning_modules.networks.layout import Layout, LayoutError, Rows, Sample, Turns, last_question, packed
from lightning_modules.networks.loading import compare_shapes
from lightning_modules.networks.r1v import R1VModel, assembled, tokenizer_of
from lightning_modules.pipelines.answering import Decoding, TransformersEngine
from lightning_modules.planning import Run
from lightning_modules.rewards.answers import TextReward
from lightning_modules.rewards.protocol import Request
from lightning_modules.schedule import AdamW, adamw

logger = logging.getLogger(__name__)
Part = Literal["projector", "language", "vision"]
MOST_LEFT_OUT = 0.5  # share of WINDOW conversations that may be left out before a run is given up
WINDOW = 64


@dataclass
class Iteration:
    """One of R1V's iterations of stage 2: train on D_t = {score >= tau_t} united with E_{t-1}, the items that the model
    gets wrong as it is when the run begins (section 2.2 of the paper).

    Attributes:
        verifier: what says whether an answer is right.
        score: name of the reward model's score in the metadata.
        threshold: tau_t.
        max_new_tokens: of the answers that are verified.
        samples: at a time, whose keys and values must fit beside the model: 64 layers of a 32B model keep 256 KiB of
            each token.
    """

    verifier: TextReward
    score: str = "score"
    threshold: float = 2.0
    max_new_tokens: int = 80
    samples: int = 128


class R1VModule(GradientHooks, L.LightningModule):
    """Trains the projector between a frozen vision tower and a frozen language model on conversations.

    Plugging a trained projector onto another language model is a config that names both, with no step of training.

    Args:
        vision: folder of a tower, or of a whole R1V; "pocket/tower" is built here.
        language: folder of a causal language model; "pocket/substitute", "pocket/reasoner" and "pocket/other" too.
        projector: folder of a whole R1V, such as an earlier run's export; None draws one.
        train: the parts that are trained.
        normalisation: what each learned token counts: "token", "sample" or "square" (losses/tokens.py).
        context: tokens of a row that conversations are packed into; longer ones are left out, named and counted.
        max_tiles: of a picture, at most.
        iteration: train on what a score and the model's own errors choose; None trains on all.
        val_tokens: of an answer in validation, at most.
        optimizer: AdamW and its schedule.
        gradient_checkpointing: recompute the language model's activations instead of keeping them.
        steps: optimiser steps of the whole run, for the schedule.
        seed: of a projector that is drawn.
    """

    asks = False  # conversations are learned from, with their answers

    def __init__(
        self,
        vision: str = "pocket/tower",
        language: str = "pocket/substitute",
        projector: str | None = None,
        train: list[Part] = ["projector"],  # noqa: B006
        normalisation: Normalisation = "token",
        context: int = 16384,
        max_tiles: int = 12,
        iteration: Iteration | None = None,
        val_tokens: int = 96,
        optimizer: AdamW = AdamW(lr=2e-4),  # noqa: B008
        gradient_checkpointing: bool = False,
        steps: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not train:
            raise InputError('train is empty; expected some of "projector", "language", "vision"')
        if val_tokens < 1:
            raise InputError(f"val_tokens is {val_tokens}; expected at least 1")
        self.strict_loading = False  # a checkpoint holds what is trained, and no frozen weights
        self.folders = vision, language, projector
        self.train_parts, self.normalisation = list(train), normalisation
        self.context, self.max_tiles = context, max_tiles
        self.iteration, self.optimizer_settings, self.steps, self.seed = iteration, optimizer, steps, seed
        self.gradient_checkpointing, self.val_tokens = gradient_checkpointing, val_tokens
        self.model: Any = None
        self.left_out = Counter[str]()
        self.met, self.kept = 0, 0  # conversations of the window, and those of them that can be trained on

    def configure_model(self) -> None:
        """Plugs the parts together; called again it does nothing."""
        if self.model is not None:
            return
        vision, language, projector = self.folders
        earlier = None if projector is None else r1v_folder(projector)
        self.model = R1VModel.from_parts(
            r1v_folder(vision), r1v_folder(language), earlier, self.seed, max_dynamic_patch=self.max_tiles
        )
        for name in ("projector", "language", "vision"):
            getattr(self.model, name).requires_grad_(name in self.train_parts)
        if self.gradient_checkpointing:
            self.model.language.gradient_checkpointing_enable()
        self.layout = Layout.of(self.model, self.context)

    def pipeline(self) -> R1VModel:
        """The model with the live weights, which is what is exported."""
        return self.model

    def needs(self, run: Run) -> Needs:
        """What a run holds and does, for plan."""
        return chat_needs(run, self)

    def sources(self) -> dict[str, str]:
        """Folders, and what they must be, for doctor."""
        vision, language, projector = self.folders
        return {vision: "tower", language: "model", **({} if projector is None else {projector: "r1v"})}

    def wanted(self) -> tuple[Sequence[str], Sequence[str], bool]:
        """Scores and other metadata that each conversation must have, and whether pictures too, for the dry run."""
        seen = self.train_parts == ["projector"]
        if self.iteration is None:
            return (), (), seen
        return (self.iteration.score,), getattr(self.iteration.verifier, "requires", ()), seen

    def planned_layout(self) -> Layout | None:
        """How conversations will be laid out, for the dry run; None where the folders are not here."""
        vision, language = (planned_r1v(name) for name in self.folders[:2])
        if not (vision.is_dir() and language.is_dir()):
            return None
        config = assembled(vision, language, self.max_tiles)
        return Layout.planned(config, tokenizer_of(language, config["llm_config"]["vocab_size"]), self.context)

    def on_fit_start(self) -> None:
        """Chooses an iteration's data, unless a checkpoint says what was chosen; measures it for batches of tokens."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.iteration is not None:
            if data.wrong is None:
                data.wrong = self.errors(data.train)
            data.narrow(self.iteration.score, self.iteration.threshold)
            logger.info("%d conversations, of them %d answered wrongly before", len(data.train), len(data.wrong))
        if getattr(data, "batch_tokens", None) is not None:
            data.lengths = self.lengths(data.train)

    def lengths(self, chats: Sequence[Chat]) -> list[int]:
        """Tokens of each conversation, measured by all devices; 0 for what is left out when it comes."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        every = [[self.tokens_of(chat) for chat in chats[rank::world]]]
        if world > 1:
            every, own = [[]] * world, every[0]
            torch.distributed.all_gather_object(every, own)
        found = [every[i % world][i // world] for i in range(len(chats))]
        logger.info("%d conversations have %d tokens", len(found), sum(found))
        return found

    def tokens_of(self, chat: Chat) -> int:
        """Tokens of a conversation to learn from; 0 where it cannot be laid out or is longer than the context."""
        try:
            found = self.layout.length(chat.turns, sizes(chat.record))
        except LayoutError:
            return 0
        return found if found <= self.context else 0

    def on_train_start(self) -> None:
        """Sets the mode in which transformers recomputes; until here a model is in the other one, and can answer."""
        self.model.language.train(self.gradient_checkpointing)

    def on_train_end(self) -> None:
        """Back to the mode in which it answers."""
        self.model.language.eval()

    def training_step(self, batch: ChatBatch, batch_idx: int) -> Tensor:
        rows = self.rows(batch)
        loss, count = self.loss(rows)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("train/tokens", float(count), batch_size=len(batch))
        return loss

    def loss(self, rows: Rows) -> tuple[Float[Tensor, ""], int]:
        """Negative log-likelihood of the answers, and how many tokens they have.

        A token counts alike on all devices: each device's mean is weighed by what its share of all weights is.
        Micro-batches that are accumulated count alike each, however many tokens they have.
        """
        if not rows.samples:  # other devices have some, and wait for this one's gradients
            nothing = [0.0 * p.sum() for _, p in self.trainable_parameters()]
            return self.shared(torch.stack(nothing).sum(), torch.zeros((), device=self.device)), 0
        seen = self.model.image_features(rows.tiles) if len(rows.tiles) else None
        logits = self.model(rows.input_ids, rows.attention_mask, seen, before_learned(rows.labels))
        weights, total = token_weights(rows.labels, rows.attention_mask, self.normalisation)
        loss = (answer_nll(logits, rows.labels) * weights).sum()
        return self.shared(loss, total), int((weights > 0).sum())

    def shared(self, loss: Float[Tensor, ""], total: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """A device's mean as its share of the mean of all devices, whose gradients are averaged."""
        if not self.training or not torch.distributed.is_initialized():
            return loss
        return loss * total / self.all_gather(total).mean().clamp(min=torch.finfo(total.dtype).tiny)

    def rows(self, batch: ChatBatch) -> Rows:
        """The batch packed; what cannot be laid out is left out, named and counted."""
        samples = self.samples(batch)
        self.met, self.kept = self.met + len(batch), self.kept + len(samples)
        if self.met >= WINDOW:
            if self.kept < (1 - MOST_LEFT_OUT) * self.met:
                raise InputError(
                    f"{self.met - self.kept} of {self.met} conversations in a row cannot be trained on "
                    f"({dict(self.left_out)} so far); correct the data, or raise model.init_args.context"
                )
            self.met, self.kept = 0, 0
        return packed(samples, self.context, self.model.pad_token).to(self.device)

    def samples(self, batch: ChatBatch) -> list[Sample]:
        """Conversations laid out to learn from."""
        found = [sample for _, sample in self.laid_out(batch, self.learned)]
        if self.left_out and self.training:
            self.log("train/left_out", float(sum(self.left_out.values())), batch_size=len(batch))
        return found

    def learned(self, turns: Turns, pictures: Sequence[Tensor]) -> Sample:
        """A conversation to learn from, which must have a picture where the projector alone learns."""
        sample = self.layout.sample(turns, pictures)
        if self.train_parts == ["projector"] and not len(sample.tiles):
            raise LayoutError("no picture", "the projector learns nothing from words alone")
        return sample

    def laid_out(self, batch: ChatBatch, lay: Callable[[Turns, Sequence[Tensor]], Sample]) -> list[tuple[int, Sample]]:
        """Conversations laid out, by their numbers in the batch; what cannot be is left out, named and counted."""
        found = []
        for i, (key, turns, pictures) in enumerate(zip(batch.keys, batch.turns, batch.pictures, strict=True)):
            try:
                found.append((i, lay(turns, pictures)))
            except LayoutError as error:
                self.left_out[error.reason] += 1
                logger.warning("%s is left out: %s", key, error)
        return found

    def errors(self, chats: Sequence[Chat]) -> list[int]:
        """E_{t-1}: ids of the conversations whose last question the model answers wrongly, found by all devices.

        An answer on which the verifier fails, and a question that cannot be laid out or has nothing to verify by, count
        as no errors: they say nothing of the model.
        """
        assert self.iteration is not None
        settings, rank, world = self.iteration, self.trainer.global_rank, self.trainer.world_size
        decoding, wrong = Decoding(settings.max_new_tokens, 0.0), list[int]()
        _, required, _ = self.wanted()
        lost = 0
        for batch in in_batches(chats[rank::world], settings.samples):
            numbers, said = self.answered(batch, decoding, required)
            texts = [self.model.tokenizer.decode(tokens.tolist(), skip_special_tokens=False) for tokens in said]
            requests = [Request(last_question(batch.turns[i]), metadata=batch.metadata[i]) for i in numbers]
            scores = settings.verifier.score(texts, requests)
            ids = batch.sample_ids.tolist()
            wrong += [ids[i] for i, score in zip(numbers, scores, strict=True) if score is not None and score < 1]
            lost += len(batch) - sum(score is not None for score in scores)
        every = [(wrong, lost)]
        if world > 1:
            every *= world
            torch.distributed.all_gather_object(every, (wrong, lost))
        self.report_lost(sum(lost for _, lost in every), len(chats))
        return sorted(i for own, _ in every for i in own)

    def report_lost(self, lost: int, met: int) -> None:
        """Names how many conversations were not verified; InputError where these are most."""
        if not lost:
            return
        reasons = {**self.left_out, **getattr(self.iteration and self.iteration.verifier, "counts", {})}
        text = f"{lost} of {met} conversations were not verified, and count as no errors ({reasons})"
        if lost > MOST_LEFT_OUT * met:
            raise InputError(f"{text}; correct the data (--dry_run names what is wrong with it) or the verifier")
        logger.warning("%s", text)

    def validation_step(self, batch: ChatBatch, batch_idx: int) -> None:
        rows = self.rows(batch)
        if rows.samples:
            self.log("val/loss", self.loss(rows)[0], batch_size=rows.samples, sync_dist=True)
        numbers, said = self.answered(batch, Decoding(self.val_tokens, 0.0), ["answer"])
        if not said:
            return
        texts = [self.model.tokenizer.decode(t.tolist(), skip_special_tokens=True) for t in said]
        right = [answer_of(text) == str(batch.metadata[i]["answer"]) for i, text in zip(numbers, texts, strict=True)]
        self.log("val/accuracy", sum(right) / len(right), prog_bar=True, batch_size=len(right), sync_dist=True)
        self.log("val/length", sum(map(len, said)) / len(said), batch_size=len(said), sync_dist=True)

    def answered(
        self, batch: ChatBatch, decoding: Decoding, known: Sequence[str] = ()
    ) -> tuple[list[int], list[Tensor]]:
        """Answers to the last questions of a batch, and the numbers in it of those that can be asked.

        Only conversations whose metadata hold all of `known` are asked.
        """
        laid = self.laid_out(batch, self.layout.prompt)
        asked = [(i, each) for i, each in laid if all(batch.metadata[i].get(name) not in (None, "") for name in known)]
        if not asked:
            return [], []
        engine = TransformersEngine()
        return [i for i, _ in asked], engine.answers(self.model, [each for _, each in asked], 1, decoding, self.seed)

    def configure_optimizers(self) -> Any:
        self._gradients = Gradients(p for _, p in self.trainable_parameters())
        optimizer, rule = adamw(self.trainable_parameters(), self.optimizer_settings, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops frozen weights."""
        self.drop_frozen(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        shapes = [
            {n: tuple(t.shape) for n, t in state.items()}
            for state in (dict(self.trainable_parameters()), checkpoint["state_dict"])
        ]
        compare_shapes(Path(self.folders[1]), *shapes)
