"""Commands that are done before a Trainer or a model is built: plan, doctor, and fit --dry_run."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml

from data_pipeline.chat_lint import faults
from data_pipeline.errors import InputError
from data_pipeline.lint import lint
from data_pipeline.records import SPELT
from lightning_modules import planning, preflight
from lightning_modules.commands import RUNS, overridden, read_config
from lightning_modules.folders import NotBuilt
from lightning_modules.networks.layout import LayoutError
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.planning import Machine, NotCounted, Plan, Run
from lightning_modules.preflight import Finding
from lightning_modules.rollouts.arithmetic import multiples

COMMANDS = ("plan", "doctor")
DRY_RUN = "--dry_run"


class Outline(Protocol):
    """What a config makes without loading anything."""

    model: Any
    datamodule: Any
    config_init: Any


Outliner = Callable[[Sequence[str]], Outline]


def wanted(argv: Sequence[str]) -> bool:
    """Whether a command line is for this module."""
    return list(argv[:1]) in [[name] for name in COMMANDS] or (argv[:1] == ["fit"] and DRY_RUN in argv)


def run(argv: Sequence[str], outline: Outliner) -> int:
    """Runs one of the commands.

    Args:
        argv: the command line, its name first.
        outline: makes what a config describes, of arguments without a command. ValueError where it cannot.
    """
    if argv[0] == "fit":
        return dry_run([argument for argument in argv[1:] if argument != DRY_RUN], outline)
    return plan(argv[1:], outline) if argv[0] == "plan" else doctor(argv[1:], outline)


def plan(argv: Sequence[str], outline: Outliner) -> int:
    """Prints what a run needs."""
    parser = argparse.ArgumentParser(prog="python -m lightning_modules.cli plan", allow_abbrev=False)
    parser.add_argument("-c", "--config", required=True)
    parser.add_argument("--tflops", type=float, default=790.0, help="dense bf16 TFLOP/s of a device; H200: 790")
    parser.add_argument("--utilisation", type=float, default=0.45, help="share of them that training reaches")
    parser.add_argument("--memory_gib", type=float, default=139.0, help="of a device; H200: 139")
    known, overrides = parser.parse_known_args(argv)
    machine = Machine(known.tflops * 1e12, known.utilisation, known.memory_gib)
    return planning.main(planned(outline(["--config", known.config, *overrides])), machine)


def planned(found: Outline) -> Run:
    """The numbers of a run."""
    return Run.of(found.model, found.datamodule, trainer_of(found))


def trainer_of(found: Outline) -> dict[str, Any]:
    """Settings of the Trainer, its callbacks made."""
    return dict(vars(found.config_init["trainer"]))


def doctor(argv: Sequence[str], outline: Outliner) -> int:
    """Prints what is found of the environment, and of a config's needs; the exit status is 1 where anything is bad."""
    found = [*preflight.versions(), *preflight.accelerators()]
    made = None
    if any(argument.partition("=")[0] in ("-c", "--config") for argument in argv):
        made = outline(argv)
        found += of_run(made)
    else:
        found += preflight.disk(RUNS, None)
    for finding in found:
        print(finding)
    return int(any(finding.level == "BAD" for finding in found))


def of_run(made: Outline) -> Iterator[Finding]:
    """What a config's run needs."""
    data, trainer = made.datamodule, trainer_of(made)
    yield from preflight.requested_devices(trainer)
    yield from preflight.portions(trainer)
    yield from preflight.true_precision(trainer)
    yield from preflight.cpu_precision(trainer)
    if hasattr(made.model, "sources"):
        for source, kind in made.model.sources().items():
            yield from preflight.weights(source, kind)
    yield from preflight.shards(folders_of(data))
    if not hasattr(made.model, "needs"):
        yield from preflight.disk(RUNS, None)
        return
    try:
        sized = Plan(planned(made))
    except (InputError, CheckpointError) as error:
        yield Finding("note" if isinstance(error, NotBuilt | NotCounted) else "BAD", "plan", str(error))
        return
    yield from preflight.disk(RUNS, sized.disk)
    yield from sizes(sized, data)
    yield from shared(getattr(made.model, "sampling", None), sized.run.devices)


def shared(sampling: Any, devices: int) -> Iterator[Finding]:
    """Groups of reinforcement that the devices cannot learn from in equal numbers."""
    groups, micro = getattr(sampling, "groups", None), getattr(sampling, "micro_groups", 1)
    if groups is not None and groups % (devices * micro):
        nearest = multiples(groups, devices * micro)
        found = f"sampling.groups {groups} cannot be shared by {devices} devices, {micro} at a time"
        yield Finding("BAD", "batch", f"{found}; nearest are groups {nearest}, or change trainer.devices")


def sizes(sized: Plan, data: Any) -> Iterator[Finding]:
    """Resolutions that the model has no tokens or no positions for."""
    multiple, limit = sized.needs.multiple, sized.needs.limit
    if multiple is None or limit is None:
        return
    if data.size_multiple % multiple:
        near = -(-data.size_multiple // multiple) * multiple
        yield Finding(
            "BAD", "buckets", f"data.size_multiple {data.size_multiple} is no multiple of {multiple}; use {near}"
        )
    for size in data.sizes.values():
        if size > limit:
            yield Finding("BAD", "buckets", f"data.image_size {size} is beyond the model's {limit}; no sample fits")


def dry_run(argv: Sequence[str], outline: Outliner) -> int:
    """Prints everything that is wrong with a config and its data, row by row; the exit status is 1 if anything is."""
    problems = 0
    for line in wrong(argv, outline):
        problems += 1
        print(line)
    print(f"{problems} problems; nothing was trained" if problems else "no problem found; nothing was trained")
    return int(problems > 0)


def wrong(argv: Sequence[str], outline: Outliner) -> Iterator[str]:
    """Each bad field of the config; then, where it can be read, each bad part of weights and row of data."""
    try:
        made = outline(argv)
    except (ValueError, TypeError) as error:
        yield from bad_fields(argv, outline, error)
        return
    for finding in (*preflight.versions(), *of_run(made)):
        if finding.level == "BAD":
            yield f"{finding.what}: {finding.found}"
    for folder in map(Path, folders_of(made.datamodule)):
        if folder.is_dir() and any(folder.glob("*.tar")):
            yield from (f"{folder}/{line.translate(SPELT)}" for line in lint(folder))
            yield from (f"{folder}: {line.translate(SPELT)}" for line in unlearnable(folder, made))
    bucket = unfitting(made.datamodule)
    if bucket is not None:
        yield f"data: {bucket}"


def unlearnable(folder: Path, made: Outline) -> Iterator[str]:
    """What a stage that learns from conversations would leave out of a folder; nothing for other stages."""
    if not hasattr(made.model, "wanted"):
        return
    numbers, present, seen = made.model.wanted()
    try:
        layout = made.model.planned_layout()
    except (NotBuilt, CheckpointError):  # there is no folder yet, or what is wrong with it has been named
        layout = None
    except LayoutError as error:
        yield str(error)
        return
    asked = made.model.asks
    refused = layout and partial(layout.refused, asked=asked)
    scores = [*dict.fromkeys([*made.datamodule.minimum, *numbers])]
    try:
        yield from faults(folder, scores, present, seen, refused, asked)
    except InputError as error:
        yield str(error)


def folders_of(data: Any) -> list[str]:
    """Folders of shards, whether a set has a name or none has."""
    found = data.shards
    return [name for many in found.values() for name in many] if isinstance(found, dict) else list(found)


def unfitting(data: Any) -> str | None:
    """Why no batch can be made of the data, once scene shards are built; None where one can, or scenes are to come."""
    here = all(Path(name).is_dir() for name in folders_of(data))
    if data.scenes or not here:
        return None
    try:
        data.setup("validate")
        next(data.plans()[0] if hasattr(data, "plans") else data.plan())
    except InputError as error:
        return str(error)
    return None


def bad_fields(argv: Sequence[str], outline: Outliner, error: Exception) -> Iterator[str]:
    """Each field of a config that is refused: one whose absence changes the error is what the error is about."""
    path, overrides = config_of(argv)
    config = overridden(read_config(path), [word for text in overrides for word in text.split("=", 1)])
    absent: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        while (message := refusal(config, copy, outline)) is not None:
            field = next((f for f in fields(config) if refusal(without(config, f), copy, outline) != message), None)
            if field is None or any(f.rpartition(".")[2] in message for f in absent):
                break  # about no field alone, or asking for one that was bad
            absent.append(field)
            yield f"{path}: {field}: {message}"
            config = without(config, field)
    if not absent:
        yield f"{path}: {reason(error)}"


def refusal(config: dict[str, Any], copy: Path, outline: Outliner) -> str | None:
    """Why a config is refused; None where it is not."""
    copy.write_text(yaml.safe_dump(config), encoding="utf-8")
    try:
        outline(["--config", str(copy)])
    except (ValueError, TypeError) as error:
        return reason(error)
    return None


def reason(error: Exception) -> str:
    """What the argument parser found, without the values that it was given and the types that it tried in vain."""
    text = " ".join(str(error).split()).partition(" Given value")[0]
    inner = text.partition(" Errors: - ")[2] or text
    return inner.removesuffix(" - Expected a <class 'NoneType'>")


def config_of(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """The config of a command line, and its overrides."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("-c", "--config", required=True)
    known, overrides = parser.parse_known_args(argv)
    left, pairs = list(overrides), []
    while left:
        word = left.pop(0)
        pairs.append(word if "=" in word or not left else f"{word}={left.pop(0)}")
    return Path(known.config), pairs


def fields(config: dict[str, Any]) -> list[str]:
    """Dotted names of what may be wrong by itself.

    >>> fields({"model": {"class_path": "x", "init_args": {"steps": 1}}, "trainer": {"callbacks": [{}]}, "seed": 0})
    ['model.init_args.steps', 'trainer.callbacks.0', 'seed']
    """
    found: list[str] = []
    for section, content in config.items():
        inner = content.get("init_args") if isinstance(content, dict) else None
        if isinstance(inner, dict):
            found += [f"{section}.init_args.{name}" for name in inner]
        elif isinstance(content, dict) and "class_path" not in content:
            for name, value in content.items():
                each = [f".{i}" for i in range(len(value))] if isinstance(value, list) and name == "callbacks" else [""]
                found += [f"{section}.{name}{number}" for number in each]
        else:
            found.append(section)
    return found


def without(config: dict[str, Any], field: str) -> dict[str, Any]:
    """A copy of a config without one of `fields`."""
    found = deepcopy(config)
    *places, last = field.split(".")
    inner: Any = found
    for place in places:
        inner = inner[int(place)] if isinstance(inner, list) else inner[place]
    del inner[int(last) if isinstance(inner, list) else last]
    return found
