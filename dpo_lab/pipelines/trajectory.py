"""The trajectory of a run: what it is measured on, and its points in the record."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from dpo_lab.evals.context import EvalContext
from dpo_lab.evals.judges import LoadedJudge
from dpo_lab.evals.trajectory import TrajectoryMeter
from dpo_lab.pipelines.eval_inputs import eval_prompts
from dpo_lab.pipelines.inputs import TrainingInputs
from dpo_lab.pipelines.session import Session
from dpo_lab.pipelines.setup import broadcast_from_rank_zero
from dpo_lab.rewards.base import ScoreTokens
from dpo_lab.runs import metrics_log
from dpo_lab.runs.trajectory import points_of
from dpo_lab.training.callbacks.trajectory import Trajectory

log = logging.getLogger("dpo_lab")


def add_trajectory(
    session: Session, inputs: TrainingInputs, stage: str, judge: LoadedJudge | None, reward: ScoreTokens | None = None
) -> Trajectory | None:
    """Let the session's Trainer measure the policy every evals.every steps of the stage; None if that is 0.

    reward: that of a method that samples.
    """
    config, forward, evals = session.config, session.forward, session.config.evals
    if not evals.every:
        return None
    task, prompts, prompt_ids = eval_prompts(config, inputs)
    if not prompts:
        log.warning("evals.every=%d: no prompt is held out, so there is no trajectory", evals.every)
        return None
    context = EvalContext(
        trained=inputs.initial,
        initial=inputs.initial,
        encoder=inputs.encoder,
        pairs=(),
        prompts=prompts,
        prompt_ids=prompt_ids,
        texts=(),
        task=task,
        max_new_tokens=evals.max_new_tokens,
        tokens=config.data.forward_tokens,
        batch_size=evals.batch_size,
        context=forward.context,
        judge=judge,
        seed=config.seed,
    )
    meter = TrajectoryMeter(context, evals.num_trajectory_prompts, forward.device, reward)
    trajectory = Trajectory(meter, evals.every, partial(session.timer.inside, stage, "trajectory"))
    session.trainer.callbacks.insert(0, trajectory)  # type: ignore[attr-defined]  # Lightning sets it
    return trajectory


def end_trajectory(session: Session, trajectory: Trajectory, final: EvalContext) -> None:
    """Log the policy that was kept as the last point, and record all points; a collective."""
    run, trainer = session.run, session.trainer
    path = run.folder / metrics_log.METRICS_LOG

    def points() -> list[dict[str, Any]]:
        return points_of(metrics_log.rows(path)) if path.exists() else []

    step = run.record.get("early_stopping", {}).get("step", trainer.global_step)
    if step not in broadcast_from_rank_zero(trainer, lambda: [point["step"] for point in points()]):
        trajectory.log_point(trainer, step, trajectory.meter.last(final))
    if run.writes:
        run.update(trajectory=points())
