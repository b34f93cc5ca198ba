"""Sharded training (FSDP2) that says how many devices it shards over, and writes the same checkpoints as DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from data_pipeline.errors import InputError


class ShardedStrategy(ModelParallelStrategy):
    """Weights, gradients, optimiser and average in equal shards on all devices; `configure_model` shards the model.

    Lightning's own defaults would split each layer over a node's GPUs (tensor parallelism). A checkpoint is one whole
    file, written by the trainer's CheckpointIO and checked before it is read.

    Args:
        data_parallel_size: devices x nodes of the run.
    """

    def __init__(self, data_parallel_size: int) -> None:
        super().__init__(data_parallel_size, 1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Refuses sizes that are not the run's."""
        assert self.cluster_environment is not None
        world = self.num_nodes * self.num_processes
        if self._data_parallel_size != world:
            raise InputError(
                f"strategy: data_parallel_size is {self._data_parallel_size} and the run has {world} devices "
                f"({self.num_nodes} nodes); set it to {world}, or trainer.devices and num_nodes to match"
            )
        super().setup_environment()

    def setup(self, trainer: Any) -> None:
        """Refuses stages that shard nothing: each rank would train a model of its own."""
        model = self.lightning_module
        assert model is not None
        if not any(isinstance(p, DTensor) for p in model.parameters()):
            raise InputError(f"{type(model).__name__} does not shard its weights; use trainer.strategy ddp")
        super().setup(trainer)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank reads a file that the first has found whole; weights and optimiser go to their shards."""
        problem: list[InputError | None] = [None]
        if self.is_global_zero:
            try:
                self.checkpoint_io.load_checkpoint(checkpoint_path)
            except InputError as error:
                problem = [error]
        if (found := self.broadcast(problem)[0]) is not None:
            raise found
        return super().load_checkpoint(Path(checkpoint_path), weights_only=True)
