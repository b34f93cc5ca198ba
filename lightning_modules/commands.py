"""Commands that need no Trainer: test an export on the benchmark, predict pictures with it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from data_pipeline.chains import split
from data_pipeline.counters import counter_seed, generator
from data_pipeline.errors import InputError
from data_pipeline.records import slug
from data_pipeline.sources.folder import EXTENSIONS
from data_pipeline.transforms import decode, fit_size
from lightning_modules.evaluation import questions
from lightning_modules.evaluation.questions import QuestionBenchmark
from lightning_modules.evaluation.scenes import SceneBenchmark, evaluate
from lightning_modules.networks.layout import MARK, Layout, LayoutError
from lightning_modules.networks.loading import CheckpointError, read_json
from lightning_modules.networks.r1v import R1VModel
from lightning_modules.pipelines import KontextPipeline, MetaqueryPipeline
from lightning_modules.pipelines.answering import Decoding, TransformersEngine
from lightning_modules.pipelines.opening import open_folder

COMMANDS = ("test", "predict")
RUNS = Path("runs")
ANSWERS = "answers.jsonl"
LONGEST_ANSWER = 4096  # tokens, where the config's benchmark says nothing


@dataclass(frozen=True)
class Request:
    """One picture to make: a prompt, and a picture to edit or None; or a question, and the picture that it is about."""

    name: str
    prompt: str
    source: Path | None
    question: bool = False


def run(argv: Sequence[str]) -> int:
    """Parses and runs one of COMMANDS."""
    parser = argparse.ArgumentParser(prog="python -m lightning_modules.cli", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name, allow_abbrev=False) for name in COMMANDS}
    for command in parsers.values():
        command.add_argument("-c", "--config", type=Path, required=True, help="the run's config")
        command.add_argument("--export", type=Path, help="checkpoint folder; default runs/<config>/latest/export")
        command.add_argument("--vlm", help="vision-language model of a Metaquery folder that comes without")
        command.epilog = "Fields of the config can be overridden, as --benchmark.count 64."
    command = parsers["predict"]
    command.add_argument("--input", type=Path, required=True, help="folder of pictures, or JSONL of prompts")
    command.add_argument("--instruction", help="the edit of every picture of a folder")
    command.add_argument("--question", help="what to ask about every picture of a folder (a Metaquery or R1V model)")
    command.add_argument("--output", type=Path, required=True, help="folder for the pictures, or for answers.jsonl")
    command.add_argument("--steps", type=positive, help="Euler steps; default the benchmark's, else 28")
    command.add_argument("--guidance", type=float, help="classifier-free guidance; default the benchmark's, else 3.5")
    command.add_argument("--negative", help="negative prompt; default the benchmark's, else the released one")
    command.add_argument("--size", type=positive, help="pixels of the longer side; default the config's image_size")
    command.add_argument(
        "--max_new_tokens", type=positive, help="longest answer; default 64, an R1V model's benchmark's"
    )
    command.add_argument("--temperature", type=temperature, help="of answers; default 0, the likeliest token each time")
    command.add_argument("--seed", type=int, default=0, help="of pictures, and of answers at a temperature above 0")
    arguments, overrides = parser.parse_known_args(argv)
    words = [word for override in overrides for word in override.split("=", 1)]
    if len(words) % 2 or not all(name.startswith("--") and "." in name for name in words[::2]):
        parser.error(f"unknown options: {' '.join(overrides)}")
    config = overridden(read_config(arguments.config), words)
    return test(arguments, config) if arguments.command == "test" else predict(arguments, config)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}; expected a whole number of at least 1")
    return int(text)


def temperature(text: str) -> float:
    """A finite number of at least 0."""
    found = float(text)
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"is {text}; expected a finite number of at least 0")
    return found


def read_config(path: Path) -> dict:
    """A run's YAML as plain data."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not {"model", "data"} <= set(content):
        raise InputError(f"{path} is not a run's config; expected YAML with model, data and trainer")
    return content


def overridden(config: dict, words: Sequence[str]) -> dict:
    """The config with overrides, alternately a dotted name ("--benchmark.count") and a value in YAML."""
    for name, value in zip(words[::2], words[1::2], strict=True):
        place(config, name.removeprefix("--"), yaml.safe_load(value))
    return config


def place(config: dict, dotted: str, value: Any) -> None:
    """Sets a field by its dotted name, such as "benchmark.count"."""
    *path, last = dotted.split(".")
    inner = config
    for key in path:
        inner = inner.setdefault(key, {})
        if not isinstance(inner, dict):
            raise InputError(f"--{dotted}: {key} is {inner!r} in the config, which has no fields")
    inner[last] = value


def run_name(config: Path) -> str:
    """A config's path below configs/, without its ending.

    >>> run_name(Path("configs/sd35m/edit.yaml"))
    'sd35m/edit'
    """
    parts = config.with_suffix("").parts
    return str(Path(*parts[parts.index("configs") + 1 :])) if "configs" in parts else config.stem


def export_folder(arguments: argparse.Namespace) -> Path:
    """--export, or that of the config's last finished run."""
    folder: Path = arguments.export or RUNS / run_name(arguments.config) / "latest" / "export"
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no export {folder}; train one (fit -c {arguments.config}) or give --export FOLDER"
        )
    return folder


def load_export(arguments: argparse.Namespace) -> KontextPipeline:
    """The pipeline of an export."""
    pipeline = open_folder(export_folder(arguments), arguments.vlm)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def test(arguments: argparse.Namespace, config: Mapping[str, Any]) -> int:
    """Prints the summary's metrics for an export."""
    settings = config.get("benchmark")
    if settings is None:
        raise InputError(f"{arguments.config} has no benchmark; test needs one, such as benchmark: {{level: 1}}")
    try:
        if "questions" in settings:
            asked = QuestionBenchmark(**settings)
            model = R1VModel.from_folder(export_folder(arguments)).to("cuda" if torch.cuda.is_available() else "cpu")
            metrics = questions.means(questions.outcomes(model, asked))
        else:
            metrics = evaluate(load_export(arguments), SceneBenchmark(**settings))
    except TypeError as error:
        raise InputError(f"{arguments.config}: benchmark: {error}") from error
    print(json.dumps(metrics, indent=2))
    return 0


def predict(arguments: argparse.Namespace, config: Mapping[str, Any]) -> int:
    """Writes a picture for each request; a picture that cannot be read is named and counted, not fatal."""
    requests = list(read_requests(arguments.input, arguments.instruction, arguments.question))
    if arguments.output.resolve() in {request.source.resolve().parent for request in requests if request.source}:
        raise InputError(f"--output {arguments.output} holds the pictures to edit; choose another folder")
    if is_r1v(export_folder(arguments)):
        return ask(arguments, config.get("benchmark") or {}, requests)
    pipeline = load_export(arguments)
    size = arguments.size or config["data"].get("init_args", {}).get("image_size")
    if not size:
        raise InputError(f"{arguments.config} has no data.init_args.image_size; give --size PIXELS")
    sampling = sampling_settings(arguments, config.get("benchmark") or {})
    asked = any(request.question for request in requests)
    if asked and not isinstance(pipeline, MetaqueryPipeline):
        raise InputError(f"{arguments.input} asks questions, which this model cannot answer; take a Metaquery model")
    decoding = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    decoding = {name: value for name, value in decoding.items() if value is not None}
    if decoding and not asked:
        raise InputError(
            f"--{next(iter(decoding))} is for answers, and {arguments.input} asks no question; leave it out"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed, answers = 0, list[str]()
    for i, request in enumerate(requests):
        try:
            source = None if request.source is None else fitted(request.source, size, pipeline.size_multiple)
        except InputError as error:
            failed += 1
            print(f"skipped: {error}", file=sys.stderr)
            continue
        if request.question:
            assert isinstance(pipeline, MetaqueryPipeline)
            drawn = counter_seed(arguments.seed, "answer", 0, i)
            answer = pipeline.ask(request.prompt, source, seed=drawn, **decoding)[0]
            answers.append(json.dumps({"name": request.name, "question": request.prompt, "answer": answer}))
            continue
        side = {} if source is not None else {"height": size, "width": size}
        picture = pipeline(
            request.prompt,
            image=source,
            generator=generator(arguments.seed, "predict", 0, i),
            return_dict=False,
            **sampling,
            **side,
        )[0][0]
        picture.save(arguments.output / f"{request.name}.png")
    if asked:
        (arguments.output / ANSWERS).write_text("\n".join([*answers, ""]), encoding="utf-8")
    made = f"{len(requests) - failed - len(answers)} pictures" + (f" and {len(answers)} answers" if asked else "")
    print(f"{made} in {arguments.output}" + (f", {failed} skipped" if failed else ""))
    return 2 if failed == len(requests) else 0


def is_r1v(folder: Path) -> bool:
    """Whether it holds a model that sees and answers, and makes no pictures."""
    return (folder / "config.json").is_file() and "llm_config" in read_json(folder / "config.json")


def ask(arguments: argparse.Namespace, benchmark: Mapping[str, Any], requests: Sequence[Request]) -> int:
    """Writes an R1V model's answer to each request; what cannot be asked is named and counted, not fatal."""
    output = arguments.output
    model = R1VModel.from_folder(export_folder(arguments)).to("cuda" if torch.cuda.is_available() else "cpu")
    layout, engine = Layout.of(model), TransformersEngine()
    longest = arguments.max_new_tokens or benchmark.get("max_new_tokens", LONGEST_ANSWER)
    decoding = Decoding(longest, temperature=arguments.temperature or 0.0)
    answers = list[str]()
    for i, request in enumerate(requests):
        try:
            shown = [] if request.source is None else [as_tensor(read_picture(request.source))]
            sample = layout.prompt([("user", f"{MARK}\n" * len(shown) + request.prompt)], shown)
        except (InputError, LayoutError) as error:
            print(f"skipped: {request.name}: {error}", file=sys.stderr)
            continue
        [said] = engine.answers(model, [sample], 1, decoding, counter_seed(arguments.seed, "answer", 0, i))
        chain = split(model.tokenizer.decode([t for t in said.tolist() if t != model.tokenizer.eos_token_id]))
        told = {"answer": chain.said.strip(), "thought": chain.thought.strip()}
        answers.append(json.dumps({"name": request.name, "question": request.prompt, **told}, ensure_ascii=False))
    output.mkdir(parents=True, exist_ok=True)
    (output / ANSWERS).write_text("".join(f"{line}\n" for line in answers), encoding="utf-8")
    failed = len(requests) - len(answers)
    print(f"{len(answers)} answers in {output / ANSWERS}" + (f", {failed} skipped" if failed else ""))
    return 2 if failed == len(requests) else 0


def as_tensor(picture: Image.Image) -> Tensor:
    """(3, h, w) uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def sampling_settings(arguments: argparse.Namespace, benchmark: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says, else how the config's benchmark samples, else the released settings."""
    given = {
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "negative_prompt": arguments.negative,
    }
    usual = {
        "num_inference_steps": benchmark.get("num_inference_steps", 28),
        "guidance_scale": [*benchmark.get("guidance_scales", []), 3.5][0],
        "negative_prompt": benchmark.get("negative_prompt"),
    }
    return usual | {name: value for name, value in given.items() if value is not None}


def fitted(path: Path, size: int, multiple: int) -> Image.Image:
    """A picture to edit, with its longer side brought to `size` by the released rule."""
    picture = read_picture(path)
    height, width = fit_size(picture.height, picture.width, size, multiple)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def read_picture(path: Path) -> Image.Image:
    """A picture at its own size."""
    try:
        return decode(path.read_bytes())
    except Exception as error:  # a decoder may raise anything
        raise InputError(f"{path} is not a readable png, jpeg or webp ({error})") from error


def read_requests(path: Path, instruction: str | None, question: str | None = None) -> Iterator[Request]:
    """Requests of a folder of pictures with one instruction or question, or of JSONL lines with a "prompt" or a
    "question", and an "image" (optional)."""
    if path.is_dir():
        pictures = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS)
        if not pictures:
            raise InputError(f"--input {path} holds no pictures; expected {', '.join(EXTENSIONS)}")
        if bool(instruction) == bool(question):
            raise InputError(
                f"--input {path} is a folder of pictures; say what to do: --instruction TEXT, or --question TEXT"
            )
        stems = Counter(picture.stem for picture in pictures)
        for picture in pictures:
            name = picture.stem if stems[picture.stem] == 1 else slug(picture.name)
            yield Request(name, instruction or question or "", picture, bool(question))
        return
    if not path.is_file():
        raise InputError(f"--input {path} does not exist; expected a folder of pictures, or a JSONL file of prompts")
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if not lines:
        raise InputError(f'--input {path} is empty; expected lines of {{"prompt": TEXT, "image": NAME (optional)}}')
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            prompt, image = row.get("prompt") or row.get("instruction"), row.get("image") or row.get("source")
            asks = prompt is None and "question" in row
            prompt = row["question"] if asks else prompt
        except (json.JSONDecodeError, AttributeError) as error:
            raise InputError(f"--input {path} line {number} is not a JSON object: {line[:60]!r}") from error
        if not isinstance(prompt, str) or not isinstance(image, str | None):
            raise InputError(
                f'--input {path} line {number} should have a "prompt" and at most one "image", got {line[:60]!r}'
            )
        yield Request(f"{number:05d}-{slug(prompt)[:40]}", prompt, path.parent / image if image else None, asks)
