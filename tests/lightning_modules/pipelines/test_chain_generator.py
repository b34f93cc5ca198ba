"""A generator of chains for the data pipeline, and engines that sample answers."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from chains import folder
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.length_control import Brevity
from data_pipeline.recipe import load_recipe
from data_pipeline.records import EncodedImage, ReasoningRecord
from data_pipeline.steps.distill_chains import EndpointJudge
from lightning_modules.networks.layout import Layout
from lightning_modules.networks.r1v import CLOSE, R1VModel, end_of_thoughts
from lightning_modules.pipelines import answering
from lightning_modules.pipelines.answering import Decoding, TransformersEngine, VllmEngine
from lightning_modules.pipelines.chain_generator import ChainGenerator

RECIPE = Path(__file__).parents[3] / "configs" / "data" / "distill_chains_sd35m.yaml"


def record(key: str, text: str = "<image>how many?", pictures: int = 1) -> ReasoningRecord:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    shown = (EncodedImage(buffer.getvalue(), "png"),) * pictures
    return ReasoningRecord(key, shown, (("user", text), ("assistant", "two")))


def test_each_record_is_answered_under_its_own_control() -> None:
    generator = ChainGenerator(folder(), TransformersEngine(), Decoding(8, temperature=0.0), context=128)
    records = [record(f"r-{i}") for i in range(3)]
    plain, strong, again = generator.generate(records, [Brevity(), Brevity(1.9), Brevity()])
    assert plain == again != strong  # three times the same question
    ended, *_ = generator.generate(records[:1], [Brevity(end_bias=1e3)])
    assert ended.text.replace(CLOSE, "").replace(".\n", "") == "" and ended.tokens == 8
    assert plain.tokens == 8 and not plain.ended and generator.fingerprint


def test_what_cannot_be_asked_says_why() -> None:
    generator = ChainGenerator(folder(), TransformersEngine(), Decoding(8), context=64)
    missing, long, sound = generator.generate(
        [record("a", pictures=0), record("b", "<image>" + "how many? " * 40), record("c")], [Brevity()] * 3
    )
    assert missing.refused.startswith("missing picture") and long.refused.startswith("too long")
    assert not sound.refused and sound.tokens


def test_an_engine_is_chosen_and_vllm_gets_a_frozen_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM says is read as what the model itself says."""
    end = R1VModel.from_folder(folder()).tokenizer.eos_token_id
    told: list[SimpleNamespace] = []

    def generate(prompts: list, settings: SimpleNamespace) -> list:
        told.append(settings)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[40, 41, end])]) for _ in prompts]

    fake = SimpleNamespace(SamplingParams=lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setattr(VllmEngine, "loaded", lambda self: (fake, SimpleNamespace(generate=generate)))
    generator = ChainGenerator(folder(), VllmEngine("models/llm"), Decoding(8), context=128)
    first, second = generator.generate([record("a"), record("b")], [Brevity(), Brevity(1.5)])
    assert first == second and first.ended and first.tokens == 3
    assert [settings.repetition_penalty for settings in told] == pytest.approx([1.0, 1.5])
    assert not any(p.requires_grad for p in generator._model.parameters())


def test_the_full_size_recipe_generates_by_vllm_and_is_judged_behind_an_endpoint(tmp_path: Path) -> None:
    [distil, columns] = load_recipe(RECIPE, ["--source.path", str(tmp_path)]).steps
    assert isinstance(distil.generator.engine, VllmEngine) and isinstance(distil.judge, EndpointJudge)
    assert distil.graded == "score" and "score" in columns.names and distil.control.scores == "data/my_reasoning"
    sft = yaml.safe_load((RECIPE.parents[1] / "sd35m" / "r1v_sft.yaml").read_text())["model"]["init_args"]
    assert distil.generator.engine.language == sft["language"] and distil.generator.context == sft["context"]
    other = RECIPE.read_text().replace("lightning_modules.pipelines.answering.VllmEngine", "subprocess.Popen")
    (tmp_path / "other.yaml").write_text(other)
    with pytest.raises(InputError, match=r"engine.class_path is subprocess.Popen; it must start with"):
        load_recipe(tmp_path / "other.yaml", ["--source.path", str(tmp_path)])


def model_and_prompts() -> tuple[R1VModel, list]:
    model = R1VModel.from_folder(folder())
    shown = [torch.full((3, 64, 64), value, dtype=torch.uint8) for value in (10, 200)]
    return model, [Layout.of(model).prompt([("user", "<image>what?")], [each]) for each in shown]


def test_answers_never_hold_a_pictures_token_and_a_bias_ends_thoughts() -> None:
    model, prompts = model_and_prompts()
    found = TransformersEngine().answers(model, prompts, 8, Decoding(12), 0)
    assert len(found) == 16 and all(model.image_token not in tokens for tokens in found)
    biased = TransformersEngine().answers(model, prompts, 1, Decoding(4, 0.0, end_bias=1e3), 0)
    assert all(set(tokens.tolist()) <= set(end_of_thoughts(model.tokenizer)) and len(tokens) == 4 for tokens in biased)
    again = TransformersEngine().answers(model, prompts, 8, Decoding(12), 0)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_thoughts_end_with_the_end_of_a_line() -> None:
    tokenizer = R1VModel.from_folder(folder()).tokenizer
    assert tokenizer.convert_ids_to_tokens(end_of_thoughts(tokenizer)) == [".Ċ", CLOSE]
    blind = SimpleNamespace(  # to line ends
        name_or_path="blind",
        unk_token_id=None,
        convert_tokens_to_ids=lambda token: 7,
        convert_ids_to_tokens=lambda number: CLOSE,
        encode=lambda text, add_special_tokens: [5, 7],
        decode=lambda tokens: ".",
    )
    assert end_of_thoughts(blind) == [7]


def test_vllm_gets_embeddings_and_never_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        """What of vLLM is called."""

        def __init__(self, **options: object) -> None:
            self.options = options

        def generate(self, prompts: list, settings: SimpleNamespace) -> list:
            assert settings.n == 2 and settings.max_tokens == 5
            biases.append(settings.logit_bias)
            return [
                SimpleNamespace(outputs=[SimpleNamespace(token_ids=[i, len(p["prompt_embeds"])]) for i in range(2)])
                for p in prompts
            ]

    biases: list[dict[int, float]] = []
    fake = SimpleNamespace(LLM=Fake, SamplingParams=lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    model, prompts = model_and_prompts()
    model.requires_grad_(False)
    engine = VllmEngine("models/llm", {"tensor_parallel_size": 8})
    found = engine.answers(model, prompts, 2, Decoding(5), 0)
    assert [tokens.tolist() for tokens in found] == [[i, len(p.input_ids)] for p in prompts for i in range(2)]
    assert engine._engine.options == {"model": "models/llm", "enable_prompt_embeds": True, "tensor_parallel_size": 8}
    engine.answers(model, prompts, 2, Decoding(5, end_bias=3.0), 0)
    never = {model.image_token: -100.0}
    assert biases == [never, {**never, **dict.fromkeys(end_of_thoughts(model.tokenizer), 3.0)}]
    # A tokenizer to which the end of thoughts is no token is asked for none.
    monkeypatch.setattr(answering, "end_of_thoughts", lambda *_: pytest.fail("the end of thoughts was looked for"))
    engine.answers(model, prompts, 2, Decoding(5), 0)
    model.language.requires_grad_(True)
    with pytest.raises(InputError, match="frozen language model"):
        engine.answers(model, prompts, 2, Decoding(5), 0)


def test_vllm_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="pip install vllm"):
        VllmEngine("models/llm").loaded()
