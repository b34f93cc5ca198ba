"""How fast training goes, and what it waits for."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.stage import stage

# Nominal dense bfloat16 FLOP/s by the device name that CUDA reports, from NVIDIA's data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


class Throughput(Callback):
    """Logs samples/s, the share of time spent waiting for data, MFU and peak memory every n optimizer steps.

    Waiting is what the training loader says of itself (`waited`, in seconds), else the time between
    `on_train_batch_end` and the next `on_train_batch_start`; list this callback after those that work in
    `on_train_batch_end`, such as SampleGrid. Pauses with a validation or a checkpoint in them are
    left out of these figures, but not out of `train_seconds`.

    Args:
        peak_flops: FLOP/s of one device for MFU; by default looked up by its name, and no MFU where that is unknown.
        every_n_steps: the window, in optimizer steps.
    """

    def __init__(self, peak_flops: float | None = None, every_n_steps: int = 50) -> None:
        self.peak_flops = peak_flops
        self.every_n_steps = every_n_steps
        self.samples_seen = 0
        self._earlier_seconds = 0.0
        self._first_time: float | None = None
        self._end_time = 0.0
        self._step = 0
        self._paused = False
        self._window = _Window()

    @property
    def train_seconds(self) -> float:
        """Wall clock from the start of the first optimizer step to the end of the last, summed over resumes."""
        return self._earlier_seconds + (0.0 if self._first_time is None else self._end_time - self._first_time)

    @property
    def samples_per_second(self) -> float:
        """Over the whole training, on all devices together."""
        return self.samples_seen / self.train_seconds if self.train_seconds > 0 else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._earlier_seconds, self._first_time = self.train_seconds, None
        self._step = trainer.global_step
        self._window = _Window()
        if self.peak_flops is None and trainer.strategy.root_device.type == "cuda":
            self.peak_flops = peak_flops_of(torch.cuda.get_device_name(trainer.strategy.root_device))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self._first_time is None:
            self._first_time = self._end_time = now
        elif not self._paused:
            self._window.gap_seconds += now - self._end_time
        self._window.batch_start = now
        self._paused = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._end_time = time.perf_counter()
        window = self._window
        window.work_seconds += self._end_time - window.batch_start
        window.samples += len(batch) * trainer.world_size
        self.samples_seen += len(batch) * trainer.world_size
        if self.peak_flops is not None and hasattr(pl_module, "training_flops"):
            window.flops += stage(pl_module).training_flops(batch)
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._step % self.every_n_steps == 0:
                self._log(trainer, pl_module)
                self._window = _Window(getattr(trainer.train_dataloader, "waited", 0.0))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._paused = True

    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self.samples_seen, "train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples_seen = state_dict["samples_seen"]
        self._earlier_seconds, self._first_time = state_dict["train_seconds"], None

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        window = self._window
        seconds = max(window.work_seconds + window.gap_seconds, 1e-9)
        waited = getattr(trainer.train_dataloader, "waited", None)
        wait_seconds = window.gap_seconds if waited is None else waited - window.waited_before
        metrics = {
            "throughput/samples_per_second": window.samples / seconds,
            "throughput/data_wait_share": wait_seconds / seconds,
            "throughput/peak_memory_gib": peak_memory_bytes(trainer.strategy.root_device) / 2**30,
        }
        if self.peak_flops is not None and window.flops > 0:
            metrics["throughput/mfu"] = window.flops / (seconds * self.peak_flops)
        # Straight to the loggers: their own interval would drop what is logged between its ticks.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        pl_module.log("samples/s", window.samples / seconds, prog_bar=True, logger=False)


class _Window:
    """Sums since the last log."""

    def __init__(self, waited_before: float = 0.0) -> None:
        self.waited_before = waited_before
        self.samples = 0
        self.flops = 0.0
        self.work_seconds = 0.0
        self.gap_seconds = 0.0
        self.batch_start = 0.0


def peak_flops_of(device_name: str) -> float | None:
    """The entry with the longest name that `device_name` begins with, as "NVIDIA H100 80GB HBM3" is an H100.

    >>> peak_flops_of("NVIDIA H200 NVL"), peak_flops_of("NVIDIA H200")
    (835000000000000.0, 989000000000000.0)
    """
    matches = [name for name in PEAK_FLOPS if f"{device_name} ".startswith((f"{name} ", f"{name}-"))]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated by torch on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
