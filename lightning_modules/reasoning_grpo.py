"""Reinforcement of visual reasoning on answers that can be verified (R1V, arXiv 2504.05599; R1V2, arXiv 2504.16656)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.chains import split
from data_pipeline.chat_batches import ChatBatch
from data_pipeline.counters import counter_seed
from data_pipeline.errors import InputError
from lightning_modules.folders import planned_r1v, r1v_folder
from lightning_modules.gradients import GradientHooks, Gradients
from lightning_modules.losses.token_policy import entropy, log_probs
from lightning_modules.needs.language import answer_needs
from lightning_modules.networks.footprint import Needs
from lightning_modules.networks.layout import Layout, LayoutError, Sample, last_question
from lightning_modules.networks.loading import check_state, read_json
from lightning_modules.networks.r1v import R1VModel, tokenizer_of
from lightning_modules.networks.snapshots import Snapshots
from lightning_modules.pipelines.answering import Decoding, Engine
from lightning_modules.planning import Run
from lightning_modules.rewards.answers import FAILURES
from lightning_modules.rewards.protocol import Request
from lightning_modules.rollouts import shares
from lightning_modules.rollouts.advantages import Advantages, weighted_sum
from lightning_modules.rollouts.chain_algorithms import ChainAlgorithm, MixedPreference, Totals
from lightning_modules.rollouts.chain_settings import (
    ChainSampling,
    Overlong,
    WeightedText,
    reasons,
    required,
    scored,
)
from lightning_modules.rollouts.chains import Answer, Batch, Question, batched, moved
from lightning_modules.rollouts.sample_buffer import SampleBuffer
from lightning_modules.schedule import AdamW, adamw

logger = logging.getLogger(__name__)
PATIENCE = 50  # batches that teach nothing, or whose questions are mostly lost, before a run is given up
MOST_LEFT_OUT = 0.5  # share of a batch's questions that may be left out or unscored
NEVER = -1e4  # a logit whose probability is 0 in every precision
Scores = dict[str, Tensor]
Part = Literal["projector", "language", "vision"]


class ReasoningGrpoModule(GradientHooks, L.LightningModule):
    """Trains the projector of an R1V folder on what its own answers are worth.

    A batch is a set of questions. Groups of answers to each are sampled and scored; once enough of them teach
    something, the policy is updated, and what was sampled is dropped, but for what a buffer keeps.

    Args:
        pretrained: folder in R1V's layout, such as the export of an earlier run.
        rewards: what answers are worth, by name.
        algorithm: a class of lightning_modules.rollouts.chain_algorithms, or of one's own.
        engine: what samples, lightning_modules.pipelines.answering.TransformersEngine or VllmEngine.
        advantages: how rewards become advantages, as for pictures.
        sampling: how many answers, and how they are sampled.
        overlong: what becomes of answers that are cut off.
        buffer: R1V2's Selective Sample Buffer; None learns from new answers alone.
        train: the parts that are trained.
        optimizer: AdamW and its schedule.
        max_grad_norm: the norm that gradients are clipped to.
        steps: updates of the whole run, for the schedule.
        context: tokens of a question and its answer, at most; longer questions are left out and counted.
        gradient_checkpointing: recompute the language model's activations instead of keeping them.
        seed: the seed of every draw.
    """

    asks = True  # conversations are asked, without their last answers

    def __init__(
        self,
        pretrained: str,
        rewards: dict[str, WeightedText],
        algorithm: ChainAlgorithm,
        engine: Engine,
        advantages: Advantages = Advantages(),  # noqa: B008
        sampling: ChainSampling = ChainSampling(),  # noqa: B008
        overlong: Overlong = Overlong(),  # noqa: B008
        buffer: SampleBuffer | None = None,
        train: list[Part] = ["projector"],  # noqa: B006
        optimizer: AdamW = AdamW(lr=1e-6),  # noqa: B008
        max_grad_norm: float = 1.0,
        steps: int = 1000,
        context: int = 16384,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not train:
            raise InputError('train is empty; expected some of "projector", "language", "vision"')
        if not any(each.weight for each in rewards.values()):
            raise InputError("rewards: none has a weight; say what answers are worth, as configs/r1v_grpo.yaml does")
        if max_grad_norm <= 0:
            raise InputError(f"max_grad_norm is {max_grad_norm:g}; expected above 0")
        if context <= sampling.max_new_tokens:
            raise InputError(
                f"context {context} has no room for a question beside {sampling.max_new_tokens} new tokens"
            )
        if buffer is not None and isinstance(algorithm, MixedPreference):
            raise InputError("buffer keeps single answers, and MixedPreference learns from pairs; leave the buffer out")
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds what is trained, and no frozen weights
        self.pretrained, self.rewards, self.algorithm, self.advantages = pretrained, rewards, algorithm, advantages
        self.sampling, self.overlong, self.buffer, self.engine = sampling, overlong, buffer, engine
        self.train_parts, self.optimizer_settings, self.max_grad_norm = list(train), optimizer, max_grad_norm
        self.gradient_checkpointing, self.steps, self.context, self.seed = gradient_checkpointing, steps, context, seed
        self.model: Any = None
        self.waiting: list[list[Answer]] = []
        self.updates, self.asked, self.idle = 0, 0, 0
        self.refused = 0  # batches in a row of mostly lost questions
        self.unscored = 0  # groups without a score in a batch
        self.left_out, self.failures = Counter[str](), Counter[str]()
        self.required = required(rewards)
        self._loaded_buffer: list[dict[str, Any]] = []

    def configure_model(self) -> None:
        """Loads the folder; called again it does nothing."""
        if self.model is not None:
            return
        self.model = R1VModel.from_folder(r1v_folder(self.pretrained))
        for name in ("projector", "language", "vision"):
            getattr(self.model, name).requires_grad_(name in self.train_parts)
        if self.gradient_checkpointing:
            self.model.language.gradient_checkpointing_enable()
        self.layout = Layout.of(self.model, self.context - self.sampling.max_new_tokens)
        self.snapshots = Snapshots(dict(self.trainable_parameters()))
        if self.algorithm.needs_reference:
            self.snapshots.take("reference")

    def on_fit_start(self) -> None:
        """Moves what is no module to the device; refuses groups that the devices cannot share."""
        self.snapshots.to(self.device)
        self.waiting = [moved(group, self.device) for group in self.waiting]
        self.sampling.share(self.trainer.world_size)  # refused before anything is sampled

    def pipeline(self) -> R1VModel:
        """The model with the live weights, which is what is exported."""
        return self.model

    def needs(self, run: Run) -> Needs:
        """What a run holds and does, for plan."""
        return answer_needs(run, self)

    def sources(self) -> dict[str, str]:
        """Folders, and what they must be, for doctor."""
        return {self.pretrained: "r1v"}

    def wanted(self) -> tuple[Sequence[str], Sequence[str], bool]:
        """Scores and other metadata that each conversation must have, and whether pictures too, for the dry run."""
        return (), self.required, self.train_parts == ["projector"]

    def planned_layout(self) -> Layout | None:
        """How questions will be laid out, for the dry run; None where the folder is not here."""
        folder = planned_r1v(self.pretrained)
        if not folder.is_dir():
            return None
        config = read_json(folder / "config.json")
        tokenizer = tokenizer_of(folder, config["llm_config"]["vocab_size"])
        return Layout.planned(config, tokenizer, self.context - self.sampling.max_new_tokens)

    def training_step(self, batch: ChatBatch, batch_idx: int) -> None:
        questions = self.questions(batch)
        found = self.collect(questions)
        self.bound(len(batch), len(questions))
        self.idle = 0 if found else self.idle + 1
        if self.idle == PATIENCE:
            raise InputError(
                f"{PATIENCE} batches of questions in a row taught nothing: in each group all answers are worth alike, "
                "have no score or were cut off. Look at reward/* and answers/* in TensorBoard; take easier or harder "
                "questions, larger groups, or more max_new_tokens"
            )
        self.waiting += found
        # All devices learn together, from equally many groups.
        count = int(self.across(len(self.waiting), "min"))
        if count >= self.sampling.groups // self.trainer.world_size:
            self.improve(self.waiting[:count])
            self.waiting = []

    def bound(self, met: int, asked: int) -> None:
        """Ends a run most of whose questions cannot be asked or scored, batch after batch."""
        lost = met - asked + self.unscored
        self.refused = self.refused + 1 if lost > MOST_LEFT_OUT * met else 0
        if self.refused == PATIENCE:
            raise InputError(
                f"in {PATIENCE} batches in a row most questions were left out ({dict(self.left_out) or 'none'} so far) "
                f"or their answers got no score ({dict(self.failures) or 'none'} so far): rewards fail, or the data do "
                "not suit them. Look at answers/* in TensorBoard and at the log; correct the data (--dry_run names "
                "what is wrong with it), the verifier or the judge, or raise model.init_args.context"
            )

    def questions(self, batch: ChatBatch) -> list[Question]:
        """What can be asked of a batch; what cannot is left out, named and counted."""
        found, refused = [], 0
        for i, key in enumerate(batch.keys):
            try:
                if absent := [name for name in self.required if batch.metadata[i].get(name) in (None, "")]:
                    raise LayoutError(f"no {absent[0]}", "the record's metadata hold nothing to verify answers by")
                sample = self.layout.prompt(batch.turns[i], batch.pictures[i])
                if self.train_parts == ["projector"] and not len(sample.tiles):
                    raise LayoutError("no picture", "the projector learns nothing from words alone")
            except LayoutError as error:
                refused += 1
                self.left_out[error.reason] += 1
                logger.warning("question %s is left out: %s", key, error)
                continue
            tiles = sample.tiles.to(self.device) if len(sample.tiles) else None
            counters = int(batch.sample_ids[i]), int(batch.epochs[i])
            ids = torch.tensor(sample.input_ids, device=self.device)
            found.append(Question(key, *counters, last_question(batch.turns[i]), ids, tiles, batch.metadata[i]))
        self.log("answers/questions_left_out", refused / len(batch.keys), batch_size=1)
        return found

    @torch.no_grad()
    def collect(self, questions: Sequence[Question]) -> list[list[Answer]]:
        """Samples a group of answers to each question, has them scored meanwhile, and keeps what teaches something."""
        size, per = self.sampling.group_size, max(1, self.sampling.micro_answers // self.sampling.group_size)
        self.unscored = 0
        pending: list[tuple[list[Answer], Future[Scores]]] = []
        with ThreadPoolExecutor(1) as pool:
            for start in range(0, len(questions), per):
                answers = self.sample(questions[start : start + per])
                texts = [self.text(answer) for answer in answers]
                requests = [Request(a.question.prompt, metadata=a.question.metadata) for a in answers]
                pending.append((answers, pool.submit(scored, self.rewards, texts, requests)))
        answers = [answer for part, _ in pending for answer in part]
        if not answers:
            return []
        parts = [future.result() for _, future in pending]
        scores = {name: torch.cat([part[name] for part in parts]) for name in self.rewards}
        scores |= self.overlong.punished([len(a.tokens) for a in answers], self.sampling.max_new_tokens)
        groups = self.judged(answers, {name: values.view(-1, size) for name, values in scores.items()})
        self.remember([answer for group in groups for answer in group])
        return groups

    def sample(self, questions: Sequence[Question]) -> list[Answer]:
        """A group of answers to each question."""
        settings = self.sampling
        empty = torch.empty(0, 3, self.layout.image_size, self.layout.image_size, device=self.device)
        samples = [Sample(q.input_ids.tolist(), [], empty if q.tiles is None else q.tiles) for q in questions]
        seed = counter_seed(self.seed, "answers", questions[0].epoch, questions[0].sample_id)
        decoding = Decoding(settings.max_new_tokens, settings.temperature)
        found = self.engine.answers(self.model, samples, settings.group_size, decoding, seed)
        asked = [question for question in questions for _ in range(settings.group_size)]
        end = self.model.tokenizer.eos_token_id
        self.asked += len(asked)
        return [
            Answer(q, tokens, ended=bool((tokens == end).any()), update=self.updates)
            for q, tokens in zip(asked, found, strict=True)
        ]

    def text(self, answer: Answer) -> str:
        """What an answer says, without the end of its turn."""
        tokens = answer.tokens[:-1] if answer.ended else answer.tokens
        return str(self.model.tokenizer.decode(tokens.tolist(), skip_special_tokens=False))

    def judged(self, answers: list[Answer], scores: dict[str, Float[Tensor, "p g"]]) -> list[list[Answer]]:
        """The groups that teach something, with rewards and advantages."""
        weights = {name: each.weight for name, each in self.rewards.items()} | {"overlong": self.overlong.weight}
        weighed = {name: values for name, values in scores.items() if weights[name]}
        total = weighted_sum(weighed, weights)
        known = total.isfinite().all(dim=1)
        useful = known & self.advantages.useful(total.nan_to_num())
        if self.overlong.cut_off == "mask":  # what was cut off whole would be a step without a gradient
            useful &= torch.tensor([answer.ended for answer in answers]).view(total.shape).any(dim=1)
        advantages = self.advantages(weighed, weights)
        for i, answer in enumerate(answers):
            answer.reward, answer.advantage = total.flatten()[i].item(), advantages.flatten()[i].item()
        self.report(answers, scores, total[known], useful)
        size = self.sampling.group_size
        groups = [answers[i : i + size] for i in range(0, len(answers), size)]
        return [g for g, teaches in zip(groups, useful.tolist(), strict=True) if teaches and self.algorithm.choose(g)]

    def report(self, answers: list[Answer], scores: Scores, known: Float[Tensor, "p g"], useful: Tensor) -> None:
        """Logs rewards, lengths and verdicts."""
        for name, values in scores.items():
            if values.isfinite().any():
                self.log(f"reward/{name}", values[values.isfinite()].mean(), batch_size=1)
        if known.numel():
            self.log("reward/mean", known.mean(), prog_bar=True, batch_size=1)
        self.log("answers/useful", useful.float().mean(), prog_bar=True, batch_size=1)
        self.unscored = len(useful) - len(known)
        self.log("answers/unscored", self.unscored / len(useful), batch_size=1)
        self.log("answers/tokens", sum(len(a.tokens) for a in answers) / len(answers), batch_size=1)
        self.log("answers/cut_off", sum(not a.ended for a in answers) / len(answers), batch_size=1)
        self.log(
            "answers/thinking_open", sum(not split(self.text(a)).closed for a in answers) / len(answers), batch_size=1
        )
        for reason, count in reasons(self.rewards).items():
            self.log(f"answers/{reason}", count / len(answers), batch_size=1)
            if reason in FAILURES:
                self.failures[reason] += count

    def remember(self, answers: list[Answer]) -> None:
        """Log-probabilities of answers as they were sampled, under the policy and, where needed, the reference."""
        size = self.sampling.micro_answers
        for start in range(0, len(answers), size):
            part = answers[start : start + size]
            batch = self.padded(part)
            names = {"old": None, **({"reference": "reference"} if self.algorithm.needs_reference else {})}
            for name, weights in names.items():
                with self.snapshots.using(weights):
                    found = log_probs(self.logits(batch), batch.tokens, self.sampling.temperature)
                for answer, row in zip(part, found, strict=True):
                    setattr(answer, name, row[: len(answer.tokens)].clone())

    def padded(self, answers: Sequence[Answer]) -> Batch:
        """A batch to learn from."""
        learn = self.overlong.cut_off == "learn"
        return batched(answers, self.model.pad_token, self.sampling.max_new_tokens, learn)

    def logits(self, batch: Batch) -> Float[Tensor, "b t v"]:
        """Those that a batch's tokens are drawn from."""
        prompts, width = batch.prompts, batch.tokens.shape[1]
        seen = None if prompts.tiles is None else prompts.spread(self.model.image_features(prompts.tiles))
        ids = torch.cat([prompts.input_ids, batch.tokens], dim=1)
        lengths = torch.arange(width, device=ids.device) < batch.lengths[:, None]
        mask = torch.cat([prompts.mask, lengths.to(prompts.mask)], dim=1)
        before = torch.arange(prompts.input_ids.shape[1] - 1, ids.shape[1] - 1, device=ids.device)
        # The token of a picture is never sampled, so that it has no share of the probability.
        never = torch.tensor([self.model.image_token], device=ids.device)
        return self.model(ids, mask, seen, before).index_fill(2, never, NEVER)

    def improve(self, groups: list[list[Answer]]) -> None:
        """One iteration: `updates` steps of the policy, each on its share of the groups and on some kept ones."""
        share = len(groups) // self.sampling.updates
        for number in range(self.sampling.updates):
            part = groups[number * share : (number + 1) * share]
            chosen = [answer for group in part for answer in self.algorithm.choose(group)]
            count = int(self.across(len(chosen), "min")) // 2 * 2
            if self.buffer is not None:
                chosen = chosen[:count] + self.replayed(count)
                self.buffer.keep(moved(chosen[:count], "cpu"), self.updates)  # the tiles of a question are many MB
            else:
                chosen = chosen[:count]
            if chosen:
                self.update(chosen)

    def replayed(self, fresh: int) -> list[Answer]:
        """Answers of the buffer, equally many on all devices."""
        assert self.buffer is not None
        count = int(self.across(self.buffer.wanted(fresh), "min")) // 2 * 2
        seed = counter_seed(self.seed, "buffer", self.updates, self.global_rank)
        return moved(self.buffer.draw(count, torch.Generator().manual_seed(seed)), self.device)

    def update(self, answers: list[Answer]) -> None:
        """One optimiser step."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        size = self.sampling.micro_answers
        batches = [self.padded(answers[i : i + size]) for i in range(0, len(answers), size)]
        learned = sum(float(batch.mask.sum()) for batch in batches)
        totals = Totals(self.across(learned, "mean"), float(len(answers)))
        logs = []
        self.model.language.train(self.gradient_checkpointing)  # the mode in which transformers recomputes
        for batch in batches:
            logits = self.logits(batch)
            new, spread = log_probs(logits, batch.tokens, self.sampling.temperature), entropy(logits.detach())
            loss, metrics = self.algorithm.loss(new, batch, totals)
            self.manual_backward(loss)
            seen = torch.where(batch.mask > 0, spread, 0.0).sum() / batch.mask.sum().clamp_min(1)
            logs.append(metrics | {"loss": loss.detach() * len(batches), "entropy": seen})
        self.model.language.eval()
        self.log("train/grad_norm", self._gradients.norm(), batch_size=1)
        self._gradients.clip(self.max_grad_norm)
        optimizer.step()
        self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]
        self.updates += 1
        for name in logs[0]:
            values = torch.stack([entry[name] for entry in logs])
            self.log(f"train/{name}", values.max() if name == "ratio_off" else values.mean(), batch_size=1)
        ages = [self.updates - 1 - answer.update for answer in answers]
        self.log("train/age", sum(ages) / len(ages), batch_size=1)
        self.log("cost/answers", float(self.asked), batch_size=1)

    def across(self, value: float, how: str) -> float:
        """A number of all devices."""
        own = torch.tensor(value, dtype=torch.float32, device=self.device)
        return float(self.trainer.strategy.reduce(own, reduce_op=how))

    def configure_optimizers(self) -> Any:
        self._gradients = Gradients(p for _, p in self.trainable_parameters())
        optimizer, rule = adamw(self.trainable_parameters(), self.optimizer_settings, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the reference, what waits for an update, the buffer and the counts; drops frozen weights."""
        self.drop_frozen(checkpoint)
        own = {
            "waiting": [[answer.state() for answer in moved(group, "cpu")] for group in self.waiting],
            "buffer": [] if self.buffer is None else self.buffer.state(),
            "shift": getattr(self.algorithm, "shift", None),
            "idle": self.idle,
            "refused": self.refused,
            "asked": self.asked,
        }
        checkpoint["grpo"] = {
            "copies": self.snapshots.state(),
            "updates": self.updates,
            "devices": shares.gathered(own),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_state(Path(self.pretrained), dict(self.trainable_parameters()), checkpoint["state_dict"])
        saved, devices = checkpoint["grpo"], checkpoint["grpo"]["devices"]
        self.snapshots.load(saved["copies"])
        self.updates = saved["updates"]
        self.waiting = [[Answer.of(state) for state in group] for group in shares.share(devices, "waiting")]
        if self.buffer is not None:
            self.buffer.answers = [Answer.of(state) for state in shares.share(devices, "buffer")]
        if (shift := shares.beside(devices, "shift")) is not None:
            self.algorithm.shift = shift  # type: ignore[attr-defined]
        self.asked = shares.counted(devices, "asked")
        self.idle, self.refused = (shares.beside(devices, name) for name in ("idle", "refused"))
