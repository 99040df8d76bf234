"""Policies with the options that a command line gives them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from equipoise.errors import ConfigError
from equipoise.policy import get_policy
from equipoise.policy.base import PlacementPolicy


@dataclass(frozen=True, kw_only=True)
class FlowChoices:
    """Options that only `flow` takes; None for its own default.

    Attributes:
        move_budget: experts received per plan, as a fraction of all slots.
        hierarchy: how groups are kept on nodes; None for "strict" where there are groups, as the
            published algorithm does.
        survival: whose death no expert shall be lost by.
        min_copies: ranks (or nodes) that hold each expert then.
    """

    move_budget: float | None = None
    hierarchy: Literal["off", "strict", "relaxed"] | None = None
    survival: Literal["off", "rank", "node"] | None = None
    min_copies: int | None = None


def takes_budget(name: str) -> bool:
    """Whether a policy can be told how much it may move. Collective: none."""
    return name == "flow"


def make_policy(
    name: str, num_groups: int = 1, choices: FlowChoices | None = None
) -> PlacementPolicy:
    """Make a policy.

    Args:
        name: one of `list_policies()`.
        num_groups: equal groups that consecutive experts form.
        choices: what `flow` is told.
    Collective: none.
    Raises: ConfigError if there is no such policy, or it does not take an option that is given.
    """
    given = {
        field.name: value
        for field in fields(FlowChoices)
        if choices is not None and (value := getattr(choices, field.name)) is not None
    }
    if name == "flow":
        from equipoise.policy.flow import FlowOptions, FlowPolicy

        rule = {"hierarchy": "strict"} if num_groups > 1 else {}
        return FlowPolicy(FlowOptions(**{"num_groups": num_groups, **rule, **given}))
    for option in given:
        raise ConfigError(f"policy {name!r} takes no {option}: flow does")
    if name == "deepseek":
        from equipoise.policy.deepseek import DeepSeekPolicy

        return DeepSeekPolicy(num_groups)
    if num_groups > 1:
        raise ConfigError(f"policy {name!r} takes no groups: deepseek and flow do")
    return get_policy(name)
