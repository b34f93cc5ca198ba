"""Checkpoint folders in the diffusers layout: what they must hold, checked before anything is loaded."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHOWN = 8  # keys named in an error before it says how many more there are
UNFINISHED = (".incomplete", ".part", ".partial", ".tmp", ".aria2", ".crdownload")  # of downloaders
MAX_HEADER = 100 << 20  # bytes, the limit of the safetensors format's own readers
ONE_FILE = "one file; expected a folder in the diffusers layout, which its publisher has, or from_single_file makes"
CONVERT = "convert it where it is trusted (from_pretrained(FOLDER, use_safetensors=False).save_pretrained(FOLDER))"


class CheckpointError(ValueError):
    """A checkpoint folder, or an input to its model, does not fit. Says what was found, expected, and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or one clear error."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {path.parent} is not a folder of weights, or not all of one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy the folder again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, got {type(content).__name__}")
    return content


def require_parts(folder: Path, parts: Collection[str]) -> None:
    """Checks that a folder exists and has the named parts and all those that its model_index.json names."""
    if folder.is_file():
        raise CheckpointError(f"{folder} is {ONE_FILE}")
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no checkpoint folder {folder}; give a folder in the diffusers layout, or pocket"
        )
    index = read_json(folder / "model_index.json")
    named = [part for part, entry in index.items() if isinstance(entry, list) and all(entry)]
    missing = [part for part in dict.fromkeys([*parts, *named]) if not (folder / part).is_dir()]
    if missing:
        found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "no folders"
        remedy = "download the rest, or give the folder of a whole model"
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; it has {found}: {remedy}{interrupted(folder)}")


def interrupted(folder: Path) -> str:
    """What the hub's client leaves of a download that it did not finish, for the end of an error; "" where nothing."""
    left = sum(1 for _ in (folder / ".cache" / "huggingface").rglob("*.incomplete"))
    return f" ({left} files in {folder / '.cache'} are half downloaded)" if left else ""


@dataclass(frozen=True)
class StoredFile:
    """A safetensors file: the shapes of its tensors by name, and their bytes together."""

    path: Path
    names: dict[str, tuple[int, ...]]
    size: int


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a part's safetensors files, from their headers alone (sharded files included)."""
    return {name: shape for file in stored_files(folder) for name, shape in file.names.items()}


def stored_files(folder: Path) -> list[StoredFile]:
    """A part's safetensors files, all of them whole: a download that is not complete is named."""
    files = sorted(folder.glob("*.safetensors"))
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; expected a model with its *.safetensors")
    if unfinished := sorted(f.name for f in folder.iterdir() if f.suffix in UNFINISHED):
        raise CheckpointError(f"{folder} is half downloaded: {', '.join(unfinished)}; download it again")
    if not files:
        pickles = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        also = f"; {', '.join(pickles)} can run code when loaded and is not accepted: {CONVERT}" if pickles else ""
        remedy = also or f"; download them again{interrupted(folder.parent)}"
        raise CheckpointError(f"{folder} holds no *.safetensors{remedy}")
    for index in folder.glob("*.safetensors.index.json"):
        named = set(read_json(index).get("weight_map", {}).values())
        absent = sorted(named - {f.name for f in files})
        if absent:
            raise CheckpointError(
                f"{folder} is incomplete: {index.name} names {', '.join(absent)}; download them again"
            )
    if absent := missing_shards(files):
        raise CheckpointError(f"{folder} is incomplete: {', '.join(absent)} are missing; download them again")
    found = []
    for file in files:
        header = read_header(file)
        sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()]
        found.append(StoredFile(file, {n: tuple(entry["shape"]) for n, entry in header.items()}, sum(sizes)))
    return found


def missing_shards(files: Collection[Path]) -> list[str]:
    """Names that files of several parts, such as model-00001-of-00003.safetensors, have no fellows of."""
    here = {file.name for file in files}
    found = [match for file in files if (match := re.fullmatch(r"(.+-)(\d+)-of-(\d+)(\.safetensors)", file.name))]
    wanted = {
        f"{match[1]}{number:0{len(match[2])}}-of-{match[3]}{match[4]}"
        for match in found
        for number in range(1, int(match[3]) + 1)
    }
    return sorted(wanted - here)


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, after checking that the file is as long as it says."""
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MAX_HEADER:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file ({error}); copy it again") from error
    size = file.stat().st_size
    if size != 8 + length + end:
        raise CheckpointError(f"{file} has {size} bytes where its header says {8 + length + end}; copy it again")
    return header


def check_weights(cls: Any, folder: Path, classes: Collection[str], optional: Collection[str] = ()) -> None:
    """Compares a part's files with the model that its config describes, without allocating either.

    Args:
        cls: a diffusers model class.
        folder: the part's folder.
        classes: values of `_class_name` that name this architecture.
        optional: keys that may be missing.
    """
    config = read_json(folder / "config.json")
    if config.get("_class_name") not in classes:
        raise CheckpointError(
            f"{folder / 'config.json'} describes a {config.get('_class_name')}; expected {' or '.join(sorted(classes))}"
        )
    try:
        with torch.device("meta"):
            expected = cls.from_config({**config, "_class_name": cls.__name__}).state_dict()
    except Exception as error:  # a config of another architecture may fail anywhere in a constructor
        raise CheckpointError(f"{folder / 'config.json'} does not describe a {cls.__name__}: {error}") from error
    compare_shapes(folder, {name: tuple(t.shape) for name, t in expected.items()}, stored_shapes(folder), optional)


def check_text_encoder(cls: Any, folder: Path) -> None:
    """Compares stored weights with those that the config describes, without allocating either.

    Names are compared where most are as the library has them today; older ones are left to loading, which knows them.
    """
    stored = stored_shapes(folder)
    read_json(folder / "config.json")
    try:
        with torch.device("meta"):
            model = cls(cls.config_class.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # a config of another architecture may fail anywhere in a constructor
        raise CheckpointError(f"{folder / 'config.json'} does not describe a {cls.__name__}: {error}") from error
    tied: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), set()).add(name)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    common = {name for name in shapes if name in stored}
    if not common:
        raise CheckpointError(f"{folder} holds no weight of a {cls.__name__}; use weights and config.json of one model")
    here = {name for names in tied.values() if names & common for name in names}
    wanted = common if 2 * len(common) < len(shapes) else {*shapes} - (here - common)
    compare_shapes(folder, {name: shapes[name] for name in wanted}, {name: stored[name] for name in common})


def check_tokenizer(folder: Path) -> None:
    """Refuses a tokenizer without its words, whose absence transformers takes for a missing package."""
    kinds = (["tokenizer.json"], ["vocab.json", "merges.txt"], ["spiece.model"])
    if not any(all((folder / name).is_file() for name in names) for names in kinds):
        wanted = ", or ".join(" and ".join(names) for names in kinds)
        raise CheckpointError(f"{folder} holds no tokenizer: expected {wanted}; download it again")


def load_text_encoder(cls: Any, folder: Path, dtype: torch.dtype | None) -> Any:
    """A model of transformers, of which every weight must be in the folder: the library itself would draw the rest."""
    stored_shapes(folder)
    try:
        model, found = cls.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below, all of them
            **({} if dtype is None else {"dtype": dtype}),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} does not load as a {cls.__name__}: {str(error).splitlines()[0]}") from error
    misshapen = [f"{name} is {list(got)}, expected {list(wanted)}" for name, got, wanted in found["mismatched_keys"]]
    report_keys(folder, {"missing": sorted(found["missing_keys"]), "misshapen": sorted(misshapen)})
    return model


def check_state(folder: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Names every tensor of a checkpoint that does not fit a model made from a folder, before any is copied."""
    own, given = ({name: tuple(t.shape) for name, t in state.items()} for state in (expected, found))
    compare_shapes(folder, own, given)


def compare_shapes(
    folder: Path,
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
    optional: Collection[str] = (),
) -> None:
    """Names every missing, unexpected or misshapen key in one error."""
    problems = {
        "missing": sorted(set(expected) - set(found) - set(optional)),
        "unexpected": sorted(set(found) - set(expected)),
        "misshapen": [
            f"{name} is {list(found[name])}, expected {list(expected[name])}"
            for name in sorted(set(expected) & set(found))
            if expected[name] != found[name]
        ],
    }
    report_keys(folder, problems)


def report_keys(folder: Path, problems: dict[str, list[str]]) -> None:
    """Raises one error that lists what is wrong, if anything is."""
    lines = [f"  {len(names)} {what}: {listed(names)}" for what, names in problems.items() if names]
    if lines:
        remedy = "use weights and config.json of the same model"
        raise CheckpointError("\n".join([f"the weights in {folder} do not fit its config.json; {remedy}", *lines]))


def listed(names: list[str]) -> str:
    """All names of a short list, the first of a long one and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
