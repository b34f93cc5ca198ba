"""python -m data_pipeline build | inspect."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.executors.local import leftovers, summary
from data_pipeline.inspect import inspect
from data_pipeline.recipe import load_recipe


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command and its options; what `build` does not know is left for the recipe's source."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="any source in, shards out", allow_abbrev=False)
    build.add_argument("-c", "--config", required=True, type=Path, help="a recipe of configs/data")
    build.add_argument("--output", required=True, type=Path, help="a new folder for the shards")
    build.epilog = "Options of the recipe's source go as --source.NAME VALUE."
    look = commands.add_parser("inspect", help="counts, and one HTML page of thumbnails")
    look.add_argument("folder", type=Path, help="a folder of shards")
    look.add_argument("--limit", type=int, default=48, help="records on the page")
    arguments, rest = parser.parse_known_args(argv)
    unknown = [option for option in rest if option.startswith("--") and not option.startswith("--source.")]
    if unknown or (rest and arguments.command != "build"):
        parser.error(f"unknown options: {' '.join(unknown or rest)}")
    return arguments, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; a user's mistake is one line and exit status 2."""
    arguments, rest = parse(argv)
    try:
        if arguments.command == "inspect":
            print(inspect(arguments.folder, arguments.limit))
            return 0
        manifest = load_recipe(arguments.config, rest).build(arguments.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; check the path, its permissions and the space left", file=sys.stderr)
        return 2
    print(summary(manifest))
    if manifest.get("reused"):
        print("nothing to do: this build was finished before; to build changed input, choose a new --output")
    for path in leftovers(arguments.output):
        print(f"unfinished: {path} is left of a build that was killed, or of one that runs now; remove the former")
    count, output = len(manifest["shards"]), arguments.output
    print(f"{count} shards in {output}; look: python -m data_pipeline inspect {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
