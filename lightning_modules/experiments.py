"""python -m lightning_modules.experiments -c configs/experiments/<name>.yaml [--only ARM ...] [--seeds N ...]

Arms x seeds x chains of runs. Each run is a process of its own (`lightning_modules.cli fit`) under a name made of what
decides its result, so that it is run once wherever it occurs, skipped once it is finished, and resumed where it was
interrupted. The table and its chart are made of finished runs alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from jsonargparse import ArgumentParser

from callbacks.atomic import replace_file
from callbacks.checkpoint import checkpoints
from callbacks.summary import OUTCOMES, SUMMARY
from data_pipeline.errors import InputError
from lightning_modules.commands import RUNS, place, read_config, run_name
from lightning_modules.distillation_rounds import Round, folder_of
from lightning_modules.evaluation import gain_chart
from lightning_modules.evaluation.comparison import Trial, compare, markdown, record, stages
from lightning_modules.networks.loading import CheckpointError

PRETRAINED = "model.init_args.pretrained"
PREVIOUS = "previous"
LOG = "log.txt"
Value = str | bool | int | float | list | dict | None  # of a config; as Any, what names a class would become its object


@dataclass(frozen=True)
class Link:
    """One run of a chain: a config, and what is changed in it.

    Attributes:
        config: of the run.
        set: values by dotted name.
        callbacks: settings by the names of callbacks; null leaves one out, and one that the config lacks comes first.
        take: what takes the export of an earlier link of the chain, by dotted name; "previous" is the link before.
        build: folders of shards that the run needs, with the recipes that build them.
        round: shards that the run before makes first, and this one learns from.
        seed: instead of the experiment's: the run is the same for all seeds.
        in_place: the run is the one that `fit -c CONFIG` makes for everyone, with nothing changed in it.
        minutes: what it is expected to take, for the plan.
    """

    config: Path
    set: dict[str, Value] = field(default_factory=dict)
    callbacks: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    take: dict[str, str] = field(default_factory=lambda: {PRETRAINED: PREVIOUS})
    build: dict[str, Path] = field(default_factory=dict)
    round: Round | None = None
    seed: int | None = None
    in_place: bool = False
    minutes: float = 0.0


@dataclass(frozen=True)
class Experiment:
    """What is compared.

    Attributes:
        links: runs by name.
        arms: chains of links by name; the last link's outcomes are the arm's.
        baseline: the arm that others are compared with.
        columns: of the table: outcomes by title, the best of which is taken.
        seeds: of every arm.
        set: values by dotted name, in all links but those in place.
        reported: what a paper reports of arms, by title; shown beside, on its own scale.
        after: the arm that each arm goes on from, to say what its last stage adds; arms that are left out have no such
            line.
    """

    links: dict[str, Link]
    arms: dict[str, list[str]]
    baseline: str
    columns: dict[str, list[str]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    set: dict[str, Value] = field(default_factory=dict)
    reported: dict[str, dict[str, float]] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {"reported": {*self.reported}, "after": {*self.after, *self.after.values()}}
        for name, arms in named.items():
            if strangers := sorted(arms - set(self.arms)):
                raise InputError(f"{name} names {', '.join(strangers)}; the arms are {', '.join(self.arms)}")
        if self.baseline not in self.arms:
            raise InputError(f"the baseline {self.baseline} is none of the arms {', '.join(self.arms)}")
        for arm, chain in self.arms.items():
            for number, name in enumerate(chain):
                if name not in self.links:
                    raise InputError(f"arm {arm} names the link {name}; there are {', '.join(self.links)}")
                unknown = set(self.links[name].take.values()) - {PREVIOUS, *chain[:number]}
                if unknown and number:
                    raise InputError(f"arm {arm}: {name} takes from {', '.join(sorted(unknown))}, not before it there")


@dataclass(frozen=True)
class Run:
    """A link in its place in a chain; `name` is that of its folder below runs/."""

    link: Link
    name: str
    config: Path
    content: dict[str, Any]
    recipe: dict[str, Any] | None = None

    @property
    def version(self) -> Path:
        """The folder of its last finished version; before there is one, what will lead to it."""
        latest = RUNS / self.name / "latest"
        return latest.parent / latest.readlink() if latest.is_symlink() else latest

    @property
    def finished(self) -> bool:
        """Whether it has written its summary."""
        return (self.version / SUMMARY).is_file()

    @property
    def resumable(self) -> bool:
        """Whether a version of it was interrupted after a checkpoint."""
        versions = (RUNS / self.name).glob("version_*")
        return any(checkpoints(v / "checkpoints") and not (v / SUMMARY).exists() for v in versions)

    def fit(self, threads: int | None = None) -> float:
        """Runs it to its end, unless it is finished; what it prints goes to log.txt in its folder. Returns the minutes.

        Chains that share it wait for each other. `threads` are those of its process, by default as many as it likes.
        """
        log = RUNS / self.name / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(log.with_name(".lock")):
            started = time.monotonic()
            if not self.finished:
                self._fit(threads)
            return (time.monotonic() - started) / 60

    def _fit(self, threads: int | None) -> None:
        fit = ["lightning_modules.cli", "fit", "-c", str(self.config)]
        if not self.link.in_place:
            text = yaml.safe_dump(self.content, sort_keys=False, width=120)
            write(self.config, f"# python -m {' '.join(fit)}\n{text}")
        for folder, recipe in self.link.build.items():
            Path(folder).parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):  # other runs may want it too
                self.call(["data_pipeline", "build", "-c", str(recipe), "--output", folder], threads)
        if self.recipe is not None:
            output = folder_of(self.name, self.recipe)
            write(output.with_suffix(".yaml"), yaml.safe_dump(self.recipe, sort_keys=False, width=120))
            self.call(
                ["data_pipeline", "build", "-c", str(output.with_suffix(".yaml")), "--output", str(output)], threads
            )
        self.call([*fit, "--resume"] if self.resumable else fit, threads)
        if not self.finished:
            raise InputError(f"{self.name} wrote no {SUMMARY}; see {RUNS / self.name / LOG}")

    def call(self, module: Sequence[str], threads: int | None) -> None:
        """One command as a process of its own."""
        log, environment = RUNS / self.name / LOG, dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with log.open("ab") as file:
            command = [sys.executable, "-m", *module]
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            raise InputError(
                f"{self.name}: {' '.join(module[:2])} ended with status {code}: {''.join(last)} (see {log})"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing and writes the table; 1 where runs failed, 2 after a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m lightning_modules.experiments", description=__doc__)
    parser.add_argument("-c", "--config", type=Path, required=True, help="an experiment of configs/experiments")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="run these arms alone")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="in place of the config's")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="chains at a time, with as many threads for all"
    )
    parser.add_argument("--plan", action="store_true", help="say what would run, and run nothing")
    parser.add_argument("--table", action="store_true", help="write the table of what is finished, and run nothing")
    arguments = parser.parse_args(argv)
    try:
        experiment, folder = read(arguments.config), RUNS / run_name(arguments.config)
        arms, seeds = arguments.only or list(experiment.arms), arguments.seeds or experiment.seeds
        if unknown := sorted(set(arms) - set(experiment.arms)):
            raise InputError(f"--only names {', '.join(unknown)}; the arms are {', '.join(experiment.arms)}")
        if arguments.jobs < 1:
            raise InputError(f"--jobs is {arguments.jobs}; expected at least 1")
        if arguments.plan:
            print("\n".join(plan(experiment, folder.name, arms, seeds)))
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            failed = [] if arguments.table else list(run_missing(experiment, folder, arms, seeds, arguments.jobs))
            print(table(experiment, folder, seeds))
    except (InputError, CheckpointError, OSError, Timeout) as error:
        busy = f"another process runs {arguments.config}; wait for it"
        print(f"error: {busy if isinstance(error, Timeout) else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print("\n".join([*failed, f"look at {folder / 'results.md'} and {folder / 'gains.svg'}"]))
    return 1 if failed else 0


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would keep the last one without a word.

    Keys that a merge (<<) brings may be set anew: they are looked at before they are merged.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it was written."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def read(path: Path) -> Experiment:
    """An experiment's config, type-checked."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Experiment, "experiment")
    try:
        return parser.instantiate(parser.parse_object({"experiment": content})).experiment
    except InputError:
        raise
    except Exception as error:  # jsonargparse reports a user's mistake by several types
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error


def chain(experiment: Experiment, name: str, arm: str, seed: int) -> Iterator[Run]:
    """An arm's runs in turn; each knows the finished versions of those before it once it is asked for."""
    earlier: dict[str, Run] = {}
    for link_name in experiment.arms[arm]:
        link = experiment.links[link_name]
        if link.in_place:
            made = Run(link, run_name(link.config), link.config, {})
        else:
            content = effective(experiment.set, link, seed, earlier)
            decides = [content, sorted({str(run.version) for run in earlier.values()})]
            decides += [] if link.round is None else [repr(link.round), link.round.recipe.read_text(encoding="utf-8")]
            digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
            own = f"experiments/{name}/{link_name}/seed_{content['seed_everything']}-{digest}"
            recipe = None
            if link.round is not None:
                if not earlier:
                    raise InputError(f"arm {arm}: {link_name} has a round, and no run before it that could make it")
                recipe = link.round.made(str(earlier[PREVIOUS].version / "export"))
                place(content, link.round.into, [str(folder_of(own, recipe))])
            made = Run(link, own, RUNS / "configs" / f"{own}.yaml", content, recipe)
        yield made
        earlier[link_name] = earlier[PREVIOUS] = made


def effective(common: Mapping[str, Any], link: Link, seed: int, earlier: Mapping[str, Run]) -> dict[str, Any]:
    """A link's config with all that is changed in it."""
    content = read_config(link.config)
    for dotted, value in {**common, **link.set}.items():
        place(content, dotted, deepcopy(value))
    place(content, "seed_everything", seed if link.seed is None else link.seed)
    for dotted, name in link.take.items() if earlier else ():
        place(content, dotted, str(earlier[name].version / "export"))
    listed = content.get("trainer", {}).get("callbacks") or []
    for name, settings in link.callbacks.items():
        there = [entry for entry in listed if entry["class_path"].rpartition(".")[2] == name]
        if settings is None:
            listed = [entry for entry in listed if entry not in there]
        elif there:
            there[0]["init_args"] = {**there[0].get("init_args", {}), **settings}
        else:
            listed = [{"class_path": f"callbacks.{name}", "init_args": settings}, *listed]
    place(content, "trainer.callbacks", listed)
    return content


def plan(experiment: Experiment, name: str, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
    """What would run, in lines."""
    seen: dict[str, Run] = {}
    widths = [max(len(text) for text in texts) for texts in (arms, [" > ".join(experiment.arms[arm]) for arm in arms])]
    for arm in arms:
        runs = [list(chain(experiment, name, arm, seed)) for seed in seeds]
        done = sum(all(run.finished for run in one) for one in runs)
        seen |= {run.name: run for one in runs for run in one}
        links = " > ".join(experiment.arms[arm])
        yield f"{arm:<{widths[0]}}  {links:<{widths[1]}}  seeds {', '.join(map(str, seeds))}: {done} done"
    missing = [run for run in seen.values() if not run.finished]
    minutes = sum(run.link.minutes for run in missing)
    yield f"{len(seen)} runs, {len(missing)} of them to run: about {minutes:.0f} minutes"


def run_missing(
    experiment: Experiment, folder: Path, arms: Sequence[str], seeds: Sequence[int], jobs: int = 1
) -> Iterator[str]:
    """Runs what is not finished, all arms of one seed before the next; yields what failed, and goes on with others."""
    threads = None if jobs == 1 else max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // jobs)

    def run_chain(arm: str, seed: int) -> bool:
        ran = False
        for each in chain(experiment, folder.name, arm, seed):
            if not each.finished:
                ran = True
                print(f"{arm}, seed {seed}: {each.name}", flush=True)
                print(f"{each.name}: {each.fit(threads):.1f} minutes", flush=True)
        return ran

    order = in_turn({arm: experiment.arms[arm] for arm in arms})
    with ThreadPoolExecutor(jobs) as pool:
        chains = [pool.submit(run_chain, arm, seed) for seed in seeds for arm in order]
        try:
            for one in as_completed(chains):
                if isinstance(error := one.exception(), InputError):
                    print(f"  {error}", flush=True)
                    yield f"failed: {error}"
                elif one.result():
                    table(experiment, folder, seeds)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def in_turn(arms: Mapping[str, Sequence[str]]) -> list[str]:
    """The arms that must be run to have them all, in an order in which few wait for what they share.

    One whose chain begins another's is run with that one. Those of one first link stand apart, because chains that run
    at a time wait for each other where they share a run.

    >>> in_turn({"a": ["x"], "b": ["x", "y"], "c": ["x", "z"], "d": ["w"]})
    ['b', 'd', 'c']
    """
    chains = {arm: tuple(chain) for arm, chain in arms.items()}
    last = {chain: arm for arm, chain in chains.items()}  # of arms of one chain the last
    begun = {chain[:length] for chain in chains.values() for length in range(1, len(chain))}
    groups: dict[str, list[str]] = {}
    for arm, chain in chains.items():
        if chain not in begun and last[chain] == arm:
            groups.setdefault(chain[0], []).append(arm)
    return [arm for turn in zip_longest(*groups.values()) for arm in turn if arm is not None]


def table(experiment: Experiment, folder: Path, seeds: Sequence[int]) -> str:
    """Writes results.md, results.json and gains.svg of what is finished; returns the first."""
    trials: dict[str, list[Trial]] = {}
    wanted: dict[str, int] = {}
    for arm in experiment.arms:
        every = [list(chain(experiment, folder.name, arm, seed)) for seed in sorted({*experiment.seeds, *seeds})]
        runs = {one[-1].name: one for one in every}
        wanted[arm] = len(runs)
        trials[arm] = [trial(one) for one in runs.values() if all(run.finished for run in one)]
    rows = compare(trials, wanted, experiment.columns, experiment.baseline)
    added = stages(trials, experiment.columns, experiment.after) if rows else []
    plain = {"baseline": experiment.baseline, "rows": [*map(record, rows)], "stages": [asdict(each) for each in added]}
    write(folder / "results.json", json.dumps(plain, indent=2) + "\n")
    write(folder / "results.md", text := markdown(rows, experiment.baseline, experiment.reported, added))
    write(folder / "gains.svg", gain_chart.draw(rows, experiment.baseline))
    return text


def write(path: Path, text: str) -> None:
    """Replaces a file at once."""
    replace_file(path, lambda file: file.write(text.encode()))


def trial(runs: Sequence[Run]) -> Trial:
    """What a finished chain came to; what runs in place cost is not counted."""
    path = runs[-1].version / OUTCOMES
    if not path.is_file():
        raise InputError(f"{runs[-1].name} has no {OUTCOMES}: the last link of an arm needs a benchmark")
    own = [json.loads((run.version / SUMMARY).read_text()) for run in runs if not run.link.in_place]
    spent = (sum(summary.get(name) or 0 for summary in own) for name in ("evaluations", "seconds"))
    return Trial(json.loads(path.read_text()), *spent)


if __name__ == "__main__":
    sys.exit(main())
