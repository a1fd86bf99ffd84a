"""What the runs of all doors import: the process that tests.warm forks has it loaded, and has computed nothing."""

from __future__ import annotations

from dpo_lab.door import loading

with loading():
    import dpo_lab.evaluation_run
    import dpo_lab.inspection.look
    import dpo_lab.inspection.report
    import dpo_lab.inspection.terminal
    import dpo_lab.run
    import dpo_lab.sft_run  # noqa: F401
