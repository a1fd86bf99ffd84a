"""Study files, `ablations/NAME.yaml`: typed and checked, arms listed or swept, budgets by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lab.config.schema import explain
from dpo_lab.studies.effects import check
from dpo_lab.studies.spec import Arm, Figure, Prediction, Study, StudyError

NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass
class ArmSpec:
    """An arm, or with `sweep` one arm for every combination of an axis' values: setting -> numbers.

    An arm of a sweep is called after its group and its values, which are its place on the axes.
    """

    name: str = ""
    group: str = ""
    overrides: list[str] = field(default_factory=list)
    at: dict[str, float] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)


@dataclass
class Budget:
    """How much a study may cost. settings: overrides of every arm; arms: only these arms or groups; predictions that need
    another are left out; found: what came out under this budget, of `full` it stands in the study's own `found`.
    """

    seeds: list[int] = MISSING
    settings: list[str] = field(default_factory=list)
    arms: list[str] = field(default_factory=list)
    found: str = ""


@dataclass
class StudyFile:
    """What a study file holds; see results/study.py for the rest. settings: overrides of every arm."""

    title: str = MISSING
    question: str = MISSING
    claim: str = MISSING
    source: str = MISSING
    predictions: list[Prediction] = MISSING
    arms: list[ArmSpec] = MISSING
    baseline: str = MISSING
    metrics: list[str] = MISSING
    budgets: dict[str, Budget] = MISSING
    settings: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    found: str = ""


def read(path: Path, budget: str = "full", seeds: Sequence[int] | None = None, more: Sequence[str] = ()) -> Study:
    """The study in a file under one of its budgets. seeds: others than the budget's; more: overrides of every arm, last.

    Raises StudyError, naming file and key, where it can't be.
    """
    try:
        plain = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        near = sorted(str(other) for other in path.parent.glob("*.yaml"))
        raise StudyError(f"{path}: no such file; type {' or '.join(near) or 'the path of a study file'}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyError(f"{path}: can't be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise StudyError(f"{path}: holds no keys; it needs title, question, claim, source, predictions, arms, ...")
    try:
        return _study(path, _typed(plain), budget, seeds, more)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None


def _typed(plain: Mapping[str, Any]) -> StudyFile:
    known = [spec.name for spec in fields(StudyFile)]
    for key in plain:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0)
            raise StudyError(f"unknown key '{key}': did you mean '{near[0]}'?")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(StudyFile), OmegaConf.create(dict(plain)))
        missing = sorted(key for key in OmegaConf.missing_keys(merged))
        if missing:
            raise StudyError(f"{missing[0]}: is missing")
        made = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise StudyError(explain(error)) from None
    assert isinstance(made, StudyFile)
    return made


def _study(path: Path, file: StudyFile, budget: str, seeds: Sequence[int] | None, more: Sequence[str]) -> Study:
    if NAME.fullmatch(path.stem) is None:
        raise StudyError("a study's file is named in small letters, digits and _, as in my_question.yaml")
    if budget not in file.budgets:
        raise StudyError(
            f"budget={budget}: the study has no such budget; type budget={' or budget='.join(file.budgets)}"
        )
    chosen = file.budgets[budget]
    settings = [*file.settings, *chosen.settings]
    arms = [
        Arm(arm.name, [*settings, *arm.overrides, *more], arm.group, arm.at)
        for spec in file.arms
        for arm in _arms(spec)
    ]
    names = {name for arm in arms for name in (arm.name, arm.group)}
    if unknown := [name for name in chosen.arms if name not in names]:
        raise StudyError(f"budgets.{budget}.arms: no arm or group is called '{unknown[0]}'")
    kept = [arm for arm in arms if not chosen.arms or arm.name in chosen.arms or arm.group in chosen.arms]
    left = {name for arm in kept for name in (arm.name, arm.group)}
    predictions = [p for p in file.predictions if all(n in left or n not in names for n in (p.of, p.to) if n)]
    made = Study(
        name=path.stem,
        title=file.title,
        question=file.question,
        claim=file.claim,
        source=file.source,
        predictions=predictions,
        arms=kept,
        baseline=file.baseline,
        seeds=list(chosen.seeds if seeds is None else seeds),
        metrics=file.metrics,
        figures=file.figures,
        found=(file.found if budget == "full" else chosen.found).strip(),
    )
    check(made)
    return made


def _arms(spec: ArmSpec) -> Iterator[Arm]:
    if not spec.sweep:
        if not spec.name:
            raise StudyError("arms: one has neither a name nor a sweep")
        yield Arm(spec.name, list(spec.overrides), spec.group, dict(spec.at))
        return
    if spec.name:
        raise StudyError(f"arms: '{spec.name}' has a sweep, so its arms are named by their values; give it a group")
    for key, values in spec.sweep.items():
        if not isinstance(values, list) or not values or not all(type(value) in (int, float) for value in values):
            raise StudyError(f"arms: sweep of {key}: needs numbers, as in {key}: [0.1, 1]")
    for values in product(*spec.sweep.values()):
        place = dict(zip(spec.sweep, map(float, values), strict=True))
        said = [f"{key}={value:g}" for key, value in place.items()]
        name = ", ".join([spec.group, *said] if spec.group else said)
        yield Arm(name, [*spec.overrides, *said], spec.group, dict(spec.at) | place)
