"""Any checkpoint folder as the pipeline that it is for, and what makes its conditions."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_modules.networks.connected import Connected
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.pipelines.kontext import KontextPipeline
from lightning_modules.pipelines.metaquery import MetaqueryPipeline
from lightning_modules.pipelines.prompts import PromptCache, Prompts
from lightning_modules.pipelines.queries import QueryCache


def open_folder(folder: Path, vlm: str | None = None, text_dtype: torch.dtype = torch.float32) -> KontextPipeline:
    """The pipeline of a checkpoint folder: one with `conditioner/` is a Metaquery model, whose VLM may lie apart.

    `text_dtype` is that of frozen text encoders, or of the VLM.
    """
    if (folder / "conditioner").is_dir():
        return MetaqueryPipeline.from_pretrained(folder, vlm, vlm_dtype=text_dtype)
    if vlm is not None:
        raise CheckpointError(f"{folder} has no conditioner/, which would query the VLM {vlm}; leave vlm out (null)")
    return KontextPipeline.from_pretrained(folder, text_dtype=text_dtype)


def prompts_of(pipeline: KontextPipeline, root: str | None = None) -> Prompts:
    """What makes conditions of prompts and pictures, remembered; in a folder of feature stores too, if one is given."""
    if isinstance(pipeline, MetaqueryPipeline):
        return QueryCache(pipeline, root=root)
    return PromptCache(pipeline, root=root)


def connected(pipeline: KontextPipeline, prompts: Prompts) -> Connected:
    """Transformer and connector of a Metaquery model as one network; its prompts become hidden states from here on."""
    if not isinstance(pipeline, MetaqueryPipeline) or not isinstance(prompts, QueryCache):
        raise CheckpointError(
            "train_connector needs a Metaquery model, and this folder has no conditioner/; leave it out"
        )
    prompts.hidden = True
    return Connected(pipeline.transformer, pipeline.conditioner)


def reads_pictures(pipeline: KontextPipeline | None) -> bool:
    """Whether its conditions depend on the pictures to edit."""
    return isinstance(pipeline, MetaqueryPipeline)
