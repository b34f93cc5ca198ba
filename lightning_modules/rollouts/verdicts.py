"""Which groups teach something by what their pictures are worth, and the figures of all that were scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.rollouts.advantages import Advantages, weighted_sum
from lightning_modules.rollouts.records import Rollout

Scored = tuple[Rollout, dict[str, Tensor]]  # with B numbers of each reward, NaN where there is none


def judged(
    scored: Sequence[Scored], weights: Mapping[str, float], advantages: Advantages
) -> tuple[list[Rollout], dict[str, Tensor]]:
    """Rollouts with their rewards, of the groups that teach something; and what to log of all of them.

    Args:
        scored: rollouts of one task, and their scores.
        weights: of each reward; one of weight 0 is logged and teaches nothing.
        advantages: says what teaches something.
    """
    found, totals = [], []
    for rollout, scores in scored:
        shape, device = (len(rollout.keys), rollout.group_size), rollout.trajectory.x0.device
        shaped = {name: values.reshape(shape).to(device) for name, values in scores.items()}
        rollout.rewards = {name: values for name, values in shaped.items() if weights[name]}
        totals.append(weighted_sum(rollout.rewards, weights))
        useful = totals[-1].isfinite().all(dim=1) & advantages.useful(totals[-1].nan_to_num())
        if useful.any():
            found.append(rollout.select(useful.nonzero().flatten().tolist()))
    return found, figures(scored, torch.cat(totals), sum(len(rollout.keys) for rollout in found))


def figures(scored: Sequence[Scored], total: Float[Tensor, "p g"], useful: int) -> dict[str, Tensor]:
    """Mean rewards, and the shares of groups that taught something, were flat, or have no score."""
    known, task = total.isfinite().all(dim=1), scored[0][0].task
    found: dict[str, Tensor] = {}
    for name in scored[0][1]:
        values = torch.cat([scores[name] for _, scores in scored])
        if values.isfinite().any():
            found[f"reward/{task}/{name}"] = values[values.isfinite()].mean()
    if known.any():
        found[f"reward/{task}"] = total[known].mean()
        found[f"reward/{task}_std"] = total[known].std(dim=1).mean()
    found["rollouts/unscored"] = 1 - known.float().mean()
    found["rollouts/useful"] = torch.tensor(useful / len(total), device=total.device)
    found["rollouts/flat"] = (known.sum() - useful) / len(total)
    return found


def averages(entries: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Means over the entries that have a figure, in the order in which figures came."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    return {name: torch.stack([entry[name] for entry in entries if name in entry]).mean() for name in names}
