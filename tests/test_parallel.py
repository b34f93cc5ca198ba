"""The same losses on one rank and on two, replicated and sharded, accumulated, compiled, recomputed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import chains
import parallel_rl
import pytest
import torch
from micro import built
from parallel import CLIP, PLAIN, STEPS, VARIANTS, trained

from lightning_modules.kontext import KontextModule
from lightning_modules.pipelines import KontextPipeline
from lightning_modules.planning import Plan, Run
from lightning_modules.strategies import ShardedStrategy

ROOT = Path(__file__).parents[1]
EXACT, LOW = 2e-5, 5e-3  # relative: of float32, whose sums are taken in another order; of bfloat16


def two_ranks(output: Path, *names: str, seconds: float = 280) -> None:
    """Runs variants on two gloo processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"}
    common |= {
        "MICRO_FOLDER": str(built()),
        "MICRO_R1V": chains.folder(),
        "HF_HUB_OFFLINE": "1",
        "TORCHELASTIC_RUN_ID": "test",
        "GROUP_RANK": "0",
    }
    argv = [sys.executable, str(ROOT / "tests" / "parallel.py"), str(output), *names]
    with ExitStack() as stack:
        logs = [stack.enter_context(open(output / f"log-{rank}", "w+")) for rank in range(2)]
        processes = [
            subprocess.Popen(argv, env={**common, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}, stdout=log, stderr=log)
            for rank, log in enumerate(logs)
        ]
        try:
            codes = [process.wait(timeout=seconds) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for code, log in zip(codes, logs, strict=True):
            log.seek(0)
            assert code == 0, log.read()[-4000:]


def losses(output: Path, name: str, accumulate: int = 1) -> list[float]:
    """The loss of each step: the mean over ranks and micro-batches, which are equally large."""
    ranks = [json.loads((output / f"{name}-{rank}.json").read_text())["losses"] for rank in range(2)]
    return [
        sum(r[i * accumulate + m] for r in ranks for m in range(accumulate)) / (2 * accumulate) for i in range(STEPS)
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, float32, eager, big batches."""
    return trained(tmp_path_factory.mktemp("plain"), "plain")


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, several ways."""
    output = tmp_path_factory.mktemp("parallel")
    names = "ddp", "sharded", "sharded_accumulated", "sharded+resumed", "low_ddp", "low_sharded"
    two_ranks(output, *names, "both_ddp_accumulated", "both_sharded_accumulated", "pictures", "answers", "shared")
    return output


def near(wanted: list[float], tolerance: float) -> Any:
    """Equal up to a relative tolerance."""
    return pytest.approx(wanted, rel=tolerance, abs=0)


def test_batches_of_both_tasks_are_trained_on_and_clipped(plain: dict[str, Any]) -> None:
    assert set(plain["batches"]) == {"text_to_image", "edit"}
    assert len(plain["losses"]) == STEPS
    assert plain["norm"] > 2 * CLIP and plain["moved"] > 1e-4


def test_accumulation_equals_a_big_batch(plain: dict[str, Any], tmp_path: Path) -> None:
    found = trained(tmp_path, "accumulated", **VARIANTS["accumulated"])["losses"]
    assert [(a + b) / 2 for a, b in zip(found[::2], found[1::2], strict=True)] == near(plain["losses"], EXACT)


def test_a_step_of_both_tasks_is_the_same_in_one_batch_accumulated_and_on_two_ranks(
    parallel: Path, tmp_path: Path
) -> None:
    """One micro-batch of captions and one of edits, or all in one batch whose references are lists."""
    whole = trained(tmp_path, "both", **VARIANTS["both"])
    found = trained(tmp_path, "both_accumulated", **VARIANTS["both_accumulated"])
    assert set(whole["batches"]) == {"mixed"} and found["batches"] == ["text_to_image", "edit"] * STEPS
    assert [(a + b) / 2 for a, b in zip(found["losses"][::2], found["losses"][1::2], strict=True)] == near(
        whole["losses"], EXACT
    )
    for name in ("both_ddp_accumulated", "both_sharded_accumulated"):
        assert losses(parallel, name, 2) == near(whole["losses"], EXACT)


@pytest.mark.parametrize(
    ("name", "accumulate", "tolerance"),
    [("ddp", 1, EXACT), ("sharded", 1, EXACT), ("sharded_accumulated", 2, EXACT), ("low_ddp", 1, LOW),
     ("low_sharded", 1, LOW)],
)  # fmt: skip
def test_two_ranks_give_the_losses_of_one(
    name: str, accumulate: int, tolerance: float, plain: dict[str, Any], parallel: Path
) -> None:
    assert losses(parallel, name, accumulate) == near(plain["losses"], tolerance)


def test_all_ranks_have_one_norm_and_one_average(plain: dict[str, Any], parallel: Path) -> None:
    for name in ("ddp", "sharded"):
        ranks = [json.loads((parallel / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        assert ranks[0]["norm"] == ranks[1]["norm"] == pytest.approx(plain["norm"], rel=1e-4)
        assert ranks[0]["average"] == ranks[1]["average"]
        for key, value in plain["average"].items():
            torch.testing.assert_close(
                torch.tensor(ranks[0]["average"][key]), torch.tensor(value), rtol=1e-3, atol=1e-5
            )


@pytest.mark.parametrize("name", ["ddp", "sharded", "low_ddp", "low_sharded"])
def test_a_device_holds_what_is_planned(name: str, parallel: Path) -> None:
    """To the byte, on the first rank; the last one's shards are smaller where rows are left over."""
    strategy = ShardedStrategy(2) if VARIANTS[name]["strategy"] == "sharded" else "ddp"
    module = KontextModule(str(built()), compute=VARIANTS[name].get("compute", PLAIN))
    sizes = {"ratio": {"edit": 1}, "batch_size": 2, "batch_tokens": None, "size_multiple": 32, "image_size": 32}
    plan = Plan(Run(module, {"devices": 2, "max_steps": STEPS, "strategy": strategy}, ema=True, keep=2, **sizes))
    first, last = (json.loads((parallel / f"{name}-{rank}.json").read_text())["bytes"] for rank in range(2))
    assert first == {part: plan.states[part] for part in first} and len(first) == 4
    assert all(last[part] <= first[part] for part in first)


def test_a_sharded_run_resumes_exactly(parallel: Path) -> None:
    whole, resumed = (
        [json.loads((parallel / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        for name in ("sharded", "sharded+resumed")
    )
    for one, other in zip(whole, resumed, strict=True):
        assert other["losses"] == one["losses"][3:] and other["average"] == one["average"]


def test_the_exports_of_replicated_and_sharded_runs_are_alike(parallel: Path) -> None:
    a, b = (KontextPipeline.from_pretrained(parallel / name / "export").transformer for name in ("ddp", "sharded"))
    for (name, p), (_, q) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["pictures", "answers"])
def test_reinforcement_goes_on_with_what_waited_on_each_rank(name: str, parallel: Path) -> None:
    """Stopped while rollouts wait for an update, which are of each rank's own prompts."""
    ranks = [json.loads((parallel / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    for found in ranks:
        assert found["resumed"] == found["whole"]
        assert not found["alike"] and all(held["waiting"] for held in found["held"])
        assert all(held["anchor" if name == "pictures" else "buffer"] for held in found["held"])
    assert ranks[0]["whole"]["weights"] == ranks[1]["whole"]["weights"]


def test_reinforcement_on_two_ranks_learns_what_one_does(parallel: Path, tmp_path: Path) -> None:
    parallel_rl.shared(tmp_path)
    files = tmp_path / "shared-1-0.pt", parallel / "shared-2-0.pt", parallel / "shared-2-1.pt"
    one, *two = (torch.load(file, weights_only=True) for file in files)
    for name, weights in one.items():
        assert torch.equal(two[0][name], two[1][name])
        torch.testing.assert_close(two[0][name], weights, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["again", "cheap"])
def test_what_is_recomputed_changes_no_bit(name: str, plain: dict[str, Any], tmp_path: Path) -> None:
    found = trained(tmp_path, name, **VARIANTS[name])
    assert found["losses"] == plain["losses"] and found["average"] == plain["average"]


def test_bfloat16_weights_with_masters_follow_float32(plain: dict[str, Any], tmp_path: Path) -> None:
    assert trained(tmp_path, "low", **VARIANTS["low"])["losses"] == near(plain["losses"], LOW)


def assert_compiled(found: dict[str, Any], plain: dict[str, Any]) -> None:
    """No block ran as Python, as all of an eager run do."""
    assert found["graphs"] >= 2 and found["eager"] == 0
    assert plain["graphs"] == 0 and plain["eager"] >= STEPS


@pytest.mark.slow
def test_compiled_blocks_give_the_losses_of_eager_ones(plain: dict[str, Any], tmp_path: Path) -> None:
    found = trained(tmp_path, "compiled", **VARIANTS["compiled"])
    assert found["losses"] == near(plain["losses"], 1e-4)
    assert_compiled(found, plain)


@pytest.mark.slow
def test_compiled_blocks_on_two_ranks(plain: dict[str, Any], tmp_path: Path) -> None:
    names = ("compiled_ddp", "compiled_sharded", "compiled_cheap")
    two_ranks(tmp_path, *names, seconds=1200)
    for name in names:
        assert losses(tmp_path, name) == near(plain["losses"], 1e-4)
        for rank in range(2):
            assert_compiled(json.loads((tmp_path / f"{name}-{rank}.json").read_text()), plain)
