"""What `import equipoise` offers, and what it does not cost."""

from __future__ import annotations

import subprocess
import sys

import pytest

import equipoise


def run(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_names_are_sorted_and_there() -> None:
    assert equipoise.__all__ == sorted(equipoise.__all__)
    assert set(equipoise.__all__) == set(equipoise._HOMES)
    assert set(equipoise.__all__) <= set(dir(equipoise))
    for name in equipoise.__all__:
        found = getattr(equipoise, name)
        # A name is told by its home, or by the package in front of it.
        assert found.__module__.startswith(equipoise._HOMES[name])
        assert found.__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'equipoise' has no attribute 'EplbStat'"):
        _ = equipoise.EplbStat
    with pytest.raises(ImportError, match="EplbStat"):
        from equipoise import EplbStat  # noqa: F401


def test_the_package_itself_imports_nothing_heavy() -> None:
    modules = run("import sys, equipoise; print(*sys.modules)")
    heavy = {"torch", "numpy", "pydantic", "transformers", "nixl", "nixl_cu13", "prometheus_client"}
    assert modules.isdisjoint(heavy)


def test_the_balancer_needs_no_optional_package_and_no_cuda() -> None:
    names = "EplbState, RankGroup, create_eplb_communicator, parallelize"
    code = f"import sys; from equipoise import {names}; import torch; print(*sys.modules)"
    modules = run(f"{code}; print('cuda' if torch.cuda.is_initialized() else 'no_cuda')")
    optional = {"transformers", "nixl", "nixl_cu13", "nixl_cu12", "rixl", "prometheus_client"}
    assert modules.isdisjoint(optional)
    assert "no_cuda" in modules
