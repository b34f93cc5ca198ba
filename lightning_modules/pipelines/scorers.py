"""Models that data recipes name by class path: joint embeddings, aesthetic ratings and perceptual distances.

Each is a dataclass of plain settings, so that a recipe can be read, hashed and sent to workers; the weights come from a
local folder when the first batch is scored, safetensors only.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from data_pipeline.errors import InputError


def folder_fingerprint(path: str, what: str) -> str:
    """Name and hash of the weights of a folder or file; an InputError where there are none."""
    found = Path(path)
    files = sorted(found.glob("*.safetensors")) if found.is_dir() else [found]
    if not path or not files or not all(file.is_file() for file in files):
        raise InputError(f"{what}: there are no *.safetensors at {path or '(not set)'}; give a local folder of weights")
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return f"{found.name}@{digest.hexdigest()[:12]}"


@dataclass
class ClipEmbedder:
    """A CLIP model of transformers from a local folder.

    Args:
        folder: the model, its tokenizer and its image processor.
        device: where it runs.
    """

    folder: str = ""
    device: str = "cpu"

    @cached_property
    def fingerprint(self) -> str:
        """The folder's name and the hash of its weights."""
        return folder_fingerprint(self.folder, "ClipEmbedder.folder")

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        assert self.fingerprint  # a missing folder is named before a library looks for it on a hub
        model = CLIPModel.from_pretrained(self.folder, use_safetensors=True, local_files_only=True).eval()
        processor = AutoImageProcessor.from_pretrained(self.folder, local_files_only=True)
        return model.to(self.device), processor, AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    @torch.no_grad()
    def images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """(H, W, 3) uint8 each to unit vectors (N, D), float32."""
        model, processor, _ = self._parts
        inputs = processor(images=list(pictures), return_tensors="pt").to(self.device)
        return unit(projected(model.get_image_features(**inputs)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts, cut to what the model reads, to unit vectors (N, D), float32."""
        model, _, tokenizer = self._parts
        limit = model.config.text_config.max_position_embeddings
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return unit(projected(model.get_text_features(**inputs.to(self.device))))


def projected(output: Any) -> Tensor:
    """The projected embedding, which some versions of transformers wrap in an output record."""
    return output if isinstance(output, Tensor) else output.pooler_output


def unit(vectors: Tensor) -> np.ndarray:
    """Rows of length one, float32."""
    return nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()


@dataclass
class LinearRater:
    """A linear head on CLIP's image embedding, as LAION's aesthetic predictor (v1).

    Args:
        embedder: the embedding that the head was fitted on.
        head: a safetensors file with `weight` (1, D) or (D,) and `bias`.
    """

    embedder: ClipEmbedder
    head: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """Head and embedding."""
        return f"{folder_fingerprint(self.head, 'LinearRater.head')} on {self.embedder.fingerprint}"

    @cached_property
    def _head(self) -> tuple[np.ndarray, float]:
        assert self.fingerprint
        weights = load_file(self.head)
        if set(weights) != {"weight", "bias"}:
            raise InputError(
                f"LinearRater.head {self.head}: expected the tensors weight and bias, got {sorted(weights)}"
            )
        return weights["weight"].float().numpy().ravel(), float(weights["bias"])

    def rate(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """(H, W, 3) uint8 each to ratings (N,), float32."""
        weight, bias = self._head
        return self.embedder.images(pictures) @ weight + np.float32(bias)


@dataclass
class Lpips:
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) as maps.

    Args:
        trunk: a safetensors file with the torchvision weights of the network; "" leaves it random, which ranks large
            differences and nothing finer.
        network: "alex", "squeeze" or "vgg".
        device: where it runs.
    """

    trunk: str = ""
    network: str = "alex"
    device: str = "cpu"

    @cached_property
    def fingerprint(self) -> str:
        """The network and the hash of its trunk."""
        return f"lpips-{self.network}/{folder_fingerprint(self.trunk, 'Lpips.trunk') if self.trunk else 'random'}"

    @cached_property
    def _model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = lpips.LPIPS(net=self.network, spatial=True, pnet_rand=True, verbose=False).eval()
        if self.trunk:  # lpips cuts torchvision's features into slices and keeps their numbers: slice2.3 is features.3
            names = {n: f"features.{n.partition('.')[2]}" for n in model.net.state_dict() if n.startswith("slice")}
            load_named(model.net, names, self.trunk, "Lpips.trunk")
        return model.to(self.device)

    @torch.no_grad()
    def maps(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pairs of equal size (H, W, 3) uint8 to maps (H, W), float32."""
        found: dict[int, np.ndarray] = {}
        for rows, a, b in same_sizes(first, second, self.device):
            found |= dict(zip(rows, self._model(a, b)[:, 0].cpu().numpy(), strict=True))
        return [found[i] for i in range(len(first))]


@dataclass
class TimmDistance:
    """One minus the cosine of a timm network's last feature map, at every place.

    Args:
        model: timm's name of an architecture, such as "vit_small_patch14_dinov2.lvd142m" or "resnet18".
        weights: a safetensors file; "" leaves the network random.
        device: where it runs.
    """

    model: str = "resnet18"
    weights: str = ""
    device: str = "cpu"

    @cached_property
    def fingerprint(self) -> str:
        """The architecture and the hash of its weights."""
        weights = folder_fingerprint(self.weights, "TimmDistance.weights") if self.weights else "random"
        return f"timm-{self.model}/{weights}"

    @cached_property
    def _network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = timm.create_model(self.model, pretrained=False, features_only=True, out_indices=(-1,))
        if self.weights:  # some architectures are wrapped once more to give features
            names = {name: name.removeprefix("model.") for name in network.state_dict()}
            load_named(network, names, self.weights, "TimmDistance.weights")
        return network.eval().to(self.device)

    def _features(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] to (N, C, h, w), at the size and with the statistics the network was made for."""
        config = timm.data.resolve_model_data_config(self._network)
        mean, std = (torch.tensor(config[name], device=pixels.device).view(3, 1, 1) for name in ("mean", "std"))
        resized = nn.functional.interpolate(pixels, config["input_size"][1:], mode="bilinear", antialias=True)
        return self._network(((resized + 1) / 2 - mean) / std)[0]

    @torch.no_grad()
    def maps(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pairs of equal size (H, W, 3) uint8 to maps (H, W), float32."""
        found: dict[int, np.ndarray] = {}
        for rows, a, b in same_sizes(first, second, self.device):
            apart = 1 - nn.functional.cosine_similarity(self._features(a), self._features(b), dim=1)
            full = nn.functional.interpolate(apart[:, None], a.shape[-2:], mode="bilinear")[:, 0]
            found |= dict(zip(rows, full.cpu().numpy(), strict=True))
        return [found[i] for i in range(len(first))]


def load_named(network: nn.Module, names: dict[str, str], path: str, what: str) -> None:
    """Loads the tensors of a safetensors file by `names` (the network's -> the file's); none may be missing."""
    stored, own = load_file(path), network.state_dict()
    wrong = [f for n, f in names.items() if f not in stored or stored[f].shape != own[n].shape]
    if wrong:
        raise InputError(f"{what} {path} lacks {len(wrong)} tensors of the right shape, such as {wrong[0]}")
    network.load_state_dict({name: stored[file] for name, file in names.items()}, strict=False)


def same_sizes(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], device: str
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of pairs of one size: their positions and both sides as (N, 3, H, W) in [-1, 1]."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, picture in enumerate(first):
        groups[picture.shape].append(i)
    for rows in groups.values():
        sides = (torch.from_numpy(np.stack([side[i] for i in rows])).permute(0, 3, 1, 2) for side in (first, second))
        a, b = (side.to(device).float() / 127.5 - 1 for side in sides)
        yield rows, a, b
