"""What the runs of all commands import: the process that tests.support.warm forks has it loaded, and has computed nothing."""

from __future__ import annotations

from dpo_lab.distributed.fork_server import fast_imports

with fast_imports():
    import dpo_lab.inspection.look
    import dpo_lab.inspection.report
    import dpo_lab.inspection.terminal
    import dpo_lab.pipelines.evaluate_run
    import dpo_lab.pipelines.train_dpo
    import dpo_lab.pipelines.train_reward
    import dpo_lab.pipelines.train_sft  # noqa: F401
