"""Load a trained policy from its folder, with the settings of the initial one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dpo_lab.config.schema import ConfigError
from dpo_lab.models.policy import Lora, Policy, PolicyConfig, PolicyError, Pretrained, is_adapter
from dpo_lab.runs.cache import CACHE


def load_trained(policy: PolicyConfig, folder: Path) -> Policy:
    """Load the policy in a folder with the settings of the initial policy; adapters are merged unless their base is
    quantized. Raise ConfigError if it can't be loaded.
    """
    check_folder(folder)
    settings = policy if isinstance(policy, Pretrained) else Pretrained(path=str(folder))
    if not (settings.is_quantized and is_adapter(folder)):
        settings = replace(settings, lora=Lora(), quantize=None)
    settings = replace(settings, merge=False)
    if is_adapter(folder) and not is_adapter(Path(settings.path)):
        settings = replace(settings, adapter=str(folder))
    else:
        unset = {"adapter": None, "package": None, "gguf_file": None, "revision": None, "key_prefix": None}
        settings = replace(settings, path=str(folder), **unset)
    try:
        loaded = settings.load(cache=CACHE)
    except PolicyError as error:
        raise ConfigError(f"{folder}: {error}") from error
    loaded.model.eval()
    return loaded


def check_folder(trained: Path) -> None:
    """Raise ConfigError if there is no such folder."""
    if not trained.is_dir():
        raise ConfigError(
            f"{trained}: no such folder; type trained=FOLDER of a policy, or run=FOLDER of a run that has one"
        )
