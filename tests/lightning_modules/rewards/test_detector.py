"""GenEval on detectors of transformers: its verdicts on recorded objects, colours as the official code asks CLIP."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from data_pipeline.errors import InputError
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.rewards.detector import (
    TEMPLATES,
    VERDICTS,
    Detector,
    GenEval,
    Seen,
    TransformersDetector,
    crop,
)
from lightning_modules.rewards.geneval import COLOURS, Detection
from lightning_modules.rewards.protocol import Request, Reward

PAINT = {"red": (255, 0, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
TWO = {
    "tag": "color_attr",
    "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
}


@dataclass
class Recorded:
    """What was seen in each picture."""

    seen: list[dict[str, list[Seen]]]
    names: tuple[str, ...] = ("cat", "dog")

    def classes(self) -> Collection[str]:
        return self.names

    def objects(self, pictures: Sequence[np.ndarray]) -> list[dict[str, list[Seen]]]:
        return self.seen[: len(pictures)]


@dataclass
class Paint:
    """An embedding in which a picture is its mean colour and a text the colour that it speaks of."""

    fingerprint: str = "paint"
    texts_seen: list[str] = field(default_factory=list)
    crops: list[np.ndarray] = field(default_factory=list)

    def images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        self.crops += pictures
        return unit([p.reshape(-1, 3).mean(0) - 127 for p in pictures])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        self.texts_seen += texts
        wanted = [next((rgb for name, rgb in PAINT.items() if name in text), (100, 160, 120)) for text in texts]
        return unit([np.array(rgb) - 127 for rgb in wanted])


def unit(rows: Sequence[np.ndarray]) -> np.ndarray:
    stacked = np.stack([np.asarray(row, dtype=np.float32) for row in rows])
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


def painted(left: str, right: str) -> torch.Tensor:
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, :16], picture[:, 16:] = PAINT[left], PAINT[right]
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255


def halves(confidence: float = 0.95) -> dict[str, list[Seen]]:
    return {
        "cat": [Seen(Detection((0, 0, 16, 16), confidence))],
        "dog": [Seen(Detection((16, 0, 32, 16), confidence))],
    }


def test_verdicts_follow_the_colours_of_the_pictures() -> None:
    pictures = torch.stack([painted("red", "blue"), painted("blue", "blue"), painted("blue", "red")])
    requests = [Request("a red cat and a blue dog", metadata=TWO)] * 3
    embedder = Paint()
    rewards = {kind: GenEval(Recorded([halves()] * 3), embedder, kind) for kind in VERDICTS}
    assert all(isinstance(reward, Reward) for reward in rewards.values())
    for kind in ("soft", "flow_grpo"):
        assert rewards[kind].score(pictures, requests) == pytest.approx([1, 3 / 4, 1 / 2])
    assert rewards["strict"].score(pictures, requests) == rewards["correct"].score(pictures, requests) == [1, 0, 0]
    asked = [t.format(colour=c, name="cat") for c in COLOURS for t in TEMPLATES]
    assert asked[:3] == ["a photo of a red cat", "a photo of a red-colored cat", "a photo of a red object"]
    # Once a reward and class.
    assert set(asked) <= set(embedder.texts_seen) and len(embedder.texts_seen) == len(VERDICTS) * 2 * 30


def test_only_what_is_asked_for_its_colour_and_surely_there_is_looked_at() -> None:
    embedder = Paint()
    seen = {**halves(), "dog": [Seen(Detection((16, 0, 32, 16), 0.2))]}
    (score,) = GenEval(Recorded([seen]), embedder).score(painted("red", "blue")[None], [Request("", metadata=TWO)])
    assert score == pytest.approx(1 / 2) and len(embedder.crops) == 1
    facts = {"tag": "two_object", "include": [{"class": "cat", "count": 1}]}
    GenEval(Recorded([halves()]), embedder).score(painted("red", "blue")[None], [Request("", metadata=facts)])
    assert len(embedder.crops) == 1


def test_crops_are_grey_around_the_object() -> None:
    picture = np.zeros((8, 10, 3), np.uint8)
    mask = np.zeros((8, 10), bool)
    mask[2:5, 3:6] = True
    mask[2, 3] = False
    found = crop(picture, Seen(Detection((3, 2, 6, 5), 0.9), mask))
    assert found.shape == (3, 3, 3) and found[0, 0].tolist() == [0x99] * 3 and found.sum() == 3 * 0x99
    assert crop(picture, Seen(Detection((2.6, 2.4, 6.4, 4.6), 0.9))).shape == (3, 3, 3)  # 2 to 5, 3 to 6
    assert crop(picture, Seen(Detection((4.1, 4.1, 4.2, 4.2), 0.9))).shape == (1, 1, 3)


def test_prompts_that_can_have_no_verdict_end_the_run() -> None:
    reward = GenEval(Recorded([halves()]), Paint())
    picture = painted("red", "blue")[None]
    unknown = {"tag": "", "include": [{"class": "cat", "count": 1}], "exclude": [{"class": "unicorn", "count": 1}]}
    with pytest.raises(InputError, match="does not know, \\['unicorn'\\]"):
        reward.score(picture, [Request("no unicorn", metadata=unknown)])
    with pytest.raises(InputError, match="no clauses"):
        reward.score(picture, [Request("a cat")])


LABELS = {0: "cat", 1: "mouse", 2: "aeroplane"}


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector of boxes, which is very sure of all it sees."""
    folder = tmp_path_factory.mktemp("yolos")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = YolosConfig(image_size=[32, 32], patch_size=16, num_detection_tokens=5, id2label=LABELS, **small)
    model = YolosForObjectDetection(config)
    with torch.no_grad():
        model.class_labels_classifier.layers[-1].weight.mul_(1e3)
        model.class_labels_classifier.layers[-1].bias[-1] = -1e6  # of no object
    model.save_pretrained(folder)
    size = {"shortest_edge": 32, "longest_edge": 64}
    YolosImageProcessor(size=size, pad_size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector of instances, which is very sure of all it sees."""
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    backbone = {"model_type": "swin", "image_size": 32, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1] * 4}
    backbone |= {"window_size": 2, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    small = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "num_attention_heads": 2, "num_queries": 4}
    small |= {"encoder_feedforward_dim": 8, "dim_feedforward": 8, "encoder_layers": 1, "decoder_layers": 2}
    config = Mask2FormerConfig(backbone_config=backbone, id2label=LABELS, train_num_points=4, **small)
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(1e3)
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


PICTURES = [np.random.default_rng(i).integers(0, 255, (24, 40 + 8 * i, 3), dtype=np.uint8) for i in range(3)]


def test_a_detector_of_boxes_says_what_the_library_does(boxes: Path) -> None:
    detector = TransformersDetector(str(boxes), batch_size=2)
    assert isinstance(detector, Detector) and list(detector.classes()) == ["cat", "computer mouse", "airplane"]
    found = detector.objects(PICTURES)
    model, processor = YolosForObjectDetection.from_pretrained(boxes).eval(), YolosImageProcessor.from_pretrained(boxes)
    names = list(detector.classes())
    for picture, objects in zip(PICTURES, found, strict=True):
        with torch.no_grad():
            output = model(**processor(images=[picture], return_tensors="pt"))
        (expected,) = processor.post_process_object_detection(output, 0.3, [picture.shape[:2]])
        columns = (expected["scores"].tolist(), [names[label] for label in expected["labels"]], expected["boxes"])
        wanted = sorted(zip(*columns, strict=True), key=lambda row: row[0])
        got = sorted(((s.detection, name) for name, g in objects.items() for s in g), key=lambda e: e[0].confidence)
        assert len(got) == len(wanted) > 0
        for (detection, name), (score, label, box) in zip(got, wanted, strict=True):
            assert name == label and detection.confidence == pytest.approx(score, abs=1e-4)
            assert detection.box == pytest.approx(box.tolist(), abs=0.05)


def test_a_detector_of_instances_gives_masks_and_the_boxes_around_them(masks: Path) -> None:
    found = TransformersDetector(str(masks)).objects(PICTURES)
    every = [(p, seen) for p, objects in zip(PICTURES, found, strict=True) for g in objects.values() for seen in g]
    assert every
    for picture, seen in every:
        assert seen.mask is not None and seen.mask.shape == picture.shape[:2] and seen.detection.confidence >= 0.3
        left, top, right, bottom = map(int, seen.detection.box)
        inside = seen.mask[top:bottom, left:right]
        assert inside.sum() == seen.mask.sum() > 0
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
    facts = {"tag": "counting", "include": [{"class": name, "count": 1} for name in ("cat", "airplane")]}
    pictures = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    reward = GenEval(TransformersDetector(str(masks)), Paint())
    scores = reward.score(pictures, [Request("", metadata=facts)] * 2)
    assert len(scores) == 2 and all(0 <= score <= 1 for score in scores)


def test_a_folder_without_safe_weights_is_named(boxes: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((boxes / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        TransformersDetector(str(tmp_path)).objects(PICTURES)
