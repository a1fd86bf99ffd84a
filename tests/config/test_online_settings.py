"""Settings of methods that sample: what does not fit is refused in one line that says what to type."""

from __future__ import annotations

import pytest

from dpo_lab.config.reward_model import reward_model_run, with_reward_model
from dpo_lab.config.schema import validate
from dpo_lab.runs.cache import CACHE
from dpo_lab.runs.renamed_keys import present_config
from tests.support.configs import composed, recorded, settled


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("method=rloo reward=gold noise=symmetric", r"noise: reward=gold reads no label .* type noise=none"),
        (
            "method=rloo reward=learned reward.path=mine noise=symmetric",
            r"noise: reward.path=mine reads no label .* type noise=none, or leave reward.path= out",
        ),
        ("method=rloo loss.beta=0.5", r"loss.beta=0.5: method=rloo trains with method.beta=0.1; .* type beta=0.1"),
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


def test_label_noise_fits_the_reward_model_that_was_made_for_the_run():
    config = settled("method=rloo", "reward=learned", "noise=symmetric", "noise.rate=0.2")
    assert with_reward_model(config, CACHE / "reward-1").reward.reads_labels


def test_the_defaults_of_all_methods_fit():
    for method in ("dpo", "online_dpo", "rloo", "grpo", "ppo"):
        config = settled(f"method={method}", "beta=0.3")
        assert config.method.is_online == (method != "dpo")
        assert getattr(config.method, "beta", 0.3) == 0.3
    assert settled("method=online_dpo", "loss=ipo").loss.name == "ipo"


def test_the_reward_model_of_a_run_does_not_depend_on_how_the_run_is_evaluated_or_trained():
    def digest(*overrides: str) -> str:
        cfg = composed(*overrides)
        return reward_model_run(cfg, validate(cfg))[2]

    made = digest("method=rloo")
    assert digest("method=grpo", "evals.num_prompts=7", "beta=3", "optim.lr=1", "trainer.max_steps=9") == made
    assert digest("method=rloo", "seed=1") != made != digest("method=rloo", "reward.steps=9")
    assert digest("method=rloo", "noise=symmetric", "noise.rate=0.2") != made


def test_a_run_from_before_the_penalty_goes_on():
    before = recorded("method=rloo")
    del before["method"]["missing_end_penalty"]
    assert present_config(before) == recorded("method=rloo")
    assert present_config(recorded("method=dpo")) == recorded("method=dpo")
