"""Parts of a pipeline that are loaded when something asks for them, and what says which they would be."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

SAMPLES, SAMPLE = 64, 4096  # of a file: how many, and bytes of each


class LaterParts(DiffusionPipeline):
    """A pipeline some of whose parts are not loaded until they are asked for, as `pipeline.vae`.

    Attributes:
        origin: folder and settings that put-off parts come from, of which `origin_of` is made; None where none was.
    """

    origin: tuple[Path, str] | None = None

    def put_off(self, loaders: Mapping[str, Callable[[], Any]], origin: tuple[Path, str]) -> None:
        """Takes the parts away; each is loaded when it is next asked for, and goes where the others are."""
        self.__dict__["_place"] = self.device
        for part in loaders:
            self.__dict__.pop(part, None)
        self.__dict__["_loaders"], self.__dict__["_later"] = {**loaders}, {*loaders}
        self.origin = origin

    def let_go(self, parts: Collection[str]) -> None:
        """Gives parts back that had been put off; they are loaded again when they are next asked for."""
        for part in parts:
            if part in self.__dict__.get("_loaders", {}):
                self.__dict__.pop(part, None)
                self.__dict__["_later"].add(part)

    def load_all(self) -> None:
        """Loads what was put off, and leaves it on the CPU: it is for writing."""
        for part in sorted(self.put_off_parts):
            self._load(part, torch.device("cpu"))

    @property
    def put_off_parts(self) -> set[str]:
        """Names of the parts that are not loaded."""
        found: set[str] = self.__dict__.get("_later", set())
        return found

    def _load(self, part: str, place: torch.device) -> Any:
        # Weights made in inference mode, as validation has it, could not be trained beside.
        with torch.inference_mode(False), torch.no_grad():
            module = self.__dict__["_loaders"][part]()
            self.register_modules(**{part: module.to(place)})
        self.put_off_parts.discard(part)
        return module

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_later", ()):
            return self._load(name, self.device)
        return super().__getattr__(name)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers does; a part that is loaded later goes there, too."""
        with self._without_later():
            super().to(*args, **kwargs)
        if isinstance(place := (args or (None,))[0], str | torch.device):
            self.__dict__["_place"] = torch.device(place)
        return self

    @property
    def device(self) -> torch.device:
        """Where the loaded parts are; where the others will be, if none is."""
        with self._without_later():
            loaded = any(isinstance(part, nn.Module) for part in vars(self).values())
            found: torch.device = super().device
        return found if loaded else self.__dict__.get("_place", found)

    @property
    def _execution_device(self) -> torch.device:
        """Of diffusers' own code, which would ask for every part to know it."""
        if self.put_off_parts:
            return self.device
        found: torch.device = super()._execution_device
        return found

    @contextmanager
    def _without_later(self) -> Iterator[None]:
        """Within, parts that are not loaded are None."""
        absent = sorted(self.put_off_parts)
        self.__dict__.update(dict.fromkeys(absent))
        try:
            yield
        finally:
            for part in absent:
                del self.__dict__[part]


def origin_of(folder: Path, parts: Collection[str], settings: str) -> str:
    """A hash that other files of these parts, or others of the libraries that read them, do not have.

    It takes names, sizes and times of the files and samples of their bytes: folders that were unpacked with equal times
    may differ in weights alone, and gigabytes are not to be read to learn what is in them.
    """
    libraries = [importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")]
    digest = hashlib.sha256(f"{libraries} {settings}".encode())
    for file in sorted(file for part in parts for file in (folder / part).rglob("*") if file.is_file()):
        facts = file.stat()
        digest.update(f"{file.relative_to(folder)} {facts.st_size} {facts.st_mtime_ns}".encode())
        step = max(SAMPLE, facts.st_size // SAMPLES)
        with open(file, "rb") as stream:
            for start in range(0, facts.st_size, step):
                stream.seek(start)
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()
