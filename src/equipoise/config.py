"""How balancing is configured."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from equipoise.errors import ConfigError


class EPLBConfig(BaseModel):
    """Options of Expert Parallelism Load Balancing; names and meanings as vLLM users know them.

    Raises: pydantic.ValidationError; `make_config` turns it into a ConfigError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    window_size: Annotated[int, Field(ge=1)] = 1000
    """Steps whose load a plan is made from."""

    step_interval: Annotated[int, Field(ge=1)] = 3000
    """Steps between two plans."""

    num_redundant_experts: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Slots of a layer beyond its experts. `auto`: the fewest that make slots divide by ranks and
    leave one spare slot per rank."""

    log_balancedness: bool = False
    """Log the balancedness of the steps since the last log."""

    log_balancedness_interval: Annotated[int, Field(ge=1)] = 1
    """Steps between two such logs. In the background none comes while a rebalance is under way, and
    one may tell of several intervals where steps are very short."""

    policy: str = "flow"
    """Placement policy, by the name it is registered under."""

    communicator: str = "auto"
    """Wire for expert weights. `auto` chooses and logs why; a name means it."""

    nccl_max_ctas: Annotated[int, Field(ge=1, le=64)] | None = None
    """Most thread blocks that a kernel of NCCL's takes from the forward pass, over the communicator
    `pynccl`; None: NCCL's own choice."""

    staging_bytes: Annotated[int, Field(ge=1)] | None = None
    """Most bytes of staging on a rank; None: as much as the largest layer's incoming experts need,
    twice that in the background, where there are two buffers, each of 16 MB at least, on a GPU of
    256 MB."""

    max_bytes_per_s: Annotated[int, Field(ge=1)] | None = None
    """Most bytes of experts per second that a rank sends and receives in the background, both ways
    together, so that dispatch keeps its share of the link; None: as many as the wire takes."""

    max_bytes_per_step: Annotated[int, Field(ge=1)] | None = None
    """Most bytes that a step in the background brings into a rank's slots; a layer that has more
    is committed alone. None: no bound."""

    max_layers_per_step: Annotated[int, Field(ge=1)] | None = None
    """Most layers that a step in the background commits; None: no bound."""

    balancedness_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Plan only where the window's balancedness is below this; None: always."""

    token_us: Annotated[float, Field(ge=0)] | None = None
    """Microseconds that a layer takes longer for each more token on its busiest rank. Given it,
    layers are skipped whose moves cost more time than they save until the next plan."""

    use_async: bool = True
    """Plan and move experts in the background, beside the forward pass."""

    on_failure: Literal["raise", "disable"] = "raise"
    """What a failure in the background does: `raise`, at the next step of every rank; `disable`,
    serve on from the last placement that was committed, without balancing."""

    verify: Literal["off", "sample", "all"] = "off"
    """Compare checksums of received experts, some or all, with their sources' before a commit."""


def make_config(values: dict[str, Any]) -> EPLBConfig:
    """Check option values and make a configuration of them.

    Args:
        values: option name to value; what is absent keeps its default.
    Raises: ConfigError that names the key, what was wrong with it, and for a misspelt key the
        nearest right one.
    """
    try:
        return EPLBConfig(**values)
    except ValidationError as error:
        said = dict.fromkeys(_explain(detail) for detail in error.errors())
        raise ConfigError("; ".join(said)) from error


def explain_unknown(key: str) -> str:
    """What to say of an option that does not exist, with the nearest right one."""
    near = difflib.get_close_matches(key, EPLBConfig.model_fields, n=1)
    known = ", ".join(EPLBConfig.model_fields)
    return f"unknown option {key!r}: " + (
        f"did you mean {near[0]!r}?" if near else f"there are {known}"
    )


def _explain(detail: Any) -> str:
    key = str(detail["loc"][0]) if detail["loc"] else "configuration"
    if detail["type"] == "extra_forbidden":
        return explain_unknown(key)
    if key == "num_redundant_experts":
        return f"{key} must be 'auto' or a whole number from 0 up, got {detail['input']!r}"
    return f"{key}: {detail['msg'].lower()}, got {detail['input']!r}"
