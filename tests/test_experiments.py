"""Experiments on micro runs: what is run, what is not run again, what goes on, and what the table is made of."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback, Trainer
from micro import micro_config

from data_pipeline.errors import InputError
from lightning_modules.experiments import PREVIOUS, Run, chain, effective, in_turn, main, read

ROOT = Path(__file__).parents[1]
BENCHMARK = {"level": 1, "count": 3, "num_inference_steps": 1, "guidance_scales": [1.0], "negative_prompt": ""}
CALLBACKS = {"SampleGrid": None, "Ledger": None, "Checkpoint": {"every_n_steps": 1}, "EMA": {"decay": 0.0}}


def experiment(root: Path, **changes: object) -> Path:
    """A start that is there for everyone, its evaluation, and two stages of which one is in two arms."""
    config = str(micro_config(root, benchmark__count=1).relative_to(root))
    stage = {"config": config, "minutes": 2.0}
    content = {
        "seeds": [0, 1],
        "baseline": "none",
        "columns": {"edit": ["edit_success"], "kept": ["preservation"]},
        "set": {"benchmark": BENCHMARK, "trainer.val_check_interval": 100, "trainer.max_steps": 50},
        "links": {
            "base": {"config": config, "in_place": True, "minutes": 1.0},
            "evaluate": {**stage, "seed": 0, "set": {"trainer.limit_train_batches": 0}, "callbacks": CALLBACKS},
            "train": {**stage, "callbacks": {**CALLBACKS, "Budget": {"max_evaluations": 12}}},
            "more": {**stage, "callbacks": {**CALLBACKS, "Budget": {"max_evaluations": 6}}},
        },
        "arms": {"none": ["base", "evaluate"], "one": ["base", "train"], "two": ["base", "train", "more"]},
    } | changes
    path = root / "configs" / "experiments" / "small.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path.relative_to(root)


def finish(folder: Path, outcomes: dict[str, list[float]] | None = None) -> None:
    """What a finished run leaves, at its least."""
    version = folder / "version_0"
    (version / "export").mkdir(parents=True)
    (version / "summary.json").write_text(json.dumps({"evaluations": 1000, "seconds": 60.0}))
    if outcomes is not None:
        (version / "outcomes.json").write_text(json.dumps(outcomes))
    (folder / "latest").symlink_to("version_0")


def test_a_round_is_made_by_the_run_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that learns from the shards of a recipe whose generator is the last export."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "round.yaml").write_text(yaml.safe_dump({"steps": [{"init_args": {"pretrained": "?", "alpha": 0.1}}]}))
    path = experiment(tmp_path)
    content = yaml.safe_load(path.read_text())
    settings = {"recipe": "round.yaml", "take": "steps.0.init_args.pretrained", "set": {"steps.0.init_args.alpha": 0.5}}
    content["links"]["train"]["round"] = settings
    path.write_text(yaml.safe_dump(content))
    _, run = chain(read(path), "small", "one", 0)
    assert run.recipe == {"steps": [{"init_args": {"pretrained": "runs/micro/latest/export", "alpha": 0.5}}]}
    [made] = run.content["data"]["init_args"]["shards"]
    called: list[list[str]] = []
    monkeypatch.setattr(Run, "call", lambda self, module, threads: called.append(list(module)))
    monkeypatch.setattr(Run, "finished", property(lambda self: bool(called)))
    run.fit()
    assert called[0] == ["data_pipeline", "build", "-c", f"{made}.yaml", "--output", made]
    assert yaml.safe_load(Path(f"{made}.yaml").read_text()) == run.recipe
    content["links"]["train"]["round"]["set"] = {"steps.0.init_args.alpha": 0.7}
    path.write_text(yaml.safe_dump(content))
    assert list(chain(read(path), "small", "one", 0))[1].name != run.name
    content["links"]["train"]["round"]["take"] = "steps.3.pretrained"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=r"no field steps.3"):
        list(chain(read(path), "small", "one", 0))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = experiment(tmp_path, seeds=[0])
    text = (tmp_path / path).read_text()
    doubled = text.replace("arms:\n", "arms:\n  one:\n  - base\n", 1)
    assert doubled != text
    (tmp_path / path).write_text(doubled)
    with pytest.raises(InputError, match=r"the key one stands twice.*line \d+"):
        read(tmp_path / path)
    merged = text.replace("arms:\n", "arms:\n  <<: {one: [base]}\n", 1)
    (tmp_path / path).write_text(merged)
    assert read(tmp_path / path).arms["one"] == ["base", "train"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    for name, value in {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def test_runs_are_named_by_what_decides_them(folder: Path) -> None:
    path = experiment(folder)
    loaded = read(path)
    finish(folder / "runs/micro")
    names = {arm: [run.name for run in chain(loaded, "small", arm, 1)] for arm in loaded.arms}
    assert names["one"][1] == names["two"][1] and names["one"][1].startswith("experiments/small/train/seed_1-")
    assert names["none"] == [run.name for run in chain(loaded, "small", "none", 0)]  # its seed is its own
    assert names["one"] != [run.name for run in chain(loaded, "small", "one", 0)]
    train = list(chain(loaded, "small", "one", 1))[1]
    assert train.content["model"]["init_args"]["pretrained"] == "runs/micro/version_0/export"
    # Another start, and another budget, are other runs; what is expected of them is not.
    os.replace(folder / "runs/micro/version_0", folder / "runs/micro/version_1")
    (folder / "runs/micro/latest").unlink()
    (folder / "runs/micro/latest").symlink_to("version_1")
    assert list(chain(loaded, "small", "one", 1))[1].name != train.name
    content = yaml.safe_load(path.read_text())
    content["links"]["train"]["minutes"] = 9.0
    path.write_text(yaml.safe_dump(content))
    os.replace(folder / "runs/micro/version_1", folder / "runs/micro/version_0")
    (folder / "runs/micro/latest").unlink()
    (folder / "runs/micro/latest").symlink_to("version_0")
    assert list(chain(read(path), "small", "one", 1))[1].name == train.name


def test_a_links_config_holds_all_its_changes(folder: Path) -> None:
    loaded = read(experiment(folder))
    base = next(chain(loaded, "small", "one", 0))
    content = effective(loaded.set, loaded.links["train"], 7, {"base": base, PREVIOUS: base})
    names = [entry["class_path"].rpartition(".")[2] for entry in content["trainer"]["callbacks"]]
    assert names[0] == "Budget" and "SampleGrid" not in names and "Ledger" not in names
    averaging = next(e for e in content["trainer"]["callbacks"] if e["class_path"].endswith("EMA"))
    assert averaging["init_args"]["decay"] == 0.0
    assert content["seed_everything"] == 7 and content["benchmark"] == BENCHMARK
    assert content["model"]["init_args"]["pretrained"] == "runs/micro/latest/export"


def test_the_plan_counts_shared_runs_once(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = experiment(folder)
    assert main(["-c", str(path), "--plan"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == "6 runs, 6 of them to run: about 11 minutes"  # 1 + 2 + 2 x (2 + 2)
    finish(folder / "runs/micro")
    assert main(["-c", str(path), "--plan", "--only", "one", "--seeds", "5"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == "2 runs, 1 of them to run: about 2 minutes"


def test_the_table_is_made_of_finished_runs_alone(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = experiment(folder)
    loaded = read(path)
    finish(folder / "runs/micro")
    assert main(["-c", str(path), "--table"]) == 0
    assert "nothing to compare" in (folder / "runs/experiments/small/results.md").read_text()
    finish(
        folder / "runs" / list(chain(loaded, "small", "none", 0))[1].name,
        {"edit_success": [0, 1], "preservation": [1, 1]},
    )
    finish(
        folder / "runs" / list(chain(loaded, "small", "one", 1))[1].name,
        {"edit_success": [1, 1], "preservation": [1, 0]},
    )
    assert main(["-c", str(path), "--table"]) == 0
    lines = (folder / "runs/experiments/small/results.md").read_text().splitlines()
    assert lines[2] == "| none | 1 | 0.500 | 1.000 | 1k | 1.0 |"
    assert lines[3].startswith("| one | 1 of 2 | 1.000 (+0.500, ") and "two" not in lines[4]
    plain = json.loads((folder / "runs/experiments/small/results.json").read_text())
    assert [row["arm"] for row in plain["rows"]] == ["none", "one"]
    assert (folder / "runs/experiments/small/gains.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"baseline": "nothing"}, "baseline nothing is none of the arms"),
        ({"arms": {"none": ["base", "elsewhere"]}}, "names the link elsewhere"),
        ({"seeds": "many"}, "small.yaml"),
        ({"sedes": [0]}, "small.yaml"),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture, changes: dict, match: str) -> None:
    assert main(["-c", str(experiment(folder, **changes)), "--plan"]) == 2
    found = capsys.readouterr().err
    assert match in found and found.startswith("error: ") and found.count("\n") == 1


def test_arms_that_are_not_there_are_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["-c", str(experiment(folder)), "--only", "three"]) == 2
    assert "--only names three; the arms are none, one, two" in capsys.readouterr().err


class Fuse(Callback):
    """Kills its own process after the second step, once."""

    def __init__(self, burnt: str) -> None:
        self.burnt = Path(burnt)

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 2 and not self.burnt.exists():
            self.burnt.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def start(folder: Path) -> None:
    """The finished run in place, with an untrained export."""
    finish(folder / "runs/micro", {"edit_success": [0, 1, 0], "preservation": [1, 1, 1]})
    (folder / "runs/micro/version_0/export").rmdir()
    (folder / "runs/micro/version_0/export").symlink_to(folder / "pretrained")


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "runs/experiments/small/results.json").read_text())["rows"]


def test_what_is_missing_is_run_and_nothing_twice(folder: Path, capsys: pytest.CaptureFixture) -> None:
    arms = {"none": ["base"], "one": ["base", "train"], "the same": ["base", "train"]}
    path = experiment(folder, seeds=[0], arms=arms)
    start(folder)
    assert main(["-c", str(path), "--jobs", "3"]) == 0, capsys.readouterr().out
    assert [(row["arm"], row["evaluations"]) for row in rows(folder)] == [("none", 0), ("one", 12), ("the same", 12)]
    log = next((folder / "runs/experiments/small/train").glob("*/log.txt"))
    assert log.read_text().count("Seed set to 0") == 1
    before = log.stat().st_size
    assert main(["-c", str(path)]) == 0 and log.stat().st_size == before
    config = next((folder / "runs/configs/experiments/small/train").glob("*.yaml"))
    assert config.read_text().startswith(
        "# python -m lightning_modules.cli fit -c runs/configs/experiments/small/train/seed_0-"
    )


@pytest.mark.slow
def test_a_failure_stops_its_own_arm_and_an_interrupted_run_goes_on(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    path = experiment(folder, seeds=[0])
    content = yaml.safe_load(path.read_text())
    content["links"]["broken"] = {**content["links"]["more"], "set": {"model.init_args.nonsense": 1}}
    fuse = [
        {"class_path": "callbacks.Checkpoint", "init_args": {"every_n_steps": 1}},
        {"class_path": "test_experiments.Fuse", "init_args": {"burnt": str(folder / "burnt")}},
        {"class_path": "callbacks.Export"},
    ]
    content["links"]["train"] = {"config": content["links"]["train"]["config"], "set": {"trainer.callbacks": fuse}}
    content["links"]["train"]["set"]["trainer.max_steps"] = 3
    content["arms"] = {"none": ["base", "evaluate"], "bad": ["base", "broken"], "two": ["base", "train", "more"]}
    path.write_text(yaml.safe_dump(content))
    start(folder)
    assert main(["-c", str(path)]) == 1
    said = capsys.readouterr().out
    assert "failed: experiments/small/broken/seed_0-" in said and "nonsense" in said
    assert "train/seed_0-" in said and "status -9" in said and [row["arm"] for row in rows(folder)] == ["none"]
    assert main(["-c", str(path), "--only", "two"]) == 0
    run = next((folder / "runs/experiments/small/train").glob("*"))
    assert "resuming" in (run / "log.txt").read_text() and not (run / "version_1").exists()
    assert json.loads((run / "latest/summary.json").read_text())["steps"] == 3
    assert [(row["arm"], row["evaluations"]) for row in rows(folder)] == [("none", 0), ("two", 18 + 6)]


@pytest.mark.parametrize("changes", [{"reported": {"three": {"GEdit": 6.9}}}, {"after": {"two": "three"}}])
def test_what_is_said_of_arms_is_of_arms_that_there_are(folder: Path, changes: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(changes))} names three; the arms are none, one, two"):
        read(experiment(folder, **changes))


def test_arms_that_others_run_anyway_are_left_to_those_and_shared_beginnings_stand_apart() -> None:
    chains = {"a": ["x"], "b": ["x", "y"], "c": ["x", "y", "z"], "d": ["x", "v"], "e": ["w"], "f": ["w"]}
    assert in_turn(chains) == ["c", "f", "d"]
    assert in_turn({"a": ["x"]}) == ["a"] and in_turn({}) == []


def test_what_each_stage_adds_is_told(folder: Path) -> None:
    path = experiment(folder, seeds=[0], after={"two": "one", "one": "none"})
    finish(folder / "runs/micro", {})
    outcomes = {"none": [0, 1, 0], "one": [1, 1, 0]}
    for arm, values in outcomes.items():
        run = list(chain(read(path), "small", arm, 0))[-1]
        finish(folder / "runs" / run.name, {"edit_success": values, "preservation": values})
    assert main(["-c", str(path), "--table"]) == 0
    text = (folder / "runs/experiments/small/results.md").read_text()
    assert "| one | none | +0.333 (+0.000 to +1.000) | +0.333 (" in text and "| two |" not in text
    [stage] = json.loads((folder / "runs/experiments/small/results.json").read_text())["stages"]
    assert (stage["arm"], stage["before"]) == ("one", "none") and stage["gains"]["edit"][0] == pytest.approx(1 / 3)


def test_metaquerys_arms_differ_from_the_joint_stage_in_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = read(Path("configs/experiments/metaquery.yaml"))
    settings = {}
    for arm in found.arms:
        last = [*chain(found, "metaquery", arm, 0)][-1].content
        settings[arm] = {k: last["model"]["init_args"].get(k) for k in ("train", "reference", "reconstruction")}
        assert last["trainer"]["max_steps"] == 1500 and last["model"]["init_args"]["optimizer"]["lr"] == 1e-3
        assert {"text_to_image", "edit"} == set(last["data"]["init_args"]["ratio"])
    both = {"train": ["connector", "transformer"], "reference": "both", "reconstruction": None}
    assert settings["picture to both, both tuned"] == settings["light head first"] == both
    assert settings["picture to the VLM"] == both | {"reference": "vlm"}
    assert settings["transformer frozen"] == both | {"train": ["connector"]}
    assert settings["a share of reconstructions"] == both | {"reconstruction": 0.2}
