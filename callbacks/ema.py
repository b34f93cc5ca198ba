"""Exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from callbacks.stage import stage
from data_pipeline.errors import InputError


class EMA(Callback):
    """shadow <- d shadow + (1 - d) weights after every optimizer step, in float32 whatever the weights' precision is
    (in bfloat16 a decay of 0.9999 would never move), over `pl_module.trainable_parameters()` only.

    The shadow stands in for the weights during validation, test and prediction. It is saved once, in this callback's
    state; the checkpoint's `state_dict` stays the raw weights. Sharded parameters are averaged shard by shard.

    Args:
        decay: d, in [0, 1).
        warmup: after n updates use min(d, (1 + n) / (10 + n)), so that the initial weights are soon forgotten.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise InputError(f"EMA decay is {decay}; it must be at least 0 and below 1, for example 0.999.")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.shadow: dict[str, Tensor] = {}
        self._restored: dict[str, Tensor] | None = None
        self._parameters: list[Tensor] = []
        self._raw: list[tuple[Tensor, Tensor, bool]] | None = None
        self._seen_step: int | None = None

    @property
    def effective_decay(self) -> float:
        """The decay that the next update uses."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    def catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Updates the shadow if the optimizer has stepped since it was last updated; safe to call at any time."""
        if self._seen_step is not None and trainer.global_step > self._seen_step:
            self._seen_step = trainer.global_step
            self._update(masters(trainer))

    @contextmanager
    def swapped(self, pl_module: LightningModule, full_precision: bool = False) -> Iterator[None]:
        """The averaged weights inside, exactly the raw ones after. Nests. Before training it changes nothing.

        `full_precision` makes weights of lower precision float32 inside, so that an export loses nothing.
        """
        if self._raw is not None:
            yield
            return
        self._swap_in(pl_module, full_precision)
        try:
            yield
        finally:
            self._swap_out()

    @torch.no_grad()
    def _update(self, copies: Mapping[Tensor, Tensor] | None = None) -> None:
        weight = 1.0 - self.effective_decay
        exact = [(copies or {}).get(p, p) for p in self._parameters]
        pairs = [(_local(s), _local(p)) for s, p in zip(self.shadow.values(), exact, strict=True)]
        same = [(s, p) for s, p in pairs if p.dtype == torch.float32]
        if same:
            torch._foreach_lerp_([s for s, _ in same], [p for _, p in same], weight)
        for shadow, parameter in pairs:
            if parameter.dtype != torch.float32:
                shadow.lerp_(parameter.float(), weight)
        self.updates += 1

    # Under inference mode the shadow would be born as an inference tensor, which training could not update.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _prepare(self, pl_module: LightningModule) -> None:
        live: dict[str, Tensor] = dict(stage(pl_module).trainable_parameters())
        self._parameters = list(live.values())
        if self._restored is not None:
            _check_names(self._restored, live)
            self.shadow = {name: _shard_like(self._restored[name], p) for name, p in live.items()}
            self._restored = None
        elif self.shadow.keys() != live.keys():
            self.shadow = {name: p.detach().to(torch.float32, copy=True) for name, p in live.items()}

    @torch.no_grad()
    def _swap_in(self, pl_module: LightningModule, full_precision: bool = False) -> None:
        if self._restored is not None:
            self._prepare(pl_module)
        if not self.shadow or self._raw is not None:
            return
        self._raw = []
        for parameter, shadow in zip(self._parameters, self.shadow.values(), strict=True):
            rebind = full_precision and parameter.dtype != torch.float32
            if rebind:
                self._raw.append((parameter, parameter.data, True))
                parameter.data = shadow.to(parameter.device)
            else:
                # Copied, not rebound: sharded and compiled modules hold on to the storage.
                self._raw.append((parameter, _local(parameter).detach().clone(), False))
                _local(parameter).copy_(_local(shadow))

    @torch.no_grad()
    def _swap_out(self) -> None:
        for parameter, raw, rebind in self._raw or []:
            if rebind:
                parameter.data = raw
            else:
                _local(parameter).copy_(raw)
        self._raw = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Some strategies load the checkpoint after this hook, so the shadow is made in on_train_start.
        self._seen_step = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(pl_module)
        self._seen_step = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # With manual optimization one batch may step several times; each of them is averaged before the next.
        self.catch_up(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.catch_up(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap_out()

    def state_dict(self) -> dict[str, Any]:
        shadow = self.shadow if self._restored is None else self._restored
        return {"updates": self.updates, "shadow": {name: _full(t) for name, t in shadow.items()}} if shadow else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]
        self._restored = state_dict["shadow"]


def averaged(
    trainer: Trainer, pl_module: LightningModule, full_precision: bool = False
) -> AbstractContextManager[None]:
    """The up-to-date averaged weights if the trainer has an EMA callback, else the weights as they are."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            callback.catch_up(trainer, pl_module)
            return callback.swapped(pl_module, full_precision)
    return nullcontext()


def masters(trainer: Trainer) -> dict[Tensor, Tensor]:
    """The float32 copies that an optimiser keeps of parameters of lower precision."""
    states = [(p, state) for optimizer in trainer.optimizers for p, state in optimizer.state.items()]
    return {p: state["master"] for p, state in states if "master" in state}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _full(tensor: Tensor) -> Tensor:
    # Gathered one by one, and kept where there is room.
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def _shard_like(saved: Tensor, parameter: Tensor) -> Tensor:
    saved = saved.to(parameter.device, torch.float32)
    if isinstance(parameter, DTensor):
        return distribute_tensor(saved, parameter.device_mesh, parameter.placements)
    return saved


def _check_names(saved: dict[str, Tensor], live: dict[str, Tensor]) -> None:
    missing = sorted(live.keys() - saved.keys())
    unexpected = sorted(saved.keys() - live.keys())
    misshapen = sorted(n for n in live.keys() & saved.keys() if live[n].shape != saved[n].shape)
    if missing or unexpected or misshapen:
        raise InputError(
            "The averaged weights in the checkpoint do not fit the trained parameters: "
            f"missing {missing[:5]}, unexpected {unexpected[:5]}, of another shape {misshapen[:5]} (first five each). "
            "Resume with the configuration that wrote the checkpoint."
        )
