"""Settings of Hydra's and of Lightning's that can't be taken end a command with one line that says what to type."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dpo_lab.config import schema
from dpo_lab.config.allowed_targets import TargetRefused, check_hydra
from dpo_lab.config.trainer_arguments import REFUSED, check_trainer
from dpo_lab.reporting.run_summary import print_summary
from dpo_lab.runs.run_record import RunStatus
from dpo_lab.stats.estimates import Estimate
from dpo_lab.sweeps import sweeper
from dpo_lab.sweeps.plan import Job
from dpo_lab.sweeps.summary import Outcome, show
from dpo_lab.terminal.progress import plain_console
from tests.conftest import REPOSITORY
from tests.support.configs import composed, settled
from tests.support.sweeping import behaves, run, starts

pytestmark = pytest.mark.slow

BRACKETS = [
    "data.path=[/abs/a.jsonl]",
    r"prompt \[/x] [red]:heart: [link=a]",
    "evals.evaluators=[preference,kl]",
    "[/]",
    "policy.path=m[1]",
]


@pytest.mark.parametrize("text", BRACKETS)
def test_a_terminal_shows_brackets_as_they_are(text):
    out = io.StringIO()
    console = plain_console(file=out, width=200)
    job = Job((), text, Path(text), Path(text), {}, ())
    show(console, Path(text), [Outcome(job, RunStatus.new, "failed", text, 1.0, text)], text)
    sample = dict.fromkeys(("prompt", "initial", "trained"), text)
    print_summary(console, {"kl": Estimate(1.0)}, {"kl": text}, [sample], Path(text), [text])
    assert out.getvalue().count(text) >= 10


def test_no_console_of_the_package_obeys_markup():
    """One function makes consoles; rich's own is only drawn on by bars, whose columns obey none either."""
    called = {
        (path.name, ast.unparse(node.func))
        for path in (REPOSITORY / "dpo_lab").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    }
    makers = {file for file, name in called if name.split(".")[-1] in ("Console", "get_console")}
    assert makers == {"progress.py"}
    markup = {file for file, name in called if name.endswith("from_markup") or name in ("rich.print", "print_json")}
    assert markup == set()


def test_a_sweep_over_lists_may_stand_in_a_yaml(tmp_path):
    """Without --multirun on the command line; that comes first where it names the same key."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "lists.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      beta: 0.3,0.4\n"
        "      evals.evaluators: '[preference],[preference,kl]'\n"
    )
    behaves(tmp_path)
    result = run("tests.support.standin", tmp_path, "--config-dir", "mine", "+experiment=lists", "beta=0.2")
    assert result.returncode == 0, result.stdout + result.stderr
    table = result.stdout.splitlines()[-3:-1]
    settings = [line.split("  ")[0].rstrip() for line in table]
    assert settings == ["evals.evaluators=[preference]", "evals.evaluators=[preference,kl]"]
    assert [[part for part in start["argv"] if part.startswith("beta")] for start in starts(tmp_path)] == [
        ["beta=0.2"]
    ] * 2


def test_the_sweeper_names_a_setting_that_it_does_not_have():
    made = sweeper.JobSweeper(params={}, max_batch_size=3)
    with pytest.raises(schema.ConfigError, match=r"hydra.sweeper.max_batch_size=3: .*type hydra/sweeper=basic"):
        made.setup(hydra_context=None, task_function=None, config=OmegaConf.create())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("hydra.job.chdir=true", "type hydra.job.chdir=false"),
        ("hydra.sweep.subdir=${hydra:job.num}", "hydra.sweep.subdir: a job's number"),
        ("hydra.sweep.subdir=x-${hydra.job.num}", "hydra.sweep.subdir: a job's number"),
        ("hydra.sweep.dir=out/${hydra:job.id}", "hydra.sweep.dir: a job's number"),
        ("hydra.run.dir=out/${hydra:job.num}", "hydra.run.dir: a job's number"),
    ],
)
def test_settings_of_hydra_without_effect_are_refused(override, told):
    sweeper.register(schema.as_record)
    schema.register()
    with initialize_config_dir(schema.conf_dir(), version_base="1.3"):
        cfg = compose("train", [override], return_hydra_config=True)
    with pytest.raises(TargetRefused) as refused:
        check_hydra(cfg.hydra)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["seed", "noise.seed"])
def test_seeds_have_bounds(key):
    for seed in (-1, 2**32):
        with pytest.raises(schema.ConfigError, match=f"^{key}={seed}: must lie in 0 to 4294967295; type e.g. {key}=0$"):
            settled(f"{key}={seed}")
    assert settled(f"{key}={2**32 - 1}")


TYPED = {
    "gradient_clip_val": ("0.5", "type optim.max_grad_norm=0.5"),
    "gradient_clip_algorithm": ("value", "type optim.max_grad_norm="),
    "accumulate_grad_batches": ("4", "type data.batch_size=N"),
    "fast_dev_run": ("true", "type trainer.max_steps=2"),
    "overfit_batches": ("1", "type data.pairs=N"),
    "limit_train_batches": ("0.1", "type data.pairs=N"),
    "limit_val_batches": ("0", "type data.validation_pairs=N"),
    "logger": ("false", "type logger="),
    "callbacks": ("[]", "type callbacks="),
    "plugins": ("[x]", "leave it out"),
    "default_root_dir": ("x", "type name=NAME"),
    "use_distributed_sampler": ("true", "leave it out"),
    "enable_checkpointing": ("false", "type callbacks.checkpoint.every_n_steps=N"),
}


@pytest.mark.parametrize("name", TYPED)
def test_an_argument_that_the_trainer_can_t_be_given_names_the_key_that_helps(name):
    value, told = TYPED[name]
    with pytest.raises(schema.ConfigError, match=rf"^trainer\.{name}=") as refused:
        settled(f"+trainer.{name}={value}")
    assert told in str(refused.value)


def test_it_is_named_without_a_plus_sign_too():
    with pytest.raises(schema.ConfigErrors) as refused:
        composed("trainer.gradient_clip_val=0.5")
    assert schema.explain(refused.value).endswith("type optim.max_grad_norm=0.5")
    with pytest.raises(schema.ConfigErrors) as refused:
        composed("trainer.max_time=00:01:00:00")
    assert schema.explain(refused.value).endswith("type +trainer.max_time=00:01:00:00")


def test_what_changes_nothing_is_taken():
    """And each argument that is refused is one of Lightning's."""
    from inspect import signature

    from lightning.pytorch import Trainer

    harmless = {name: value for name, (value, _) in REFUSED.items()}
    check_trainer({"max_steps": 10, "val_check_interval": 5, "log_every_n_steps": 1} | harmless)
    assert set(REFUSED) <= set(signature(Trainer.__init__).parameters)
