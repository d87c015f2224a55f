"""Reads a configuration: preset or YAML file, then the phase's own section, then key=value overrides."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import UserError
from . import PHASES
from .schema import TrainConfig


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text, where everybody means a number, and 10:15 as 615, where nobody does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)
_INT, _WHOLE = "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][\d_]*)$")
# The pattern above also fits whole numbers, so their own resolver must be asked first.
for _rules in _Loader.yaml_implicit_resolvers.values():
    _rules[:] = [(tag, _WHOLE if tag == _INT else pattern) for tag, pattern in _rules]
    _rules.sort(key=lambda rule: rule[0] != _INT)


def presets() -> dict[str, Path]:
    """Names and files of the presets inside the package."""
    folder = Path(str(resources.files("genkd.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(source: str, phase: str, overrides: Iterable[str] = ()) -> TrainConfig:
    """The configuration of one phase.

    source: path of a YAML file, or a preset's name. Its top-level keys are TrainConfig's, `phases: {PHASE: ...}` holds
    what differs in one phase, and `base` names a preset, or a file beside it, that it stands on. overrides:
    "dotted.key=value" texts, values read as YAML; they win.
    Raises UserError naming key, file and the nearest known key; nothing is started or written before.
    """
    if phase not in PHASES:
        raise UserError(f"unknown phase {phase!r}; there are {', '.join(PHASES)}")
    origin: dict[str, str] = {}
    merged: dict[str, Any] = {}
    path = _find(source)
    for file, values, section in _chain(path, phase):
        _merge(merged, values, str(file), origin)
        _merge(merged, section, f"{file}, phases.{phase}", origin)
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UserError(f"override {text!r} is not of the form key=value, e.g. optimizer.lr=0.05")
        _merge(merged, _nested(key, _parse(value, f"override {text!r}")), f"override {text!r}", origin)
    stated = merged.setdefault("phase", phase)
    if stated != phase:
        raise UserError(f"{origin['phase']}: phase is {stated!r}, but {phase!r} was asked for")
    return validate(merged, origin, str(path))


def validate(values: Mapping[str, Any], origin: Mapping[str, str], default_origin: str) -> TrainConfig:
    """values as a TrainConfig, or a UserError that names every wrong key and where it came from."""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        lines = [_sentence(problem, origin, default_origin) for problem in error.errors()]
        raise UserError("; ".join(lines)) from None


def dump(config: TrainConfig) -> str:
    """The whole configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def read_run(run: Path) -> TrainConfig:
    """The configuration that a run folder was started with."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is no training run: it has no config.yaml")
    return validate(_read(path), {}, str(path))


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Dotted keys whose values differ, as 'key: old -> new'."""
    a, b = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def _chain(path: Path, phase: str) -> list[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """(file, its values, its section of a phase) of a file and of the bases it stands on, the lowest base first."""
    chain: list[tuple[Path, dict[str, Any], dict[str, Any]]] = []
    while True:
        if path.resolve() in (file.resolve() for file, _, _ in chain):
            raise UserError(f"{path}: its `base` leads back to itself")
        values = _read(path)
        sections, base = values.pop("phases", None) or {}, values.pop("base", None)
        if not isinstance(sections, dict):
            raise UserError(f"{path}: `phases` must map a phase's name to its keys")
        for name in sections:
            if name not in PHASES:
                raise UserError(f"{path}: unknown phase {name!r} under `phases`{_nearest(name, PHASES)}")
            if not isinstance(sections[name] or {}, dict):
                raise UserError(f"{path}: phases.{name} must map keys to values, not be {sections[name]!r}")
        chain.insert(0, (path, values, sections.get(phase) or {}))
        if base is None:
            return chain
        if not isinstance(base, str):
            raise UserError(f"{path}: `base` is a preset's name or a YAML file, not {base!r}")
        path = _find(base, path.parent)


def _find(source: str, folder: Path | None = None) -> Path:
    known = presets()
    if source in known:
        return known[source]
    path = Path(source) if folder is None else folder / source
    if not path.is_file():
        raise UserError(
            f"no configuration file {source!r}, and no preset of that name{_nearest(source, known)}; "
            f"presets: {', '.join(known) or 'none'}"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file") from None
    values = _parse(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines, not a {type(values).__name__}")
    return values


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(into: dict[str, Any], values: Mapping[str, Any], where: str, origin: dict[str, str], prefix="") -> None:
    if not prefix and "method" in values:  # short for distill.method
        values = dict(values)
        _merge(into, _nested("distill.method", values.pop("method")), where, origin)
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            inner = into.setdefault(key, {})
            if isinstance(inner, dict):
                origin.setdefault(dotted, where)
                _merge(inner, value, where, origin, dotted + ".")
                continue
        into[key] = value
        origin[dotted] = where


def _flat(values: Mapping[str, Any], prefix="") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _known_keys(model: type[BaseModel], path: tuple) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.4)
    return f"; did you mean {found[0]!r}?" if found else ""


def _all_keys(model: type[BaseModel], prefix="") -> dict[str, str]:
    """Last part of every dotted key -> the key, so that `lr` finds `optimizer.lr`."""
    keys: dict[str, str] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys = _all_keys(inner, f"{prefix}{name}.") | keys
        keys.setdefault(name, prefix + name)
    return keys


def _sentence(problem: typing.Any, origin: Mapping[str, str], default_origin: str) -> str:
    location = problem["loc"]
    dotted = ".".join(str(part) for part in location)
    where = next((origin[key] for key in _prefixes(dotted) if key in origin), default_origin)
    if problem["type"] == "extra_forbidden":
        parent = dotted.removesuffix(str(location[-1]))
        siblings = [parent + name for name in _known_keys(TrainConfig, location[:-1])]
        elsewhere = _all_keys(TrainConfig).get(str(location[-1]))
        hint = f"; did you mean {elsewhere!r}?" if elsewhere else _nearest(dotted, siblings)
        return f"{where}: unknown key {dotted!r}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    value = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
    return f"{where}: {dotted or 'configuration'}: {message}{value}"


def _prefixes(dotted: str) -> Iterable[str]:
    while dotted:
        yield dotted
        dotted = dotted.rpartition(".")[0]
