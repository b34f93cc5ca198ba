"""What devices held, handed back to as many, to fewer and to more of them."""

from __future__ import annotations

import pytest

from lightning_modules.rollouts import shares

SAVED = [{"waiting": ["a", "b"], "anchor": "x", "count": 5}, {"waiting": ["c"], "anchor": "y", "count": 8}]


def handed(size: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], str, int]]:
    """What each of so many devices is given."""
    found = []
    for rank in range(size):
        monkeypatch.setattr(shares, "place", lambda rank=rank: (rank, size))
        found.append((shares.share(SAVED, "waiting"), shares.beside(SAVED, "anchor"), shares.counted(SAVED, "count")))
    return found


def test_as_many_devices_have_what_they_had(monkeypatch: pytest.MonkeyPatch) -> None:
    assert handed(2, monkeypatch) == [(["a", "b"], "x", 5), (["c"], "y", 8)]


def test_fewer_or_more_devices_share_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert handed(1, monkeypatch) == [(["a", "b", "c"], "x", 13)]
    assert handed(4, monkeypatch) == [(["a"], "x", 3), (["b"], "y", 3), (["c"], "x", 3), ([], "y", 3)]


def test_one_device_gathers_what_it_holds() -> None:
    assert shares.place() == (0, 1) and shares.gathered(SAVED[0]) == [SAVED[0]]
