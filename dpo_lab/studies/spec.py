"""The specification of a study: question, claim, predictions registered before any run, and arms.

The same objects are read from a study file (`ablations/NAME.yaml`) and from a study's record (`study.json`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from dpo_lab.runs.renamed_keys import present_override, renamed
from dpo_lab.runs.run_record import RunRefused
from dpo_lab.studies.path_at_gain import AT
from dpo_lab.studies.scales import Scale, default_scale, on_scale

RECORD = "study.json"
# Keys of a study by their names in earlier versions.
RENAMED_STUDY_KEYS = {"found": "notes"}
RENAMED_ARM_KEYS = {"at": "axes"}
RENAMED_PREDICTION_KEYS = {
    "says": "description",
    "of": "treatment",
    "to": "control",
    "over": "axis",
    "at": "matched_on",
    "at_least": "min_effect",
}
# Keys that were added, with the value for what was done before.
ADDED_STUDY_KEYS = {"known": "", "missing": "left_out"}
ADDED_PREDICTION_KEYS = {"scale": "plain"}
EXPRESSION = re.compile(r"(\S+)(?: ([-/]) (\S+))?")


class StudyError(RunRefused):
    """Raised for an invalid study; the message names the key and says what to type."""


class Measure(str, Enum):
    """What is computed of the metric for each seed: the effect that a prediction is about."""

    level = "level"  # treatment - value
    difference = "difference"  # treatment - control
    slope = "slope"  # change along the axis, of the arms of the group `treatment`; minus that of `control`, if given
    area = "area"  # under the reward-KL frontier, as a share of the optimum's area: treatment - control, or - value


class Direction(str, Enum):
    """Where the effect is predicted to lie."""

    more = "more"  # above 0
    less = "less"  # below 0
    same = "same"  # within min_effect of 0


class Missing(str, Enum):
    """What a seed counts as whose runs have ended without an effect: one failed, or never came to the value at which
    arms are compared. A missing effect is taken as large as the largest that was found in another seed.
    """

    bounds = "bounds"  # the verdict must be the same with it against the prediction, in its favour, and left out
    worst = "worst"  # it is against the prediction
    left_out = "left_out"  # it is not counted: only in records of earlier versions, which registered no rule


@dataclass
class Prediction:
    """An effect that is predicted if the claim is true.

    metric: a name in run.json, or two of them, `a - b` or `a / b`; or `kl at gold_gain 0.9`, on the trajectory of each run.
    treatment, control: names of arms or groups of
    arms. axis: of a slope, which is per factor of 10 if all its values are above 0, otherwise per unit. matched_on:
    compare at an equal value of another metric, e.g. {gold_gain: 0.9}, interpolated between the arms of a group for
    each seed. value: what a level (or an area without a control) is compared with. min_effect: the smallest relevant
    effect, for `same` the largest irrelevant one; in the metric's unit or, on a scale of logarithms, a factor above 1
    (1.25: at least x 1.25, or at most x 0.8). scale: of the effect; by default log for a ratio quantity such as KL,
    otherwise plain. Primary predictions decide the study's verdict; the others are reported beside it.
    """

    description: str
    measure: Measure
    treatment: str
    direction: Direction
    metric: str = ""
    control: str = ""
    axis: str = ""
    matched_on: dict[str, float] = field(default_factory=dict)
    value: float = 0.0
    min_effect: float = 0.0
    primary: bool = True
    scale: Scale = Scale.by_metric

    def __post_init__(self) -> None:
        if self.scale is Scale.by_metric:
            is_plain = self.measure is Measure.area or (self.measure is Measure.level and self.value == 0)
            self.scale = Scale.plain if is_plain else default_scale(self.metric)
        if error := next(self._errors(), None):
            raise StudyError(f"prediction '{self.description}': {error}")

    @property
    def least(self) -> float:
        """The smallest relevant effect on the scale: `min_effect`, or its logarithm; 0 if there is none."""
        return math.log(self.min_effect) if self.min_effect and self.scale is not Scale.plain else self.min_effect

    def _errors(self) -> Iterator[str]:
        if not self.min_effect >= 0 or not math.isfinite(self.min_effect) or not math.isfinite(self.value):
            yield f"min_effect={self.min_effect}, value={self.value}: must be numbers, min_effect 0 or more"
        if self.scale is not Scale.plain:
            if 0 < self.min_effect <= 1:
                yield (
                    f"min_effect={self.min_effect:g}: on the {self.scale.value} scale it is a factor above 1, such as"
                    " 1.25; or state scale: plain"
                )
            if self.measure is Measure.level:
                try:
                    on_scale(self.scale, self.value)
                except ValueError as error:
                    yield f"value={error}"
            if self.measure is Measure.area:
                yield f"scale={self.scale.value}: an area is a share of the optimum's; leave it out"
        if self.direction is Direction.same and self.min_effect == 0:
            yield "direction=same: needs min_effect, the largest irrelevant effect"
        if (self.measure is Measure.slope) != bool(self.axis):
            yield "axis: needed for measure=slope, and only there"
        if self.measure is Measure.difference and not self.control:
            yield "control: a difference needs the arm or group that the treatment is compared with"
        if self.measure is Measure.area:
            if self.metric:
                yield "metric: an area is always of gold_gain against kl; leave it out"
        elif not (EXPRESSION.fullmatch(self.metric) or AT.fullmatch(self.metric)):
            yield f"metric={self.metric}: type one name of run.json, or two: a - b, or a / b; or kl at gold_gain 0.9"
        if self.matched_on and self.measure not in (Measure.difference, Measure.slope):
            yield "matched_on: only for measure=difference and measure=slope"
        if len(self.matched_on) > 1:
            yield "matched_on: takes one metric"


@dataclass
class Arm:
    """One way of training: its overrides, its group, and its values on the study's axes."""

    name: str
    overrides: list[str] = field(default_factory=list)
    group: str = ""
    axes: dict[str, float] = field(default_factory=dict)


class Kind(str, Enum):
    """What a figure shows."""

    axis = "axis"  # the metrics y against the axis x, a line per group and value of its other axes
    arms = "arms"  # the metrics y, a row per arm
    frontier = "frontier"  # reward against KL, with the optimum's line
    curves = "curves"  # the metrics log's column y (`train/rewards/margins`) against steps, a line per arm


@dataclass
class Figure:
    """A figure of the report. x: an axis; y: metrics, or columns of the metrics log; arms: arms or groups, all if
    empty.
    """

    kind: Kind
    y: list[str] = field(default_factory=list)
    x: str = ""
    arms: list[str] = field(default_factory=list)


@dataclass
class Study:
    """A study. baseline: the arm that the others are compared with; metrics: columns of the table of arms, which are
    ranked by the first; missing: the rule for seeds without an effect; known: what earlier runs had shown when the
    predictions were written; notes: written after the runs.
    """

    name: str
    title: str
    question: str
    claim: str
    source: str
    predictions: list[Prediction]
    arms: list[Arm]
    baseline: str
    seeds: list[int]
    metrics: list[str]
    figures: list[Figure] = field(default_factory=list)
    notes: str = ""
    known: str = ""
    missing: Missing = Missing.bounds

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise StudyError(f"arms: two have the name {next(n for n in names if names.count(n) > 1)}")
        if self.baseline not in names:
            raise StudyError(f"baseline={self.baseline}: no such arm; type one of {', '.join(names)}")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise StudyError(f"seeds={self.seeds}: need at least one, each once")
        for number, prediction in enumerate(self.predictions):
            for key in ("treatment", "control"):
                named = getattr(prediction, key)
                if named and not self.members(named):
                    known = ", ".join([*names, *sorted({arm.group for arm in self.arms if arm.group})])
                    raise StudyError(f"predictions[{number}].{key}={named}: no such arm or group; type one of {known}")

    def members(self, named: str) -> list[Arm]:
        """Return the arm of that name, otherwise the arms of the group of that name."""
        return [arm for arm in self.arms if arm.name == named] or [arm for arm in self.arms if arm.group == named]

    def digest(self, stopping: Mapping[str, Any] | None = None) -> str:
        """Return a hash of what is registered before the first run: predictions, arms, claim, baseline, the rule for missing
        seeds, and the seeds or, where seeds are added until the study is decided, the rule by which they are.

        stopping: that rule, as in study.json.
        """
        return _digest(self.as_record(), stopping)

    def as_record(self) -> dict[str, Any]:
        """Return the study as plain values; `from_record` reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Study:
        parts = {
            "predictions": [
                Prediction(
                    **{
                        **p,
                        "measure": Measure(p["measure"]),
                        "direction": Direction(p["direction"]),
                        "scale": Scale(p["scale"]),
                    }
                )
                for p in record["predictions"]
            ],
            "missing": Missing(record["missing"]),
            "arms": [Arm(**arm) for arm in record["arms"]],
            "figures": [Figure(**{**figure, "kind": Kind(figure["kind"])}) for figure in record["figures"]],
        }
        return cls(**{**record, **parts})


def present_study(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a study, or its archived record, with the present names of its keys and its arms' overrides.

    Renaming registers nothing anew: the study keeps the times of its registrations. A study of a version without scales
    and rules for missing seeds keeps what it was registered with: plain differences, and missing seeds left out.
    """
    study: dict[str, Any] = {**ADDED_STUDY_KEYS, **renamed(record["study"], RENAMED_STUDY_KEYS)}
    study["predictions"] = [
        ADDED_PREDICTION_KEYS | renamed(each, RENAMED_PREDICTION_KEYS) for each in study["predictions"]
    ]
    study["arms"] = [
        renamed(arm, RENAMED_ARM_KEYS) | {"overrides": [*map(present_override, arm["overrides"])]}
        for arm in study["arms"]
    ]
    stopping = record.get("stopping")
    digests = {_digest(record["study"], stopping): _digest(study, stopping)}
    registrations = [
        entry | {"digest": digests.get(entry["digest"], entry["digest"])} for entry in record.get("registrations") or ()
    ]
    return {**record, "study": study, "registrations": registrations}


def _digest(study: Mapping[str, Any], stopping: Mapping[str, Any] | None = None) -> str:
    """Return a hash of the parts of a study's record that are registered before the first run."""
    names = ("predictions", "arms", "claim", "baseline", "seeds", "missing")
    registered = {name: study[name] for name in names if name in study}
    if stopping:
        registered["seeds"] = dict(stopping)
    return hashlib.blake2b(json.dumps(registered, sort_keys=True).encode(), digest_size=12).hexdigest()
