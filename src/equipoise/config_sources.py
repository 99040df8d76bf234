"""Where options come from: a file, the environment, flags; later ones win."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from equipoise.config import EPLBConfig, explain_unknown, make_config
from equipoise.errors import ConfigError

FORMAT_VERSION = 1
ENVIRONMENT_PREFIX = "EQUIPOISE_"


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration, and who said what of it.

    Attributes:
        config: what is in force.
        origins: option to where its value comes from: "default", a file's path, "environment
            EQUIPOISE_...", or a flag as it was written.
    """

    config: EPLBConfig
    origins: Mapping[str, str]

    def to_yaml(self) -> str:
        """What is in force, as a file that `--config` reads; each line says where it is from."""
        lines = [f"format_version: {FORMAT_VERSION}"]
        for key, value in self.config.model_dump().items():
            lines.append(f"{key}: {json.dumps(value)}  # {self.origins[key]}")
        return "\n".join(lines) + "\n"


def resolve_config(
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, tuple[str, Any]] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> ResolvedConfig:
    """Gather options and check them.

    Args:
        file: YAML or JSON, a mapping of options.
        environment: variables; those named EQUIPOISE_<OPTION> count. None: the process's own.
        flags: option to (flag as it was written, value).
        defaults: of the command, in place of EPLBConfig's own.
    Raises: ConfigError that names the file, the variable or the flag, the key, and what would be
        right.
    """
    values: dict[str, Any] = dict(defaults or {})
    origins = dict.fromkeys(EPLBConfig.model_fields, "default")
    layers = [_read_file(file)] if file is not None else []
    layers.append(_read_environment(os.environ if environment is None else environment))
    layers.append(dict(flags or {}))
    for layer in layers:
        for key, (origin, value) in layer.items():
            if key not in EPLBConfig.model_fields:
                raise ConfigError(f"{origin}: {explain_unknown(key)}")
            values[key], origins[key] = value, origin
    try:
        config = make_config(values)
    except ConfigError as error:
        blamed = [origins[key] for key in values if str(error).startswith((f"{key}:", f"{key} "))]
        raise ConfigError(": ".join([*blamed[:1], str(error)])) from error
    return ResolvedConfig(config, origins)


def parse_flags(
    eplb_config: str | None, extra: list[str], *, known: Sequence[str] = ()
) -> dict[str, tuple[str, Any]]:
    """Read `--eplb-config JSON` and `--eplb-config.FIELD VALUE`, as vLLM users write them.

    Args:
        eplb_config: the JSON object, None where it was not given.
        extra: arguments that no other option took.
        known: options of the command, for saying which one a misspelt one is nearest to.
    Returns:
        Option to (flag, value).
    Raises: ConfigError if JSON, or an argument, cannot be read, or two flags contradict.
    """
    flags: dict[str, tuple[str, Any]] = {}
    if eplb_config is not None:
        for key, value in _parse_object("--eplb-config", eplb_config).items():
            flags[key] = ("--eplb-config", value)
    rest = list(extra)
    while rest:
        argument = rest.pop(0)
        flag, equals, text = argument.partition("=")
        if not flag.startswith("--eplb-config."):
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown argument {argument!r}{hint}")
        if not equals:
            if not rest:
                raise ConfigError(f"{flag} needs a value")
            text = rest.pop(0)
        add_flag(flags, flag.removeprefix("--eplb-config.").replace("-", "_"), flag, _scalar(text))
    return flags


def add_flag(flags: dict[str, tuple[str, Any]], key: str, flag: str, value: Any) -> None:
    """Add one option to `flags`.

    Raises: ConfigError if another flag gave it a different value.
    """
    if key in flags and flags[key][1] != value:
        other, earlier = flags[key]
        raise ConfigError(
            f"{flag} {value} contradicts {other}, which says {key} = {earlier}: give one of them"
        )
    flags[key] = (flag, value)


def _read_file(path: Path) -> dict[str, tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from error
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML or JSON: {_one_line(error)}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of options to values")
    version = content.pop("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: format_version is {version!r}, this version reads {FORMAT_VERSION}"
        )
    return {str(key): (str(path), value) for key, value in content.items()}


def _read_environment(environment: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): (f"environment {name}", _scalar(text))
        for name, text in sorted(environment.items())
        if name.startswith(ENVIRONMENT_PREFIX)
    }


def _parse_object(flag: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text, object_pairs_hook=_take_once)
    except _Twice as twice:
        raise ConfigError(f"{flag}: key {str(twice)!r} stands twice") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{flag}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{flag} wants a JSON object like '{{\"window_size\": 100}}'")
    return content


def _take_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON takes the last of two equal keys without a word; we refuse them."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise _Twice(key)
        content[key] = value
    return content


class _Twice(Exception):  # noqa: N818 - what a key stands
    """A key of a JSON object stands twice."""


def _scalar(text: str) -> Any:
    """Numbers, true, false and null as YAML reads them; any other text is a string."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, int | float | bool) or value is None else text


def _one_line(error: yaml.YAMLError) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys without a word; we refuse them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
