"""Check that the paths which a config names exist, before anything costly begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_lab.data.rows import check_exists
from dpo_lab.models.policy import Pretrained
from dpo_lab.rewards.learned import Learned

if TYPE_CHECKING:
    from dpo_lab.config.schema import RunConfig

MODEL = "type the path of a Hugging Face folder with safetensors, or a model's name on the hub"


def check_paths(config: RunConfig) -> None:
    """Raise ValueError for a path that does not exist. A name that may be one of the hub is not looked up."""
    for key, path in config.data.paths().items():
        if path:
            check_exists(path, key)
    if error := next(_missing(config), None):
        raise ValueError(error)


def _missing(config: RunConfig) -> Iterator[str]:
    """Yield a message, with what to type, for each file and folder that is missing."""
    policy, judge, reward = config.policy, config.evals.judge.path, config.reward
    if isinstance(policy, Pretrained):
        folders = {"policy.path": policy.path if policy.package is None else None, "policy.adapter": policy.adapter}
        for key, path in folders.items():
            if path is not None and not Path(path).exists() and not _may_be_on_the_hub(path):
                yield f"{key}={path}: no such folder; {MODEL}"
        if policy.chat_template is not None and not Path(policy.chat_template).is_file():
            yield f"policy.chat_template={policy.chat_template}: no such file; type the path of a Jinja file"
    if judge is not None and not Path(judge).is_dir():
        yield f"evals.judge.path={judge}: no such folder; type the folder of a classifier"
    if isinstance(reward, Learned) and reward.path is not None and not Path(reward.path).is_dir():
        yield f"reward.path={reward.path}: no such folder; type the folder of a reward model"


def _may_be_on_the_hub(path: str) -> bool:
    parent = Path(path).parent
    return not path.startswith((".", "/", "~")) and path.count("/") <= 1 and (parent == Path() or not parent.is_dir())
