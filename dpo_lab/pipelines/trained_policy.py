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
    try:
        loaded = trained_settings(policy, folder).load(cache=CACHE)
    except PolicyError as error:
        raise ConfigError(f"{folder}: {error}") from error
    loaded.model.eval()
    return loaded


def trained_settings(policy: PolicyConfig, folder: Path) -> Pretrained:
    """Return the settings by which the policy in a folder is loaded; policy: those of the initial one."""
    settings = policy if isinstance(policy, Pretrained) else Pretrained(path=str(folder))
    if not (settings.is_quantized and is_adapter(folder)):
        settings = replace(settings, lora=Lora(), quantize=None)
    settings = replace(settings, merge=False)
    if is_adapter(folder) and not is_adapter(Path(settings.path)):
        return replace(settings, adapter=str(folder))
    unset = {"adapter": None, "package": None, "gguf_file": None, "revision": None, "key_prefix": None}
    return replace(settings, path=str(folder), **unset)


def check_folder(trained: Path) -> None:
    """Raise ConfigError if there is no such folder."""
    if not trained.is_dir():
        raise ConfigError(
            f"{trained}: no such folder; type trained=FOLDER of a policy, or run=FOLDER of a run that has one"
        )
