"""A reward model for edits: a regressor learns a judge's scores of one's own model's edits (Skywork-EditReward)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batches import ImageBatch
from data_pipeline.errors import InputError
from lightning_modules.evaluation.agreement import agreement
from lightning_modules.folders import checkpoint_folder, vlm_folder
from lightning_modules.gradients import GradientHooks, Gradients
from lightning_modules.needs.rewards import reward_needs
from lightning_modules.networks.adapters import Lora, add_lora
from lightning_modules.networks.edit_readers import Tower, TowerReader, VlmReader
from lightning_modules.networks.edit_regressor import EditRegressor
from lightning_modules.networks.footprint import Needs
from lightning_modules.networks.loading import compare_shapes
from lightning_modules.planning import Run
from lightning_modules.schedule import AdamW, adamw

DIMENSIONS = {"instruction": "judge_instruction", "preservation": "judge_preservation"}


class EditRewardModule(GradientHooks, L.LightningModule):
    """Trains a regressor on edits whose metadata hold a judge's scores (configs/data/own_edits.yaml builds such).

    Validation measures how well it agrees with the judge on held-out records, for each dimension and for their product,
    which is the reward: val/pearson_*, val/spearman_*, val/pairwise_* and val/pairwise_in_group_*.

    Args:
        pretrained: a vision-language model of transformers; with a `tower` a checkpoint folder in the diffusers layout,
            or "pocket".
        tower: train a small tower from scratch in place of a vision-language model.
        dimensions: what is predicted, and the name of the score in metadata; None takes instruction and preservation.
        highest: the judge's best score; the worst is 0.
        frozen: parameters of a vision-language model that are not trained, by what their names begin with.
        lora: adapters to train in place of the model's weights.
        gradient_checkpointing: recompute the vision-language model's activations instead of keeping them.
        optimizer: AdamW and its schedule.
        steps: optimiser steps of the whole run, for the schedule.
        seed: of what is drawn at the start.
    """

    def __init__(
        self,
        pretrained: str = "pocket",
        tower: Tower | None = None,
        dimensions: dict[str, str] | None = None,
        highest: float = 1.0,
        frozen: list[str] | None = None,
        lora: Lora | None = None,
        gradient_checkpointing: bool = False,
        optimizer: AdamW = AdamW(),  # noqa: B008
        steps: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if highest <= 0:
            raise InputError(f"highest is {highest:g}; expected a judge's best score, above 0")
        if tower is not None and (frozen or lora or gradient_checkpointing):
            raise InputError("frozen, lora and gradient_checkpointing are for a vision-language model, not for a tower")
        self.strict_loading = False  # a checkpoint holds what is trained, and no frozen weights
        self.pretrained, self.tower, self.highest = pretrained, tower, highest
        self.dimensions = dimensions or dict(DIMENSIONS)
        self.frozen, self.lora, self.gradient_checkpointing = frozen or [], lora, gradient_checkpointing
        self.optimizer_settings, self.steps, self.seed = optimizer, steps, seed
        self.regressor: Any = None
        self.seen: list[tuple[Tensor, Tensor, list[str]]] = []

    def configure_model(self) -> None:
        """Loads or draws the reader; called again it does nothing."""
        if self.regressor is not None:
            return
        if self.tower is not None:
            reader: Any = TowerReader.drawn(checkpoint_folder(self.pretrained), self.tower, self.seed)
        else:
            reader = VlmReader.from_pretrained(vlm_folder(self.pretrained))
            for name, parameter in reader.model.named_parameters():
                parameter.requires_grad_(not name.startswith(tuple(self.frozen)))
            if self.lora is not None:
                add_lora(reader.model, self.lora, self.seed)
            if self.gradient_checkpointing:
                reader.model.activation_checkpointing_enable()
                reader.model.disable_input_require_grads()  # else a backward pass goes through a frozen tower too
        self.regressor = EditRegressor(reader, list(self.dimensions))

    def pipeline(self) -> EditRegressor:
        """The regressor with the live weights, which is what is exported."""
        return self.regressor

    def needs(self, run: Run) -> Needs:
        """What a run holds and does, for plan."""
        return reward_needs(run, self)

    def sources(self) -> dict[str, str]:
        """Folders, and what they must be, for doctor."""
        return {self.pretrained: "model" if self.tower is None else "image"}

    def on_train_start(self) -> None:
        """Sets the mode in which transformers recomputes; until here a model is in the other one."""
        if self.tower is None:
            self.regressor.reader.model.train(self.gradient_checkpointing)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        predicted, judged = self.predict(batch), self.judged(batch)
        loss = nn.functional.mse_loss(predicted, judged)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def predict(self, batch: ImageBatch) -> Float[Tensor, "b k"]:
        """Ratings of the targets of edits."""
        if batch.references is None:
            raise InputError(f"expected edits, got records such as {batch.keys[0]} of the task {batch.task}")
        shown = [[*own, target] for own, target in zip(batch.references, batch.target, strict=True)]
        unit = [[picture / 2 + 0.5 for picture in pictures] for pictures in shown]
        return self.regressor(self.regressor.prepare(batch.prompts, unit))

    def judged(self, batch: ImageBatch) -> Float[Tensor, "b k"]:
        """The judge's scores, 0 to 1."""
        rows = []
        for key, facts in zip(batch.keys, batch.metadata or [], strict=True):
            scores: list[Any] = [facts.get(name) for name in self.dimensions.values()]
            if not all(type(score) in (int, float) and 0 <= score <= self.highest for score in scores):
                raise InputError(
                    f"record {key} has {dict(zip(self.dimensions.values(), scores, strict=True))} in its metadata; "
                    f"expected scores from 0 to {self.highest:g}: build the shards as configs/data/own_edits.yaml does"
                )
            rows.append(scores)
        return torch.tensor(rows, dtype=torch.float32, device=self.device) / self.highest

    def on_validation_epoch_start(self) -> None:
        self.seen = []

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        predicted, judged = self.predict(batch), self.judged(batch)
        self.log("val/loss", nn.functional.mse_loss(predicted, judged), batch_size=len(batch), sync_dist=True)
        groups = [str(facts.get("group", key)) for key, facts in zip(batch.keys, batch.metadata or [], strict=True)]
        self.seen.append((predicted.float().cpu(), judged.cpu(), groups))

    def on_validation_epoch_end(self) -> None:
        predicted, judged = torch.cat([p for p, _, _ in self.seen]), torch.cat([j for _, j, _ in self.seen])
        groups = [group for _, _, own in self.seen for group in own]
        columns = {name: (predicted[:, i], judged[:, i]) for i, name in enumerate(self.dimensions)}
        columns["reward"] = (predicted.clamp(0, 1).prod(dim=1), judged.prod(dim=1))
        for name, (found, wanted) in columns.items():
            for metric, value in agreement(found, wanted, groups).items():
                if math.isfinite(value):  # nothing correlates with scores that are all equal
                    self.log(f"val/{metric}_{name}", value, prog_bar=metric == "spearman")

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
        compare_shapes(Path(self.pretrained), *shapes)
