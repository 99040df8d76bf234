"""Policies with the options that a command line gives them."""

from __future__ import annotations

from typing import Literal

from equipoise.errors import ConfigError
from equipoise.policy import get_policy
from equipoise.policy.base import PlacementPolicy

Hierarchy = Literal["off", "strict", "relaxed"]


def takes_budget(name: str) -> bool:
    """Whether a policy can be told how much it may move. Collective: none."""
    return name == "flow"


def make_policy(
    name: str,
    *,
    num_groups: int = 1,
    hierarchy: Hierarchy | None = None,
    move_budget: float | None = None,
) -> PlacementPolicy:
    """Make a policy.

    Args:
        name: one of `list_policies()`.
        num_groups: equal groups that consecutive experts form.
        hierarchy: how `flow` keeps groups on nodes; None for "strict" where there are groups, as
            the published algorithm does.
        move_budget: experts that `flow` may receive per plan, as a fraction of all slots; None
            for its default.
    Collective: none.
    Raises: ConfigError if there is no such policy, or it does not take an option that is given.
    """
    if name == "flow":
        from equipoise.policy.flow import FlowOptions, FlowPolicy

        kept = hierarchy or ("strict" if num_groups > 1 else "off")
        budget = FlowOptions().move_budget if move_budget is None else move_budget
        return FlowPolicy(FlowOptions(num_groups=num_groups, hierarchy=kept, move_budget=budget))
    if move_budget is not None:
        raise ConfigError(f"policy {name!r} takes no move budget: flow does")
    if hierarchy is not None:
        raise ConfigError(f"policy {name!r} takes no hierarchy: flow does")
    if name == "deepseek":
        from equipoise.policy.deepseek import DeepSeekPolicy

        return DeepSeekPolicy(num_groups)
    if num_groups > 1:
        raise ConfigError(f"policy {name!r} takes no groups: deepseek and flow do")
    return get_policy(name)
