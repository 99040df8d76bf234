from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from equipoise.errors import ConfigError, PlacementError
from equipoise.policy import PlacementPolicy, get_policy, list_policies
from equipoise.policy.base import check_load
from equipoise.policy.deepseek import DeepSeekPolicy
from equipoise.topology import Topology


def install(site: Path, entry_point: str, source: str = "") -> None:
    """Put a package with one policy entry point where Python looks for packages."""
    (site / "outside_policy.py").write_text(source)
    info = site / "outside_policy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-policy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[equipoise.policies]\n{entry_point}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "outside_policy", raising=False)
    return tmp_path


def test_every_listed_policy_can_be_made_and_knows_its_name() -> None:
    assert "deepseek" in list_policies()
    assert list(list_policies()) == sorted(set(list_policies()))
    for name in list_policies():
        policy = get_policy(name)
        assert isinstance(policy, PlacementPolicy)
        assert policy.name == name


def test_a_policy_of_another_package_is_found_and_imported_only_when_asked_for(site: Path) -> None:
    source = """
from equipoise.placement import place_in_order
from equipoise.policy import PlacementPolicy

class InOrder(PlacementPolicy):
    name = "in-order"

    def place(self, load, topology, *, standing=None):
        return place_in_order(*load.shape, topology)
"""
    install(site, "in-order = outside_policy:InOrder", source)
    assert "in-order" in list_policies()
    assert "outside_policy" not in sys.modules
    placement = get_policy("in-order").place(np.ones((1, 2), dtype=np.int64), Topology(2, 1))
    assert placement.slot_to_expert.tolist() == [[0, 1]]


def test_no_other_package_takes_the_name_of_ours(site: Path) -> None:
    install(site, "deepseek = outside_policy:Nothing")
    assert isinstance(get_policy("deepseek"), DeepSeekPolicy)


def test_unknown_names_are_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match="no policy 'depseek': did you mean 'deepseek'"):
        get_policy("depseek")
    with pytest.raises(ConfigError, match=r"no policy 'zzz': there are .*deepseek"):
        get_policy("zzz")


@pytest.mark.parametrize(
    ("entry_point", "message"),
    [
        ("odd = outside_policy:Missing", "'odd' cannot be loaded from outside_policy:Missing"),
        ("odd = no_such_package:Policy", "'odd' cannot be loaded from no_such_package:Policy"),
        ("odd = outside_policy:number", "outside_policy:number is not a subclass"),
    ],
)
def test_broken_entry_points_are_named(site: Path, entry_point: str, message: str) -> None:
    install(site, entry_point, "number = 3")
    with pytest.raises(ConfigError, match=message):
        get_policy("odd")


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ([1, 2, 3], r"must be \[layers, experts\], got \[3\]"),
        (np.zeros((0, 4)), r"must be \[layers, experts\], got \[0, 4\]"),
        ([["many", "few"]], "must be whole numbers of tokens, got <U4"),
        ([[1, 2], [3, -4]], "layer 1, expert 1 is -4"),
        ([[1, 2.5], [3, 4]], "layer 0, expert 1 is 2.5"),
        ([[1, 2], [float("nan"), 4]], "layer 1, expert 0 is nan"),
        ([[1, float("inf")]], "layer 0, expert 1 is inf"),
        ([[1] * 7], "6 slots cannot hold 7 experts on 2 ranks: ask for at least 4 slots per rank"),
    ],
)
def test_loads_that_cannot_be_are_refused(load: object, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        check_load(load, Topology(2, 3))  # type: ignore[arg-type]


def test_whole_numbers_pass_whatever_holds_them() -> None:
    for dtype in (np.uint8, np.int32, np.float32, np.uint64):
        checked = check_load(np.array([[0, 200]], dtype=dtype), Topology(1, 2))
        assert checked.dtype == np.int64
        assert checked.tolist() == [[0, 200]]
