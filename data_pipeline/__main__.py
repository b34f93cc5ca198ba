"""python -m data_pipeline build | index | select | lint | inspect | cache: each says what it does and what it left."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline import foreign, lint
from data_pipeline.encode import Encoding
from data_pipeline.errors import InputError
from data_pipeline.executors.build import Executor, summary
from data_pipeline.executors.local import Local
from data_pipeline.executors.on_ray import Ray
from data_pipeline.inspect import inspect
from data_pipeline.recipe import load_recipe, load_selection
from data_pipeline.select import report, select

ENCODERS = "lightning_modules.pipelines.encoders"


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command and its options; dotted options are left for the source of a recipe, or for the rules."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    build = command("build", "any source in, shards out; options of the source go as --source.NAME VALUE")
    build.add_argument("-c", "--config", required=True, type=Path, help="a recipe of configs/data")
    build.add_argument("--output", required=True, type=Path, help="a new folder for the shards")
    build.add_argument("--executor", choices=["local", "ray"], default="local")
    build.add_argument("--workers", type=int, default=0, help="processes or actors; 0: one for each processor")
    build.add_argument("--gpus", type=float, default=0.0, help="GPUs an actor of Ray takes, fractions allowed")
    index = command("index", "indexes tars by others where they lie, by their headers alone")
    index.add_argument("tars", nargs="+", help="tars, folders of tars or URLs; {0000..0009} stands for a range")
    index.add_argument("--output", required=True, type=Path, help="a folder for the indexes")
    choose = command("select", "decides which records to train on; rules go as --rules.NAME VALUE")
    choose.add_argument("folder", type=Path, help="a folder of shards or indexes")
    choose.add_argument("-c", "--config", type=Path, help="rules, such as configs/data/select.yaml")
    check = command("lint", "names every defect of tars, ours or by others")
    check.add_argument("folder", type=Path, help="a tar or a folder of tars")
    look = command("inspect", "counts, and one HTML report")
    look.add_argument("folder", type=Path, help="a folder of shards or indexes")
    look.add_argument("--limit", type=int, default=48, help="records on the page")
    encode = command("cache", "encodes pictures and texts once, ahead of training")
    encode.add_argument("shards", nargs="+", help="folders of shards or indexes")
    encode.add_argument("--output", required=True, type=Path, help="folder of the cache")
    encode.add_argument("--pretrained", required=True, help="checkpoint folder of the encoders")
    encode.add_argument("--image_size", required=True, type=int, help="pixels of the longer side")
    encode.add_argument("--size_multiple", type=int, default=32, help="both sides are multiples of it")
    encode.add_argument("--mirrored", action="store_true", help="for runs with augmentation.flip")
    encode.add_argument("--latents", default=f"{ENCODERS}.LatentEncoder", help='class of the pictures\' encoder, or ""')
    encode.add_argument("--texts", default=f"{ENCODERS}.TextEncoder", help='class of the texts\' encoder, or ""')
    encode.add_argument("--index_root", type=Path, default=Path("data/index"), help="as data.index_root of the run")
    encode.add_argument("--device", default="auto", help="what encodes: auto is a GPU where there is one")
    arguments, rest = parser.parse_known_args(argv)
    prefix = {"build": "--source.", "select": "--rules."}.get(arguments.command, "--none.")
    unknown = [option for option in rest if option.startswith("-") and not option.startswith(prefix)]
    if unknown or (rest and not rest[0].startswith(prefix)):
        parser.error(f"unknown options: {' '.join(unknown or rest)}")
    return arguments, rest


def chosen_executor(arguments: argparse.Namespace) -> Executor:
    """What runs the tasks."""
    if arguments.workers < 0 or arguments.gpus < 0:
        raise InputError(f"--workers and --gpus must be 0 or more, got {arguments.workers} and {arguments.gpus:g}")
    workers = arguments.workers or len(os.sched_getaffinity(0))
    return Ray(workers, gpus=arguments.gpus) if arguments.executor == "ray" else Local(workers)


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Runs a command and returns its exit status."""
    match arguments.command:
        case "build":
            return run_build(arguments, rest)
        case "index":
            print(foreign.index(arguments.tars, arguments.output))
            print(f"indexes in {arguments.output}; look: python -m data_pipeline inspect {arguments.output}")
        case "select":
            funnel = select(arguments.folder, load_selection(arguments.config, rest))
            print(f"{report(funnel)}\nkept records in {arguments.folder / 'keep.parquet'}, which training honours")
        case "lint":
            return lint.main(arguments.folder)
        case "inspect":
            print(inspect(arguments.folder, arguments.limit))
        case "cache":
            options = {name: value for name, value in vars(arguments).items() if name != "command"}
            print(Encoding(**options).run())
    return 0


def run_build(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Builds shards by a recipe."""
    recipe, executor, output = load_recipe(arguments.config, rest), chosen_executor(arguments), arguments.output
    print(f"building {output} from {type(recipe.source).__name__} by {executor}")
    manifest = recipe.build(output, executor)
    print(summary(manifest))
    if manifest.get("reused"):
        print("nothing to do: this build was finished before; to build changed input, choose a new --output")
    print(f"{len(manifest['shards'])} shards in {output}; look: python -m data_pipeline inspect {output}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; a user's mistake is one line and exit status 2."""
    arguments, rest = parse(argv)
    try:
        return run(arguments, rest)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}; check the path, its permissions and the space left", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
