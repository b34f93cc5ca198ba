"""python -m lightning_modules.cli fit | validate | test | predict -c configs/<run>.yaml [dotted overrides]."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import AtomicCheckpointIO
from callbacks.checkpoint import checkpoints
from callbacks.summary import SUMMARY, Summary
from data_pipeline.errors import InputError
from lightning_modules import commands
from lightning_modules.evaluation.scenes import SceneBenchmark
from lightning_modules.networks.loading import CheckpointError

RUNS = Path("runs")


class CLI(LightningCLI):
    """LightningCLI with runs/<config>/<version>/, one seed and one number of steps for all."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--benchmark", type=SceneBenchmark | None, default=None, help="scenes to evaluate on")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("trainer.max_steps", "model.init_args.steps")
        parser.link_arguments(
            ("trainer.max_steps", "trainer.accumulate_grad_batches"), "data.init_args.steps", compute_fn=batches
        )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds what every run has: its folder, the summary at its end, and checkpoints that are never half written."""
        summary = Summary(self._get(self.config_init, "benchmark"), self._get(self.config_init, "seed_everything"))
        logger = TensorBoardLogger(save_dir=str(RUNS), name=run_name(), version=os.environ.get("RUN_VERSION"))
        plugins = [AtomicCheckpointIO()]
        trainer = super().instantiate_trainer(**{"logger": logger, "plugins": plugins, **kwargs})
        if self.subcommand == "fit":
            trainer.callbacks.append(summary)
        return trainer


def batches(steps: int, accumulation: int) -> int:
    """Batches of a run."""
    return steps * (accumulation or 1)


def run_name() -> str:
    """The config's path below configs/, without its ending: configs/sd35m/edit.yaml is sd35m/edit."""
    config = config_path(sys.argv[1:])
    if config is None:
        return "run"
    parts = config.with_suffix("").parts
    return str(Path(*parts[parts.index("configs") + 1 :])) if "configs" in parts else config.stem


def config_path(argv: Sequence[str]) -> Path | None:
    """The (last) config on a command line."""
    found = None
    for i, argument in enumerate(argv):
        if argument in ("-c", "--config") and i + 1 < len(argv):
            found = argv[i + 1]
        elif argument.startswith("--config="):
            found = argument.partition("=")[2]
    return Path(found) if found else None


def resume(argv: list[str]) -> list[str]:
    """Turns `--resume` into the newest unfinished version of the config and its newest checkpoint."""
    argv.remove("--resume")
    root = RUNS / run_name()
    versions = [v for v in root.glob("version_*") if v.is_dir() and v.name.removeprefix("version_").isdigit()]
    for version in sorted(versions, key=lambda v: int(v.name.removeprefix("version_")), reverse=True):
        saved = checkpoints(version / "checkpoints")
        if saved and not (version / SUMMARY).exists():
            os.environ["RUN_VERSION"] = version.name
            print(f"resuming {version} from {saved[-1].name}")
            return [*argv, "--ckpt_path", str(saved[-1])]
    raise InputError(f"--resume: {root} has no unfinished version with a checkpoint; leave --resume out to start one")


def quiet() -> None:
    """Silences what others print that a user can do nothing about."""
    import transformers  # slow to import

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*lru_cache.*",
        ".*tensorboardX.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; a mistake of the user's is one clear message and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    quiet()
    config = config_path(arguments)
    try:
        if config is not None and not config.is_file():
            raise InputError(f"there is no config {config}; the runs are in configs/")
        if arguments[:1] and arguments[0] in commands.COMMANDS:
            return commands.run(arguments)
        if "--resume" in arguments:
            arguments = resume(arguments)
        sys.argv[1:] = arguments
        CLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            args=None,
        )
    except ValueError as error:
        mistake = users_mistake(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return 0


def users_mistake(error: BaseException | None) -> BaseException | None:
    """The mistake behind an error, which the argument parser wraps; None where the error is not a user's."""
    while error is not None and not isinstance(error, (InputError, CheckpointError)):
        error = error.__cause__
    return error


if __name__ == "__main__":
    sys.exit(main())
