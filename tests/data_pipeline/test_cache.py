"""Feature stores: whole entries only, of one encoder only, found again by whoever looks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from micro import micro_folder, micro_shards

from data_pipeline import cache
from data_pipeline.__main__ import main
from data_pipeline.cache import FeatureStore, fill
from data_pipeline.errors import InputError


def features(i: float) -> dict[str, torch.Tensor]:
    return {"moments": torch.full((4, 2, 3), i), "bits": torch.tensor([i], dtype=torch.bfloat16)}


class Counting:
    fingerprint = "f" * 64

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.calls = 0

    def to(self, device: str) -> None:
        pass

    def encode(self, inputs: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        self.calls += 1
        self.seen += [tuple(value.shape) for value in inputs]
        return [{"moments": 2 * value} for value in inputs]


def wanted(count: int) -> list[tuple[str, Callable[[], torch.Tensor]]]:
    return [(f"name {i}", lambda i=i: torch.full((1 + i % 2,), float(i))) for i in range(count)]


def test_what_is_added_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "a" * 64)
    for i in range(5):
        store.add(f"name {i}", features(i))
    assert "name 0" not in store and store.pending("name 0")
    store.commit()
    again = FeatureStore(tmp_path, "a" * 64)
    for reader in (store, again):
        assert all(f"name {i}" in reader for i in range(5)) and "name 5" not in reader
        for i in range(5):
            found = reader.get(f"name {i}")
            assert all(torch.equal(found[name], value) for name, value in features(i).items())
            assert found["bits"].dtype == torch.bfloat16
    assert again.get("name 5") is None


def test_two_instructions_on_one_target_are_two_entries(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "a" * 64)
    store.add("make it red", features(1))
    store.add("make it blue", features(2))
    store.commit()
    assert not torch.equal(store.get("make it red")["moments"], store.get("make it blue")["moments"])


def test_another_writer_is_seen(tmp_path: Path) -> None:
    reader, writer = FeatureStore(tmp_path, "a" * 64), FeatureStore(tmp_path, "a" * 64)
    assert "late" not in reader
    writer.add("late", features(3))
    writer.commit()
    assert torch.equal(reader.get("late")["moments"], features(3)["moments"])


def test_stock_tools_read_the_tars(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "a" * 64)
    fill(store, Counting(), wanted(7), 7)
    (tar,) = store.folder.glob("*.tar")
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert len(samples) == 7 and all("safetensors" in sample for sample in samples)


def test_filling_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "ENTRIES", 8)
    monkeypatch.setattr(cache, "TOGETHER", 4)
    store, encoder = FeatureStore(tmp_path, Counting.fingerprint), Counting()

    def stopped() -> list[tuple[str, Callable[[], torch.Tensor]]]:
        items = wanted(20)

        def fail() -> torch.Tensor:
            raise KeyboardInterrupt

        return [*items[:13], ("name 13", fail), *items[14:]]

    with pytest.raises(KeyboardInterrupt):
        fill(store, encoder, stopped(), 20)
    done = len(encoder.seen)
    again, rest = FeatureStore(tmp_path, Counting.fingerprint), Counting()
    assert fill(again, rest, wanted(20), 20) == len(rest.seen) < 20 <= done + len(rest.seen)
    assert fill(again, rest, wanted(20), 20) == 0
    for i in range(20):
        assert torch.equal(again.get(f"name {i}")["moments"], torch.full((1 + i % 2,), 2.0 * i))


def test_killed_in_the_middle_of_writing_nothing_partial_is_found(tmp_path: Path) -> None:
    program = (
        "import itertools, sys, torch; from pathlib import Path; from data_pipeline.cache import FeatureStore\n"
        "store = FeatureStore(Path(sys.argv[1]), 'a' * 64); print('ready', flush=True)\n"
        "for i in itertools.count():\n"
        "    store.add(f'name {i}', {'moments': torch.full((64, 64), float(i))}); store.commit()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    while len(list(tmp_path.rglob("*.npy"))) < 5:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = FeatureStore(tmp_path, "a" * 64)
    count = len(list(store.folder.glob("*.npy")))
    assert count >= 5 and all(f"name {i}" in store for i in range(count - 1))
    assert all(store.get(f"name {i}")["moments"][0, 0] == i for i in range(count - 1))


def test_a_damaged_entry_is_named(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "a" * 64)
    fill(store, Counting(), wanted(3), 3)
    (tar,) = store.folder.glob("*.tar")
    data = bytearray(tar.read_bytes())
    for at in range(600, len(data), 7):
        data[at] ^= 1
    tar.write_bytes(data)
    with pytest.raises(InputError, match=r"\.tar is damaged at byte \d+; delete"):
        for i in range(3):
            store.get(f"name {i}")


@pytest.mark.parametrize("name", ["tar", "npy"])
@pytest.mark.parametrize("left", [0, 0.5])
def test_what_a_cut_file_held_is_encoded_again(
    name: str, left: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(FeatureStore(tmp_path, Counting.fingerprint), Counting(), wanted(7), 7)
    (path,) = tmp_path.rglob(f"*.{name}")
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    store = FeatureStore(tmp_path, Counting.fingerprint)
    assert fill(store, Counting(), wanted(7), 7) == 7 and "is damaged" in caplog.text
    assert FeatureStore(tmp_path, Counting.fingerprint).get(next(iter(wanted(1)))[0]) is not None


def test_a_damaged_name_of_the_encoder_is_one_clear_error(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "f" * 64)
    (store.folder / "encoder.json").write_text("")
    with pytest.raises(InputError, match="is damaged; delete"):
        FeatureStore(tmp_path, "f" * 64)


def test_a_folder_of_another_encoder_is_refused(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "a" * 16 + "b" * 48)
    store.add("x", features(0))
    store.commit()
    with pytest.raises(InputError, match="was filled by the encoder aaaa"):
        FeatureStore(tmp_path, "a" * 16 + "c" * 48)
    assert "x" not in FeatureStore(tmp_path, "d" * 64)


def test_the_command_fills_pictures_and_texts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    shards, folder = micro_shards(tmp_path / "shards", 12, 12), micro_folder(tmp_path / "model")
    command = ["cache", str(shards), "--output", "features", "--pretrained", str(folder), "--image_size", "64"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first.count("new entries") == 2 and " 0 new entries" not in first
    assert main([*command, "--size_multiple", "16"]) == 0
    assert capsys.readouterr().out.count(" 0 new entries") == 2
    assert main([*command, "--mirrored"]) == 0
    mirrored = capsys.readouterr().out.splitlines()[1:]  # behind what it will do
    assert " 0 new entries" not in mirrored[0] and " 0 new entries" in mirrored[1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--latents", "nowhere.Nothing"], "cannot make an encoder of nowhere.Nothing"),
        (["--pretrained", "nowhere"], "nowhere is no folder"),
        (["--latents", "", "--texts", ""], "nothing would be encoded"),
        (["--image_size", "70"], "not divisible"),
    ],
)
def test_wrong_options_of_the_command_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, options: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shards, folder = micro_shards(tmp_path / "shards", 4, 0), micro_folder(tmp_path / "model")
    command = ["cache", str(shards), "--output", "features", "--pretrained", str(folder), "--image_size", "64"]
    assert main([*command, *options]) == 2
    assert expected in capsys.readouterr().err


def test_names_do_not_meet_by_chance() -> None:
    keys = {cache.key_of(f"name {i}") for i in range(10_000)}
    assert len(keys) == 10_000 and np.mean([low & 1 for _, low in keys]) == pytest.approx(0.5, abs=0.02)


def test_more_tars_than_a_process_may_open_are_read(tmp_path: Path) -> None:
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "import torch; from data_pipeline.cache import FeatureStore\n"
        "store = FeatureStore(sys.argv[1], 'a' * 64)\n"
        "for i in range(100):\n"
        "    store.add(f'name {i}', {'moments': torch.full((2,), float(i))}); store.commit()\n"
        "assert all(store.get(f'name {i}')['moments'][0] == i for i in range(100))\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])


def test_many_tars_are_not_sorted_again_with_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, plain = [], np.sort
    monkeypatch.setattr(cache.np, "sort", lambda table, **options: rows.append(len(table)) or plain(table, **options))
    store = FeatureStore(tmp_path, "a" * 64)
    for i in range(256):
        store.add(f"name {i}", features(i))
        store.commit()
        assert f"name {i}" in store and (i == 0 or f"name {i // 2}" in store)
    assert sum(rows) < 256 * 16 and len(store._tables) < 10  # all of them each time would be 32,896


def test_what_waits_to_be_written_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BYTES", 10_000)
    store = FeatureStore(tmp_path, "a" * 64)
    for i in range(10):
        store.add(f"name {i}", {"moments": torch.full((1000,), float(i))})
    assert len(list(store.folder.glob("*.tar"))) == 3 and "name 8" in store and "name 9" not in store


def test_inputs_of_several_shapes_are_encoded_together_and_equal_ones_once(tmp_path: Path) -> None:
    store, encoder = FeatureStore(tmp_path, Counting.fingerprint), Counting()
    assert fill(store, encoder, [*wanted(130), *wanted(130)], 260) == 130
    assert encoder.calls == 3


def test_two_processes_do_not_encode_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    encoders = [Counting(), Counting()]
    started = threading.Event()

    def slow() -> torch.Tensor:
        started.set()
        time.sleep(0.2)
        return torch.zeros(1)

    def work(i: int) -> int:
        items = wanted(20) if i else [("slow", slow), *wanted(20)]
        return fill(FeatureStore(tmp_path, Counting.fingerprint), encoders[i], items, 20)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(work, 0)
        assert started.wait(10)
        second = pool.submit(work, 1)
        assert (first.result(), second.result()) == (21, 0)
    assert not encoders[1].seen and "waiting for another process that fills" in caplog.text
