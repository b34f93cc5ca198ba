import errno
import os
import resource
from pathlib import Path

import pytest
import torch

from callbacks import AtomicCheckpointIO
from callbacks.atomic import partial_path, replace_folder
from data_pipeline.errors import InputError

IO = AtomicCheckpointIO()
OLD, NEW = ({"state_dict": {}, "pytorch-lightning_version": "2", "w": torch.arange(size)} for size in (1000, 500_000))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "step_00000001.ckpt"
    IO.save_checkpoint(OLD, path)
    return path


def assert_intact(target: Path) -> None:
    assert torch.equal(IO.load_checkpoint(target)["w"], OLD["w"])
    assert os.listdir(target.parent) == [target.name]


def test_overwrites_and_leaves_nothing_else(target: Path) -> None:
    IO.save_checkpoint(NEW, target)
    assert torch.equal(IO.load_checkpoint(target)["w"], NEW["w"])
    assert os.listdir(target.parent) == [target.name]


def test_a_file_size_limit_keeps_the_previous_checkpoint(target: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match=r"Could not write the checkpoint .*step_00000001\.ckpt.*intact"):
            IO.save_checkpoint(NEW, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_intact(target)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_previous_checkpoint(target: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left") as caught:
            IO.save_checkpoint(NEW, target)
    assert caught.value.errno == errno.ENOSPC
    assert_intact(target)


def test_leftovers_of_killed_runs_go_at_the_next_save(target: Path) -> None:
    partial_path(target.with_name("step_00000009.ckpt")).write_bytes(b"half")
    IO.save_checkpoint(OLD, target)
    assert_intact(target)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", "half"])
def test_an_unreadable_checkpoint_is_one_clear_error(target: Path, damage: bytes | str) -> None:
    good = target.with_name("step_00000000.ckpt")
    IO.save_checkpoint(OLD, good)
    data = target.read_bytes()
    target.write_bytes(data[: len(data) // 2] if damage == "half" else damage)
    with pytest.raises(InputError, match=r"step_00000001.ckpt \(\d+ bytes\) is truncated.*: step_00000000.ckpt"):
        IO.load_checkpoint(target)


def test_code_in_a_checkpoint_is_refused_whatever_is_asked_for(target: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(target.parent / "pwned"),)

    torch.save({"w": Evil()}, target)
    with pytest.raises(InputError, match="objects other than tensors"):
        IO.load_checkpoint(target, weights_only=False)
    assert os.listdir(target.parent) == [target.name]


def test_a_missing_checkpoint_names_the_ones_there_are(target: Path) -> None:
    with pytest.raises(InputError, match=r"There is no checkpoint .*step_7\.ckpt.*step_00000001\.ckpt"):
        IO.load_checkpoint(target.with_name("step_7.ckpt"))


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    for name in ("a", "b"):
        with replace_folder(folder) as partial:
            (partial / name).write_text(name)
        assert os.listdir(folder) == [name]
    with pytest.raises(RuntimeError), replace_folder(folder) as partial:
        (partial / "c").write_text("c")
        raise RuntimeError
    assert os.listdir(folder) == ["b"]
    assert os.listdir(tmp_path) == ["export"]
