"""What a training run does beside training; every callback works with any stage module that offers
`pipeline()`, `trainable_parameters()` and `training_flops(batch)`."""

from callbacks.budget import Budget
from callbacks.checkpoint import Checkpoint
from callbacks.checkpoint_io import AtomicCheckpointIO
from callbacks.dashboard import Dashboard
from callbacks.ema import EMA
from callbacks.export import Export
from callbacks.nonfinite import NonFiniteError, NonFiniteGuard
from callbacks.probe import Probe
from callbacks.progress import Progress
from callbacks.random_state import RandomState
from callbacks.sample_grid import SampleGrid
from callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "AtomicCheckpointIO",
    "Budget",
    "Checkpoint",
    "Dashboard",
    "Export",
    "NonFiniteError",
    "NonFiniteGuard",
    "Probe",
    "Progress",
    "RandomState",
    "SampleGrid",
    "Throughput",
]
