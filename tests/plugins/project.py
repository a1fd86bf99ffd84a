"""A project of a user's: what `python -m dpo_lab.new` writes, with the examples of docs/plugins.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from dpo_lab.new import write
from tests.conftest import REPOSITORY, SMALL

PAGE = (REPOSITORY / "docs" / "plugins.md").read_text()
EXAMPLE = re.compile(r"`(my_lab/\w+\.py)`[^`]*:\n\n```python\n(.*?)```", re.S)
# Smaller still: the task is of the plugin, so that its initial policy is made, too.
TINY = [*(s for s in SMALL if not s.startswith(("sft.steps", "evals.num"))), "sft.steps=16", "evals.num_prompts=4"]
TINY += ["evals.num_texts=4", "evals.num_train_pairs=8"]


def make(parent: Path) -> Path:
    """Write the project my_lab to a folder, with the examples of the page, and return its folder."""
    write("my_lab", parent)
    for name, text in EXAMPLE.findall(PAGE):
        (parent / "my_lab" / name).write_text(text)
    return parent / "my_lab"


def commands(text: str) -> list[list[str]]:
    """Return the commands of a page's sh blocks as words."""
    return [shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
