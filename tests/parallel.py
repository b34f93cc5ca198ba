"""A short training on text-to-image and edit batches in turn, on one process or on several: `torchrun`'s variables say.

    python tests/parallel.py OUTPUT VARIANT ...

Writes OUTPUT/<variant>-<rank>.json: the losses of each batch, and a hash of the averaged weights at the end.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch._dynamo
from micro import built
from rl import Stream, prompts
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from callbacks import EMA, Checkpoint, Export
from callbacks.checkpoint_io import AtomicCheckpointIO
from data_pipeline.batches import ImageBatch
from lightning_modules.kontext import KontextModule
from lightning_modules.networks.attention import KontextAttnProcessor
from lightning_modules.networks.compute import Compute
from lightning_modules.schedule import AdamW
from lightning_modules.strategies import ShardedStrategy

PLAIN = Compute()
STEPS, SAMPLES, CLIP = 6, 4, 0.05  # clipped at every step
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 2},
    "ddp": {"strategy": "ddp"},
    "sharded": {"strategy": "sharded"},
    "sharded_accumulated": {"strategy": "sharded", "accumulate": 2},
    "low": {"compute": Compute(weights="bfloat16")},
    "low_ddp": {"strategy": "ddp", "compute": Compute(weights="bfloat16")},
    "low_sharded": {"strategy": "sharded", "compute": Compute(weights="bfloat16")},
    "again": {"compute": Compute(recompute=True)},
    "cheap": {"compute": Compute(recompute="cheap")},
    "compiled": {"compile": True},
    "compiled_ddp": {"strategy": "ddp", "compile": True},
    "compiled_sharded": {"strategy": "sharded", "compile": True},
    "compiled_cheap": {"strategy": "ddp", "compute": Compute(recompute="cheap"), "compile": True},
    "both": {"both": True},
    "both_accumulated": {"both": True, "accumulate": 2},
    "both_ddp_accumulated": {"both": True, "accumulate": 2, "strategy": "ddp"},
    "both_sharded_accumulated": {"both": True, "accumulate": 2, "strategy": "sharded"},
}


def batches(rank: int, world: int, accumulate: int, both: bool = False) -> Iterator[ImageBatch]:
    """This rank's micro-batches: at each step, all ranks' and micro-batches' rows together are the same samples; of
    `both` tasks, in one micro-batch, or each task in one of two.
    """
    for step in range(STEPS):
        if both:
            each = [prompts(2 * step + i, task, SAMPLES) for i, task in enumerate(("text_to_image", "edit"))]
            each = each if accumulate == 2 else [joined(*each)]
            for whole in each:
                found = picked(whole, [*range(len(whole))[rank::world]])
                yield replace(found, prompts=[str(i) for i in found.sample_ids.tolist()])
            continue
        whole = prompts(step, "edit" if step % 2 else "text_to_image", SAMPLES)
        parts = world * accumulate
        for micro in range(accumulate):
            rows = range(SAMPLES)[(micro * world + rank) :: parts]
            found = whole.rows(rows[0], rows[0] + 1) if len(rows) == 1 else picked(whole, list(rows))
            yield replace(found, prompts=[str(i) for i in found.sample_ids.tolist()])


def joined(one: ImageBatch, other: ImageBatch) -> ImageBatch:
    """A batch of both tasks, whose references are lists: of the first batch's samples none."""
    assert one.references is None and other.references is not None
    return replace(
        one,
        tasks=one.tasks + other.tasks,
        keys=one.keys + other.keys,
        sample_ids=torch.cat([one.sample_ids, other.sample_ids]),
        epochs=torch.cat([one.epochs, other.epochs]),
        prompts=one.prompts + other.prompts,
        target=torch.cat([one.target, other.target]),
        references=[[] for _ in one.keys] + [list(images) for images in other.references],
    )


class EagerCalls:
    """Counts how often a block's attention runs as Python, which a compiled block's never does."""

    def __init__(self) -> None:
        self.count, self._plain = 0, KontextAttnProcessor.__call__

    def __enter__(self) -> EagerCalls:
        plain = self._plain

        @functools.wraps(plain)  # whose parameters diffusers looks at
        def noted(processor: KontextAttnProcessor, *args: Any, **options: Any) -> Any:
            if not torch.compiler.is_compiling():
                self.count += 1
            return plain(processor, *args, **options)

        KontextAttnProcessor.__call__ = noted  # type: ignore[method-assign]
        torch._dynamo.reset()
        counters.clear()
        return self

    def __exit__(self, *_: object) -> None:
        KontextAttnProcessor.__call__ = self._plain  # type: ignore[method-assign]


class Held(L.Callback):
    """Bytes of gradients before a step; those of weights and moments after."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.bytes["gradients"] = held(p.grad for p in pl_module.parameters())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        states = trainer.optimizers[0].state.values()
        self.bytes["optimiser"] = held(value for state in states for value in state.values())
        self.bytes["transformer"] = held(pl_module.parameters())


def held(tensors: Iterable[Any]) -> int:
    """Bytes of tensors, or of this rank's shards of them."""
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors if tensor is not None]
    return sum(tensor.nbytes for tensor in own)


def picked(batch: ImageBatch, rows: list[int]) -> ImageBatch:
    """Rows of a batch, in any order."""
    parts = [batch.rows(i, i + 1) for i in rows]
    references: Any = None if batch.references is None else [part.references for part in parts]
    if isinstance(batch.references, torch.Tensor):
        references = torch.cat(references)
    elif references is not None:
        references = [row[0] for row in references]
    return replace(
        batch,
        tasks=[part.tasks[0] for part in parts],
        keys=[part.keys[0] for part in parts],
        sample_ids=torch.cat([part.sample_ids for part in parts]),
        epochs=torch.cat([part.epochs for part in parts]),
        target=torch.cat([part.target for part in parts]),
        references=references,
    )


def trained(
    output: Path,
    name: str,
    strategy: str = "auto",
    accumulate: int = 1,
    compile: bool = False,
    compute: Compute = PLAIN,
    both: bool = False,
    steps: int = STEPS,
    resume: Path | None = None,
) -> dict[str, Any]:
    """Losses of all micro-batches, the averaged weights, and where the run is."""
    rank, world = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    folder = str(built())
    optimizer = AdamW(lr=1e-3, warmup_steps=2)
    module = KontextModule(folder, STEPS, 0, optimizer, compile=compile, compute=compute)
    losses: list[float] = []
    module.log = lambda name, value, **_: losses.append(float(value)) if name == "train/loss" else None
    ema, own = EMA(0.5, warmup=False), Held()
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=ShardedStrategy(world) if strategy == "sharded" else strategy,
        devices=world,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=CLIP,
        logger=False,
        default_root_dir=output / name,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[ema, own, Checkpoint(3), Export()],
    )
    start = 0 if resume is None else 3 * accumulate
    mine = list(batches(rank, world, accumulate, both))[start:]
    with EagerCalls() as eager:
        trainer.fit(module, DataLoader(Stream(mine), batch_size=None), ckpt_path=resume)
    graphs = counters["stats"]["unique_graphs"]
    bytes_of = {**own.bytes, "average (EMA)": held(ema.shadow.values())}
    average = {key: value.tolist() for key, value in ema.state_dict()["shadow"].items() if "proj_out" in key}
    norm = float(module.gradient_norm())
    untrained = KontextModule(folder)
    untrained.configure_model()
    before = dict(untrained.transformer.named_parameters())["proj_out.weight"]
    moved = float((ema.state_dict()["shadow"]["transformer.proj_out.weight"] - before.detach()).abs().max())
    ran: dict[str, Any] = {
        "bytes": bytes_of,
        "graphs": graphs,
        "eager": eager.count,
        "batches": [batch.task for batch in mine],
    }
    return {"losses": losses, "average": average, "norm": norm, "moved": moved, **ran}


def main(output: Path, names: list[str]) -> None:
    """Trains each variant and writes what it gave; "NAME+resumed" goes on from the middle of NAME. "pictures",
    "answers" and "shared" are reinforced."""
    torch.set_num_threads(1)
    for name in names:
        if name in ("pictures", "answers", "shared"):
            from parallel_rl import reinforced  # which takes seconds, and the others need nothing of it

            reinforced(output, name)
            continue
        plain, _, resumed = name.partition("+")
        checkpoint = output / plain / "checkpoints" / "step_00000003.ckpt" if resumed else None
        found = trained(output, name, resume=checkpoint, **VARIANTS[plain])
        (output / f"{name}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
