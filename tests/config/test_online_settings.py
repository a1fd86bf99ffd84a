"""Settings of methods that sample: what does not fit is refused in one line that says what to type."""

from __future__ import annotations

import pytest

from tests.support.configs import settled


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("method=rloo reward=gold noise=symmetric", r"noise: reward=gold reads no label .* type noise=none"),
        ("method=rloo loss=ipo", r"loss: method=rloo trains without a loss of pairs; leave loss= out"),
        ("method=ppo +ablation=hinge", r"loss: method=ppo trains without a loss of pairs"),
        ("method=grpo reward=judge", r"reward=judge: no judge is set; type evals.judge.path=FOLDER"),
        ("method=rloo reward=gold data=jsonl data.path=x.jsonl", r"reward=gold: these data have no gold reward"),
        ("method=rloo method.minibatches=3", r"method.minibatches=3: must divide method.prompts=16"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, message):
    with pytest.raises(Exception, match=message):
        settled(*overrides.split())


def test_the_defaults_of_all_methods_fit():
    for method in ("dpo", "online_dpo", "rloo", "grpo", "ppo"):
        config = settled(f"method={method}", "beta=0.3")
        assert config.method.is_online == (method != "dpo")
        assert getattr(config.method, "beta", 0.3) == 0.3
    assert settled("method=online_dpo", "loss=ipo").loss.name == "ipo"
