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
from dpo_lab.runs.fingerprint import override_key
from dpo_lab.studies.effects import check
from dpo_lab.studies.spec import (
    RENAMED_ARM_KEYS,
    RENAMED_PREDICTION_KEYS,
    RENAMED_STUDY_KEYS,
    Arm,
    Figure,
    Missing,
    Prediction,
    Study,
    StudyError,
)

NAME = re.compile(r"[a-z][a-z0-9_]*")
COLLECTION = Path("ablations")


@dataclass
class ArmSpec:
    """An arm; or with `sweep`, setting -> numbers, one arm for every combination of the numbers.

    An arm of a sweep is named by its group and its values; the values are also its `axes`.
    """

    name: str = ""
    group: str = ""
    overrides: list[str] = field(default_factory=list)
    axes: dict[str, float] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)


@dataclass
class Budget:
    """A budget of a study, by name.

    settings: overrides of every arm, in place of its own of that key; arms: only these arms or groups, and only
    predictions about them; notes: on the results under this budget (for `full` it is the study's own `notes`).
    """

    seeds: list[int] = MISSING
    settings: list[str] = field(default_factory=list)
    arms: list[str] = field(default_factory=list)
    notes: str = ""


@dataclass
class StudyFile:
    """The keys of a study file, see also studies/spec.py. settings: overrides of every arm; missing: `bounds` or `worst`;
    known: what earlier runs had shown when the predictions were written.
    """

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
    notes: str = ""
    known: str = ""
    missing: Missing = Missing.bounds


def read(path: Path, budget: str = "full", seeds: Sequence[int] | None = None, more: Sequence[str] = ()) -> Study:
    """Read a study from a file under one of its budgets.

    seeds: used instead of the budget's; more: overrides of every arm, applied last. Raises StudyError, which names file
    and key, if the study is invalid.
    """
    try:
        config_dict = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        here = [*path.parent.glob("*.yaml"), *COLLECTION.glob("*.yaml")]
        known = {other.stem: str(other) for other in here if NAME.fullmatch(other.stem)}
        near = [known[name] for name in difflib.get_close_matches(path.stem, known) or sorted(known)]
        raise StudyError(f"{path}: no such file; type {' or '.join(near) or 'the path of a study file'}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyError(f"{path}: can't be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config_dict, dict):
        raise StudyError(f"{path}: has no keys; it needs title, question, claim, source, predictions, arms, ...")
    try:
        return _study(path, _typed(config_dict), budget, seeds, more)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None


def _typed(config_dict: Mapping[str, Any]) -> StudyFile:
    _refuse_renamed(config_dict)
    known = [spec.name for spec in fields(StudyFile)]
    for key in config_dict:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0)
            raise StudyError(f"unknown key '{key}': did you mean '{near[0]}'?")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(StudyFile), OmegaConf.create(dict(config_dict)))
        missing = sorted(key for key in OmegaConf.missing_keys(merged))
        if missing:
            raise StudyError(f"{missing[0]}: is missing")
        file = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise StudyError(explain(error)) from None
    assert isinstance(file, StudyFile)
    return file


def _refuse_renamed(config_dict: Mapping[str, Any]) -> None:
    """Raise StudyError for a key of an earlier version, which names the present one."""
    parts = [("", config_dict, RENAMED_STUDY_KEYS)]
    for group, names in (("predictions", RENAMED_PREDICTION_KEYS), ("arms", RENAMED_ARM_KEYS)):
        parts += [(f"{group}[{number}].", part, names) for number, part in enumerate(config_dict.get(group) or ())]
    parts += [
        (f"budgets.{name}.", part, RENAMED_STUDY_KEYS) for name, part in (config_dict.get("budgets") or {}).items()
    ]
    for place, part, names in parts:
        for key in part if isinstance(part, dict) else ():
            if key in names:
                raise StudyError(f"{place}{key}: renamed; type {names[key]}: in its place")


def _study(path: Path, file: StudyFile, budget: str, seeds: Sequence[int] | None, more: Sequence[str]) -> Study:
    if NAME.fullmatch(path.stem) is None:
        raise StudyError("a study file's name has small letters, digits and _ only, as in my_question.yaml")
    if budget not in file.budgets:
        raise StudyError(
            f"budget={budget}: the study has no such budget; type budget={' or budget='.join(file.budgets)}"
        )
    if file.missing is Missing.left_out:
        raise StudyError("missing=left_out: hides failed runs; type missing: bounds or missing: worst")
    chosen = file.budgets[budget]
    settings, keys = [*file.settings, *chosen.settings], set(map(override_key, chosen.settings))
    arms = []
    for arm in (arm for spec in file.arms for arm in _arms(spec)):
        own = [override for override in arm.overrides if override_key(override) not in keys]
        arms.append(Arm(arm.name, [*settings, *own, *more], arm.group, arm.axes))
    names = {name for arm in arms for name in (arm.name, arm.group)}
    if unknown := [name for name in chosen.arms if name not in names]:
        raise StudyError(f"budgets.{budget}.arms: no arm or group is called '{unknown[0]}'")
    chosen_arms = [arm for arm in arms if not chosen.arms or arm.name in chosen.arms or arm.group in chosen.arms]
    for arm in chosen_arms:
        if swept := keys & arm.axes.keys():
            raise StudyError(f"budgets.{budget}.settings: {swept.pop()} is an axis of arm '{arm.name}'; leave it out")
    chosen_names = {name for arm in chosen_arms for name in (arm.name, arm.group)}
    left_out = names - chosen_names
    predictions = [p for p in file.predictions if not left_out & {p.treatment, p.control} - {""}]
    study = Study(
        name=path.stem,
        title=file.title,
        question=file.question,
        claim=file.claim,
        source=file.source,
        predictions=predictions,
        arms=chosen_arms,
        baseline=file.baseline,
        seeds=list(chosen.seeds if seeds is None else seeds),
        metrics=file.metrics,
        figures=file.figures,
        known=file.known.strip(),
        missing=file.missing,
        notes=(file.notes if budget == "full" else chosen.notes).strip(),
    )
    check(study)
    return study


def _arms(spec: ArmSpec) -> Iterator[Arm]:
    """Yield the arms that an entry of a study file describes."""
    if not spec.sweep:
        if not spec.name:
            raise StudyError("arms: one has neither a name nor a sweep")
        yield Arm(spec.name, list(spec.overrides), spec.group, dict(spec.axes))
        return
    if spec.name:
        raise StudyError(f"arms: '{spec.name}' has a sweep, so its arms are named by their values; give it a group")
    for key, values in spec.sweep.items():
        if not isinstance(values, list) or not values or not all(type(value) in (int, float) for value in values):
            raise StudyError(f"arms: sweep of {key}: needs numbers, as in {key}: [0.1, 1]")
    for values in product(*spec.sweep.values()):
        coordinates = dict(zip(spec.sweep, map(float, values), strict=True))
        overrides = [f"{key}={value:g}" for key, value in coordinates.items()]
        name = ", ".join([spec.group, *overrides] if spec.group else overrides)
        yield Arm(name, [*spec.overrides, *overrides], spec.group, dict(spec.axes) | coordinates)
