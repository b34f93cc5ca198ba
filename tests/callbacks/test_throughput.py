import csv
import time
from pathlib import Path

import pytest
import torch
from toy import ToyBatch, ToyLoader, ToyModule, toy_trainer

from callbacks import Checkpoint, Throughput
from callbacks.throughput import peak_flops_of, peak_memory_bytes


def logged(folder: Path) -> list[dict[str, float]]:
    with (folder / "version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    name = "throughput/samples_per_second"
    return [{k: float(v) for k, v in row.items() if v} for row in rows if row.get(name)]


def test_counts_samples_of_all_micro_batches(tmp_path: Path) -> None:
    throughput = Throughput()
    toy_trainer(tmp_path, [throughput], max_steps=6, accumulate_grad_batches=3).fit(ToyModule(), ToyLoader())
    assert throughput.samples_seen == 6 * 3 * 4
    assert throughput.samples_per_second == throughput.samples_seen / throughput.train_seconds > 0


def test_waiting_for_data_is_told_from_working(tmp_path: Path) -> None:
    def slow(batch: ToyBatch) -> None:
        time.sleep(0.03)

    class Work(ToyModule):
        def training_step(self, batch, batch_idx):
            time.sleep(0.01)
            return super().training_step(batch, batch_idx)

    toy_trainer(tmp_path, [Throughput(every_n_steps=5)], max_steps=10).fit(Work(), ToyLoader(poison=slow))
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [5, 10]
    assert 0.4 < rows[-1]["throughput/data_wait_share"] < 0.9  # 0.75 on an idle machine
    assert rows[-1]["throughput/samples_per_second"] < 4 / 0.04


def test_mfu_is_flops_over_seconds_and_peak(tmp_path: Path) -> None:
    throughput = Throughput(peak_flops=1e9, every_n_steps=3)
    toy_trainer(tmp_path, [throughput], max_steps=3).fit(ToyModule(), ToyLoader())
    (row,) = logged(tmp_path)
    # ToyModule reports 1e6 FLOPs per sample.
    assert row["throughput/mfu"] == pytest.approx(row["throughput/samples_per_second"] * 1e6 / 1e9, rel=1e-4)


def test_no_mfu_where_the_peak_is_unknown(tmp_path: Path) -> None:
    toy_trainer(tmp_path, [Throughput(every_n_steps=2)], max_steps=2).fit(ToyModule(), ToyLoader())
    (row,) = logged(tmp_path)
    assert "throughput/mfu" not in row
    assert row["throughput/peak_memory_gib"] > 0.05


def test_seconds_include_validation_and_sum_over_resumes(tmp_path: Path) -> None:
    class Validated(ToyModule):
        def validation_step(self, batch, batch_idx):
            time.sleep(0.2)

    first, second = Throughput(), Throughput()
    trainer = toy_trainer(tmp_path / "a", [first, Checkpoint(100)], max_steps=4, val_check_interval=2)
    start = time.perf_counter()
    trainer.fit(Validated(), ToyLoader(), ToyLoader(1))
    # One validation lies between the steps, the other after the last of them.
    assert 0.2 <= first.train_seconds < time.perf_counter() - start - 0.2
    path = tmp_path / "a/version_0/checkpoints/step_00000004.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"]["Throughput"]
    start = time.perf_counter()
    toy_trainer(tmp_path / "b", [second, Checkpoint(100)], max_steps=6).fit(ToyModule(), ToyLoader(), ckpt_path=path)
    assert second.samples_seen == 6 * 4
    assert 0 < second.train_seconds - saved["train_seconds"] < time.perf_counter() - start


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_peak_by_device_name(name: str, peak: float | None) -> None:
    assert peak_flops_of(name) == peak


def test_peak_memory_of_the_process_covers_what_it_holds() -> None:
    held = torch.ones(25_000_000)
    assert peak_memory_bytes(torch.device("cpu")) > held.nbytes
