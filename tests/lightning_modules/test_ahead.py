"""plan, doctor and the dry run on micro configs, in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from chains import SAMPLING, grpo
from chains import folder as r1v_folder
from micro import built, built_vlm, micro_config, tiny_vlm
from micro_r1v import part, question_shards

from data_pipeline.chat import load_chats, pictures, sizes
from lightning_modules import ahead
from lightning_modules.cli import main, outlined
from lightning_modules.networks.layout import LayoutError
from lightning_modules.rollouts.settings import Sampling


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_config(tmp_path_factory.mktemp("ahead"))


@pytest.fixture(autouse=True)
def here(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.parents[1])


def changed(config: Path, target: Path, **changes: object) -> Path:
    content = yaml.safe_load(config.read_text())
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        place = content
        for name in path:
            place = place[name]
        place[last] = value
    target.write_text(yaml.safe_dump(content))
    return target


def test_plan_prints_what_a_run_needs_and_loads_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-c", str(config), "--trainer.max_steps", "100", "--memory_gib", "2"]) == 0
    printed = capsys.readouterr().out
    for text in ("parameters", "optimiser", "activations, edit x 2", "TFLOP a sample", "100 steps", "a checkpoint"):
        assert text in printed
    assert "fits in 2 GiB" in printed


def test_eight_gpus_are_planned_without_one(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--trainer.devices", "8", "--trainer.accelerator", "gpu", "--trainer.strategy", "ddp"]
    assert main(["plan", "-c", str(config), *argv]) == 0
    assert "plan for 8 devices (DDP)" in capsys.readouterr().out


def test_doctor_finds_nothing_wrong_here(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-c", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "versions" in printed and "all parts whole" in printed and "BAD" not in printed
    assert main(["doctor"]) == 0


def test_doctor_names_missing_gpus(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    argv = ["--trainer.devices", "8", "--trainer.accelerator", "gpu"]
    assert main(["doctor", "-c", str(config), *argv]) == 1
    assert "BAD  devices" in capsys.readouterr().out


def test_groups_that_devices_cannot_share_are_found() -> None:
    [found] = ahead.shared(Sampling(groups=48, micro_groups=1), 7)
    assert "groups 48 cannot be shared by 7 devices" in found.found and "nearest are groups 42 or 49" in found.found
    assert not [*ahead.shared(Sampling(groups=48, micro_groups=2), 8)] and not [*ahead.shared(None, 7)]


def test_a_dry_run_of_a_good_config_finds_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", str(config), "--dry_run"]) == 0
    assert "no problem found" in capsys.readouterr().out
    assert not Path("runs").exists()


def test_a_dry_run_lists_every_bad_field(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = changed(
        config,
        tmp_path / "bad.yaml",
        model__init_args__optimizer={"lr": -1.0},
        model__init_args__stepz=3,
        data__init_args__batch_size=0,
        trainer__precison="32-true",
    )
    assert main(["fit", "-c", str(bad), "--dry_run"]) == 1
    printed = capsys.readouterr().out
    for field in (
        "model.init_args.optimizer",
        "model.init_args.stepz",
        "data.init_args.batch_size",
        "trainer.precison",
    ):
        assert f"bad.yaml: {field}: " in printed, field
    assert "4 problems" in printed


def test_a_dry_run_lists_every_bad_row(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(config.read_text())
    folder = tmp_path / "shards"
    (source,) = (Path(name) for name in content["data"]["init_args"]["shards"])
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tar = sorted(folder.glob("*.tar"))[0]
    data = bytearray(tar.read_bytes())
    places = [place for place in range(len(data)) if data[place : place + 4] == b"IDAT"]
    for place in (places[0], places[2]):
        data[place + 8 : place + 40] = bytes(32)
    tar.write_bytes(data)
    argv = ["--data.init_args.shards", f"[{folder}]", "--data.init_args.size_multiple", "8"]
    assert main(["fit", "-c", str(config), "--dry_run", *argv]) == 1
    printed = capsys.readouterr().out
    assert printed.count(tar.name) >= 2 and "data.size_multiple 8 is no multiple of" in printed


def test_overrides_of_a_refused_config_count(config: Path) -> None:
    path, overrides = ahead.config_of(["-c", str(config), "--a.b", "3", "--c.d=4"])
    assert path == config and overrides == ["--a.b=3", "--c.d=4"]


def test_what_a_config_makes_is_configured_by_nothing(config: Path) -> None:
    made = outlined(["--config", str(config)])
    assert made.model.transformer is None and made.trainer is None


def stages(config: Path, folder: Path) -> dict[str, Path]:
    """Configs of stages other than flow matching, on micro parts."""
    judged = {"class_path": "lightning_modules.edit_reward.EditRewardModule"}
    judged["init_args"] = {"pretrained": str(tiny_vlm(folder / "vlm")), "frozen": ["visual"]}
    sizes = {"num_queries": 4, "width": 16, "inner": 24, "layers": 1, "heads": 2}
    connector = {"class_path": "lightning_modules.connector.ConnectorModule"}
    connector["init_args"] = {"pretrained": str(built()), "vlm": str(built_vlm()), "connector": sizes}
    questions = {"class_path": "data_pipeline.chat_datamodule.ChatDataModule"}
    questions["init_args"] = {"shards": [str(question_shards(folder / "questions"))], "batch_size": 2}
    chat = {"class_path": "lightning_modules.reasoning.R1VModule"}
    chat["init_args"] = {
        "vision": str(part("tower")),
        "language": str(part("reasoner")),
        "context": 128,
        "max_tiles": 1,
    }
    names = {"connector": {"model": connector}, "edit_reward": {"model": judged}}
    names["r1v"] = {"model": chat, "data": questions, "benchmark": None}
    return {name: changed(config, folder / f"{name}.yaml", **changes) for name, changes in names.items()}


def test_every_stage_is_planned_looked_at_and_tried(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, path in stages(config, tmp_path).items():
        assert main(["plan", "-c", str(path)]) == 0, name
        printed = capsys.readouterr().out
        for text in (
            "parameters",
            "trained",
            "frozen",
            "optimiser",
            "activations",
            "peak, expected",
            "hours",
            "export",
        ):
            assert text in printed, (name, text)
        assert main(["doctor", "-c", str(path)]) == 0, (name, capsys.readouterr().out)
        assert "BAD" not in capsys.readouterr().out
        assert main(["fit", "-c", str(path), "--dry_run"]) == 0, (name, capsys.readouterr().out)
        capsys.readouterr()


def test_a_dry_run_counts_conversations_that_would_be_left_out(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stages(config, tmp_path)["r1v"]
    [folder] = yaml.safe_load(path.read_text())["data"]["init_args"]["shards"]
    iteration = {"verifier": "lightning_modules.rewards.answers.Accuracy", "score": "quality", "threshold": 2.0}
    asked = changed(path, tmp_path / "iteration.yaml", model__init_args__iteration=iteration)
    assert main(["fit", "-c", str(asked), "--dry_run"]) == 1
    printed = capsys.readouterr().out
    assert (
        f"{folder}: 48 of 48 conversations: without a number quality, such as " in printed and "1 problems" in printed
    )


def test_a_dry_run_measures_conversations_where_the_models_are_here(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As training would: what is longer than the context is counted before it begins."""
    path = stages(config, tmp_path)["r1v"]
    [folder] = yaml.safe_load(path.read_text())["data"]["init_args"]["shards"]
    short = changed(path, tmp_path / "short.yaml", model__init_args__context=40)
    made = outlined(["--config", str(short)])
    own, asking = made.model.planned_layout(), grpo(context=26, sampling=replace(SAMPLING, max_new_tokens=6))
    made.model.configure_model()
    asking.configure_model()
    assert own.context == 40 and vars(own) | {"tokenizer": 0} == vars(made.model.layout) | {"tokenizer": 0}
    assert vars(asking.planned_layout()) | {"tokenizer": 0} == vars(asking.layout) | {"tokenizer": 0}
    chats = load_chats([folder], {}, {})
    for module, asks, name in ((made.model, False, "sample"), (asking, True, "prompt")):
        long = 0
        for chat in chats:
            why = module.planned_layout().refused(chat.turns, sizes(chat.record), asks)
            try:
                getattr(module.layout, name)(chat.turns, pictures(chat.record))
                assert why is None
            except LayoutError as error:
                long += 1
                assert f"{why[0]}: {why[1]}" == str(error)
        assert 0 < long < len(chats), name
        if not asks:
            assert main(["fit", "-c", str(short), "--dry_run"]) == 1
            assert f"{folder}: {long} of {len(chats)} conversations: too long, such as " in capsys.readouterr().out


def test_groups_that_cannot_be_shared_are_named_by_plan_and_dry_run(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load((Path(__file__).parents[2] / "configs" / "r1v_grpo.yaml").read_text())
    content["model"]["init_args"]["pretrained"] = r1v_folder()
    content["data"]["init_args"] = {"shards": [str(question_shards(tmp_path / "questions"))], "batch_size": 2}
    content["trainer"] |= {"accelerator": "cpu", "devices": 3}
    path = tmp_path / "grpo.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["plan", "-c", str(path)]) == 2
    assert "multiple of 3 devices x 1 updates; take 15 or 18" in capsys.readouterr().err
    assert main(["fit", "-c", str(path), "--dry_run"]) == 1
    assert "plan: sampling.groups 16" in capsys.readouterr().out


def test_a_tower_that_is_trained_is_a_note_and_no_reason_against_a_run(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = {"class_path": "lightning_modules.edit_reward.EditRewardModule"}
    judged["init_args"] = {"pretrained": str(tiny_vlm(tmp_path / "vlm"))}
    path = changed(config, tmp_path / "tower.yaml", model=judged)
    assert main(["plan", "-c", str(path)]) == 2
    assert "this trains the tower too, which is possible" in capsys.readouterr().err
    assert main(["fit", "-c", str(path), "--dry_run"]) == 0


def test_a_stage_whose_models_are_not_here_is_planned_and_not_found_well(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = {"class_path": "lightning_modules.edit_reward.EditRewardModule"}
    absent["init_args"] = {"pretrained": "models/none", "lora": {"rank": 8, "targets": ["self_attn.q_proj"]}}
    path = changed(config, tmp_path / "absent.yaml", model=absent)
    assert main(["plan", "-c", str(path)]) == 0
    assert "Qwen2.5-VL-7B's sizes are assumed" in capsys.readouterr().out
    assert main(["doctor", "-c", str(path)]) == 1
    assert "there is no folder models/none" in capsys.readouterr().out
