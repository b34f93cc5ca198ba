from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from micro_r1v import RECIPE, part, root
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline.scenes import questions
from lightning_modules import pocket_llm
from lightning_modules.pocket_llm import PARTS, Recipe, conversation, documents, resolve


def test_parts_share_a_vocabulary_and_have_manners_of_their_own() -> None:
    base, substitute, reasoner = (AutoTokenizer.from_pretrained(part(n)) for n in ("base", "substitute", "reasoner"))
    assert base.get_vocab() == substitute.get_vocab() == reasoner.get_vocab()
    asked = [{"role": "user", "content": "what is top left?"}]
    ends = [t.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) for t in (substitute, reasoner)]
    assert ends[0].endswith("<|im_start|>assistant\n") and ends[1].endswith("<|Assistant|><think>\n")
    text = "ein Bär 🐻 says \\boxed{2}\n"
    assert base.decode(base(text, add_special_tokens=False)["input_ids"]) == text  # no text is unknown


def test_models_are_asked_in_the_tokens_that_their_base_learned_from() -> None:
    """Loaded beside a model, a tokenizer is that of the model's kind, which may cut texts otherwise."""
    learned = PreTrainedTokenizerFast(tokenizer_file=str(part("base") / "tokenizer.json"))
    rng = random.Random(0)
    texts = ["".join(text for text, _ in documents(rng, 1)) for _ in range(100)]
    texts += [text for manner in ("chat", "think") for _ in range(100) for _, text in conversation(rng, 1, manner)]
    assert any(digit in text for digit in "0123" for text in texts)
    for name in ("base", "reasoner", "substitute"):
        asked = AutoTokenizer.from_pretrained(part(name))
        for text in texts:
            ids = learned(text, add_special_tokens=False)["input_ids"]
            assert asked(text, add_special_tokens=False)["input_ids"] == ids, text


def test_a_part_is_built_once_and_after_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def make(folder: Path, parts: Path, recipe: object) -> None:
        built.append(folder.name)
        folder.mkdir()

    monkeypatch.setattr(pocket_llm, "PARTS", {name: (needs, make) for name, (needs, _) in PARTS.items()})
    first = resolve("pocket/reasoner", tmp_path, RECIPE)
    assert [name.rpartition(".")[2] for name in built] == ["base", "reasoner"]
    assert resolve("pocket/reasoner", tmp_path, RECIPE) == first and len(built) == 2
    resolve("pocket/substitute", tmp_path, RECIPE)
    assert built[2:] == ["substitute"]

    def broken(folder: Path, parts: Path, recipe: object) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(pocket_llm, "PARTS", {**PARTS, "other_base": ((), broken)})
    with pytest.raises(KeyboardInterrupt):
        resolve("pocket/other_base", tmp_path, RECIPE)
    assert sorted(p.name for p in first.parent.iterdir()) == ["base", "reasoner", "substitute"]  # no half of a part


def test_an_interrupted_build_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pocket_llm, "KEEP_EVERY", 2)
    recipe = replace(RECIPE, language=replace(RECIPE.language, base_steps=5))
    whole = resolve("pocket/base", tmp_path / "whole", recipe)
    asked = pocket_llm.conversation

    def interrupted(rng: random.Random, level: int, manner: str) -> list[tuple[str, str]]:
        if list((tmp_path / "two").glob("*/.base.pt")):
            raise KeyboardInterrupt
        return asked(rng, level, manner)

    monkeypatch.setattr(pocket_llm, "conversation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve("pocket/base", tmp_path / "two", recipe)
    monkeypatch.setattr(pocket_llm, "conversation", asked)
    resumed = resolve("pocket/base", tmp_path / "two", recipe)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert sorted(p.name for p in resumed.parent.iterdir()) == ["base"]


def test_parts_are_built_anew_where_what_decides_them_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe()
    languages, tower = recipe.language.name, recipe.tower.name
    assert replace(recipe.language, tuned_lr=1e-3).name != languages and replace(recipe.tower, patch=16).name != tower
    assert (Recipe().language.name, Recipe().tower.name) == (languages, tower)
    monkeypatch.setattr(questions, "DESCRIBE", "say what there is.")
    assert recipe.language.name != languages and recipe.tower.name == tower


def test_a_path_is_a_path() -> None:
    assert resolve("models/Qwen2.5-32B-Instruct") == Path("models/Qwen2.5-32B-Instruct")
    assert resolve("pocket/123/vae") == Path("pocket/123/vae")


def test_other_ancestry_is_another_start_and_tuning_stays_near_the_base() -> None:
    base, other, reasoner = (
        AutoModelForCausalLM.from_pretrained(part(n)).state_dict()["model.layers.0.mlp.up_proj.weight"]
        for n in ("base", "other_base", "reasoner")
    )
    assert (base - other).norm() > 0.5 * base.norm()
    assert 0 < (base - reasoner).norm() < 0.1 * base.norm()
    spoken = [
        AutoModelForCausalLM.from_pretrained(part(n)).get_input_embeddings().weight
        for n in ("base", "reasoner", "substitute")
    ]
    assert torch.equal(spoken[0], spoken[1]) and torch.equal(spoken[0], spoken[2])


def test_what_models_learn_from() -> None:
    rng = random.Random(0)
    for _ in range(50):
        pieces = documents(rng, 1)
        assert not pieces[0][1] and pieces[-1][1]  # the scene is given, the last answer learned
    thought = conversation(rng, 1, "think")
    assert thought[1][1].startswith("<think>\n") and "\\boxed{" in thought[1][1]
    assert root().is_dir() and torch.is_grad_enabled()
