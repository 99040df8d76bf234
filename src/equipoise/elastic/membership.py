"""Who serves, who shall serve, and what becomes of a change: as data that travels as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from equipoise.errors import MembershipError
from equipoise.models.host_copies import CopyKey, HostBackup
from equipoise.placement import Placement
from equipoise.topology import IntArray

Phase = Literal["idle", "preparing", "committing", "retiring", "failed"]

Rollback = Literal["nothing", "abort", "recover", "abandon"]
"""What ends a phase that fails: nothing; the next generation is closed and the serving one goes on;
the survivors form another generation; what cannot be closed is left to a thread of its own."""


@dataclass(frozen=True)
class Deadlines:
    """Longest that each part of a change may take, in seconds.

    Attributes:
        prepare_s: until all ranks have come, hold what they will serve, and say so.
        agree_s: from there until the switch is decided, and every serving rank has heard of it.
        retire_s: for the groups of the generation that ends to be closed.
    """

    prepare_s: float = 120.0
    agree_s: float = 30.0
    retire_s: float = 30.0


@dataclass(frozen=True)
class PhaseRule:
    """One phase of a change.

    Attributes:
        phase: its name.
        then: the phase behind it, if it ends well.
        deadline: the field of `Deadlines` that bounds it; None where nothing is waited for.
        rollback: what a failure within it, or its deadline, leads to.
    """

    phase: Phase
    then: Phase
    deadline: Literal["prepare_s", "agree_s", "retire_s"] | None
    rollback: Rollback


PHASES: Mapping[Phase, PhaseRule] = MappingProxyType(
    {
        rule.phase: rule
        for rule in (
            PhaseRule("idle", "preparing", None, "nothing"),
            PhaseRule("preparing", "committing", "prepare_s", "abort"),
            PhaseRule("committing", "retiring", "agree_s", "recover"),
            PhaseRule("retiring", "idle", "retire_s", "abandon"),
            PhaseRule("failed", "preparing", None, "nothing"),
        )
    }
)
"""The one table of phases. Up to the decision, with which `preparing` ends, any failure aborts."""


@dataclass(frozen=True)
class SetShape:
    """MoE layers with as many experts as each other.

    Attributes:
        num_experts: E.
        expert_bytes: per layer, of one expert.
    """

    num_experts: int
    expert_bytes: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.expert_bytes)


@dataclass(frozen=True, eq=False)
class Holding:
    """What the slots of one rank hold.

    Attributes:
        slots: per set of layers [L, S] int64, the expert of each slot; -1 for an empty one.
    """

    slots: tuple[IntArray, ...]

    def to_json(self) -> list[list[list[int]]]:
        """As nested lists."""
        return [held.tolist() for held in self.slots]

    @classmethod
    def from_json(cls, data: Any) -> Holding:
        """What `to_json` wrote."""
        return cls(tuple(np.array(held, dtype=np.int64) for held in data))

    @classmethod
    def nothing(cls, shapes: Sequence[SetShape]) -> Holding:
        """Of a rank that has no slots yet."""
        return cls(tuple(np.empty((shape.num_layers, 0), dtype=np.int64) for shape in shapes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Holding) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(str(self.to_json()))


@dataclass(frozen=True)
class Serving:
    """What ranks serve: all of a generation, or those of it that tell.

    Attributes:
        generation: theirs.
        shapes: of the model's sets of layers.
        shared_bytes: of what every rank has beside experts.
        held: what each rank's slots hold, by name, in the order of their numbers.
        copies: experts that ranks keep in host memory, by name; of ranks that tell.
    """

    generation: int
    shapes: tuple[SetShape, ...]
    shared_bytes: int
    held: Mapping[str, Holding]
    copies: Mapping[str, tuple[CopyKey, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything, of JSON's own types. Collective: none."""
        return {
            "generation": self.generation,
            "shapes": [asdict(shape) for shape in self.shapes],
            "shared_bytes": self.shared_bytes,
            "held": {name: holding.to_json() for name, holding in self.held.items()},
            "copies": {name: [list(key) for key in keys] for name, keys in self.copies.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Serving:
        """What `to_json` wrote. Raises: MembershipError if it is not that."""
        with _reading("what ranks serve"):
            return cls(
                int(data["generation"]),
                tuple(
                    SetShape(int(shape["num_experts"]), tuple(map(int, shape["expert_bytes"])))
                    for shape in data["shapes"]
                ),
                int(data["shared_bytes"]),
                {name: Holding.from_json(held) for name, held in data["held"].items()},
                {
                    name: tuple(CopyKey(*map(int, key)) for key in keys)
                    for name, keys in data["copies"].items()
                },
            )

    @staticmethod
    def join(parts: Sequence[Serving]) -> Serving:
        """What several ranks tell, each of itself, as one; of the newest generation among them.

        Args:
            parts: at least one, in the order that their ranks shall have.
        Collective: none.
        Raises: MembershipError if they serve models of other shapes.
        """
        first = parts[0]
        for part in parts:
            if (part.shapes, part.shared_bytes) != (first.shapes, first.shared_bytes):
                names = " and ".join([*first.held, *part.held])
                raise MembershipError(f"{names} do not serve the same model")
        held = {name: holding for part in parts for name, holding in part.held.items()}
        newest = max(part.generation for part in parts)
        copies = {name: keys for part in parts for name, keys in part.copies.items()}
        return Serving(newest, first.shapes, first.shared_bytes, held, copies)


@dataclass(frozen=True)
class Member:
    """A rank of the next generation.

    Attributes:
        name: that it keeps.
        number: that the generation gives it.
        is_newcomer: whether it comes with nothing.
    """

    name: str
    number: int
    is_newcomer: bool


@dataclass(frozen=True)
class MembershipPlan:
    """A change: from what is served, to what shall be.

    Attributes:
        generation: the next one's number, never used before in its store.
        serving: what stands, which commits nothing meanwhile.
        members: of the next generation, by number.
        leavers: names of ranks that serve and shall not.
        placements: of the next generation, per set of layers.
        deadlines: of its phases.
        is_recovery: whether ranks have died: the serving generation steps no more, and experts
            that nobody holds are restored.
        backup: which experts members keep in host memory for each other.
        nodes: where participants sit, by name; those that are not named share a node.
    """

    generation: int
    serving: Serving
    members: tuple[Member, ...]
    leavers: tuple[str, ...]
    placements: tuple[Placement, ...]
    deadlines: Deadlines = Deadlines()
    is_recovery: bool = False
    backup: HostBackup = "none"
    nodes: Mapping[str, str] = field(default_factory=dict)

    @property
    def participants(self) -> tuple[str, ...]:
        """Names of all that prepare it: members by number, then leavers."""
        return (*(member.name for member in self.members), *self.leavers)

    @property
    def newcomers(self) -> tuple[str, ...]:
        """Names of members that come with nothing."""
        return tuple(member.name for member in self.members if member.is_newcomer)

    def find_number(self, name: str) -> int | None:
        """A participant's number in the next generation; None of a leaver.

        Raises: MembershipError if it is no participant.
        """
        for member in self.members:
            if member.name == name:
                return member.number
        if name not in self.leavers:
            raise MembershipError(
                f"{name} is no part of generation {self.generation}: it is for "
                f"{', '.join(self.participants)}"
            )
        return None

    def find_holding(self, name: str) -> Holding:
        """What a participant's slots hold now."""
        return self.serving.held.get(name) or Holding.nothing(self.serving.shapes)

    def to_json(self) -> dict[str, Any]:
        """Everything, of JSON's own types. Collective: none."""
        return {
            "generation": self.generation,
            "serving": self.serving.to_json(),
            "members": [asdict(member) for member in self.members],
            "leavers": list(self.leavers),
            "placements": [placement.to_json() for placement in self.placements],
            "deadlines": asdict(self.deadlines),
            "is_recovery": self.is_recovery,
            "backup": self.backup,
            "nodes": dict(self.nodes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MembershipPlan:
        """What `to_json` wrote. Raises: MembershipError or PlacementError if it is not that."""
        with _reading("a plan of a membership"):
            return cls(
                int(data["generation"]),
                Serving.from_json(data["serving"]),
                tuple(
                    Member(str(one["name"]), int(one["number"]), bool(one["is_newcomer"]))
                    for one in data["members"]
                ),
                tuple(map(str, data["leavers"])),
                tuple(Placement.from_json(text) for text in data["placements"]),
                Deadlines(**data["deadlines"]),
                bool(data["is_recovery"]),
                data["backup"],
                {str(name): str(node) for name, node in data["nodes"].items()},
            )


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn whatever a wrong record raises into one line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise MembershipError(f"not {what}: {error!r}") from error
