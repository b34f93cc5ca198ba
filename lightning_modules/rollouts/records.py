"""What was sampled from prompts, and what it was worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_modules.samplers.sde import Trajectory

LISTS = ("keys", "prompts", "metadata")  # of P entries
PICTURE_AXIS = {"states": 1, "log_probs": 1, "x0": 0}  # tensors of B pictures; all others are of P groups
REWARD = "reward."
NEGATIVE = ("negative_sequence", "negative_pooled")


@dataclass
class Rollout:
    """P groups of G pictures, sampled and trained on in one batch of B = P G, group after group.

    Attributes:
        task: "text_to_image" or "edit".
        keys: P record keys.
        prompts: P texts.
        metadata: P records' facts, for rewards.
        sequence: (P, T, d) text embeddings.
        pooled: (P, p).
        references: (P, R, C, h, w) clean latents of the pictures to edit, or None.
        trajectory: of B pictures.
        rewards: (P, G) each, by name.
        negative: text embeddings (P, T, d) and (P, p) of the negative branch, or None.
        sampler: what its stochastic steps were sampled by, as text; empty where all steps follow the ODE.

    >>> Rollout.load(path).trajectory.x0.shape  # doctest: +SKIP
    torch.Size([48, 4, 16, 16])
    """

    task: str
    keys: list[str]
    prompts: list[str]
    metadata: list[dict[str, Any]]
    sequence: Float[Tensor, "p t d"]
    pooled: Float[Tensor, "p q"]
    references: Float[Tensor, "p r c h w"] | None
    trajectory: Trajectory
    rewards: dict[str, Float[Tensor, "p g"]] = field(default_factory=dict)
    negative: tuple[Float[Tensor, "p t d"], Float[Tensor, "p q"]] | None = None
    sampler: str = ""

    def __len__(self) -> int:
        """Pictures."""
        return len(self.trajectory.x0)

    @property
    def group_size(self) -> int:
        """Pictures of a group."""
        return len(self) // len(self.keys)

    @property
    def kind(self) -> tuple[str | int, ...]:
        """What rollouts have alike that can be joined: task, window, and shapes of pictures and references.

        Those of one update have one window; a replay may learn in one update from what was sampled for two.
        """
        references = () if self.references is None else self.references.shape[1:]
        return self.task, *self.trajectory.window, *self.trajectory.x0.shape[1:], *references

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        t = self.trajectory
        found = {"sequence": self.sequence, "pooled": self.pooled, "references": self.references}
        found |= {"sigmas": t.sigmas, "states": t.states, "log_probs": t.log_probs, "x0": t.x0}
        found |= dict(zip(NEGATIVE, self.negative or (None, None), strict=True))
        found |= {f"{REWARD}{name}": values for name, values in self.rewards.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def facts(self) -> dict[str, Any]:
        """All that is no tensor, as plain data."""
        whole = {"task": self.task, "sampler": self.sampler, "window": list(self.trajectory.window)}
        return whole | {name: getattr(self, name) for name in LISTS}

    @classmethod
    def of(cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rollout:
        """The inverse of `facts` and `tensors`."""
        window = tuple(facts["window"])
        return cls(
            task=facts["task"],
            **{name: facts[name] for name in LISTS},
            sequence=tensors["sequence"],
            pooled=tensors["pooled"],
            references=tensors.get("references"),
            trajectory=Trajectory(tensors["sigmas"], window, *(tensors[n] for n in ("states", "log_probs", "x0"))),
            rewards={name.removeprefix(REWARD): t for name, t in tensors.items() if name.startswith(REWARD)},
            negative=(tensors[NEGATIVE[0]], tensors[NEGATIVE[1]]) if NEGATIVE[0] in tensors else None,
            sampler=facts["sampler"],
        )

    def to(self, device: torch.device | str) -> Rollout:
        """The rollout on a device."""
        return self.of(self.facts(), {name: tensor.to(device) for name, tensor in self.tensors().items()})

    def select(self, groups: Sequence[int]) -> Rollout:
        """These groups alone."""
        rows = torch.tensor(list(groups), dtype=torch.int64, device=self.sequence.device)
        members = torch.arange(self.group_size, device=rows.device)
        pictures = (rows[:, None] * self.group_size + members).flatten()
        chosen = {
            name: tensor
            if name == "sigmas"
            else tensor.index_select(PICTURE_AXIS.get(name, 0), pictures if name in PICTURE_AXIS else rows)
            for name, tensor in self.tensors().items()
        }
        facts = self.facts()
        return self.of(facts | {name: [facts[name][g] for g in groups] for name in LISTS}, chosen)

    @classmethod
    def join(cls, rollouts: Sequence[Rollout]) -> Rollout:
        """The groups of all, which are of one kind and have one schedule and one window."""
        every = [rollout.tensors() for rollout in rollouts]
        tensors = {name: torch.cat([t[name] for t in every], PICTURE_AXIS.get(name, 0)) for name in every[0]}
        lists = {name: [one for rollout in rollouts for one in getattr(rollout, name)] for name in LISTS}
        return cls.of(rollouts[0].facts() | lists, tensors | {"sigmas": every[0]["sigmas"]})

    def save(self, path: Path) -> None:
        """Writes one safetensors file, so that collecting and training can be debugged apart."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        save_file(tensors, path, {"facts": json.dumps(self.facts())})

    @classmethod
    def load(cls, path: Path) -> Rollout:
        """Reads what `save` wrote."""
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
            return cls.of(json.loads(file.metadata()["facts"]), tensors)
