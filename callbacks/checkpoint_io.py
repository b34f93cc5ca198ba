"""Reading and writing checkpoint files so that neither a kill nor a full disk costs the previous one."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from callbacks.atomic import remove_partials, replace_file
from data_pipeline.errors import InputError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, fsyncs and renames; reads only tensors and plain values.

    Lightning's own writer goes through the system's temporary folder, so that on another filesystem the target is
    copied over in place: killed or out of space there, the previous checkpoint is gone. Remote addresses
    (`s3://...`), whose stores replace objects whole, are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        remove_partials(target.parent)
        try:
            replace_file(target, lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:
            # torch reports a failed write as a RuntimeError without the file's name.
            raise OSError(
                getattr(error, "errno", None) or 0,
                f"Could not write the checkpoint {target}: {error}. Checkpoints written before are intact; make room "
                "or choose another folder, then resume",
            ) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Always loads with weights_only=True, whatever is asked for: a checkpoint must not run code."""
        try:
            if Path(path).is_file():  # mapped, so that the ranks of a host do not each hold a copy
                checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=True)
            else:
                checkpoint = super().load_checkpoint(path, map_location, weights_only=True)
            if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(checkpoint):
                raise ValueError("it is no checkpoint of a Lightning run")
            if Path(path).is_file() and (damaged := zipfile.ZipFile(path).testzip()):
                raise ValueError(f"the checksum of its part {damaged} is wrong")
            return checkpoint
        except FileNotFoundError as error:
            raise InputError(f"There is no checkpoint {path}. {_others(path)}") from error
        except pickle.UnpicklingError as error:
            if not Path(path).is_file() or not _is_zip(Path(path)):
                raise _unreadable(path, error) from error
            raise InputError(
                f"The checkpoint {path} holds objects other than tensors and plain values, which are refused because "
                f"loading them can run code ({str(error).splitlines()[0]}). {_others(path)}"
            ) from error
        except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise _unreadable(path, error) from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unreadable(path: str | Path, error: Exception) -> InputError:
    size = Path(path).stat().st_size if Path(path).is_file() else 0
    cause = (str(error) or type(error).__name__).splitlines()[0]
    return InputError(
        f"The checkpoint {path} ({size} bytes) is truncated or is no checkpoint: {cause}. {_others(path)}"
    )


def _others(path: str | Path) -> str:
    others = sorted(p.name for p in Path(path).parent.glob("*.ckpt") if p.name != Path(path).name)
    return f"Use another one of its folder: {', '.join(others)}." if others else "There is no other one in its folder."
