"""The default settings of a command, as its runs record them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra import compose, initialize_config_dir

from dpo_lab.config import reward_model, schema
from dpo_lab.runs.fingerprint import flatten

# How runs of a command are told from others: a key that only they record; its config and how it is recorded.
COMMANDS = (
    ("beta", "train", schema.as_record),
    (f"{reward_model.REWARD_MODEL}.centring", "reward_model", reward_model.reward_record),
    ("sft.text_column", "sft", schema.sft_record),
)


def default_settings(like: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default settings of the command that records settings `like` these, by dotted key; none for others."""
    for key, name, as_record in COMMANDS:
        if key in like:
            schema.register()
            reward_model.register()
            with initialize_config_dir(schema.conf_dir(), version_base="1.3"):
                cfg = compose(name)
            return flatten(as_record(cfg, schema.validate(cfg)))
    return {}
