"""Generate, plan, edit: each picture is edited as it is answered, until there is nothing to change."""

from __future__ import annotations

from PIL import Image

from lightning_modules.pipelines import MetaqueryPipeline
from lightning_modules.pipelines.grape import refine


class Painter(MetaqueryPipeline):
    """Answers by a picture's brightness, and its edits add one to it."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def ask(self, questions: list[str], images: list[Image.Image]) -> list[str]:
        self.asked.append([image.getpixel((0, 0)) for image in images])
        wanted = [int(question.split()[-1].rstrip("?")) for question in questions]
        return ["Nothing." if v >= w else f"add {w}" for v, w in zip(self.asked[-1], wanted, strict=True)]

    def __call__(self, prompts: list[str], image: list[Image.Image], **sampling: object) -> tuple[list[Image.Image]]:
        assert all(prompt.startswith("add") for prompt in prompts) and sampling["guidance_scale"] == 2.0
        return ([one.point(lambda v: v + 1) for one in image],)


def test_pictures_are_edited_until_nothing_is_to_change() -> None:
    painter = Painter()
    pictures = [Image.new("L", (2, 2), value) for value in (5, 3, 0)]
    found = refine(painter, ["5", "4", "9"], pictures, rounds=3, guidance_scale=2.0)
    assert [picture.getpixel((0, 0)) for picture in found] == [5, 4, 3]
    assert painter.asked == [[5, 3, 0], [4, 1], [2]]
    assert refine(painter, ["9"], [Image.new("L", (2, 2))], rounds=0)[0].getpixel((0, 0)) == 0
