"""Prompt (and pictures) to picture, without a Trainer."""

from lightning_modules.pipelines.kontext import KontextPipeline

__all__ = ["KontextPipeline"]
