"""Rewards that models give: their numbers by hand, on micro models and a fake endpoint; what is no answer is None."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_server import Reply, Server, chat, running
from micro import micro_clip
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline import endpoint as endpoint_module
from data_pipeline.endpoint import Endpoint
from data_pipeline.errors import InputError
from data_pipeline.steps.judge import VlmJudge
from lightning_modules.pipelines.scorers import ClipEmbedder, LinearRater
from lightning_modules.rewards.models import Aesthetic, Judged, Similarity, as_arrays
from lightning_modules.rewards.protocol import Request, Reward

PICTURES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = [Request(text) for text in ("a red cat", "two dogs", "a cat")]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipEmbedder:
    return ClipEmbedder(str(micro_clip(tmp_path_factory.mktemp("clip"))))


@dataclass
class Plane:
    """Pictures point along x, or along y where they are bright; texts as they say."""

    fingerprint: str = "plane"
    calls: list[int] = field(default_factory=list)

    def images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        self.calls.append(len(pictures))
        return np.array([[0, 1] if picture.mean() > 127 else [1, 0] for picture in pictures], np.float32)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(len(texts))
        return np.array([{"x": [1, 0], "y": [0, 1], "against x": [-1, 0]}[text] for text in texts], np.float32)


def grey(*shades: float) -> Tensor:
    """(n, 3, 4, 4)."""
    return torch.tensor(shades)[:, None, None, None].expand(-1, 3, 4, 4)


def test_pictures_become_bytes_by_rounding_what_is_within_0_and_1() -> None:
    [found] = as_arrays([torch.tensor([-1.0, 0.5, 2.0])[:, None, None].expand(3, 2, 5)])
    assert found.dtype == np.uint8 and found.shape == (2, 5, 3) and found[0, 0].tolist() == [0, 128, 255]


def test_similarity_to_a_prompt_is_a_half_where_nothing_is_shared() -> None:
    embedder = Plane()
    reward = Similarity(embedder)
    assert isinstance(reward, Reward)
    requests = [Request("x"), Request("y"), Request("against x"), Request("y")]
    assert reward.score(grey(0, 0, 0, 1), requests) == [1.0, 0.5, 0.0, 1.0]
    assert embedder.calls == [4, 4]  # all pictures in one call, and all prompts


def test_similarity_to_the_source_looks_at_the_first_one_whatever_its_size() -> None:
    embedder = Plane()
    dark, bright = torch.zeros(3, 4, 4), torch.ones(3, 6, 8)
    requests = [Request("any", (dark, bright)), Request("words", (bright,))]
    assert Similarity(embedder, "source").score(grey(0, 0), requests) == [1.0, 0.5]
    assert embedder.calls == [2, 2]
    with pytest.raises(InputError, match="a prompt without one; keep it to the task edit"):
        Similarity(embedder, "source").score(grey(0, 0), [requests[0], Request("no source")])


def test_similarity_is_the_cosine_of_a_clip_brought_to_0_and_1(clip: ClipEmbedder) -> None:
    cosines = (clip.images(as_arrays(PICTURES)) * clip.texts([request.prompt for request in PROMPTS])).sum(1)
    found = Similarity(clip).score(PICTURES, PROMPTS)
    np.testing.assert_allclose(found, (1 + cosines) / 2, rtol=1e-6)
    assert all(type(value) is float and 0 <= value <= 1 for value in found)
    alone = [Similarity(clip).score(p[None], [r])[0] for p, r in zip(PICTURES, PROMPTS, strict=True)]
    np.testing.assert_allclose(found, alone, atol=1e-5)  # whoever else is in the batch
    same = [Request("", (picture,)) for picture in PICTURES]
    np.testing.assert_allclose(Similarity(clip, "source").score(PICTURES, same), 1, atol=1e-5)


def test_an_aesthetic_score_is_the_rating_over_the_highest(clip: ClipEmbedder, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1, 8), "bias": torch.tensor([6.5])}, tmp_path / "flat.safetensors")
    flat = LinearRater(clip, str(tmp_path / "flat.safetensors"))
    assert Aesthetic(flat).score(PICTURES, PROMPTS) == pytest.approx([0.65] * 3)
    save_file({"weight": torch.arange(8.0)[None], "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    rater = LinearRater(clip, str(tmp_path / "head.safetensors"))
    found = Aesthetic(rater, highest=5).score(PICTURES, PROMPTS)
    np.testing.assert_allclose(found, rater.rate(as_arrays(PICTURES)) / 5, rtol=1e-6)
    assert isinstance(Aesthetic(rater), Reward) and len(set(found)) == 3


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.01)
    with running() as state:
        yield state


def judged(server: Server, **settings: object) -> Judged:
    return Judged(VlmJudge(Endpoint(server.url, "judge", retries=1, seconds=5), **settings))  # type: ignore[arg-type]


def test_a_judges_ratings_are_joined_by_their_geometric_mean(server: Server) -> None:
    answers = {"a red cat": '{"alignment": 9, "quality": 4}', "two dogs": '{"alignment": 10, "quality": 0}'}
    answers["a cat"] = 'So be it: {"alignment": 10, "quality": 10.0}'
    server.reply = lambda text, _: chat(next(said for prompt, said in answers.items() if f'"{prompt}"' in text))
    reward = judged(server)
    assert isinstance(reward, Reward)
    assert reward.score(PICTURES, PROMPTS) == pytest.approx([0.6, 0.0, 1.0])  # in the order of the pictures
    assert len(server.asked) == 3


def test_an_edit_is_judged_by_its_sources_and_the_result_in_this_order(server: Server) -> None:
    server.reply = lambda *_: chat('{"instruction": 1, "preservation": 8, "quality": 1}')
    request = Request("make it blue", (torch.zeros(3, 4, 4), torch.ones(3, 6, 8)))
    assert judged(server).score(PICTURES[:1], [request]) == pytest.approx([0.2])  # the cube root of 8 / 1000
    *shown, text = server.asked[0]["messages"][0]["content"]
    assert len(shown) == 3 and len({picture["image_url"]["url"] for picture in shown}) == 3
    assert '"make it blue"' in text["text"] and "instruction" in text["text"]


def test_a_judge_may_have_its_own_scale_dimensions_and_name(server: Server) -> None:
    server.reply = lambda *_: chat('{"beauty": 3}')
    reward = judged(server, text_image={"beauty": "it is beautiful"}, highest=5, name="critic")
    assert reward.score(PICTURES[:1], PROMPTS[:1]) == pytest.approx([0.6])
    server.reply = lambda *_: chat("no idea")
    assert reward.score(PICTURES[:1], PROMPTS[:1]) == [None]


@pytest.mark.parametrize(
    "reply",
    [
        lambda *_: chat("I cannot judge this."),
        lambda *_: chat(""),
        lambda *_: chat(None),
        lambda *_: chat('{"alignment": 9}'),
        lambda *_: chat('{"alignment": 11, "quality": 9}'),
        lambda *_: chat('{"alignment": -1, "quality": 9}'),
        lambda *_: chat('{"alignment": "9", "quality": 9}'),
        lambda *_: chat('{"alignment": true, "quality": 9}'),
        lambda *_: chat('{"alignment": NaN, "quality": 9}'),
        lambda *_: chat('{"alignment": 9, "quality": 9} or {"alignment": 1, "quality": 1}'),
        lambda *_: chat('{"alignment": 9, "quality": 9}', finish_reason="length"),
        lambda *_: (200, {}, b"<html>"),
        lambda *_: (400, {}, b"too many pictures"),
    ],
)
def test_what_is_no_answer_is_none_and_leaves_the_others_alone(
    server: Server, reply: Callable[[str, int], Reply]
) -> None:
    good = chat('{"alignment": 9, "quality": 4}')
    server.reply = lambda text, times: reply(text, times) if "two dogs" in text else good
    assert judged(server).score(PICTURES, PROMPTS) == [pytest.approx(0.6), None, pytest.approx(0.6)]


def test_a_judge_that_asks_nothing_of_edits_has_no_score_for_them(server: Server) -> None:
    request = Request("make it blue", (torch.zeros(3, 4, 4),))
    assert judged(server, edit={}).score(PICTURES[:1], [request]) == [None] and not server.asked


def test_an_endpoint_that_serves_nobody_is_named_and_gives_no_number(server: Server) -> None:
    server.reply = lambda *_: (503, {}, b"overloaded")
    with pytest.raises(InputError, match="failed 2 times in a row"):
        judged(server).score(PICTURES[:1], PROMPTS[:1])
