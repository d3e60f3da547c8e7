"""Learning rates over the epochs of a run."""

import torch

from .recipe import Optimizer, Schedule

MEMBER_GROUP = "of members"  # a parameter group's mark


def learning_rate_factor(schedule: Schedule, optimizer: Optimizer, epoch: float) -> float:
    """Return the base weights' learning rate over what it is at first: annealed linearly, times the drops so far."""
    length = schedule.anneal_end - schedule.anneal_start
    if length:
        done = min(max(epoch - schedule.anneal_start, 0.0) / length, 1.0)
    else:
        done = float(epoch >= schedule.anneal_end)
    drops = sum(epoch >= drop for drop in schedule.drop_epochs)
    return (1.0 + done * (schedule.end_lr / optimizer.lr - 1.0)) * schedule.drop_factor**drops


def set_learning_rates(groups: list[dict], schedule: Schedule, optimizer: Optimizer, epoch: float) -> None:
    """Set every group's rate from its initial one: members keep their ratio to the base weights, or their own rate."""
    factor = learning_rate_factor(schedule, optimizer, epoch)
    for group in groups:
        follows = schedule.members_follow or not group.get(MEMBER_GROUP)
        group["lr"] = group["initial_lr"] * (factor if follows else 1.0)


def mark_new_groups(optimizer: torch.optim.Optimizer, num_base_groups: int) -> None:
    """Mark the groups that expand added behind the others as the members'."""
    for group in optimizer.param_groups[num_base_groups:]:
        group[MEMBER_GROUP] = True
