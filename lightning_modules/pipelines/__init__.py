"""Prompt (and pictures) to picture, without a Trainer."""

from lightning_modules.pipelines.kontext import KontextPipeline
from lightning_modules.pipelines.metaquery import MetaqueryPipeline

__all__ = ["KontextPipeline", "MetaqueryPipeline"]
