"""Check that the paths which a config names exist, before anything costly begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_lab.data.rows import check_exists
from dpo_lab.evals.evaluate import policy_folder
from dpo_lab.models.policy import Pretrained, is_adapter
from dpo_lab.rewards.learned import Learned

if TYPE_CHECKING:
    from dpo_lab.config.schema import RunConfig

MODEL = "type the path of a Hugging Face folder with safetensors, or a model's name on the hub"


def check_paths(config: RunConfig) -> None:
    """Raise ValueError for a path that does not exist. A name that may be one of the hub is not looked up."""
    rows = {f"data.sources.{name}.path": source.path for name, source in config.data.sources.items()}
    rows |= {"data.path": config.data.path, "data.validation_path": config.data.validation_path}
    rows |= {"evals.prompts": config.evals.prompts}
    for key, path in rows.items():
        if path:
            check_exists(path, key)
    if error := next(_missing(config), None):
        raise ValueError(error)


def _missing(config: RunConfig) -> Iterator[str]:
    """Yield a message, with what to type, for each file and folder that is missing."""
    policy, judge, reward = config.policy, config.evals.judge, config.reward
    models: dict[str, str | None] = {}
    if isinstance(policy, Pretrained):
        models = {"policy.path": policy.path if policy.package is None else None, "policy.adapter": policy.adapter}
    for key, path in models.items():
        if path is not None and not Path(path).exists() and not _may_be_on_the_hub(path):
            yield f"{key}={path}: no such folder; {MODEL}"
    if isinstance(policy, Pretrained) and policy.chat_template is not None and not Path(policy.chat_template).is_file():
        yield f"policy.chat_template={policy.chat_template}: no such file; type the path of a Jinja file"
    if (path := judge.local_model) is not None and not Path(path).is_dir():
        if not judge.takes_hub_names:
            yield f"evals.judge.path={path}: no such folder; type the folder of a classifier"
        elif not Path(path).exists() and not _may_be_on_the_hub(path):
            yield f"evals.judge.path={path}: no such folder; {MODEL}"
    if (third := config.evals.third) is not None:
        folder = policy_folder(third)
        if not ((folder / "config.json").is_file() or is_adapter(folder)):
            yield f"evals.third={third}: holds no policy; type the folder of a policy, or of a run that trained one"
    if isinstance(reward, Learned) and reward.path is not None and not Path(reward.path).is_dir():
        yield f"reward.path={reward.path}: no such folder; type the folder of a reward model"


def _may_be_on_the_hub(path: str) -> bool:
    parent = Path(path).parent
    return not path.startswith((".", "/", "~")) and path.count("/") <= 1 and (parent == Path() or not parent.is_dir())
