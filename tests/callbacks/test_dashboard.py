"""The dashboard of a reinforced run: curves of all batches, before and after a stop, as a picture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
from micro import built
from rl import made, prompts, trained

from callbacks import Dashboard, summary
from callbacks.curves import CURVE, HEIGHT, WIDTH, draw_curves
from data_pipeline.errors import InputError


def test_a_run_draws_what_its_pictures_and_rewards_do(tmp_path: Path) -> None:
    callback = Dashboard(2)
    trained(made(str(built())), [prompts(i) for i in range(4)], 4, tmp_path, callbacks=[callback])
    wanted = {"reward/edit/bright", "reward/edit_std", "pictures/edit_edge_density", "rollouts/flat", "train/grad_norm"}
    assert wanted <= callback.curves.keys() and {len(callback.curves[name]) for name in wanted} == {4}
    drawn = PIL.Image.open(tmp_path / "samples" / "dashboard.png")
    assert drawn.width == 4 * WIDTH and drawn.height % HEIGHT == 0
    again = Dashboard()
    again.load_state_dict(callback.state_dict())
    assert again.curves == callback.curves
    found = summary.rewards(SimpleNamespace(callbacks=[callback]))
    values = callback.curves["reward/edit/bright"]
    assert (found["reward/edit/bright_first"], found["reward/edit/bright_last"]) == (values[0], values[-1])


def test_a_curve_rises_in_its_panel_and_leaves_out_what_is_not_finite() -> None:
    picture = draw_curves({"up": [0.0, 1.0, float("nan"), 2.0, 3.0], "nothing": [float("nan")], "flat": [1.0, 1.0]})
    blue = tuple(int(CURVE[i : i + 2], 16) for i in (1, 3, 5))
    places = [(x, y) for x in range(WIDTH) for y in range(HEIGHT) if picture.getpixel((x, y)) == blue]
    leftmost, rightmost = min(places), max(places)
    assert leftmost[1] > rightmost[1]
    middle = WIDTH // 2
    assert not any(abs(x - middle) < 20 for x, _ in places)


def test_it_is_drawn_at_least_now_and_then() -> None:
    with pytest.raises(InputError, match="expected at least 1"):
        Dashboard(0)
