"""python -m data_pipeline build | score | index | select | lint | inspect | cache: each says what it does and left."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from data_pipeline import foreign, lint
from data_pipeline.errors import InputError
from data_pipeline.executors.build import Executor, summary
from data_pipeline.executors.local import Local
from data_pipeline.executors.on_ray import Ray
from data_pipeline.index import KEEP, SUFFIX
from data_pipeline.inspect import inspect
from data_pipeline.recipe import load_recipe, load_scoring, load_selection, share_of_rejected
from data_pipeline.score import score, unscored
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
    build.add_argument("--max_rejected", type=float, help="share of rejected records that stops it, not the recipe's")
    scoring = command("score", "adds columns to the indexes of shards or of tars elsewhere; no tar is written")
    scoring.add_argument("folder", type=Path, help="a folder of shards or indexes")
    scoring.add_argument("-c", "--config", required=True, type=Path, help="a recipe, for its steps that score")
    for each in (build, scoring):
        each.add_argument("--executor", choices=["local", "ray"], default="local")
        each.add_argument("--workers", type=int, default=0, help="processes or actors; 0: one for each processor")
        each.add_argument("--gpus", type=float, default=0.0, help="GPUs an actor of Ray takes, fractions allowed")
    index = command("index", "indexes tars by others where they lie, by their headers alone")
    index.add_argument("tars", nargs="+", help="tars, folders of tars or URLs; {0000..0009} stands for a range")
    index.add_argument("--output", required=True, type=Path, help="a folder for the indexes")
    choose = command("select", "decides which records to train on; rules go as --rules.NAME VALUE")
    choose.add_argument("folders", nargs="+", type=Path, help="folders of shards or indexes, compared with each other")
    choose.add_argument("-c", "--config", type=Path, help="rules, such as configs/data/select_edit.yaml")
    check = command("lint", "names every defect of tars, ours or by others")
    check.add_argument("folder", type=Path, help="a tar or a folder of tars")
    for each in (index, check):
        each.add_argument("--layout", default="text_image", help="what a sample by others is, as of a source")
        each.add_argument("--columns", type=columns, default={}, help="""such as '{"sources": "src.jpg"}'""")
    look = command("inspect", "counts, and one HTML report")
    look.add_argument("folder", type=Path, help="a folder of shards or indexes")
    look.add_argument("--limit", type=int, default=48, help="records on the page")
    encode = command("cache", "encodes pictures and texts once, ahead of training")
    encode.add_argument("shards", nargs="+", help="folders of shards or indexes")
    encode.add_argument("--output", required=True, type=Path, help="folder of the cache")
    encode.add_argument("--pretrained", required=True, help="checkpoint folder of the encoders")
    encode.add_argument("--image_size", required=True, type=int, help="pixels of the longer side")
    encode.add_argument("--size_multiple", type=int, default=32, help="both sides are multiples of it")
    encode.add_argument("--no_upscale", dest="upscale", action="store_false", help="for runs with data.upscale false")
    encode.add_argument("--mirrored", action="store_true", help="for runs with augmentation.flip")
    encode.add_argument("--latents", default=f"{ENCODERS}.LatentEncoder", help='class of the pictures\' encoder, or ""')
    encode.add_argument("--texts", default=f"{ENCODERS}.TextEncoder", help='class of the texts\' encoder, or ""')
    kinds = ["float32", "bfloat16"]
    encode.add_argument("--text_precision", choices=kinds, default=kinds[0], help="as model.compute.frozen of the run")
    encode.add_argument("--index_root", type=Path, default=Path("data/index"), help="as data.index_root of the run")
    encode.add_argument("--device", default="auto", help="what encodes: auto is a GPU where there is one")
    arguments, rest = parser.parse_known_args(argv)
    prefix = {"build": "--source.", "select": "--rules."}.get(arguments.command, "--none.")
    names = [option for option in rest if re.match(r"-(?![\d.])", option)]  # -1 is a value
    unknown = [option for option in names if not option.startswith(prefix)]
    if unknown or (rest and not rest[0].startswith(prefix)):
        parser.error(f"unknown options: {' '.join(unknown or rest)}")
    return arguments, rest


def columns(text: str) -> dict[str, str | list[str]]:
    """Columns or members by role, from JSON or YAML; argparse reports what is neither."""
    found = yaml.safe_load(text)
    if not isinstance(found, dict):
        raise ValueError
    listed = [name for value in found.values() for name in (value if isinstance(value, list) else [value])]
    if not all(isinstance(name, str) for name in [*found, *listed]):
        raise ValueError
    return found


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
        case "score":
            steps, executor = load_scoring(arguments.config), chosen_executor(arguments)
            print(f"scoring {arguments.folder} by {', '.join(type(step).__name__ for step in steps)} by {executor}")
            print(score(arguments.folder, steps, executor), unscored(arguments.folder), sep="\n")
            print(f"columns in {arguments.folder}/*{SUFFIX}; look: python -m data_pipeline inspect {arguments.folder}")
        case "index":
            print(f"indexing {' '.join(arguments.tars)} into {arguments.output}, as {arguments.layout}")
            print(foreign.index(arguments.tars, arguments.output, arguments.layout, arguments.columns))
            print(f"indexes in {arguments.output}; look: python -m data_pipeline inspect {arguments.output}")
        case "select":
            rules, named = load_selection(arguments.config, rest), " ".join(map(str, arguments.folders))
            print(f"selecting from {named} by {rules}")
            print(report(select(arguments.folders, rules)))
            print(f"kept records in {KEEP} of {named}, which training honours")
        case "lint":
            print(f"reading every byte of the tars of {arguments.folder}")
            return lint.main(arguments.folder, arguments.layout, arguments.columns)
        case "inspect":
            print(f"inspecting {arguments.folder}: a page of {arguments.limit} records")
            print(inspect(arguments.folder, arguments.limit))
        case "cache":
            from data_pipeline.encode import Encoding  # brings torch, which no other command waits for

            print(f"encoding {' '.join(arguments.shards)} into {arguments.output} by {arguments.pretrained}")
            options = {name: value for name, value in vars(arguments).items() if name != "command"}
            print(Encoding(**options).run())
    return 0


def run_build(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Builds shards by a recipe."""
    recipe, executor, output = load_recipe(arguments.config, rest), chosen_executor(arguments), arguments.output
    if arguments.max_rejected is not None:
        recipe.max_rejected = share_of_rejected(arguments.max_rejected, "--max_rejected")
    print(f"building {output} from {type(recipe.source).__name__} by {executor}")
    manifest = recipe.build(output, executor)
    print(summary(manifest))
    if notes := unscored(output):
        print(notes)
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
