"""GenEval's verdicts as a reward: objects by a detector of transformers, colours by CLIP, all from local folders.

Official figures come from mmdetection's Mask2Former Swin-S and OpenAI's CLIP ViT-L/14; with other weights the numbers
are not comparable to published ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForUniversalSegmentation,
)

from data_pipeline.errors import InputError
from data_pipeline.steps.similarity import Embedder
from lightning_modules.networks.loading import load_text_encoder as load_model
from lightning_modules.networks.loading import read_json
from lightning_modules.rewards.geneval import (
    COLOURS,
    THRESHOLD,
    Detection,
    Found,
    confident,
    correct,
    flow_grpo,
    soft,
    strict,
)
from lightning_modules.rewards.models import as_arrays
from lightning_modules.rewards.protocol import Request

VERDICTS = {"soft": soft, "flow_grpo": flow_grpo, "strict": strict, "correct": correct}
GREY = np.full(3, 0x99, np.uint8)  # what the official code puts in the place of all that is not the object
# The official classifier averages these, as CLIP's own zero-shot ones do.
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
# What detectors call the classes that GenEval names otherwise: COCO's own words, and darknet's.
SYNONYMS = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


class Seen(NamedTuple):
    """An object of a class, and where it is: (H, W) bool, or None where only its box is known."""

    detection: Detection
    mask: np.ndarray | None = None


@runtime_checkable
class Detector(Protocol):
    """Finds objects."""

    def classes(self) -> Collection[str]:
        """The names of all that it can find, as GenEval has them."""

    def objects(self, pictures: Sequence[np.ndarray]) -> list[dict[str, list[Seen]]]:
        """Objects of pictures, (H, W, 3) uint8 each, by class; no less confident than THRESHOLD."""


@dataclass
class GenEval:
    """The verdict of GenEval on what a detector sees, with colours by zero-shot classification.

    Requests carry GenEval's facts as metadata, {"tag", "include": [...], "exclude"?: [...]}.

    Args:
        detector: what finds objects.
        embedder: a joint embedding such as CLIP, which tells colours.
        kind: "soft" rewards what is partly right, "flow_grpo" does it to the letter of Flow-GRPO's server, "correct" is
            the benchmark's verdict, "strict" that with exact counts.
    """

    detector: Detector
    embedder: Embedder
    kind: Literal["soft", "flow_grpo", "strict", "correct"] = "soft"
    _colours: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        for request in requests:
            self.check(request)
        arrays = as_arrays(pictures)
        seen = self.detector.objects(arrays)
        return [
            float(VERDICTS[self.kind](request.metadata, self.coloured(array, found, request.metadata)))
            for array, found, request in zip(arrays, seen, requests, strict=True)
        ]

    def check(self, request: Request) -> None:
        """Refuses what can have no verdict: a class that the detector does not know would always be missing."""
        clauses = [*request.metadata.get("include", ()), *request.metadata.get("exclude", ())]
        unknown = {clause["class"] for clause in clauses} - set(self.detector.classes())
        if not clauses or unknown:
            found = f"classes that the detector does not know, {sorted(unknown)}" if clauses else "no clauses"
            raise InputError(
                f'GenEval got {request.prompt!r} with {found}; expected metadata {{"tag", "include": [{{"class", '
                '"count"}]} of classes that it knows: take other prompts or another detector'
            )

    def coloured(self, picture: np.ndarray, seen: Mapping[str, list[Seen]], facts: Mapping[str, Any]) -> Found:
        """All objects, with their colours where a clause asks for one."""
        found = {name: [each.detection for each in group] for name, group in seen.items()}
        sure = confident(found, facts.get("tag", ""))
        for name in {clause["class"] for clause in facts["include"] if "color" in clause} & sure.keys():
            group = [each for each in seen[name] if each.detection in sure[name]]
            colours = self.colours_of([crop(picture, each) for each in group], name)
            found[name] = [replace(e.detection, colour=c) for e, c in zip(group, colours, strict=True)]
        return found

    def colours_of(self, crops: Sequence[np.ndarray], name: str) -> list[str]:
        """The nearest of COLOURS for each picture of an object."""
        if not crops:
            return []
        if name not in self._colours:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            mean = self.embedder.texts(texts).reshape(len(COLOURS), len(TEMPLATES), -1).mean(1)
            self._colours[name] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        nearest = (self.embedder.images(crops) @ self._colours[name].T).argmax(1)
        return [COLOURS[i] for i in nearest]


def crop(picture: np.ndarray, seen: Seen) -> np.ndarray:
    """The object's box of a picture, all but the object grey where its mask is known."""
    if seen.mask is not None:
        picture = np.where(seen.mask[..., None], picture, GREY)
    left, top, right, bottom = (round(side) for side in seen.detection.box)
    box = left, top, max(right, left + 1), max(bottom, top + 1)
    return np.asarray(Image.fromarray(picture).crop(box))


@dataclass
class TransformersDetector:
    """Mask2Former and its like (instances with masks) or DETR and its like (boxes), as the folder's config says.

    Args:
        folder: model and image processor, safetensors only.
        device: where it runs.
        batch_size: pictures at a time.
    """

    folder: str
    device: str = "cpu"
    batch_size: int = 8

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        named = read_json(Path(self.folder, "config.json")).get("architectures") or [""]
        kind = AutoModelForUniversalSegmentation if named[0].endswith("Segmentation") else AutoModelForObjectDetection
        model = load_model(kind, Path(self.folder), None).eval().to(self.device)
        return model, AutoImageProcessor.from_pretrained(self.folder, local_files_only=True)

    @cached_property
    def _names(self) -> dict[int, str]:
        read_json(Path(self.folder, "config.json"))  # names a missing folder, which transformers looks for on its hub
        labels = AutoConfig.from_pretrained(self.folder, local_files_only=True).id2label
        return {number: SYNONYMS.get(label, label) for number, label in labels.items()}

    def classes(self) -> Collection[str]:
        return self._names.values()

    @torch.no_grad()
    def objects(self, pictures: Sequence[np.ndarray]) -> list[dict[str, list[Seen]]]:
        model, processor = self._parts
        found: list[dict[str, list[Seen]]] = []
        for start in range(0, len(pictures), self.batch_size):
            batch = pictures[start : start + self.batch_size]
            output = model(**processor(images=list(batch), return_tensors="pt").to(self.device))
            sizes = [picture.shape[:2] for picture in batch]
            if hasattr(output, "masks_queries_logits"):
                results = processor.post_process_instance_segmentation(
                    output, threshold=THRESHOLD, target_sizes=sizes, return_binary_maps=True
                )
                found += [self._by_class(instances(result)) for result in results]
            else:
                results = processor.post_process_object_detection(output, threshold=THRESHOLD, target_sizes=sizes)
                found += [self._by_class(boxes(result)) for result in results]
        return found

    def _by_class(self, objects: Sequence[tuple[int, Seen]]) -> dict[str, list[Seen]]:
        groups: dict[str, list[Seen]] = {}
        for number, seen in objects:
            groups.setdefault(self._names[number], []).append(seen)
        return groups


def instances(result: Mapping[str, Any]) -> list[tuple[int, Seen]]:
    """Instances with masks; the box is what the mask covers."""
    found = []
    for segment, map_ in zip(result["segments_info"], result["segmentation"], strict=False):
        mask = map_.cpu().numpy() > 0
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        detection = Detection((float(box[0]), float(box[1]), float(box[2]), float(box[3])), segment["score"])
        found.append((segment["label_id"], Seen(detection, mask)))
    return found


def boxes(result: Mapping[str, Tensor]) -> list[tuple[int, Seen]]:
    """Objects known by their boxes alone."""
    columns = (result["labels"].tolist(), result["boxes"].tolist(), result["scores"].tolist())
    return [(label, Seen(Detection(tuple(box), score))) for label, box, score in zip(*columns, strict=True)]
