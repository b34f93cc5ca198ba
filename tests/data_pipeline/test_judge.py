"""Models behind an endpoint: their own numbers or null, their own words or the old ones, and no key anywhere."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from chat_server import Reply, Server, chat, running
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline import endpoint as endpoint_module
from data_pipeline.endpoint import Endpoint, Unanswered, json_object, seconds_asked
from data_pipeline.errors import InputError
from data_pipeline.executors.task import Task, run_task
from data_pipeline.index import load_index, read_member
from data_pipeline.recipe import Recipe, load_recipe
from data_pipeline.records import EditRecord, EncodedImage, PromptRecord, Record, Rejected, TextImageRecord
from data_pipeline.sources import Folder
from data_pipeline.sources.protocol import Unit
from data_pipeline.steps.judge import VlmJudge
from data_pipeline.steps.quality import Quality
from data_pipeline.steps.recaption import Recaption

KEY = "s3cret-key"


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as state:
        yield state


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.01)


def picture(shade: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 128, 0)).save(buffer, form)
    return buffer.getvalue()


def captioned(number: int, caption: str = "") -> TextImageRecord:
    image = EncodedImage(picture(number), "png")
    return TextImageRecord(f"r{number}", image, caption or f"caption {number}", metadata={"row": number})


def edited(instruction: str = "make it blue") -> EditRecord:
    images = [EncodedImage(picture(1, "JPEG"), "jpg"), EncodedImage(picture(2), "png")]
    return EditRecord("e", tuple(images), EncodedImage(picture(3, "WEBP"), "webp"), instruction)


def scores(**values: Any) -> str:
    return json.dumps({"reasoning": "as seen", **values})


GOOD = scores(alignment=7, quality=8.5)


def test_scores_are_the_models_numbers_in_the_records_order(server: Server) -> None:
    def reply(text: str, times: int) -> Reply:
        number = next(i for i in range(10) if f'"caption {i}"' in text)
        time.sleep(0.02 * (10 - number))  # the first is answered last
        return chat(scores(alignment=number, quality=10 - number))

    server.reply = reply
    judge = VlmJudge(Endpoint(server.url, "judge-7b", threads=5))
    found = judge.score([captioned(i) for i in range(10)])
    assert [row["judge_alignment"] for row in found] == list(range(10))
    assert [row["judge_quality"] for row in found] == [10 - i for i in range(10)]
    assert all(row["judge_instruction"] is row["judge_preservation"] is row["judge_note"] is None for row in found)
    assert server.asked[0]["temperature"] == 0 and server.asked[0]["seed"] == 0
    assert server.asked[0]["model"] == "judge-7b" and server.asked[0]["max_tokens"] == 512
    assert server.paths == ["/v1/chat/completions"] * 10


def test_columns_name_the_model_and_the_wording_but_not_the_address() -> None:
    columns = VlmJudge(Endpoint("http://a/v1", "m")).columns()
    assert [(c.name.removeprefix("judge_"), str(c.type)) for c in columns] == [
        ("instruction", "float"),
        ("preservation", "float"),
        ("quality", "float"),
        ("alignment", "float"),
        ("note", "string"),
    ]
    revision = columns[0].metadata[b"revision"]
    assert {(c.metadata[b"scorer"], c.metadata[b"revision"]) for c in columns} == {(b"m", revision)}
    moved = VlmJudge(Endpoint("http://b/v1", "m", "KEY", 5.0, 1, 2), batch_size=3)
    assert moved.columns()[0].metadata[b"revision"] == revision and moved.endpoint == Endpoint("http://a/v1", "m")
    for other in (VlmJudge(moved.endpoint, edit={"fun": "it is fun"}), VlmJudge(moved.endpoint, highest=5)):
        assert other.columns()[0].metadata[b"revision"] != revision


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        f"Here you are:\n```json\n{GOOD}\n```\nI hope it helps.",
        f"The set {{of rules}} gives {GOOD}.",
        f'<think>Perhaps {{"alignment": 1, "quality": 1}}?</think>\n{GOOD}',
    ],
)
def test_an_object_is_found_in_prose(server: Server, content: str) -> None:
    server.reply = lambda text, times: chat(content, finish_reason="stop")
    (row,) = VlmJudge(Endpoint(server.url, "m")).score([captioned(1)])
    assert (row["judge_alignment"], row["judge_quality"], row["judge_note"]) == (7.0, 8.5, None)


@pytest.mark.parametrize(
    ("reply", "note"),
    [
        (chat("alignment: 8, quality: 9"), "expected one JSON object, got 0: alignment: 8, quality: 9"),
        (chat(f"{GOOD} or rather {GOOD}"), "got 2"),
        (chat(scores(alignment=7)), "quality is null, expected a number from 0 to 10"),
        (chat(scores(alignment=11, quality=8)), "alignment is 11, expected"),
        (chat(scores(alignment=-1, quality=8)), "alignment is -1"),
        (chat(scores(alignment="8", quality=8)), 'alignment is "8"'),
        (chat(scores(alignment=True, quality=8)), "alignment is true"),
        (chat(scores(alignment=float("nan"), quality=8)), "alignment is NaN"),
        (chat('{"alignment": 8., "quality": 8}'), "got 0"),
        (chat('{"alignment": 2, "alignment": 9, "quality": 8}'), "a name comes twice"),
        (chat(f'{{"alignment": {"9" * 5000}, "quality": 8}}'), "got 0"),
        (chat('{"a":' * 20_000), "nested too deeply"),
        (chat(f'{{"scores": {GOOD}}}'), "alignment is null"),
        (chat(GOOD, finish_reason="length"), "cut off, finish_reason is length"),
        (chat("", finish_reason="stop"), "the answer is empty"),
        (chat(None), "the answer is empty"),
        (chat("\ud800 no"), "got 0: no"),
        ((200, {}, b'{"error": "overloaded"}'), 'not a chat completion: {"error": "overloaded"}'),
        ((200, {}, b"<html>\xff"), "not a chat completion: <html>"),
        ((200, {}, b"[" * 100_000), "not a chat completion"),
        ((400, {}, b'{"error": "picture\n too large"}'), 'HTTP 400: {"error": "picture too large"}'),
        ((403, {}, b"x" * 5000), f"HTTP 403: {'x' * 200}..."),
        ((200, {}, b" " * (1 << 21)), "HTTP 200: more than 1048576 bytes"),
    ],
)
def test_anything_else_is_null_with_a_note_and_is_asked_once(server: Server, reply: Reply, note: str) -> None:
    server.reply = lambda text, times: reply
    (row,) = VlmJudge(Endpoint(server.url, "m")).score([captioned(1)])
    assert note in row["judge_note"] and row["judge_note"].encode()
    assert all(value is None for name, value in row.items() if name != "judge_note")
    assert len(server.asked) == 1


NUMBERS = st.floats(allow_nan=False) | st.integers() | st.booleans() | st.none() | st.text()


@given(st.text(), st.dictionaries(st.text(), NUMBERS | st.lists(NUMBERS)), st.text())
def test_an_object_is_read_as_it_stands_whatever_is_around_it(before: str, held: dict[str, Any], after: str) -> None:
    before, after = before.replace("{", "("), after.replace("{", "(")
    assert json_object(f"{before}{json.dumps(held)}{after}") == held


@given(st.lists(st.sampled_from([*'{}[]:,7-" x\\', '"a"', '"b"', '{"a":', "1e9"]), max_size=20).map("".join))
def test_no_answer_gives_what_it_does_not_hold(text: str) -> None:
    def parsed(part: str) -> Any:
        with suppress(ValueError):
            return json.loads(part)

    try:
        found = json_object(text)
    except Unanswered as reason:
        assert str(reason)
    else:
        assert any(parsed(text[i:j]) == found for i, j in combinations(range(len(text) + 1), 2) if text[i] == "{")


def test_pictures_arrive_byte_for_byte_and_in_order(server: Server) -> None:
    server.reply = lambda text, times: chat(scores(instruction=1, preservation=2, quality=3))
    record = edited('say "hi"\nAnswer 10.')
    (row,) = VlmJudge(Endpoint(server.url, "m")).score([record])
    assert (row["judge_instruction"], row["judge_preservation"], row["judge_quality"]) == (1, 2, 3)
    *shown, text = server.asked[0]["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in shown]
    assert [base64.b64decode(url.partition(",")[2]) for url in urls] == [i.data for i in record.images.values()]
    assert [url.partition(";")[0] for url in urls] == ["data:image/jpeg", "data:image/png", "data:image/webp"]
    assert r'"say \"hi\"\nAnswer 10."' in text["text"]  # quoted: the text cannot end where it likes


def test_kinds_that_are_not_judged_ask_nobody(server: Server) -> None:
    judge = VlmJudge(Endpoint(server.url, "m"), edit={})
    rows = judge.score([PromptRecord("p", "a cat"), edited()])
    assert [row["judge_note"].split()[3] for row in rows] == ["prompt", "edit"]
    assert all(row["judge_alignment"] is None and "judge_instruction" not in row for row in rows) and not server.asked


def test_a_passing_failure_is_asked_again(server: Server) -> None:
    server.reply = lambda text, times: (500, {}, b"busy") if times < 2 else chat(GOOD)
    (row,) = VlmJudge(Endpoint(server.url, "m", retries=2)).score([captioned(1)])
    assert row["judge_alignment"] == 7 and len(server.asked) == 3
    server.reply = lambda text, times: (200, {"Content-Length": "9999"}, b"{") if times < 1 else chat(GOOD)
    (row,) = VlmJudge(Endpoint(server.url, "m", seconds=0.3, retries=1)).score([captioned(2)])
    assert row["judge_alignment"] == 7 and len(server.asked) == 5


def test_retry_after_is_honoured_up_to_a_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.reply = lambda text, times: (429, {"Retry-After": "1"}, b"") if times < 1 else chat("fine")
    before = time.monotonic()
    assert Endpoint(server.url, "m").ask("a") == "fine"
    assert time.monotonic() - before >= 1
    monkeypatch.setattr(endpoint_module, "LONGEST_WAIT", 0.05)
    server.reply = lambda text, times: (503, {"Retry-After": "9" * 400}, b"") if times < 1 else chat("fine")
    before = time.monotonic()
    assert Endpoint(server.url, "m").ask("b") == "fine"
    assert time.monotonic() - before < 1


def test_a_wait_is_seconds_or_a_date() -> None:
    assert seconds_asked("12") == 12
    assert seconds_asked("Wed, 21 Oct 2015 07:28:00 GMT") < 0
    assert seconds_asked("Wed, 21 Oct 2999 07:28:00 GMT") > 1e9
    assert seconds_asked("") == seconds_asked("soon") == seconds_asked("-5") == seconds_asked("²") == 0


def test_waits_double(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.1)
    server.reply = lambda text, times: (503, {}, b"down")
    before = time.monotonic()
    with pytest.raises(
        InputError, match=r"failed 4 times in a row, last with HTTP 503: down.*finished shards are kept"
    ):
        Endpoint(server.url, "m", retries=3).ask("a")
    assert 0.7 <= time.monotonic() - before < 1.4 and len(server.asked) == 4


def test_a_silent_endpoint_and_none_at_all_are_named(server: Server) -> None:
    server.reply = lambda text, times: (time.sleep(0.5), chat(GOOD))[1]
    judge = VlmJudge(Endpoint(server.url, "m", seconds=0.1, retries=1))
    with pytest.raises(InputError, match=rf"{server.url} failed 2 times.*[Tt]ime"):
        judge.score([captioned(i) for i in range(4)])
    nobody = "http://127.0.0.1:1/v1"
    with pytest.raises(InputError, match=rf"{nobody} failed 1 times.*refused.*See that it runs and serves m,"):
        Endpoint(nobody, "m", retries=0).ask("a")


@pytest.mark.parametrize("status", [301, 307, 401, 404])
def test_a_wrong_address_or_key_stops_at_once(server: Server, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.reply = lambda text, times: (status, {"Location": f"{server.url}/elsewhere"}, f"no {KEY}".encode())
    with pytest.raises(InputError, match=rf"answers HTTP {status}: no \*\*\*; check its url, model and key") as caught:
        Endpoint(server.url, "m", "JUDGE_KEY").ask("a")
    assert KEY not in str(caught.value) and server.paths == ["/v1/chat/completions"]


def test_the_key_is_in_the_header_and_nowhere_else(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    pictures(tmp_path / "in", 3)
    server.reply = lambda text, times: (400, {}, f"key {KEY} cannot do this".encode())
    recipe = written_recipe(tmp_path, server.url, "JUDGE_KEY")
    recipe.build(tmp_path / "out")
    assert len(server.asked) == 6 and {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert KEY not in json.dumps(server.asked) + json.dumps(recipe.settings) + repr(recipe) + caplog.text
    files = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert len(files) >= 4 and not any(KEY.encode() in path.read_bytes() for path in files)
    assert index(tmp_path / "out")["judge_note"].unique().to_pylist() == ["HTTP 400: key *** cannot do this"]


@pytest.mark.parametrize("value", ["", f"{KEY}\nX-Injected: 1", f"{KEY}é"])
def test_a_key_that_no_header_can_hold_is_not_shown(
    server: Server, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(InputError, match="JUDGE_KEY holds no API key; export it for http://127") as caught:
        Endpoint(server.url, "m", "JUDGE_KEY").ask("a")
    assert KEY not in str(caught.value) and not server.asked
    monkeypatch.delenv("JUDGE_KEY")
    server.reply = lambda text, times: chat("fine")
    assert Endpoint(server.url, "m").ask("a") == "fine" and "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"url": "file:///etc/passwd"}, "endpoint.url must be http"),
        ({"url": f"https://u:{KEY}@host/v1"}, "endpoint.url must be http"),
        ({"url": f"https://host/v1?key={KEY}"}, "endpoint.url must be http"),
        ({"key_variable": f"{KEY}"}, "must name an environment variable"),
        ({"model": ""}, "endpoint.model is empty"),
        ({"seconds": 1e12}, "seconds above 0 and at most"),
        ({"seconds": float("nan")}, "seconds above 0 and at most"),
        ({"threads": 0}, "threads and max_tokens must be positive"),
    ],
)
def test_wrong_settings_are_named_without_showing_a_key(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        Endpoint(**{"url": "http://host/v1", "model": "m", **settings})
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("edit", [{"note": "x"}, {"Bad Name": "x"}])
def test_wrong_dimensions_are_named(edit: dict[str, str]) -> None:
    with pytest.raises(InputError, match="neither note nor reasoning"):
        VlmJudge(Endpoint("http://host/v1", "m"), edit=edit)


def test_a_new_caption_keeps_the_old_one_and_names_the_model(server: Server) -> None:
    server.reply = lambda text, times: chat(json.dumps({"text": "A green\n tile,\x00 flat.\ud800 "}))
    prompt, edit = PromptRecord("p", "a cat"), edited()
    step = Recaption(Endpoint(server.url, "writer"))
    new, *others = step.rewrite([captioned(1, "old words"), prompt, edit])
    assert others == [prompt, edit] and len(server.asked) == 1 and '"old words"' in server.texts()[0]
    assert new == TextImageRecord(
        "r1",
        captioned(1).image,
        "A green tile, flat.",
        metadata={"row": 1, "original_text": "old words", "recaptioned_by": "writer"},
    )
    (again,) = Recaption(Endpoint(server.url, "other")).rewrite([new])
    assert isinstance(again, TextImageRecord)
    assert (again.metadata["original_text"], again.metadata["recaptioned_by"]) == ("old words", "other")
    (rewritten,) = Recaption(Endpoint(server.url, "writer"), edits=True).rewrite([edit])
    assert isinstance(rewritten, EditRecord) and rewritten.instruction == "A green tile, flat."
    assert rewritten.images == edit.images and rewritten.metadata["original_text"] == "make it blue"


@pytest.mark.parametrize(
    ("reply", "note"),
    [
        (chat("I'm sorry, I cannot describe people."), "got 0: I'm sorry"),
        (chat('{"text": " \\n "}'), "the answer holds no text"),
        (chat('{"text": ["a"]}'), "the answer holds no text"),
        (chat(json.dumps({"text": "a" * 101})), "the new text has 101 characters, at most 100"),
        (chat('{"text": "a cat on'), "got 0"),
        ((400, {}, b"too many pixels"), "HTTP 400: too many pixels"),
    ],
)
def test_without_a_new_caption_the_old_one_stays(server: Server, reply: Reply, note: str) -> None:
    server.reply = lambda text, times: reply
    record = captioned(1, "old words")
    (kept,) = Recaption(Endpoint(server.url, "m"), max_text=100).rewrite([record])
    assert isinstance(kept, TextImageRecord) and kept.caption == "old words" and kept.image == record.image
    assert note in kept.metadata["recaption_note"] and set(kept.metadata) == {"row", "recaption_note"}


def pictures(root: Path, count: int) -> None:
    root.mkdir()
    for number in range(count):
        (root / f"{number}.png").write_bytes(picture(number))
        (root / f"{number}.txt").write_text(f"caption {number}")


def index(folder: Path) -> Any:
    return pq.read_table(sorted(folder.glob("*.index.parquet")))


def written_recipe(folder: Path, url: str, key_variable: str = "", per_shard: int = 100) -> Recipe:
    """Recipe of a YAML file that counts words, recaptions, then judges."""
    model = f"{{url: {url}, model: m, retries: 0, threads: 1, key_variable: '{key_variable}'}}"
    (folder / "recipe.yaml").write_text(f"""
source: {{class_path: data_pipeline.sources.Folder, init_args: {{path: {folder / "in"}}}}}
steps:
  - class_path: data_pipeline.steps.quality.Quality
  - {{class_path: data_pipeline.steps.recaption.Recaption, init_args: {{endpoint: {model}, batch_size: 2}}}}
  - {{class_path: data_pipeline.steps.judge.VlmJudge, init_args: {{endpoint: {model}}}}}
records_per_shard: {per_shard}
""")
    return load_recipe(folder / "recipe.yaml")


def answer_both(text: str, times: int) -> Reply:
    if '{"text"' in text:
        return chat(json.dumps({"text": text.partition("Old text: ")[2].split('"')[1] + " in four words"}))
    return chat(scores(alignment=int(text.partition('"caption ')[2][0]), quality=5))


def test_a_build_rewrites_then_judges_and_scores_stay_with_their_record(server: Server, tmp_path: Path) -> None:
    server.reply = answer_both
    pictures(tmp_path / "in", 5)
    outputs = [tmp_path / name for name in ("one", "two")]
    for output in outputs:
        assert written_recipe(tmp_path, server.url).build(output)["kept"] == {"text_image/unsplit": 5}
    first, second = ({p.name: p.read_bytes() for p in o.iterdir() if p.suffix in (".tar", ".parquet")} for o in outputs)
    assert first == second and len(first) == 2
    captions = [json.loads(read_member(record, "json"))["caption"] for record in load_index(outputs[0])]
    assert captions == [f"caption {i} in four words" for i in range(5)]
    rows = index(outputs[0]).filter(index(outputs[0])["field"].to_numpy(zero_copy_only=False) == "json").to_pylist()
    assert [row["judge_alignment"] for row in rows] == list(range(5)) and {row["words"] for row in rows} == {2}
    assert [row["text_length"] for row in rows] == [len(caption) for caption in captions]


def test_an_outage_keeps_finished_shards_and_the_next_run_goes_on(server: Server, tmp_path: Path) -> None:
    pictures(tmp_path / "in", 3)
    down = lambda text, times: (503, {}, b"down") if "caption 2" in text else answer_both(text, times)  # noqa: E731
    server.reply = down
    recipe = written_recipe(tmp_path, server.url, per_shard=2)  # a picture and its text are two files of a unit
    with pytest.raises(InputError, match="finished shards are kept"):
        recipe.build(tmp_path / "out")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}
    asked = len(server.asked)
    server.reply = answer_both
    assert recipe.build(tmp_path / "out")["kept"] == {"text_image/unsplit": 3}
    assert kept and kept.items() <= {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.tar")}.items()
    assert not any(f'"caption {i}' in text for text in server.texts()[asked:] for i in (0, 1))


@dataclass
class Twos:
    """Remembers its batches and rejects the first record of each."""

    batch_size: int = 2
    seen: list[int] = field(default_factory=list)

    def rewrite(self, records: Sequence[Record]) -> list[Record | Rejected]:
        self.seen.append(len(records))
        return [Rejected(records[0].key, "first", "of its batch"), *records[1:]]


def test_a_batch_step_may_reject_and_sees_every_record_once(tmp_path: Path) -> None:
    pictures(tmp_path / "in", 5)
    source, step = Folder(str(tmp_path / "in")), Twos()
    (unit,) = source.units(100)
    assert isinstance(unit, Unit)
    report = run_task(Task(0, unit, ""), source, [Quality(), step], tmp_path)
    assert step.seen == [2, 2, 1] and report["rejected"] == {"Twos 2: first": 3}
    assert report["passed"] == {"source": 5, "Quality 1": 5, "Twos 2": 2}
    assert [row["field"] for row in index(tmp_path).to_pylist()] == ["image", "json"] * 2
    with pytest.raises(InputError, match="batch_size of Twos is 0"):
        run_task(Task(1, unit, ""), source, [Twos(0)], tmp_path)
