"""FLOPs of a network on the meta device, forward and backward, counted operation by operation on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.networks.footprint import fake_weights


def counted_flops(network: nn.Module, inputs: Callable[[], dict[str, Any]], backward: bool = True) -> float:
    """Attention is counted as its products, which no kernel computes twice."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fakes = fake_weights(network)
        found = torch.func.functional_call(network, fakes, kwargs=inputs())
        if backward:
            (found[0] if isinstance(found, tuple) else found).float().square().mean().backward()
    return float(counter.get_total_flops())
