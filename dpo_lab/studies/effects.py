"""A prediction's effect per seed: a value, a difference, a difference at equal gain, a slope, an area."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dpo_lab.studies import frontier
from dpo_lab.studies.run_data import NotMeasured, RunData, RunSet
from dpo_lab.studies.scales import Scale, on_scale
from dpo_lab.studies.spec import Arm, Measure, Prediction, Study, StudyError


def check(study: Study) -> None:
    """Raise StudyError if a prediction could not be computed even if every run were done: arms without a value on its
    axis, or a single arm where a value must be interpolated between arms.
    """
    for number, prediction in enumerate(study.predictions):
        key = f"predictions[{number}]"
        named_groups = [named for named in (prediction.treatment, prediction.control) if named]
        for named in named_groups if prediction.axis else ():
            places = [arm.axes[prediction.axis] for arm in study.members(named) if prediction.axis in arm.axes]
            if len(places) < len(study.members(named)) or len(set(places)) < 2:
                raise StudyError(
                    f"{key}.axis={prediction.axis}: needs two arms or more in {named}, all with a value of it"
                )
            if prediction.matched_on and min(map(places.count, places)) < 2:
                raise StudyError(
                    f"{key}.matched_on: needs two arms or more of {named} at each value of {prediction.axis}, to"
                    " interpolate between them"
                )
        for named in named_groups if prediction.matched_on else ():
            if len(study.members(named)) < 2:
                raise StudyError(
                    f"{key}.matched_on: {named} is one arm; type a group of arms, to interpolate between them"
                )


def describe(prediction: Prediction) -> str:
    """Return what a prediction measures, `well_formed: uniform - frozen, at gold_gain 0.9`."""
    if prediction.measure is Measure.slope:
        control = f" - {prediction.control}" if prediction.control else ""
        equal = "".join(f", at {name} {value:g}" for name, value in prediction.matched_on.items())
        return f"{prediction.metric}: slope over {prediction.axis} of {prediction.treatment}{control}{equal}"
    what = "area under the frontier" if prediction.measure is Measure.area else prediction.metric
    other = prediction.control or (f"{prediction.value:g}" if prediction.value else "")
    equal = "".join(f", at {name} {value:g}" for name, value in prediction.matched_on.items())
    return f"{what}: {prediction.treatment}{f' - {other}' if other else ''}{equal}"


def effect_per_seed(prediction: Prediction, collection: RunSet) -> tuple[dict[int, float], dict[int, str]]:
    """Return the effect for each seed, on the prediction's scale, and for the other seeds why it is missing.

    The value of a group is the mean over its arms on that scale (of logarithms: the geometric mean), all of which must
    have a run. A slope is fitted by least squares, per factor of 10 if all values on the axis are above 0, otherwise per
    unit.
    """
    effects, missing = {}, {}
    for seed in collection.seeds:
        try:
            effects[seed] = _MEASURES[prediction.measure](prediction, collection, seed)
        except (NotMeasured, ValueError) as error:
            missing[seed] = str(error)
    return effects, missing


def _level(prediction: Prediction, collection: RunSet, seed: int) -> float:
    value = on_scale(prediction.scale, prediction.value)
    return _value(collection, prediction.treatment, prediction.metric, seed, prediction.scale) - value


def _difference(prediction: Prediction, collection: RunSet, seed: int) -> float:
    sides = (prediction.treatment, prediction.control)
    if prediction.matched_on:
        ((name, value),) = prediction.matched_on.items()
        left, right = (
            interpolate_at(collection, side, prediction.metric, name, value, seed, prediction.scale) for side in sides
        )
    else:
        left, right = (_value(collection, side, prediction.metric, seed, prediction.scale) for side in sides)
    return left - right


def _slope(prediction: Prediction, collection: RunSet, seed: int) -> float:
    found = _slope_of(prediction, prediction.treatment, collection, seed)
    return found - _slope_of(prediction, prediction.control, collection, seed) if prediction.control else found


def _slope_of(prediction: Prediction, group: str, collection: RunSet, seed: int) -> float:
    """Return the slope of a group's metric; where arms share a value on the axis, of their mean, or of the metric at the
    value of another one that is interpolated between them.
    """
    by_place: dict[float, list[Arm]] = {}
    for arm in collection.members(group):
        by_place.setdefault(arm.axes[prediction.axis], []).append(arm)
    values = []
    for place, arms in by_place.items():
        if prediction.matched_on:
            ((name, value),) = prediction.matched_on.items()
            named = f"{group}, {prediction.axis} {place:g}"
            values.append(_interpolate(collection, named, arms, prediction.metric, name, value, seed, prediction.scale))
        else:
            values.append(_mean(collection, arms, prediction.metric, seed, prediction.scale))
    is_log = min(by_place) > 0
    return slope([math.log10(place) if is_log else place for place in by_place], values)


def _area(prediction: Prediction, collection: RunSet, seed: int) -> float:
    best = frontier.optimum(collection, seed)
    if not best:
        raise NotMeasured(f"seed {seed}: no run sampled candidates of the initial policy; type evals=study")
    left = frontier.area(frontier.of_arms(collection, prediction.treatment, seed), best)
    if not prediction.control:
        return left - prediction.value
    return left - frontier.area(frontier.of_arms(collection, prediction.control, seed), best)


_MEASURES: dict[Measure, Callable[[Prediction, RunSet, int], float]] = {
    Measure.level: _level,
    Measure.difference: _difference,
    Measure.slope: _slope,
    Measure.area: _area,
}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the least-squares line of y on x."""
    middle = math.fsum(x) / len(x)
    return math.fsum((a - middle) * b for a, b in zip(x, y, strict=True)) / math.fsum((a - middle) ** 2 for a in x)


def interpolate_at(
    collection: RunSet, group: str, metric: str, name: str, value: float, seed: int, scale: Scale = Scale.plain
) -> float:
    """Return a group's metric, on a scale, where its metric `name` equals `value`, interpolated linearly between
    neighbouring arms (in the order of the only axis on which they all differ, otherwise as listed).

    If the lines cross the value more than once, as when a policy over-optimises and loses its gain again, the crossing
    with the lowest KL counts. Raises NotMeasured if they never cross it; nothing is extrapolated.
    """
    return _interpolate(collection, group, collection.members(group), metric, name, value, seed, scale)


def _interpolate(
    collection: RunSet,
    named: str,
    members: Sequence[Arm],
    metric: str,
    name: str,
    value: float,
    seed: int,
    scale: Scale,
) -> float:
    arms = _ordered(members)
    runs = [_run(collection, arm, seed) for arm in arms]
    x, y = [run.value(name) for run in runs], [_read(run, metric, scale) for run in runs]
    kl = [run.value(frontier.KL) if frontier.KL in run.metrics else 0.0 for run in runs]
    crossings = []
    for n in range(len(x) - 1):
        if min(x[n], x[n + 1]) <= value <= max(x[n], x[n + 1]):
            part = (value - x[n]) / (x[n + 1] - x[n]) if x[n + 1] != x[n] else 0.5
            crossings.append(tuple(a[n] + part * (a[n + 1] - a[n]) for a in (kl, y)))
    if not crossings:
        raise NotMeasured(f"{named}, seed {seed}: {name} {value:g} lies outside of its {min(x):.3g} .. {max(x):.3g}")
    return min(crossings, key=lambda crossing: crossing[0])[1]


def _ordered(arms: Sequence[Arm]) -> list[Arm]:
    shared = set.intersection(*(set(arm.axes) for arm in arms))
    axes = [axis for axis in shared if len({arm.axes[axis] for arm in arms}) == len(arms)]
    return sorted(arms, key=lambda arm: arm.axes[axes[0]]) if len(axes) == 1 else [*arms]


def _value(collection: RunSet, named: str, metric: str, seed: int, scale: Scale) -> float:
    return _mean(collection, collection.members(named), metric, seed, scale)


def _mean(collection: RunSet, arms: Sequence[Arm], metric: str, seed: int, scale: Scale) -> float:
    values = [_read(_run(collection, arm, seed), metric, scale) for arm in arms]
    return math.fsum(values) / len(values)


def _read(run: RunData, metric: str, scale: Scale) -> float:
    """Return a run's metric on a scale. Raises NotMeasured if it has none, or no logarithm."""
    examples = run.metrics[metric].n if metric in run.metrics else None
    try:
        return on_scale(scale, run.value(metric), examples)
    except ValueError as error:
        raise NotMeasured(f"{run.title}: {metric} {error}") from None


def _run(collection: RunSet, arm: Arm, seed: int) -> RunData:
    run = collection.run(arm.name, seed)
    if run is None:
        raise NotMeasured(f"{arm.name}, seed {seed}: no run")
    return run
