from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from micro_r1v import micro_r1v, part
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from lightning_modules.networks.layout import Layout, Sample, packed, prompts
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.networks.r1v import IMAGE, R1VModel, add_image_tokens, make_language, make_projector, positions
from lightning_modules.networks.vision import INTERN, intern_config, make_tower, pixel_unshuffle

VISION = {
    "model_type": INTERN, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip


# What R1V's successors reason with beside Qwen2; a head's size may be another than width / heads.
LANGUAGES = {"qwen2": Qwen2Config, "llama": LlamaConfig, "qwen3": partial(Qwen3Config, head_dim=8)}


def released(path: Path, family: str = "qwen2", tied: bool = False, **vision: object) -> R1VModel:
    """A tiny model written to `path` in the released layout."""
    tokenizer = AutoTokenizer.from_pretrained(part("reasoner"))
    language = LANGUAGES[family](
        vocab_size=len(tokenizer) + 3, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    ).to_dict()  # fmt: skip
    config = {"model_type": "internvl_chat", "vision_config": {**VISION, **vision}, "llm_config": language}
    config |= {"downsample_ratio": 0.5, "force_image_size": 56}
    torch.manual_seed(0)
    tower, model = make_tower(config["vision_config"]), make_language(language)
    found = R1VModel(tower, make_projector(config, 16, 32), model, tokenizer, config).eval()
    for p in found.parameters():
        nn.init.normal_(p, std=0.2)
    found.save_pretrained(path)
    return found


def library_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a released folder by the names of transformers' InternVL, written out by hand."""
    vision = {
        "embeddings.class_embedding": "embeddings.cls_token",
        "embeddings.position_embedding": "embeddings.position_embeddings",
        "embeddings.patch_embedding.weight": "embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embedding.bias": "embeddings.patch_embeddings.projection.bias",
    }
    layer = {"attn.proj": "attention.projection_layer", "norm1": "layernorm_before", "norm2": "layernorm_after"}
    layer |= {"attn.q_norm": "attention.q_norm", "attn.k_norm": "attention.k_norm", "ls1": "lambda_1"}
    layer |= {"ls2": "lambda_2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    mlp = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
    found = {}
    for name, tensor in state.items():
        head, _, rest = name.partition(".")
        if head == "mlp1":
            number, _, kind = rest.partition(".")
            found[f"model.multi_modal_projector.{mlp[number]}.{kind}"] = tensor
        elif head == "language_model":
            found["lm_head.weight" if rest == "lm_head.weight" else f"model.language_model.{rest[6:]}"] = tensor
        elif rest in vision:
            found[f"model.vision_tower.{vision[rest]}"] = tensor
        else:
            number, _, inner = rest.removeprefix("encoder.layers.").partition(".")
            at = f"model.vision_tower.encoder.layer.{number}"
            if inner.startswith("attn.qkv."):
                for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{at}.attention.{letter}_proj.{inner.removeprefix('attn.qkv.')}"] = piece
            else:
                old = next(key for key in layer if inner.startswith(key))
                found[f"{at}.{inner.replace(old, layer[old])}"] = tensor
    return found


@pytest.mark.parametrize(
    "vision", [{"qk_normalization": True, "norm_type": "rms_norm"}, {"qkv_bias": True}], ids=["6b", "300m"]
)
def test_a_released_folder_gives_the_logits_of_transformers(vision: dict, tmp_path: Path) -> None:
    released(tmp_path, **vision)
    ours = R1VModel.from_folder(tmp_path)
    config = InternVLConfig(
        vision_config=intern_config(ours.config["vision_config"]).to_dict(),
        text_config=ours.config["llm_config"],
        image_token_id=ours.image_token,
        tie_word_embeddings=False,
    )
    theirs = InternVLForConditionalGeneration(config).eval()
    theirs.load_state_dict(library_names(load_file(tmp_path / "model.safetensors")))
    pixels = torch.randn(3, 3, 56, 56)
    ids = torch.randint(20, 250, (2, 14))
    ids[0, 2:10] = ids[1, 4:8] = ours.image_token  # two pictures and one
    with torch.no_grad():
        logits = ours(ids, torch.ones_like(ids), ours.image_features(pixels))
        expected = theirs(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
    assert (logits - expected).abs().max() < 1e-5
    assert logits.std() > 0.1  # not equal because they are nothing


def shown(model: R1VModel, count: int = 2) -> list[Sample]:
    """Questions about random pictures, of different lengths."""
    layout = Layout.of(model, 64)
    pictures = torch.randint(0, 256, (count, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    asked = [[("user", "<image>" + "why? " * i + "what?"), ("assistant", "a red one")] for i in range(count)]
    return [layout.sample(turns, [picture]) for turns, picture in zip(asked, pictures, strict=True)]


@pytest.mark.parametrize("family", LANGUAGES)
def test_samples_in_a_row_do_not_see_one_another_whatever_the_language_model(family: str, tmp_path: Path) -> None:
    model = released(tmp_path, family)
    samples = shown(model)
    row = packed(samples, 64, model.pad_token)
    assert len(row.input_ids) == 1 and row.samples == 2
    with torch.no_grad():
        together = model(row.input_ids, row.attention_mask, model.image_features(row.tiles))
        for number, sample in enumerate(sorted(samples, key=len, reverse=True), start=1):
            alone = packed([sample], 64, model.pad_token)
            expected = model(alone.input_ids, alone.attention_mask, model.image_features(alone.tiles))
            assert (together[row.attention_mask == number] - expected[0]).abs().max() < 1e-5
    assert together.std() > 0.1


@pytest.mark.parametrize("family", LANGUAGES)
def test_answers_are_the_likeliest_tokens_whatever_the_language_model(family: str, tmp_path: Path) -> None:
    """Of a padded batch with a cache, as without either."""
    model = released(tmp_path, family)
    layout, pictures = Layout.of(model, 64), torch.arange(2 * 3 * 56 * 56).reshape(2, 3, 56, 56).to(torch.uint8)
    asked = [
        layout.prompt([("user", text)], [p]) for text, p in zip(("<image>a", "<image>how many?"), pictures, strict=True)
    ]
    rows = prompts(asked, model.pad_token)
    said = model.generate(rows.input_ids, rows.attention_mask, model.image_features(rows.tiles), 5, temperature=0.0)
    for sample, answer in zip(asked, said.tolist(), strict=True):
        ids = torch.tensor([sample.input_ids])
        with torch.no_grad():
            for token in answer:
                logits = model(ids, torch.ones_like(ids), model.image_features(sample.tiles))[0, -1]
                logits[model.image_token] = -torch.inf
                assert token == int(logits.argmax())
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
                if token == model.tokenizer.eos_token_id:
                    break


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", LANGUAGES)
def test_a_released_folder_of_any_language_model_is_loaded_and_plugged_together(
    family: str, tied: bool, tmp_path: Path
) -> None:
    model = released(tmp_path / "a", family, tied)
    again = R1VModel.from_folder(tmp_path / "a")
    assert type(again.language) is type(model.language) and family in type(model.language).__name__.lower()
    row = packed(shown(model), 64, model.pad_token)
    with torch.no_grad():
        logits = [m(row.input_ids, row.attention_mask, m.image_features(row.tiles)) for m in (model, again)]
    assert torch.equal(*logits)
    model.language.save_pretrained(tmp_path / "language")
    model.tokenizer.save_pretrained(tmp_path / "language")
    plugged = R1VModel.from_parts(tmp_path / "a", tmp_path / "language", tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(plugged(row.input_ids, row.attention_mask, plugged.image_features(row.tiles)), logits[0])
    loss = again(row.input_ids, row.attention_mask, again.image_features(row.tiles)).logsumexp(-1).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in again.projector.parameters())


def test_a_folder_is_written_as_it_was_read(tmp_path: Path) -> None:
    released(tmp_path / "a", qk_normalization=True)
    R1VModel.from_folder(tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    tied = micro_r1v()
    tied.save_pretrained(tmp_path / "c")
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "c" / "model.safetensors")
    again, ids = R1VModel.from_folder(tmp_path / "c"), torch.randint(20, 250, (1, 6))
    assert torch.equal(again(ids, torch.ones_like(ids)), tied(ids, torch.ones_like(ids)))


def test_a_folder_that_does_not_fit_is_named(tmp_path: Path) -> None:
    released(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("mlp1.3.bias")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: mlp1\.3\.bias"):
        R1VModel.from_folder(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"downsample_ratio"', '"select_layer": -4, "downsample_ratio"')
    )
    with pytest.raises(CheckpointError, match="select_layer -4"):
        R1VModel.from_folder(tmp_path)


def test_a_projector_is_plugged_onto_another_language_model(tmp_path: Path) -> None:
    taught = micro_r1v("substitute")
    taught.save_pretrained(tmp_path)
    plugged = R1VModel.from_parts(part("tower"), part("reasoner"), tmp_path)
    for name, tensor in plugged.projector.state_dict().items():
        assert torch.equal(tensor, taught.projector.state_dict()[name])
    own = R1VModel.from_parts(part("tower"), part("reasoner"))
    for name, tensor in plugged.language.state_dict().items():
        assert torch.equal(tensor, own.language.state_dict()[name])


def test_packed_samples_do_not_see_one_another() -> None:
    model = micro_r1v()
    own = Layout.of(model, 256)
    texts = ["<image>how many circles are there?", "what is top left?", "<image>where is the red circle?"]
    pictures = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    shown = [[pictures[0]], [], [pictures[1]]]
    samples = [
        own.sample([("user", t), ("assistant", "<think>\nso\n</think>\n2")], p)
        for t, p in zip(texts, shown, strict=True)
    ]
    rows = packed(samples, 256, model.pad_token)
    assert len(rows.input_ids) == 1
    logits = model(rows.input_ids, rows.attention_mask, model.image_features(rows.tiles))
    for number in range(1, 4):
        places = rows.attention_mask[0] == number
        alone = next(s for s in samples if s.input_ids == rows.input_ids[0, places].tolist())
        ids = torch.tensor([alone.input_ids])
        features = model.image_features(alone.tiles) if len(alone.tiles) else None
        expected = model(ids, torch.ones_like(ids), features)
        assert (logits[0, places] - expected[0]).abs().max() < 1e-5


def test_logits_are_made_where_they_are_wanted_alone() -> None:
    model = micro_r1v()
    ids, mask = torch.randint(20, 250, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    every = model(ids, mask)
    places = torch.zeros(2, 9, dtype=torch.bool)
    places[0, 3], places[1, 5:] = True, True
    assert torch.allclose(model(ids, mask, None, places), every[places], atol=1e-5)
    assert torch.allclose(model(ids, mask, None, torch.tensor([4, 8])), every[:, [4, 8]], atol=1e-5)


def test_greedy_answers_are_the_likeliest_tokens_and_sampling_leaves_the_random_state() -> None:
    model = micro_r1v()
    own = Layout.of(model, 256)
    picture = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    samples = [own.prompt([("user", "<image>how many?")], [picture]), own.prompt([("user", "what is top left?")])]
    rows = prompts(samples, model.pad_token)
    features = model.image_features(rows.tiles)
    found = model.generate(rows.input_ids, rows.attention_mask, features, max_new_tokens=5, temperature=0.0)
    for row, sample in enumerate(samples):
        ids = list(sample.input_ids)
        for token in found[row].tolist():
            shown = model.image_features(sample.tiles) if len(sample.tiles) else None
            logits = model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), shown)
            assert token == logits[0, -1].argmax()
            ids.append(token)
            if token == model.tokenizer.eos_token_id:
                break
    before = torch.get_rng_state()
    draws = [
        model.generate(rows.input_ids, rows.attention_mask, features, max_new_tokens=8, seed=seed) for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1])
    assert draws[0].shape != draws[2].shape or not torch.equal(draws[0], draws[2])


def test_what_does_not_fit_a_model_is_refused() -> None:
    model = micro_r1v()
    ids = torch.full((1, 3), model.image_token)
    with pytest.raises(CheckpointError, match="3 tokens <IMG_CONTEXT> for 0 image features"):
        model(ids, torch.ones_like(ids))
    with pytest.raises(CheckpointError, match="do not divide"):
        pixel_unshuffle(torch.zeros(1, 9, 4), (3, 3), 2)
    with pytest.raises(CheckpointError, match=r"model_type is 'resnet'"):
        make_tower({"model_type": "resnet"})


def test_a_tokenizer_without_the_pictures_tokens_gets_them_where_the_embedding_has_room(tmp_path: Path) -> None:
    shutil.copytree(part("reasoner"), tmp_path / "bare")
    text = (tmp_path / "bare" / "tokenizer.json").read_text().replace(IMAGE, "<SOMETHING>")
    (tmp_path / "bare" / "tokenizer.json").write_text(text)
    config = (tmp_path / "bare" / "tokenizer_config.json").read_text().replace(IMAGE, "<SOMETHING>")
    (tmp_path / "bare" / "tokenizer_config.json").write_text(config)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"lacks <IMG_CONTEXT>.*none to spare"):
        add_image_tokens(tokenizer, len(tokenizer))
    add_image_tokens(tokenizer, len(tokenizer) + 1)
    assert tokenizer.convert_tokens_to_ids(IMAGE) == len(tokenizer) - 1


def test_positions_begin_anew_with_each_sample() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 2, 2, 0]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 0, 1, 0]]


def test_patches_of_a_square_become_one_token() -> None:
    grid = torch.arange(16.0).view(1, 16, 1)
    assert pixel_unshuffle(grid, (4, 4), 2).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
