"""Scorers of data: what the libraries compute on the same weights, from local folders only."""

from __future__ import annotations

from pathlib import Path

import lpips
import numpy as np
import pytest
import timm
import torch
import torchvision
from micro import micro_clip
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel

from data_pipeline.errors import InputError
from data_pipeline.steps.similarity import Aesthetic, Consistency, Similarity
from lightning_modules.pipelines.scorers import ClipEmbedder, LinearRater, Lpips, TimmDistance

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 255, (40 + 8 * i, 64, 3), dtype=np.uint8) for i in range(3)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_clip(tmp_path_factory.mktemp("clip"))


def test_embeddings_are_the_librarys_as_unit_vectors(clip: Path) -> None:
    embedder = ClipEmbedder(str(clip))
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPImageProcessor.from_pretrained(clip)
    with torch.no_grad():
        found = model.get_image_features(**processor(images=PICTURES, return_tensors="pt"))
    expected = torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1).numpy()
    np.testing.assert_allclose(embedder.images(PICTURES), expected, atol=1e-5)
    texts = embedder.texts(["a red cat", "a red cat " * 50])
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(embedder.texts(["a red cat"])[0], texts[0], atol=1e-5)  # padding changes nothing


def test_a_fingerprint_follows_the_weights(clip: Path, tmp_path: Path) -> None:
    before = ClipEmbedder(str(clip)).fingerprint
    assert before == ClipEmbedder(str(clip)).fingerprint
    weights = load_file(clip / "model.safetensors")
    other = tmp_path / clip.name
    other.mkdir()
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors")
    assert ClipEmbedder(str(other)).fingerprint != before
    assert before in LinearRater(ClipEmbedder(str(clip)), str(clip / "model.safetensors")).fingerprint


def test_a_rating_is_linear_in_the_embedding(clip: Path, tmp_path: Path) -> None:
    weight = torch.arange(8.0)
    save_file({"weight": weight[None], "bias": torch.tensor([2.0])}, tmp_path / "head.safetensors")
    embedder = ClipEmbedder(str(clip))
    ratings = LinearRater(embedder, str(tmp_path / "head.safetensors")).rate(PICTURES)
    np.testing.assert_allclose(ratings, embedder.images(PICTURES) @ weight.numpy() + 2, rtol=1e-5)


def test_lpips_equals_the_library_on_the_same_trunk(tmp_path: Path) -> None:
    torch.manual_seed(1)
    trunk = torchvision.models.alexnet(weights=None)
    save_file(trunk.state_dict(), tmp_path / "alexnet.safetensors")
    reference = lpips.LPIPS(net="alex", spatial=True, pnet_rand=True, verbose=False).eval()
    stored = trunk.features.state_dict()
    for part in (getattr(reference.net, f"slice{i}") for i in range(1, 6)):
        part.load_state_dict({name: stored[name] for name in part.state_dict()})
    first = [PICTURES[2], PICTURES[2]]
    second = [255 - PICTURES[2], PICTURES[2]]
    maps = Lpips(str(tmp_path / "alexnet.safetensors")).maps(first, second)
    a, b = (torch.from_numpy(side[0].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for side in (first, second))
    with torch.no_grad():
        np.testing.assert_allclose(maps[0], reference(a, b)[0, 0].numpy(), atol=1e-5)
    assert maps[0].shape == PICTURES[2].shape[:2] and maps[0].mean() > 0 and np.abs(maps[1]).max() < 1e-6


def test_timm_features_load_by_name_and_tell_pictures_apart(tmp_path: Path) -> None:
    torch.manual_seed(2)
    save_file(timm.create_model("resnet10t", pretrained=False).state_dict(), tmp_path / "w.safetensors")
    scorer = TimmDistance("resnet10t", str(tmp_path / "w.safetensors"))
    maps = scorer.maps(PICTURES, [PICTURES[0], 255 - PICTURES[1], PICTURES[2]])
    assert [m.shape for m in maps] == [p.shape[:2] for p in PICTURES]
    assert np.abs(maps[0]).max() < 1e-5 < maps[1].mean()
    assert not np.allclose(TimmDistance("resnet10t").maps(PICTURES[1:2], [255 - PICTURES[1]])[0], maps[1])


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (ClipEmbedder(""), "ClipEmbedder.folder"),
        (ClipEmbedder("nowhere"), "nowhere"),
        (LinearRater(ClipEmbedder("nowhere"), "nowhere"), "LinearRater.head"),
        (Lpips("nowhere.safetensors"), "Lpips.trunk"),
        (TimmDistance(weights="nowhere.safetensors"), "TimmDistance.weights"),
    ],
)
def test_missing_weights_are_named(scorer: object, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        scorer.fingerprint  # noqa: B018


@pytest.mark.parametrize("scorer", [Lpips, lambda path: TimmDistance(weights=path)])
def test_other_weights_are_refused(scorer, tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="of the right shape, such as"):
        scorer(str(tmp_path / "other.safetensors")).maps(PICTURES[:1], PICTURES[:1])


def test_they_fit_their_steps(clip: Path) -> None:
    embedder = ClipEmbedder(str(clip))
    steps = [Similarity(embedder), Aesthetic(LinearRater(embedder)), Consistency(Lpips()), Consistency(TimmDistance())]
    assert all(callable(step.score) and step.batch_size > 0 for step in steps)
    assert {field.metadata[b"revision"].decode() for field in steps[0].columns()} == {embedder.fingerprint}
