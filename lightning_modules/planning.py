"""python -m lightning_modules.cli plan -c CONFIG: what a run needs and how long it takes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from data_pipeline.errors import InputError
from lightning_modules.networks import footprint
from lightning_modules.networks.adapters import Lora
from lightning_modules.networks.compute import Compute
from lightning_modules.networks.flops import passes_flops
from lightning_modules.networks.footprint import Geometry, Workload
from lightning_modules.networks.loading import read_json
from lightning_modules.pocket import Recipe
from lightning_modules.schedule import AdamW

GIB = 2**30


class Planned(Protocol):
    """What a stage module offers to be planned: its settings, and what a sample costs."""

    pretrained: str
    lora: Lora | None
    compute: Compute
    optimizer_settings: AdamW
    max_sequence_length: int | None

    def workload(self) -> Workload:
        """Made when the module is, before anything is loaded."""


@dataclass(frozen=True)
class Machine:
    """What a run is planned for.

    Attributes:
        flops: dense bf16 FLOP/s of a device that matrix products reach.
        utilisation: share of them that training is expected to reach.
        memory: GiB of a device.
    """

    flops: float = 790e12
    utilisation: float = 0.45
    memory: float = 139.0


@dataclass(frozen=True)
class Run:
    """A config's numbers: of the Trainer, the data and the stage module.

    Attributes:
        module: the stage module, made and not configured.
        trainer: settings of the Trainer.
        image_size: pixels of the longer side; the largest, where it changes.
        ratio: batches of each set in a cycle.
        batch_size, batch_tokens, size_multiple: as the data has them.
        ema: whether an average is kept.
        keep: checkpoints that stay.
    """

    module: Planned
    trainer: Mapping[str, Any]
    image_size: int
    ratio: Mapping[str, float]
    batch_size: int
    batch_tokens: int | None
    size_multiple: int
    ema: bool
    keep: int

    @property
    def devices(self) -> int:
        """Of all nodes; automatic ones count as one a node."""
        devices = self.trainer.get("devices", 1)
        each = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
        return each * int(self.trainer.get("num_nodes") or 1)

    @property
    def sharded(self) -> bool:
        """Whether the strategy shards weights."""
        strategy = self.trainer.get("strategy")
        return "ShardedStrategy" in str(getattr(strategy, "class_path", None) or type(strategy).__name__)

    @property
    def autocast(self) -> bool:
        """Whether it trains under autocast."""
        return str(self.trainer.get("precision")) in ("bf16-mixed", "16-mixed")

    @property
    def accumulation(self) -> int:
        """Batches of an optimiser step."""
        return int(self.trainer.get("accumulate_grad_batches") or 1)


class Plan:
    """Of a run on a machine. Bytes are of one device."""

    def __init__(self, run: Run, machine: Machine = Machine()) -> None:
        self.run, self.machine, module = run, machine, run.module
        self.folder = planned_folder(module.pretrained)
        found = footprint.transformer_config(self.folder)
        self.assumed = found is None
        self.config = footprint.SD35_MEDIUM if found is None else found
        self.transformer = footprint.outline(self.config, module.compute, module.lora)
        self.work = module.workload()

    @cached_property
    def text_tokens(self) -> int:
        """Length of the text sequence: of CLIP's, and of T5's."""
        clip, t5 = footprint.SD35_CLIP_TOKENS, 256
        if (self.folder / "tokenizer").is_dir():
            clip = int(read_json(self.folder / "tokenizer" / "tokenizer_config.json")["model_max_length"])
        if (self.folder / "tokenizer_3").is_dir():
            t5 = min(t5, int(read_json(self.folder / "tokenizer_3" / "tokenizer_config.json")["model_max_length"]))
        return clip + (self.run.module.max_sequence_length or t5)

    @cached_property
    def factor(self) -> int:
        """Pixels of a side that are one of a latent's."""
        if not (self.folder / "vae").is_dir():
            return footprint.SD35_FACTOR
        return 2 ** (len(read_json(self.folder / "vae" / "config.json")["block_out_channels"]) - 1)

    @cached_property
    def samples(self) -> dict[str, Geometry]:
        """A square sample of each set that is trained on, an edit's with one reference of its size."""
        side = self.run.image_size // self.factor
        shape, found = (side, side), {}
        for name, share in self.run.ratio.items():
            if share > 0:
                references = (shape,) * (2 if name == "multi_reference" else "edit" in name or name == "multi_turn")
                found[name] = Geometry(shape, references, self.text_tokens)
        return found

    def batch(self, name: str) -> int:
        """Samples of a set in a device's batch."""
        if self.run.batch_tokens is None:
            return self.run.batch_size
        pictures = 1 + len(self.samples[name].references)
        return max(1, self.run.batch_tokens * self.run.size_multiple**2 // (pictures * self.run.image_size**2))

    def flops(self, name: str) -> float:
        """Model FLOPs of a sample: what is computed again does not count."""
        config = self.transformer.config
        tokens = float(self.samples[name].tokens(config.patch_size))
        frozen = 0.0 if self.run.module.lora is None else self.work.backward
        return passes_flops(config, tokens, self.text_tokens, self.work.evaluations, frozen)

    def rate(self, name: str) -> float:
        """Expected samples/s of a device: what is computed again takes its time, too."""
        again = self.work.backward * footprint.recomputed_share(
            self.run.module.compute, self.transformer.config.num_layers
        )
        done = self.flops(name) * (1 + again / self.work.evaluations)
        return self.machine.flops * self.machine.utilisation / done

    @cached_property
    def states(self) -> dict[str, float]:
        """Bytes that are there all the time, by what they are for."""
        numbers, width = footprint.trained(self.transformer), self.run.module.compute.weights_dtype.itemsize
        every = sum(p.numel() for p in self.transformer.parameters())
        positions = sum(b.numel() for b in self.transformer.buffers())
        shards = self.run.devices if self.run.sharded else 1
        stored = 4 if self.run.sharded else width
        frozen, text = footprint.frozen_parameters(self.folder), self.run.module.compute.frozen_dtype.itemsize
        found = {
            "weights": every * stored / shards,
            "position table": positions * 4,
            "gradients": numbers * stored / shards,
            "optimiser": self.optimiser_bytes / shards,
            "average (EMA)": numbers * 4 / shards if self.run.ema else 0,
            "other policies": self.work.copies * numbers * width,
            "gathered block": every / self.transformer.config.num_layers * width * 2 if self.run.sharded else 0,
            "text encoders": text * sum(n for part, n in frozen.items() if part != "vae"),
            "autoencoder": 4 * frozen.get("vae", 0),
        }
        return {name: size for name, size in found.items() if size}

    @cached_property
    def optimiser_bytes(self) -> int:
        """Of AdamW's moments, step counters and float32 masters."""
        low = self.run.module.compute.weights == "bfloat16" and not self.run.sharded
        bits = self.run.module.optimizer_settings.bits
        return sum(moments_bytes(p, bits, low) for p in self.transformer.parameters() if p.requires_grad)

    def saved(self, name: str) -> float:
        """Bytes that autograd keeps of a set's batch."""
        count, geometry = self.work.together or self.batch(name), self.samples[name]
        one, two = (footprint.saved_bytes(self.transformer, geometry, n, self.run.autocast) for n in (1, 2))
        return one + (count - 1) * (two - one)  # what grows with the batch, and what does not

    @cached_property
    def activations(self) -> dict[str, float]:
        """`saved` of each set."""
        return {name: self.saved(name) for name in self.samples}

    @property
    def peak(self) -> float:
        """Bytes at the end of a forward pass of the largest batch."""
        return sum(self.states.values()) + max(self.activations.values())

    @property
    def step_samples(self) -> float:
        """Samples of an optimiser step, of all devices."""
        shares = sum(self.run.ratio.values())
        mean = sum(self.batch(name) * self.run.ratio[name] / shares for name in self.samples)
        return self.work.samples or mean * self.run.devices * self.run.accumulation

    @property
    def seconds(self) -> float:
        """Of an optimiser step, expected."""
        weights = {name: self.batch(name) * self.run.ratio[name] for name in self.samples}
        each = sum(w / self.rate(name) for name, w in weights.items()) / sum(weights.values())
        return each * self.step_samples / self.run.devices

    @property
    def checkpoint_bytes(self) -> float:
        """Of a checkpoint on disk: weights, moments, masters and average, without what is constant."""
        numbers, compute = footprint.trained(self.transformer), self.run.module.compute
        width = 4 if self.run.sharded else compute.weights_dtype.itemsize
        return numbers * (width + (4 if self.run.ema else 0)) + self.optimiser_bytes

    @property
    def export_bytes(self) -> float:
        """Of the exported folder: everything, the transformer in float32."""
        frozen = footprint.frozen_parameters(self.folder)
        text = self.run.module.compute.frozen_dtype.itemsize
        tensors = [*self.transformer.parameters(), *self.transformer.buffers()]
        return 4 * (sum(t.numel() for t in tensors) + frozen.get("vae", 0)) + text * sum(
            n for part, n in frozen.items() if part != "vae"
        )

    @property
    def disk(self) -> float:
        """Bytes of a finished run: checkpoints that stay and one being written, and the export."""
        return self.checkpoint_bytes * (self.run.keep + 1) + self.export_bytes

    def lines(self) -> Iterator[str]:
        """All of it, for people."""
        run, machine = self.run, self.machine
        sharding = "FSDP2" if run.sharded else "DDP" if run.devices > 1 else "one device"
        yield f"plan for {run.devices} devices ({sharding}), compute {run.module.compute}"
        if self.assumed:
            yield f"  {self.folder} is not here: SD3.5-Medium's sizes are assumed"
        every = sum(p.numel() for p in self.transformer.parameters())
        yield f"parameters       {every:,}, trained {footprint.trained(self.transformer):,}"
        yield "memory a device, GiB"
        for name, size in self.states.items():
            yield f"  {name:28}{size / GIB:8.2f}"
        for name, size in self.activations.items():
            count = self.work.together or self.batch(name)
            yield f"  {f'activations, {name} x {count}':28}{size / GIB:8.2f}"
        fits = "fits" if self.peak < machine.memory * GIB else "does NOT fit: smaller batches, or compute.recompute"
        yield f"  {'peak, expected':28}{self.peak / GIB:8.2f}   {fits} in {machine.memory:g} GiB"
        yield f"speed, expected at {machine.utilisation:.0%} of {machine.flops / 1e12:,.0f} TFLOP/s a device"
        for name in self.samples:
            yield f"  {name:16}{self.flops(name) / 1e12:10.2f} TFLOP a sample {self.rate(name):8.2f} samples/s a device"
        steps = int(run.trainer.get("max_steps") or 0)
        yield f"  a step           {self.step_samples:g} samples in {self.seconds:.2f} s"
        hours = steps * self.seconds / 3600
        yield f"  the run          {steps:,} steps, {steps * self.step_samples:,.0f} samples: {hours:.1f} hours"
        yield "disk, GiB"
        yield f"  {'a checkpoint':28}{self.checkpoint_bytes / GIB:8.2f}   {run.keep} stay, one more while it is written"
        yield f"  {'export':28}{self.export_bytes / GIB:8.2f}"
        yield f"  {'all':28}{self.disk / GIB:8.2f}"


def moments_bytes(parameter: Tensor, bits: int, low: bool) -> int:
    """AdamW's state of a parameter: float32 moments, a step, and a master for one of low precision; or 8-bit moments,
    with a scale for each of torchao's blocks of 256 and a table, where there are at least 4096 numbers in whole blocks.
    """
    count = parameter.numel()
    if bits == 32:
        return 4 + 8 * count + (4 * count if low else 0)
    if count < 4096 or count % 256:
        return 4 + 2 * count * (2 if low else 4)
    return 4 + 2 * (count + 4 * count // 256 + 4 * 256)


class NotBuilt(InputError):
    """The pocket folder, which fit builds itself."""


def planned_folder(pretrained: str) -> Path:
    """The folder of a checkpoint, which is not built and need not be here."""
    if pretrained != "pocket":
        return Path(pretrained)
    folder = Path("pocket", Recipe().name)
    if not (folder / "model_index.json").is_file():
        raise NotBuilt(f"{folder} is not built yet; fit does so when it first needs it, in about three minutes")
    return folder


def of(model: Any, data: Any, trainer: Mapping[str, Any]) -> Run:
    """A run's numbers from what a config makes. InputError where its module cannot be planned."""
    if not hasattr(model, "workload"):
        raise InputError(f"plan knows stages that train a Kontext transformer; {type(model).__name__} is none")
    callbacks = {name_of(callback): callback for callback in trainer.get("callbacks") or []}
    keep = getattr(callbacks.get("Checkpoint"), "keep", 2)
    ratio = data.ratio or dict.fromkeys(("text_to_image", "edit"), 1.0)
    size = max(data.sizes.values())
    return Run(
        model, trainer, size, ratio, data.batch_size, data.batch_tokens, data.size_multiple, "EMA" in callbacks, keep
    )


def name_of(callback: Any) -> str:
    """The class of a callback that is made, or described."""
    return str(getattr(callback, "class_path", type(callback).__name__)).rpartition(".")[2]


def largest_batch(plan: Plan) -> dict[str, int]:
    """Samples of each set that fit on a device, by the plan's states."""
    room = plan.machine.memory * GIB - sum(plan.states.values())
    found = {}
    for name, geometry in plan.samples.items():
        one, two = (footprint.saved_bytes(plan.transformer, geometry, n, plan.run.autocast) for n in (1, 2))
        found[name] = max(0, int((room - one) // (two - one)) + 1)
    return found


def main(run: Run, machine: Machine) -> int:
    """Prints the plan; the exit status is 1 where it does not fit."""
    plan = Plan(run, machine)
    for line in plan.lines():
        print(line)
    return int(plan.peak > machine.memory * GIB)
