"""Options from file, environment and flags; every mistake is named with what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from equipoise.config import EPLBConfig, make_config
from equipoise.config_sources import parse_flags, resolve_config
from equipoise.errors import ConfigError


def test_later_sources_win_and_are_named(tmp_path: Path) -> None:
    file = tmp_path / "equipoise.yaml"
    file.write_text("window_size: 10\nstep_interval: 20\npolicy: deepseek\n")
    environment = {
        "EQUIPOISE_STEP_INTERVAL": "30",
        "HOME": "/",
        "EQUIPOISE_LOG_BALANCEDNESS": "true",
    }
    flags = parse_flags('{"communicator": "torch_gloo"}', ["--eplb-config.window-size", "40"])
    resolved = resolve_config(file=file, environment=environment, flags=flags)
    assert resolved.config == EPLBConfig(
        window_size=40,
        step_interval=30,
        log_balancedness=True,
        policy="deepseek",
        communicator="torch_gloo",
    )
    assert resolved.origins["window_size"] == "--eplb-config.window-size"
    assert resolved.origins["step_interval"] == "environment EQUIPOISE_STEP_INTERVAL"
    assert resolved.origins["policy"] == str(file)
    assert resolved.origins["num_redundant_experts"] == "default"


def test_flow_is_the_default_policy() -> None:
    assert EPLBConfig().policy == "flow"


def test_defaults_of_a_command_give_way_to_everything_said() -> None:
    resolved = resolve_config(
        environment={"EQUIPOISE_WINDOW_SIZE": "5"},
        defaults={"window_size": 16, "step_interval": 16},
    )
    assert (resolved.config.window_size, resolved.config.step_interval) == (5, 16)
    assert resolved.origins["step_interval"] == "default"


def test_what_is_in_force_can_be_read_back(tmp_path: Path) -> None:
    first = resolve_config(environment={"EQUIPOISE_NUM_REDUNDANT_EXPERTS": "4"})
    file = tmp_path / "again.yaml"
    file.write_text(first.to_yaml())
    assert yaml.safe_load(first.to_yaml())["format_version"] == 1
    assert (
        "num_redundant_experts: 4  # environment EQUIPOISE_NUM_REDUNDANT_EXPERTS" in first.to_yaml()
    )
    assert resolve_config(file=file, environment={}).config == first.config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("windw_size: 3", "f.yaml: unknown option 'windw_size': did you mean 'window_size'?"),
        ("zzz: 3", "f.yaml: unknown option 'zzz': there are window_size, step_interval"),
        (
            "window_size: 0",
            "f.yaml: window_size: input should be greater than or equal to 1, got 0",
        ),
        ("window_size: '3'", "f.yaml: window_size: input should be a valid integer, got '3'"),
        ("window_size: true", "window_size: input should be a valid integer, got True"),
        (
            "num_redundant_experts: -1",
            "num_redundant_experts must be 'auto' or a whole number from 0 up, got -1",
        ),
        ("- 1", "f.yaml: a configuration is a mapping"),
        ("a: [", "f.yaml: not YAML or JSON"),
        ("window_size: 1\nwindow_size: 2", "key 'window_size' stands twice"),
        ("format_version: 9", "f.yaml: format_version is 9, this version reads 1"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        resolve_config(file=file, environment={})
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such configuration file"):
        resolve_config(file=tmp_path / "nowhere.yaml", environment={})


def test_a_binary_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read as text"):
        resolve_config(file=file, environment={})


@pytest.mark.parametrize(
    ("eplb_config", "extra", "message"),
    [
        ("{", [], "--eplb-config: not JSON"),
        ("3", [], "--eplb-config wants a JSON object"),
        (None, ["--eplb-config.window_size"], "--eplb-config.window_size needs a value"),
        (None, ["--window"], "unknown argument '--window'"),
        (
            '{"window_size": 3}',
            ["--eplb-config.window_size=4"],
            "--eplb-config.window_size 4 contradicts --eplb-config, which says window_size = 3",
        ),
    ],
)
def test_wrong_flags_are_named(eplb_config: str | None, extra: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_flags(eplb_config, extra)
    assert message in str(caught.value)


def test_equal_flags_do_not_contradict() -> None:
    assert parse_flags('{"window_size": 3}', ["--eplb-config.window_size=3"]) == {
        "window_size": ("--eplb-config.window_size", 3)
    }


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="environment EQUIPOISE_WINDOW: unknown option 'window'"):
        resolve_config(environment={"EQUIPOISE_WINDOW": "3"})


@pytest.mark.parametrize(
    "values", [{}, {"num_redundant_experts": "auto"}, {"num_redundant_experts": 0}]
)
def test_good_values_are_taken(values: dict[str, Any]) -> None:
    assert make_config(values).model_dump() == {**EPLBConfig().model_dump(), **values}
