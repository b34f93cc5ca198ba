"""python -m lightning_modules.cli plan -c CONFIG: what a run needs and how long it takes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

from torch import Tensor

from data_pipeline.errors import InputError
from lightning_modules.networks.footprint import Load, Needs
from lightning_modules.schedule import AdamW

GIB = 2**30


class NotCounted(InputError):
    """A choice that can be trained, and whose needs `plan` cannot say."""


class Planned(Protocol):
    """What a stage module offers to be planned, made and not configured."""

    optimizer_settings: AdamW

    def needs(self, run: Any) -> Needs:
        """What a Run of it holds and does, from settings and the configs of folders alone."""

    def sources(self) -> dict[str, str]:
        """Folders that it loads, and what each must be (see preflight.weights)."""


@dataclass(frozen=True)
class Machine:
    """What a run is planned for.

    Attributes:
        flops: dense bf16 FLOP/s of a device that matrix products reach.
        utilisation: share of them that training is expected to reach.
        memory: GiB of a device.
        bandwidth: bytes/s that writing text token by token reads from a device's memory, 70 % of an H200's 4.8 TB/s.
    """

    flops: float = 790e12
    utilisation: float = 0.45
    memory: float = 139.0
    bandwidth: float = 3.4e12


@dataclass(frozen=True)
class Run:
    """A config's numbers: of the Trainer, the data and the stage module.

    Attributes:
        module: the stage module, made and not configured.
        trainer: settings of the Trainer.
        image_size: pixels of the longer side; the largest, where it changes; 0 for conversations.
        ratio: batches of each set in a cycle.
        batch_size, batch_tokens, size_multiple: as the data has them.
        ema: whether an average is kept.
        keep: checkpoints that stay.
        cached: whether the data keeps autoencoder moments.
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
    cached: bool = False

    @classmethod
    def of(cls, model: Any, data: Any, trainer: Mapping[str, Any]) -> Self:
        """A run's numbers from what a config makes. InputError where its module cannot be planned."""
        if not hasattr(model, "needs"):
            raise InputError(f"{type(model).__name__} cannot be planned: it has no `needs`, as {__name__}.Planned")
        callbacks = {name_of(callback): callback for callback in trainer.get("callbacks") or []}
        keep, ema = getattr(callbacks.get("Checkpoint"), "keep", 2), "EMA" in callbacks
        if not hasattr(data, "sizes"):  # conversations
            return cls(model, trainer, 0, {"conversations": 1.0}, data.batch_size, data.batch_tokens, 1, ema, keep)
        ratio = data.ratio or dict.fromkeys(("text_to_image", "edit"), 1.0)
        sizes = max(data.sizes.values()), ratio, data.batch_size, data.batch_tokens, data.size_multiple
        return cls(model, trainer, *sizes, ema, keep, data.cache is not None)

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
    def buckets(self) -> bool:
        """Whether DDP keeps gradients a second time, in the buckets that it sums."""
        strategy = self.trainer.get("strategy")
        settings = getattr(strategy, "init_args", None) or getattr(strategy, "_ddp_kwargs", {})
        return self.devices > 1 and not self.sharded and not dict(settings).get("gradient_as_bucket_view")

    @property
    def precision(self) -> str:
        """The Trainer's."""
        return str(self.trainer.get("precision") or "32-true")

    @property
    def autocast(self) -> bool:
        """Whether it trains under autocast."""
        return self.precision in ("bf16-mixed", "16-mixed")

    @property
    def accumulation(self) -> int:
        """Batches of an optimiser step."""
        return int(self.trainer.get("accumulate_grad_batches") or 1)


class Plan:
    """Of a run on a machine. Bytes are of one device."""

    def __init__(self, run: Run, machine: Machine = Machine()) -> None:
        self.run, self.machine = run, machine
        self.needs: Needs = run.module.needs(run)
        self.loads: Mapping[str, Load] = self.needs.loads

    @cached_property
    def trained(self) -> int:
        """Numbers that the optimiser moves."""
        return sum(tensor.numel() for part in self.needs.parts for tensor in part.trained)

    def seconds_of(self, name: str) -> float:
        """A device's, of a sample of a set, expected."""
        load = self.loads[name]
        computed = (load.flops + load.again) / (self.machine.flops * self.machine.utilisation)
        return computed + load.streamed / self.machine.bandwidth

    def rate(self, name: str) -> float:
        """Expected samples/s of a device."""
        return 1 / self.seconds_of(name)

    @cached_property
    def states(self) -> dict[str, float]:
        """Bytes that are there all the time, by what they are for."""
        found: dict[str, float] = {}
        gradients = 0.0
        for part in self.needs.parts:
            spread = self.shards > 1 and bool(part.trained)
            own = sum(4 * shard_of(t, self.shards) for t in part.tensors)  # of float32, and so are their gradients
            found[part.name] = own if spread else part.bytes
            gradients += sum(4 * shard_of(t, self.shards) if spread else t.nbytes for t in part.trained)
        every = sum(part.bytes for part in self.needs.parts if part.trained)
        copied = sum(tensor.nbytes for part in self.needs.parts for tensor in part.trained)
        found |= {
            "gradients": gradients,
            "DDP's buckets": gradients if self.run.buckets else 0.0,
            "optimiser": self.moments(self.shards),
            "average (EMA)": 4 * sum(shard_of(t, self.shards) for t in self.moved) if self.run.ema else 0,
            "other policies": self.needs.copies * copied,
            "gathered block": every / self.needs.blocks * 2 if self.run.sharded else 0,
            **self.needs.other,
        }
        return {name: size for name, size in found.items() if size}

    @property
    def shards(self) -> int:
        """Devices that share a weight."""
        return self.run.devices if self.run.sharded else 1

    @property
    def moved(self) -> list[Tensor]:
        """Tensors that the optimiser moves."""
        return [tensor for part in self.needs.parts for tensor in part.trained]

    @cached_property
    def optimiser_bytes(self) -> int:
        """Of the optimiser's whole state, which a checkpoint holds."""
        return self.moments(1)

    def moments(self, shards: int) -> int:
        """Bytes of AdamW's moments, step counters and float32 masters of a device that holds one of so many shards."""
        bits, masters = self.run.module.optimizer_settings.bits, not self.run.sharded
        return sum(moments_bytes(shard_of(t, shards), bits, t.itemsize == 2 and masters) for t in self.moved)

    @cached_property
    def kept(self) -> dict[str, tuple[float, float]]:
        """Bytes that autograd keeps of one sample of each set, and of each more."""
        found = {}
        for name, load in self.loads.items():
            one, two = load.kept(1), load.kept(2)
            found[name] = one, two - one  # what grows with the batch, and what does not
        return found

    @cached_property
    def activations(self) -> dict[str, float]:
        """Bytes that autograd keeps of each set's batch, and those of its loss."""
        return {
            name: one + (self.loads[name].together - 1) * more + self.loads[name].beside
            for name, (one, more) in self.kept.items()
        }

    @property
    def peak(self) -> float:
        """Bytes at the end of a forward pass of the largest batch, or of what goes on between if that is more."""
        return sum(self.states.values()) + max([*self.activations.values(), *self.needs.meanwhile.values()])

    @property
    def unasked(self) -> float:
        """Bytes of `peak` that are not there while nothing asks for what they are."""
        return sum(part.bytes for part in self.needs.parts if part.name in self.needs.asked)

    @property
    def step_samples(self) -> float:
        """Samples of an optimiser step, of all devices."""
        shares = sum(self.run.ratio[name] for name in self.loads)
        mean = sum(load.batch * self.run.ratio[name] / shares for name, load in self.loads.items())
        return self.needs.samples or mean * self.run.devices * self.run.accumulation

    @property
    def seconds(self) -> float:
        """Of an optimiser step, expected."""
        weights = {name: load.batch * self.run.ratio[name] for name, load in self.loads.items()}
        each = sum(w * self.seconds_of(name) for name, w in weights.items()) / sum(weights.values())
        return each * self.step_samples / self.run.devices

    @property
    def checkpoint_bytes(self) -> float:
        """Of a checkpoint on disk: weights, moments, masters and average, without what is constant."""
        tensors = [tensor for part in self.needs.parts for tensor in part.trained]
        weights = sum(t.numel() * 4 if self.run.sharded else t.nbytes for t in tensors)
        return weights + self.trained * (4 if self.run.ema else 0) + self.optimiser_bytes

    @property
    def export_bytes(self) -> float:
        """Of the exported folder: everything that the model consists of."""
        return sum(p.bytes if p.exported is None else p.numbers * p.exported for p in self.needs.parts)

    @property
    def disk(self) -> float:
        """Bytes of a finished run: checkpoints that stay and one being written, and the export."""
        return self.checkpoint_bytes * (self.run.keep + 1) + self.export_bytes

    def lines(self) -> Iterator[str]:
        """All of it, for people."""
        run, machine = self.run, self.machine
        sharding = "FSDP2" if run.sharded else "DDP" if run.devices > 1 else "one device"
        yield f"plan for {run.devices} devices ({sharding}), precision {run.precision}"
        yield from (f"  {text}" for text in self.needs.assumed)
        parts = [part for part in self.needs.parts if not part.constant]
        yield f"parameters       {sum(part.numbers for part in parts):,}, trained {self.trained:,}"
        for part in parts:
            moved = sum(tensor.numel() for tensor in part.trained)
            yield f"  {part.name:28}{part.numbers:16,}   {f'trained {moved:,}' if moved else 'frozen'}"
        yield "memory a device, GiB"
        for name, size in self.states.items():
            yield f"  {name:28}{size / GIB:8.2f}"
        for name, size in self.activations.items():
            yield f"  {f'activations, {name} x {self.loads[name].together}':28}{size / GIB:8.2f}"
        for name, size in self.needs.meanwhile.items():
            yield f"  {name:28}{size / GIB:8.2f}   instead, while nothing is trained"
        fits = "fits" if self.peak < machine.memory * GIB else "does NOT fit: smaller batches, or recomputation"
        yield f"  {'peak, expected':28}{self.peak / GIB:8.2f}   {fits} in {machine.memory:g} GiB"
        if self.needs.asked:
            without = f"without {' and '.join(self.needs.asked)}, while nothing asks for them"
            yield f"  {'peak, caches full':28}{(self.peak - self.unasked) / GIB:8.2f}   {without}"
        yield from self.speed()
        yield "disk, GiB"
        yield f"  {'a checkpoint':28}{self.checkpoint_bytes / GIB:8.2f}   {run.keep} stay, one more while it is written"
        yield f"  {'export':28}{self.export_bytes / GIB:8.2f}"
        yield f"  {'all':28}{self.disk / GIB:8.2f}"

    def speed(self) -> Iterator[str]:
        """How long it takes, for people."""
        machine = self.machine
        yield f"speed, expected at {machine.utilisation:.0%} of {machine.flops / 1e12:,.0f} TFLOP/s a device"
        for name, load in self.loads.items():
            rate = self.rate(name)
            tokens = f", {rate * load.tokens:,.0f} tokens/s" if load.tokens else ""
            text = f"{load.flops / 1e12:10.4g} TFLOP a sample {rate:8.4g} samples/s{tokens} a device"
            beside = f"; {load.again / 1e12:.4g} TFLOP beside" if load.again else ""
            yield f"  {name:16}{text}{beside}"
        steps = int(self.run.trainer.get("max_steps") or 0)
        yield f"  a step           {self.step_samples:g} samples in {self.seconds:.2f} s"
        hours = steps * self.seconds / 3600
        yield f"  the run          {steps:,} steps, {steps * self.step_samples:,.0f} samples: {hours:.1f} hours"


def shard_of(tensor: Tensor, shards: int) -> int:
    """Numbers of the largest shard: FSDP2 shares out the rows of the first dimension, the first get one more."""
    return tensor.numel() if shards == 1 else -(-len(tensor) // shards) * (tensor.numel() // len(tensor))


def moments_bytes(count: int, bits: int, low: bool) -> int:
    """AdamW's state of so many numbers: float32 moments, a step, and a master of what is of low precision; or 8-bit
    moments, with a scale for each of torchao's blocks of 256 and a table, where there are at least 4096 numbers in
    whole blocks, and else moments of the parameter's own precision.
    """
    if bits == 32:
        return 4 + 8 * count + (4 * count if low else 0)
    if count < 4096 or count % 256:
        return 4 + 2 * count * (2 if low else 4)
    return 4 + 2 * (count + 4 * count // 256 + 4 * 256)


def name_of(callback: Any) -> str:
    """The class of a callback that is made, or described."""
    return str(getattr(callback, "class_path", type(callback).__name__)).rpartition(".")[2]


def largest_batch(plan: Plan) -> dict[str, int]:
    """Samples of each set that fit on a device, by the plan's states."""
    room = plan.machine.memory * GIB - sum(plan.states.values())
    return {name: max(0, int((room - one) // more) + 1) for name, (one, more) in plan.kept.items()}


def main(run: Run, machine: Machine) -> int:
    """Prints the plan; the exit status is 1 where it does not fit."""
    plan = Plan(run, machine)
    for line in plan.lines():
        print(line)
    return int(plan.peak > machine.memory * GIB)
