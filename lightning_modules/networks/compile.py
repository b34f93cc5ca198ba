"""Regional compilation: the repeated blocks of a transformer, each in place."""

from __future__ import annotations

import logging
import os
import shutil

import torch
import torch._dynamo
from diffusers import ModelMixin

logger = logging.getLogger(__name__)


def missing_compiler() -> str | None:
    """What inductor needs and does not find: a C++ compiler on a CPU, and for Triton's launchers a C one on a GPU."""
    wanted = ("gcc", "clang", "cc") if torch.cuda.is_available() else ("c++", "g++", "clang++")
    if any(shutil.which(name) for name in wanted) or (torch.cuda.is_available() and "CC" in os.environ):
        return None
    return f"no {'C' if torch.cuda.is_available() else 'C++'} compiler ({', '.join(wanted)})"


def compile_blocks(transformer: ModelMixin) -> bool:
    """Compiles `transformer.transformer_blocks` in place, so that names in the state dict stay; False if it cannot."""
    if (missing := missing_compiler()) is not None:
        logger.warning("compile: %s found; running eager, slower but the same.", missing)
        return False
    # All blocks are one piece of code, of which a graph is kept for each shape, kind of block and gradient: the default
    # of 8 leaves the second shape of reinforcement eager.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.optimize_ddp = False  # which would cut a block's graph where DDP's buckets end
    for block in transformer.transformer_blocks:
        block.compile()
    return True
