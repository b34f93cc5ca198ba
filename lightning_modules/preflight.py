"""What can be known to be wrong before a run begins: versions, devices, weights, shards and room on disk."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from jsonargparse import Namespace
from packaging.version import Version

from data_pipeline.errors import InputError
from data_pipeline.index import sidecars
from lightning_modules.folders import is_hub_id, is_pocket_part, located
from lightning_modules.networks import Conditioner
from lightning_modules.networks.compile import missing_compiler
from lightning_modules.networks.conditioner import KNOWN_CLASSES
from lightning_modules.networks.kontext_transformer import KontextTransformer
from lightning_modules.networks.loading import (
    ONE_FILE,
    CheckpointError,
    check_weights,
    read_json,
    require_parts,
    stored_shapes,
)
from lightning_modules.networks.outlines import QWEN
from lightning_modules.networks.vision import INTERN, TIMM
from lightning_modules.pipelines.kontext import check_scheduler, part_checks, text_checks
from lightning_modules.pipelines.metaquery import require_conditioner

Level = Literal["ok", "note", "BAD"]


@dataclass(frozen=True)
class Finding:
    """One line of a report: what was looked at, what was found, and what to do where it is bad."""

    level: Level
    what: str
    found: str

    def __str__(self) -> str:
        return f"{self.level:5}{self.what:16}{self.found}"


@dataclass(frozen=True)
class Denied:
    """Releases of a package that are not to be used, and why. `first` and `last` are inside; None is open."""

    package: str
    first: str | None
    last: str | None
    why: str


DENIED = [
    Denied("lightning", "2.6.2", "2.6.3", "these releases were malware that steals credentials: change all you have"),
    Denied("pytorch-lightning", "2.6.2", "2.6.3", "these releases were malware that steals credentials"),
    Denied("lightning", None, "2.6.5", "loading a checkpoint can run code (CVE-2026-58659); fixed in 2.6.6"),
    Denied("torch", None, "2.9.99", "loading weights can run code (CVE-2025-32434, CVE-2026-24747); fixed in 2.10"),
    Denied("transformers", None, "5.2.99", "a model's config can run code (CVE-2026-4372); fixed in 5.3.0"),
]


def versions() -> Iterator[Finding]:
    """Packages of releases that must not be used."""
    for denied in DENIED:
        try:
            found = Version(importlib.metadata.version(denied.package))
        except importlib.metadata.PackageNotFoundError:
            continue
        after = denied.first is None or found >= Version(denied.first)
        if after and (denied.last is None or found <= Version(denied.last)):
            yield Finding("BAD", denied.package, f"{found}: {denied.why}; pip install -U {denied.package}")
    names = ("torch", "lightning", "diffusers", "transformers", "peft")
    yield Finding("ok", "versions", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))


def accelerators() -> Iterator[Finding]:
    """GPUs, and a compiler where there is none."""
    count = torch.cuda.device_count()
    for i in range(count):
        facts = torch.cuda.get_device_properties(i)
        bf16 = "" if facts.major >= 8 else ", which has no bfloat16: use float32"
        level: Level = "ok" if facts.major >= 8 else "note"
        yield Finding(level, f"GPU {i}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB{bf16}")
    if not count:
        yield Finding("note", "GPU", "none that this torch can use: runs on the CPU")
    if (missing := missing_compiler()) is not None:
        yield Finding("note", "compiler", f"{missing}: compile falls back to eager; install gcc and g++")


def requested_devices(trainer: Mapping[str, Any]) -> Iterator[Finding]:
    """GPUs asked for that are not there, and shards over other devices than the run has."""
    devices, accelerator = trainer.get("devices", "auto"), trainer.get("accelerator", "auto")
    wanted, last = devices_of(devices)
    count = torch.cuda.device_count()
    gpus = accelerator in ("gpu", "cuda") or (accelerator == "auto" and count > 0)
    if gpus and (last >= count or not count):
        remedy = f"--trainer.devices {count}" if count else "--trainer.accelerator cpu --trainer.devices 1"
        yield Finding("BAD", "devices", f"trainer.devices is {devices} and this machine has {count} GPUs; use {remedy}")
    shards = settings_of(trainer.get("strategy")).get("data_parallel_size")
    world = wanted * int(trainer.get("num_nodes") or 1)
    if shards is not None and wanted and shards != world:
        remedy = f"set it to {world}, or trainer.devices and num_nodes to match"
        yield Finding("BAD", "devices", f"strategy: data_parallel_size is {shards} and the run has {world}; {remedy}")


def devices_of(devices: object) -> tuple[int, int]:
    """How many these are, and the number of the last; 0 and -1 of what is only known where it runs.

    >>> devices_of(2), devices_of([0, 3]), devices_of("0,3"), devices_of("3,"), devices_of(-1), devices_of("auto")
    ((2, 1), (2, 3), (2, 3), (1, 3), (0, -1), (0, -1))
    """
    words = devices if isinstance(devices, list | tuple) else str(devices).split(",")
    found = [int(word) for word in map(str, words) if word.strip().isdigit()]
    if isinstance(devices, list | tuple) or len(words) > 1:
        return len(found), max(found, default=-1)
    return (found[0], found[0] - 1) if found else (0, -1)


def settings_of(strategy: object) -> Mapping[str, Any]:
    """Arguments of a strategy that a config describes; of one that is named or made, none."""
    found = getattr(strategy, "init_args", None) or {}
    return dict(vars(found)) if isinstance(found, Namespace) else dict(found)


def portions(trainer: Mapping[str, Any]) -> Iterator[Finding]:
    """Steps that would be made of no batches."""
    each = trainer.get("accumulate_grad_batches")
    if each is not None and each < 1:
        found = f"trainer.accumulate_grad_batches is {each}; expected at least 1 batch a step"
        yield Finding("BAD", "accumulation", found)


def true_precision(trainer: Mapping[str, Any]) -> Iterator[Finding]:
    """A precision that Lightning turns all weights and constants into."""
    if (precision := trainer.get("precision")) in ("bf16-true", "16-true"):
        found = f"trainer.precision {precision} rounds the frequencies of positions and the autoencoder, too"
        remedy = "use 32-true: frozen models of transformers stay as their files are, and model.compute says the rest"
        yield Finding("BAD", "precision", f"{found}; {remedy}")


def cpu_precision(trainer: Mapping[str, Any]) -> Iterator[Finding]:
    """bfloat16 on a CPU that has no instructions for it."""
    on_cpu = trainer.get("accelerator", "auto") == "cpu" or not torch.cuda.is_available()
    has_bfloat16 = any(there for name, there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    if on_cpu and "bf16" in str(trainer.get("precision")) and not has_bfloat16:
        slow = "has no instructions for bfloat16 and imitates them slowly; use --trainer.precision 32-true"
        yield Finding("note", "precision", f"trainer.precision is {trainer['precision']}, and this CPU {slow}")


def checks_of(folder: Path, kind: str) -> list[Callable[[], object]]:
    """What is looked at in a folder.

    Args:
        folder: that is here.
        kind: what it must be: "image": a checkpoint with text encoders, "pictures": one that needs none, "transformer",
            "conditioner": a Metaquery model, "model": any of transformers, "vlm": a Qwen2.5-VL, "tower", "r1v".
    """
    transformer = partial(KontextTransformer.check, folder / "transformer")
    match kind:
        case "image":
            return [
                partial(require_parts, folder, ("transformer", "vae", "scheduler")),
                transformer,
                *part_checks(folder),
                *text_checks(folder),
            ]
        case "pictures":
            vae = partial(check_weights, AutoencoderKL, folder / "vae", {"AutoencoderKL"})
            return [transformer, vae, partial(check_scheduler, folder / "scheduler")]
        case "transformer":
            return [transformer]
        case "conditioner":
            own = partial(check_weights, Conditioner, folder / "conditioner", KNOWN_CLASSES)
            return [partial(require_conditioner, folder), own]
    wanted = {"vlm": {QWEN}, "tower": {TIMM, INTERN}}
    return [partial(check_model, folder, wanted.get(kind, set()), "llm_config" if kind == "r1v" else None)]


def check_model(folder: Path, types: set[str], field: str | None) -> None:
    """Refuses a folder that is not whole, or of another model than one of these types (any if none) or with a field."""
    config = read_json(folder / "config.json")
    if field is not None and field not in config:
        raise CheckpointError(f"{folder / 'config.json'} has no {field}; expected R1V's released layout")
    found = config.get("model_type")
    if types and found not in types and not (TIMM in types and "llm_config" in config):  # a whole R1V has a tower
        raise CheckpointError(f"{folder / 'config.json'} describes a {found}; expected {' or '.join(sorted(types))}")
    stored_shapes(folder)


def weights(pretrained: str, kind: str = "image") -> Iterator[Finding]:
    """Each part of a folder: whole, safe to load, and of the architecture that is trained. `kind` as in `checks_of`."""
    if pretrained == "pocket" or is_pocket_part(pretrained):
        yield Finding("ok", "weights", f"{pretrained}, which is built when it is first needed")
        return
    folder = located(pretrained)
    if not folder.is_dir() and is_hub_id(pretrained):
        yield Finding("note", "weights", f"{pretrained} is not downloaded yet; fit does so: hf download {pretrained}")
        return
    if folder.is_file():
        yield Finding("BAD", "weights", f"{folder} is {ONE_FILE}")
        return
    if not folder.is_dir():
        remedy = "download it there (safetensors), train what exports it, or name another in model.init_args"
        yield Finding("BAD", "weights", f"there is no folder {folder}; {remedy}")
        return
    bad: dict[str, None] = {}  # what several checks meet is said once
    for check in checks_of(folder, kind):
        try:
            check()
        except CheckpointError as error:
            bad[str(error)] = None
    yield from (Finding("BAD", "weights", text) for text in bad)
    if not bad:
        yield Finding("ok", "weights", f"{folder}, all parts whole")


def shards(folders: Iterable[str]) -> Iterator[Finding]:
    """Folders of shards: there, indexed, and with the files that their indexes name."""
    for folder in map(Path, folders):
        if not folder.is_dir():
            yield Finding("BAD", "shards", f"there is no folder {folder}; python -m data_pipeline build or index it")
            continue
        try:
            indexes = sidecars(folder)
        except InputError as error:
            yield Finding("BAD", "shards", str(error))
            continue
        yield Finding("ok", "shards", f"{folder}: {len(indexes)} indexes")


def disk(folder: Path, needed: float | None) -> Iterator[Finding]:
    """Room for what a run leaves."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / 2**30:,.1f} GiB free for {folder}"
    if needed is not None and needed > free:
        remedy = "make room, keep fewer checkpoints (callbacks.Checkpoint keep), or set a link runs -> ELSEWHERE"
        yield Finding("BAD", "disk", f"{text}, and the run leaves {needed / 2**30:,.1f}; {remedy}")
    else:
        yield Finding("ok", "disk", text + ("" if needed is None else f"; the run leaves {needed / 2**30:,.1f}"))
