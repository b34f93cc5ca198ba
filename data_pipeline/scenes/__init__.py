"""The embedded world: scenes that are rendered, described, edited and read back exactly."""

from __future__ import annotations

import io
import random
from collections.abc import Collection, Mapping

from PIL import Image

from data_pipeline.records import EditRecord, EncodedImage, TextImageRecord
from data_pipeline.scenes import free
from data_pipeline.scenes.captions import TASK_WEIGHTS, Caption, meaning, random_caption
from data_pipeline.scenes.edits import Edit, random_edit
from data_pipeline.scenes.free import edits as free_edits
from data_pipeline.scenes.free.world import Canvas
from data_pipeline.scenes.renderer import render
from data_pipeline.scenes.world import LEVELS, Scene

FREE = 3  # the level whose shapes are placed freely
ALL_LEVELS = (*LEVELS, FREE)


def encode_png(scene: Scene | Canvas) -> EncodedImage:
    """A rendered scene as PNG."""
    buffer = io.BytesIO()
    picture = render(scene) if isinstance(scene, Scene) else free.world.render(scene)
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return EncodedImage(buffer.getvalue(), "png")


def text_image_record(
    level: int, seed: int, number: int, split: str, weights: Mapping[str, float] | None = None
) -> TextImageRecord:
    """A captioned scene of `split`, a function of its arguments alone; `weights` are those of the tasks."""
    rng = random.Random(f"caption/{level}/{seed}/{number}")
    scene: Scene | Canvas
    scene, caption = free.random_caption(rng, split) if level == FREE else random_caption(rng, level, split, weights)
    facts = {"scene": scene.canonical, "task": caption.task, "meaning": meaning(caption)}
    return TextImageRecord(f"caption-{number:07d}", encode_png(scene), caption.text, "scenes", "CC0-1.0", split, facts)


def edit_record(level: int, seed: int, number: int, split: str) -> EditRecord:
    """An edit between scenes of `split`, a function of its arguments alone."""
    rng = random.Random(f"edit/{level}/{seed}/{number}")
    if level == FREE:
        return free_edit_record(number, free_edits.random_edit(rng, split), split)
    edit = random_edit(rng, level, split)
    facts = {"scene": edit.target.canonical, "source": edit.source.canonical, "task": edit.kind}
    images = (encode_png(edit.source),), encode_png(edit.target)
    return EditRecord(f"edit-{number:07d}", *images, edit.instruction, "scenes", "CC0-1.0", split, facts)


def free_edit_record(number: int, edit: free_edits.FreeEdit, split: str) -> EditRecord:
    """An edit of level 3; one that takes an object from a second picture has two sources."""
    sources = [source.canonical for source in edit.sources]
    facts = {"scene": edit.target.canonical, "source": sources[0], "task": edit.kind, "reference": sources[1:]}
    images = tuple(map(encode_png, edit.sources)), encode_png(edit.target)
    return EditRecord(f"edit-{number:07d}", *images, edit.instruction, "scenes", "CC0-1.0", split, facts)


def benchmark(
    level: int, count: int, seed: int, tasks: Collection[str] = tuple(TASK_WEIGHTS["val"])
) -> tuple[list[Caption], list[Edit]]:
    """`count` captions of distinct held-out scenes and `count` held-out edits, the same for everyone at a seed."""
    rng = random.Random(f"benchmark/{level}/{seed}")
    weights = {task: weight for task, weight in TASK_WEIGHTS["val"].items() if task in tasks}
    captions: dict[str, Caption] = {}
    while len(captions) < count:
        scene, caption = random_caption(rng, level, "val", weights)
        captions.setdefault(scene.canonical, caption)
    edits: dict[tuple[str, str], Edit] = {}
    while len(edits) < count:
        edit = random_edit(rng, level, "val")
        edits.setdefault((edit.source.canonical, edit.target.canonical), edit)
    return list(captions.values()), list(edits.values())
