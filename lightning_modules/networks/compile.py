"""Regional compilation: the repeated blocks of a transformer, each in place."""

from __future__ import annotations

import logging
import shutil

import torch
from diffusers import ModelMixin

logger = logging.getLogger(__name__)


def has_cpp_compiler() -> bool:
    """Whether inductor finds a C++ compiler, which it needs on the CPU."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def compile_blocks(transformer: ModelMixin) -> bool:
    """Compiles `transformer.transformer_blocks` in place, so that names in the state dict stay; False if it cannot."""
    if not torch.cuda.is_available() and not has_cpp_compiler():
        logger.warning("compile: no C++ compiler found (c++, g++ or clang++); running eager, slower but the same.")
        return False
    for block in transformer.transformer_blocks:
        block.compile()
    return True
