"""What every reward is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """What a picture was made from.

    Attributes:
        prompt: the caption or instruction.
        sources: pictures to edit, each (3, h, w) in [0, 1]; none for text-to-image.
        metadata: facts of the record, such as the objects that a caption speaks of.

    >>> Request("a red circle", metadata={"tag": "colors"}).sources
    ()
    """

    prompt: str
    sources: tuple[Float[Tensor, "3 h w"], ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Reward(Protocol):
    """Scores pictures; a larger number is a better picture.

    Annotate an implementation with these very types: configs are checked against them.
    """

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        """One finite number for each picture, (B, 3, H, W) in [0, 1]; None where it could not be found, never a number
        in its place."""
