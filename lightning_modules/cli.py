"""python -m lightning_modules.cli fit | validate | test | predict | plan | doctor -c configs/<run>.yaml [overrides]."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks import AtomicCheckpointIO
from callbacks.checkpoint import checkpoints
from callbacks.nonfinite import NonFiniteError
from callbacks.summary import SUMMARY, Benchmark, Summary
from data_pipeline.errors import InputError
from lightning_modules import ahead, commands, preflight
from lightning_modules.commands import RUNS
from lightning_modules.networks.loading import CheckpointError

logger = logging.getLogger(__name__)
VERSION = "_UNIPIC_LIGHTNING_VERSION"  # in the environment, so that the processes of all ranks resume the same run
# What may differ when a run is resumed: how far and on what it runs, and in which portions its data comes.
RESUMABLE = (
    "ckpt_path", "benchmark", "trainer.max_steps", "model.init_args.steps", "data.init_args.steps",
    "data.init_args.num_workers", "data.init_args.ratio", "data.init_args.mixing", "data.init_args.batch_",
    "data.init_args.cache", "data.init_args.verify", "data.init_args.index_root", "trainer.accumulate_grad_batches",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "trainer.log_every_n_steps", "trainer.enable_", "trainer.callbacks",
)  # fmt: skip


class CLI(LightningCLI):
    """LightningCLI with runs/<config>/<version>/, one seed and one number of steps for all."""

    def before_instantiate_classes(self) -> None:
        """A run that is resumed goes on by its own config, or is refused before anything of it is touched."""
        if self.subcommand == "fit":
            trainer = vars(self.config["fit"]["trainer"])
            checks = preflight.requested_devices, preflight.portions, preflight.true_precision
            for finding in (found for check in checks for found in check(trainer)):
                raise InputError(finding.found)
            for finding in preflight.cpu_precision(trainer):
                logger.warning(finding.found)
        if VERSION not in os.environ or self.subcommand != "fit":
            return
        path = RUNS / run_name() / os.environ[VERSION] / "config.yaml"
        if not path.is_file():
            return
        given = yaml.safe_load(self._parser("fit").dump(self.config["fit"], skip_none=False))
        before, now = flattened(yaml.safe_load(path.read_text(encoding="utf-8"))), flattened(given)
        changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        changed = [name for name in changed if not name.startswith(RESUMABLE)]
        if changed:
            shown = "; ".join(f"{name}: {before.get(name)} -> {now.get(name)}" for name in changed)
            raise InputError(f"--resume: {path} says otherwise ({shown}); resume without, or start a new run")

    def _parse_ckpt_path(self) -> None:
        """Leaves the checkpoint to AtomicCheckpointIO: Lightning would read it here first, unchecked, for settings."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--benchmark", type=Benchmark | None, default=None, help="what to evaluate on")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("trainer.max_steps", "model.init_args.steps")
        parser.link_arguments(
            ("trainer.max_steps", "trainer.accumulate_grad_batches"), "data.init_args.steps", compute_fn=batches
        )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds what every run has: its folder, the summary at its end, and checkpoints that are never half written."""
        summary = Summary(self._get(self.config_init, "benchmark"), self._get(self.config_init, "seed_everything"))
        fit = self.subcommand == "fit"
        board = fit and TensorBoardLogger(save_dir=str(RUNS), name=run_name(), version=os.environ.get(VERSION))
        trainer = super().instantiate_trainer(**{"logger": board, "plugins": [AtomicCheckpointIO()], **kwargs})
        if fit:
            trainer.callbacks.append(summary)
        return trainer


class OutlineCLI(CLI):
    """Parses a config and makes its module and its data, which load nothing, and no Trainer."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


def outlined(argv: Sequence[str], cli: type[CLI] = OutlineCLI) -> CLI:
    """What a command line without its command describes. InputError where it cannot be made."""
    before, sys.argv[1:] = sys.argv[1:], list(argv)
    try:
        return cli(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            parser_kwargs={"exit_on_error": False},
            run=False,
        )
    except ArgumentError as error:
        raise InputError(str(error)) from error
    finally:
        sys.argv[1:] = before


def batches(steps: int, accumulation: int) -> int:
    """Batches of a run."""
    return steps * (accumulation or 1)


def flattened(content: Any, name: str = "") -> dict[str, Any]:
    """Settings by dotted name.

    >>> flattened({"trainer": {"max_steps": 3}, "seed": 0})
    {'trainer.max_steps': 3, 'seed': 0}
    """
    if not isinstance(content, dict):
        return {name: content}
    return {k: v for key, inner in content.items() for k, v in flattened(inner, f"{name}.{key}".strip(".")).items()}


def run_name() -> str:
    """The name of the command line's config."""
    config = config_path(sys.argv[1:])
    return "run" if config is None else commands.run_name(config)


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
            os.environ[VERSION] = version.name
            print(f"resuming {version} from {saved[-1].name}")
            return [*argv, "--ckpt_path", str(saved[-1])]
    raise InputError(f"--resume: {root} has no unfinished version with a checkpoint; leave --resume out to start one")


def newest(argv: list[str]) -> list[str]:
    """Adds the newest checkpoint of the config's last finished run, unless one is named."""
    if any(argument.partition("=")[0] == "--ckpt_path" for argument in argv):
        return argv
    saved = checkpoints(RUNS / run_name() / "latest" / "checkpoints")
    if not saved:
        raise InputError(f"{RUNS / run_name()} has no finished run; train one (fit), or give --ckpt_path FILE")
    print(f"validating {saved[-1]}")
    return [*argv, "--ckpt_path", str(saved[-1])]


def quiet() -> None:
    """Silences what others print that a user can do nothing about."""
    import transformers  # slow to import

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("diffusers", "torch.utils.cpp_extension"):  # the latter looks for CUDA whether or not it is asked for
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*lru_cache.*",
        ".*tensorboardX.*",
        ".*`weights_only` was not set.*",  # our reader always sets it
        ".*your dataloader is not resumable.*",  # the plan needs no loader's state
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
        if ahead.wanted(arguments):
            return ahead.run(arguments, outlined)
        if "--resume" in arguments:
            if arguments[0] != "fit" or any(argument.startswith("--ckpt_path") for argument in arguments):
                raise InputError("--resume belongs to fit, and finds the checkpoint itself; leave --ckpt_path out")
            arguments = resume(arguments)
        elif arguments[:1] == ["validate"] and config is not None:
            arguments = newest(arguments)
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
    except (OSError, MisconfigurationException, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def users_mistake(error: BaseException | None) -> BaseException | None:
    """The mistake behind an error, which the argument parser wraps; None where the error is not a user's."""
    while error is not None and not isinstance(error, (InputError, CheckpointError)):
        error = error.__cause__
    return error


if __name__ == "__main__":
    sys.exit(main())
