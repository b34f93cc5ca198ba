import pytest
import torch

from lightning_modules.evaluation.pictures import (
    colour_entropy,
    dark_fraction,
    dashboard,
    diversity,
    edge_density,
    high_frequency,
)

GREY = torch.full((1, 3, 16, 16), 0.5)
CHECKS = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float().expand(1, 3, 16, 16)
HALVES = (torch.arange(16) < 8).float().expand(1, 3, 16, 16)


def test_figures_by_hand() -> None:
    pictures = torch.cat([GREY, CHECKS, HALVES])
    assert edge_density(pictures).tolist() == pytest.approx([0, 1, 1 / 15])
    assert dark_fraction(pictures).tolist() == pytest.approx([0, 0.5, 0.5])
    assert colour_entropy(pictures).tolist() == pytest.approx([0, 1 / 9, 1 / 9])
    assert high_frequency(pictures)[:2].tolist() == pytest.approx([0, 1], abs=1e-6) and high_frequency(HALVES) < 0.2


def test_diversity_is_of_each_group() -> None:
    pictures = torch.cat([GREY, GREY, torch.zeros_like(GREY), torch.ones_like(GREY)])
    assert diversity(pictures, 2).tolist() == pytest.approx([0, 1])


def test_noise_and_blanks_are_told_from_pictures() -> None:
    noise = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blank, noisy = dashboard(torch.zeros(4, 3, 32, 32), 2), dashboard(noise, 2)
    assert blank["dark_fraction"] == 1 and blank["diversity"] == 0 and blank["colour_entropy"] == 0
    assert noisy["high_frequency"] > 0.5 and noisy["edge_density"] > 0.8
