"""The dashboard of a reinforced run: curves of all batches, before and after a stop, as a picture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
from micro import built
from rl import made, prompts, trained

from callbacks import Dashboard, summary
from callbacks.curves import CURVE, HEIGHT, WIDTH, draw_curves, panels, step_colour
from data_pipeline.errors import InputError
from lightning_modules.rollouts.algorithms import AWM, GRPO, Window
from lightning_modules.rollouts.settings import Regularisation


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


def test_ratios_are_logged_step_by_step_beside_their_averages(tmp_path: Path) -> None:
    callback = Dashboard(1)
    slow = Regularisation(old_rate=0.5)  # ratios leave 1 at the second update
    module = made(str(built()), GRPO("flow", unit="gaussian", window=Window(2, (1, 3))), regularisation=slow)
    trained(module, [prompts(i) for i in range(2)], 2, tmp_path, callbacks=[callback])
    for name in ("ratio_mean", "ratio_std", "clipped"):
        average, *steps = (callback.curves[f"train/{name}{step}"] for step in ("", "/step_1", "/step_2"))
        assert average == pytest.approx([sum(of_steps) / 2 for of_steps in zip(*steps, strict=True)])
    assert callback.curves["train/ratio_std/step_1"][0] == 0 < callback.curves["train/ratio_std/step_1"][1]
    assert callback.curves["train/ratio_std/step_1"][1] != callback.curves["train/ratio_std/step_2"][1]
    assert {name for name in callback.curves if "/step_" in name} == {
        f"train/{name}/step_{i}" for name in ("ratio_mean", "ratio_std", "clipped") for i in (1, 2)
    }
    assert set(panels(callback.curves)["train/ratio_std"]) == {"", "1", "2"}


def test_ratios_of_noise_levels_that_are_no_steps_are_only_averaged(tmp_path: Path) -> None:
    callback = Dashboard(1)
    trained(made(str(built()), AWM(points_per_picture=2)), [prompts(0)], 1, tmp_path, callbacks=[callback])
    assert "train/ratio_std" in callback.curves and not [name for name in callback.curves if "/step_" in name]


def test_steps_share_the_panel_of_their_average_and_end_where_it_ends() -> None:
    values = [0.0, 1.0, 2.0, 3.0, 4.0]
    picture = draw_curves({"ratio": values, "ratio/step_1": values[::-1], "ratio/step_3": [2.0, 2.0]})
    assert picture.size == (WIDTH, HEIGHT)
    found = {
        colour: [(x, y) for x in range(WIDTH - 24) for y in range(HEIGHT) if picture.getpixel((x, y)) == colour]
        for colour in (step_colour(0, 2), step_colour(1, 2))
    }
    (first, last) = (sorted(found[step_colour(0, 2)])[i] for i in (0, -1))
    assert first[0] < 30 and first[1] < last[1]  # it falls, from the left to the right
    assert min(found[step_colour(1, 2)])[0] > 0.7 * WIDTH  # it began when four fifths of the time were over


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
