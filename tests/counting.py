"""FLOPs of a network on the meta device, forward and backward, counted operation by operation on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def counted_flops(network: nn.Module, inputs: Callable[[], dict[str, Any]], backward: bool = True) -> float:
    """Attention is counted as its products, which no kernel computes twice."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fakes: dict[str, Tensor] = {}
        for name, p in network.named_parameters():
            fakes[name] = Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
        for name, b in network.named_buffers():
            fakes[name] = torch.empty(b.shape, dtype=b.dtype)
        found = torch.func.functional_call(network, fakes, kwargs=inputs())
        if backward:
            (found[0] if isinstance(found, tuple) else found).float().square().mean().backward()
    return float(counter.get_total_flops())
