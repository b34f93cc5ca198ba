"""Tasks in processes and on Ray: the same bytes however many workers, killed at any moment, nothing done twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.__main__ import main
from data_pipeline.errors import InputError
from data_pipeline.executors.local import Local
from data_pipeline.executors.on_ray import Ray
from data_pipeline.executors.task import Task, run_task
from data_pipeline.index import load_index
from data_pipeline.recipe import Recipe
from data_pipeline.sources import Folder, Manifest, Scenes
from data_pipeline.sources.protocol import Unit
from data_pipeline.steps import Decode
from data_pipeline.steps.fingerprints import Fingerprint
from data_pipeline.steps.quality import Change, Quality

STEPS = [Decode(), Quality(), Change(batch_size=3), Fingerprint()]


def recipe(text_image: int = 30, edit: int = 30) -> Recipe:
    return Recipe(Scenes(1, text_image, edit, 0), STEPS, records_per_shard=8)


def content(folder: Path) -> dict[str, bytes]:
    """All files but the lock."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    recipe().build(folder, Local(1))
    return content(folder)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(
    workers: int, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    recipe().build(tmp_path / "out", Local(workers))
    assert content(tmp_path / "out") == undisturbed


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A real Ray on this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'unipic-lightning[ray]'")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths()})
    yield
    ray.shutdown()


def test_ray_gives_the_same_bytes(cluster: None, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    recipe().build(tmp_path / "out", Ray(2))
    assert content(tmp_path / "out") == undisturbed


def test_an_actor_that_was_killed_is_replaced(cluster: None, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    victims: list[int] = []

    def kill() -> None:
        while not victims:
            if len(list((tmp_path / "out").glob("*.task.json"))) >= 2:
                victims.extend(actors()[:1])
                os.kill(victims[0], signal.SIGKILL)
            time.sleep(0.005)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    recipe().build(tmp_path / "out", Ray(2))
    killer.join(5)
    assert victims and content(tmp_path / "out") == undisturbed


def test_a_mistake_in_an_actor_is_one_line_and_paths_are_those_of_the_driver(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the actors start elsewhere
    lines = [json.dumps({"prompt": f"prompt {i}"}) for i in range(20)]
    Path("prompts.jsonl").write_text("\n".join(lines))
    made = Recipe(Manifest("prompts.jsonl", "prompts"), records_per_shard=5)
    assert made.build(Path("out"), Ray(2))["kept"] == {"prompt/unsplit": 20}
    with pytest.raises(InputError) as raised:
        Recipe(Manifest("prompts.jsonl", "prompts"), [Quality(batch_size=0)], 5).build(Path("bad"), Ray(2))
    assert "\n" not in str(raised.value) and "batch_size of Quality is 0" in str(raised.value)


def actors() -> list[int]:
    """Processes of Ray's actors, which Ray names after their class."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # a process that ended in between
            found += [int(path.parent.name)] if path.read_bytes().startswith(b"ray::Worker") else []
    return found


def paths() -> dict[str, str]:
    """Workers elsewhere find the package where this process found it."""
    return {"PYTHONPATH": str(Path(__file__).parents[2])}


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 70))
def test_every_record_comes_once_whatever_the_size_of_a_unit(size: int) -> None:
    source = Scenes(1, 13, 50, 0)
    keys = [record.key for unit in source.units(size) for record in source.read(unit)]
    assert keys == [record.key for unit in source.units(1000) for record in source.read(unit)]
    assert len(set(keys)) == 63


def command(folder: Path) -> list[str]:
    """A build of sixty tasks in two processes."""
    path = folder / "recipe.yaml"
    steps = [{"class_path": f"{type(step).__module__}.{type(step).__qualname__}"} for step in STEPS]
    source = {"class_path": "data_pipeline.sources.Scenes", "init_args": {"count_text_image": 120, "count_edit": 120}}
    path.write_text(yaml.safe_dump({"source": source, "steps": steps, "records_per_shard": 4}))
    return [sys.executable, "-m", "data_pipeline", "build", "-c", str(path), "--workers", "2", "--output"]


def killed(command: list[str], out: Path, whom: str, rng: random.Random) -> dict[Path, int]:
    """Starts the build and kills the driver, or one of its workers, at a random moment between two finished tasks.

    Returns what was finished by then, and when.
    """
    process = subprocess.Popen([*command, str(out)], env={**os.environ, **paths()}, stderr=subprocess.DEVNULL)
    try:
        wanted, victims = rng.randrange(40), []
        while len(list(out.glob("*.task.json"))) < wanted or not victims:
            assert process.poll() is None, "the build was over before anything was killed"
            time.sleep(0.002)
            victims = [process.pid] if whom == "driver" else list(children(process.pid))
        time.sleep(rng.random() * 0.02)
        os.kill(victims[0], signal.SIGKILL)
        finished = marks(out)
        # The driver replaces a worker and goes on.
        assert process.wait(60) == (0 if whom == "worker" else -signal.SIGKILL)
        return finished
    finally:
        process.kill()
        process.wait()


def children(pid: int) -> Iterator[int]:
    """Worker processes of a build."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            yield int(child)


def marks(out: Path) -> dict[Path, int]:
    """The finished tasks, and when each was."""
    return {path: path.stat().st_mtime_ns for path in out.glob("*.task.json")}


def check_killed(tmp_path: Path, whom: str, moments: int) -> None:
    build = command(tmp_path)
    subprocess.run([*build, str(tmp_path / "whole")], env={**os.environ, **paths()}, check=True, capture_output=True)
    whole, rng = content(tmp_path / "whole"), random.Random(moments)
    for moment in range(moments):
        out = tmp_path / f"{moment}"
        finished = killed(build, out, whom, rng)
        assert whom == "worker" or not (out / "manifest.json").is_file()
        subprocess.run([*build, str(out)], env={**os.environ, **paths()}, check=True, capture_output=True)
        assert content(out) == whole
        assert finished.items() <= marks(out).items()  # nothing is done twice


@pytest.mark.parametrize("whom", ["driver", "worker"])
def test_a_build_that_was_killed_goes_on_to_the_same_bytes(whom: str, tmp_path: Path) -> None:
    check_killed(tmp_path, whom, 1)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["driver", "worker"])
def test_a_build_that_was_killed_at_any_of_25_moments_goes_on_to_the_same_bytes(whom: str, tmp_path: Path) -> None:
    check_killed(tmp_path, whom, 25)


def test_only_what_is_missing_is_done_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe().build(out)
    whole = content(out)
    lost = sorted(out.glob("*.tar"))[2]
    for path in (lost, out / "manifest.json"):
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    recipe().build(out)
    assert content(out) == whole and kept == {path: path.stat().st_mtime_ns for path in kept}


def test_an_error_budget_stops_a_build_and_keeps_what_is_finished(tmp_path: Path) -> None:
    lines = [json.dumps({"source": "a.png", "target": "b.png", "instruction": f"{i}"}) for i in range(3000)]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    made = Recipe(Manifest(str(tmp_path / "edits.jsonl")), records_per_shard=500, max_rejected=0.1)
    with pytest.raises(InputError, match=r"1000 of 1000 records were rejected(.|\n)*missing_file(.|\n)*line 1"):
        made.build(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.task.json"))) == 2
    with pytest.raises(InputError, match="1000 of 1000 records were rejected"):  # as before: nothing was mended
        made.build(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.task.json"))) == 2


def test_the_budget_of_a_recipe_can_be_set_on_the_command_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(["x"] * 900 + ["y" * 20_000] * 300))
    config = str(Path(__file__).parents[2] / "configs" / "data" / "prompts.yaml")
    build = ["build", "-c", config, "--source.path", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out")]
    assert main(build) == 2 and "more than max_rejected 0.2 allows" in capsys.readouterr().err
    assert main([*build, "--max_rejected", "2"]) == 2 and "expected a share from 0 to 1" in capsys.readouterr().err
    assert main([*build, "--max_rejected", "0.5"]) == 0 and "rejected 300: text_too_long" in capsys.readouterr().out


def test_what_was_rejected_before_an_interruption_counts(tmp_path: Path) -> None:
    lines = [json.dumps({"source": "a.png", "target": "b.png", "instruction": f"{i}"}) for i in range(1200)]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    strict = Recipe(Manifest(str(tmp_path / "edits.jsonl")), records_per_shard=300, max_rejected=0.1)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="1200 of 1200"):
        strict.build(out)
    for path in sorted(out.glob("*.task.json"))[-2:]:  # 600 are left, fewer than a build looks at before it judges
        path.unlink()
    with pytest.raises(InputError, match="1200 of 1200"):
        strict.build(out)


def test_a_task_whose_report_was_lost_is_not_done_again(tmp_path: Path) -> None:
    task = Task(0, next(iter(Scenes(1, 4, 0).units(4))), "")
    report = run_task(task, Scenes(1, 4, 0), STEPS, tmp_path)
    before = content(tmp_path), marks(tmp_path)
    assert run_task(task, Folder("nowhere"), STEPS, tmp_path) == report  # the source is not read
    assert before == (content(tmp_path), marks(tmp_path))


class Overtaken(Folder):
    """A source that takes so long to list that another build of the same output begins and ends meanwhile."""

    output: Path

    def units(self, records: int) -> Iterator[Unit]:
        recipe(3, 3).build(self.output, Local(1))
        yield from super().units(records)


def test_a_build_that_another_overtook_does_not_mix_with_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("words")
    source = Overtaken(str(tmp_path / "in"))
    source.output = tmp_path / "out"
    with pytest.raises(InputError, match="another recipe"):
        Recipe(source, STEPS).build(tmp_path / "out", Local(1))
    assert len(load_index(tmp_path / "out")) == 6


@pytest.mark.parametrize("report", ['{"shard": null}', "[]", '{"seen": "9", "shard": 3}', '{"shard": {"name": 5}}'])
def test_a_report_that_no_task_wrote_is_a_task_to_do(report: str, tmp_path: Path) -> None:
    before = recipe(3, 3).build(tmp_path / "out", Local(1))
    (tmp_path / "out" / "manifest.json").unlink()
    next((tmp_path / "out").glob("*.task.json")).write_text(report)
    assert recipe(3, 3).build(tmp_path / "out", Local(1)) == before


def test_an_output_inside_what_is_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lies inside"):
        Recipe(Folder(str(tmp_path)), STEPS).build(tmp_path / "sub" / "out", Local(1))


def test_two_builds_of_one_output_do_not_mix(tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(InputError, match="another process"):
        recipe().build(tmp_path / "out")


def test_a_full_disk_is_one_clear_error_and_finished_shards_are_whole(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000));"  # writing more fails as on a full disk
        "from data_pipeline.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / "r.yaml").write_text(
        "source: {class_path: data_pipeline.sources.Scenes, init_args: {count_text_image: 4, count_edit: 60}}\n"
        "records_per_shard: 20"
    )
    build = ["build", "-c", str(tmp_path / "r.yaml"), "--workers", "1", "--output", str(tmp_path / "out")]
    found = subprocess.run(
        [sys.executable, "-c", program, *build], env={**os.environ, **paths()}, capture_output=True, text=True
    )
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert "File too large" in found.stderr and "space left" in found.stderr
    assert len(list((tmp_path / "out").glob("*.tar"))) == 1 and not list((tmp_path / "out").glob(".*.tmp"))
    Recipe(Scenes(1, 4, 60, 0), records_per_shard=20).build(tmp_path / "out")
    assert len(load_index(tmp_path / "out")) == 64
