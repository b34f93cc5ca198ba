"""Numbers for an edit, one a dimension, by a reader and a linear head (as Skywork-EditReward, arXiv 2509.04548)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_modules.networks.edit_readers import TOWER, Pictures, Reader, TowerReader, VlmReader
from lightning_modules.networks.loading import read_json

HEAD, FACTS = "head.safetensors", "edit_regressor.json"


class EditRegressor(nn.Module):
    """Rates edits.

    Args:
        reader: makes a vector of an edit.
        dimensions: what is rated, by name; 0 is worst and 1 is best.
    """

    def __init__(self, reader: Reader, dimensions: Sequence[str]) -> None:
        super().__init__()
        self.reader: Any = reader
        self.dimensions = list(dimensions)
        self.head = nn.Linear(reader.width, len(self.dimensions))
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, 0.5)

    def prepare(self, instructions: Sequence[str], pictures: Pictures) -> dict[str, Tensor]:
        """Inputs of a batch: B instructions, and of each sample the pictures to edit and then the edited one, (3, h, w)
        in [0, 1]."""
        device = self.head.weight.device
        return {name: tensor.to(device) for name, tensor in self.reader.prepare(instructions, pictures).items()}

    def forward(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "b k"]:
        """Ratings."""
        return self.head(self.reader(inputs).to(self.head.weight.dtype))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> EditRegressor:
        """What `save_pretrained` wrote."""
        folder = Path(folder)
        dimensions = read_json(folder / FACTS)["dimensions"]  # first, because it names a folder that is missing
        kind: Any = TowerReader if (folder / TOWER).is_file() else VlmReader
        found = cls(kind.from_pretrained(folder), dimensions)
        found.head.load_state_dict(load_file(folder / HEAD))
        return found

    def save_pretrained(self, folder: str | Path, safe_serialization: bool = True) -> None:
        """Writes a folder, safetensors only; `safe_serialization` is there because pipelines take it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.reader.save_pretrained(folder)
        save_file({name: t.detach().cpu().contiguous() for name, t in self.head.state_dict().items()}, folder / HEAD)
        (folder / FACTS).write_text(json.dumps({"dimensions": self.dimensions}, indent=2) + "\n")
