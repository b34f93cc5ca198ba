"""The commands that need no Trainer; the ones that run whole are in tests/test_cli.py."""

from __future__ import annotations

from argparse import Namespace

from lightning_modules.commands import sampling_settings

RELEASED = {"num_inference_steps": 28, "guidance_scale": 3.5, "negative_prompt": None}
BENCHMARK = {"level": 1, "num_inference_steps": 20, "guidance_scales": [2.0, 1.0], "negative_prompt": ""}


def test_the_command_line_wins_over_the_benchmark_and_that_over_the_released_settings() -> None:
    silent = Namespace(steps=None, guidance=None, negative=None)
    assert sampling_settings(silent, {}) == RELEASED
    like_benchmark = {"num_inference_steps": 20, "guidance_scale": 2.0, "negative_prompt": ""}
    assert sampling_settings(silent, BENCHMARK) == like_benchmark
    spoken = Namespace(steps=5, guidance=1.0, negative="blurry")
    told = {"num_inference_steps": 5, "guidance_scale": 1.0, "negative_prompt": "blurry"}
    assert sampling_settings(spoken, BENCHMARK) == told
