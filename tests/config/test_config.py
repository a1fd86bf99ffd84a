"""The config: every YAML composes, every ablation is a diff, what can't be is refused in one line that says what to type."""

from __future__ import annotations

from itertools import combinations
from operator import attrgetter

import pytest
from omegaconf import OmegaConf

from dpo_lab.cli import entry_point
from dpo_lab.config import choices, logger_packages, schema
from dpo_lab.core.losses import DPO, LOSSES, IPOSum, SimPO
from dpo_lab.core.losses.base import StepLevel
from dpo_lab.models import policy
from dpo_lab.models.reference import Uniform, UniformOver
from dpo_lab.runs import run_record
from dpo_lab.runs.fingerprint import KEYS_WITHOUT_EFFECT
from dpo_lab.runs.metrics_log import MetricsLogError
from dpo_lab.training.checkpoint_io import CheckpointError
from dpo_lab.training.nonfinite import NotFinite
from tests.conftest import python_m
from tests.support import warm
from tests.support.configs import CONF, composed, recorded, settled

pytestmark = pytest.mark.slow

GROUPS = sorted({p.parent.name for p in CONF.glob("*/*.yaml")} - {"ablation"})
ABLATIONS = sorted(p.stem for p in (CONF / "ablation").glob("*.yaml"))
CHOICES = [(p.parent.name, p.stem) for p in sorted(CONF.glob("*/*.yaml")) if p.parent.name != "ablation"]


NEEDED = {
    **{("loss", name): ["reference=uniform"] for name, loss in LOSSES.items() if loss.requires_reference is False},
    ("loss", "mix"): ["+loss.terms={dpo: 1, sft: 0.1}"],
    ("data", "jsonl"): ["data.path=pairs.jsonl"],
    ("data", "mix"): ["+data.sources={a: {path: a.jsonl}}"],
    ("policy", "pretrained"): ["policy.path=folder"],
    ("policy", "lora"): ["policy.path=folder"],
    ("policy", "qlora"): ["policy.path=folder"],
    ("reference", "adapter_off"): ["policy=lora", "policy.path=folder"],
}


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes(group, choice, monkeypatch):
    for module in (logger_packages, policy):  # as if all extras were installed
        monkeypatch.setattr(module, "find_spec", lambda name: object())
    settled(f"{group}={choice}", *NEEDED.get((group, choice), []))


def test_help_has_a_line_for_every_loss_under_what_it_requires():
    lines = choices.describe_choices(CONF).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("loss, "))
    lines = lines[begin : lines.index("method:")]
    for name, loss in LOSSES.items():
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"  {name} ")]
        heading = next(line for line in reversed(lines[:at]) if line.startswith("loss, "))
        together = issubclass(loss, StepLevel)
        assert heading == f"loss, {choices.TOGETHER if together else choices.HEADINGS[loss.requires_reference]}:"
    assert max(map(len, lines)) < 135


@pytest.mark.parametrize("name", ["train", "sft", "inspect", "evaluate"])
def test_every_command_composes(name):
    schema.validate(composed(*(["run=folder"] if name == "evaluate" else []), name=name))


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_composes_and_is_a_diff(ablation):
    settled(f"+ablation={ablation}")
    text = (CONF / "ablation" / f"{ablation}.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    raw = OmegaConf.create(text)
    assert set(raw) & {"seed", "name", "hydra", "trainer", "logger"} == set()  # no seeds, paths or sweeps
    assert (recorded(f"+ablation={ablation}") == recorded()) == (ablation == "none")


def test_the_ablations_asked_for_are_there():
    asked = (
        "none uniform_ref uniform_tokens_ref label_noise ipo hinge cdpo rdpo simpo no_sft sft_chosen unlikelihood rpo"
    )
    asked += " dpop dpo_kl"
    assert set(asked.split()) <= set(ABLATIONS)


@pytest.mark.parametrize(("first", "second"), list(combinations(["uniform_ref", "label_noise", "ipo", "no_sft"], 2)))
def test_ablations_stack(first, second):
    both = settled(f"+ablation=[{first},{second}]")
    for ablation in (first, second):
        alone, base = settled(f"+ablation={ablation}"), settled()
        for axis in ("loss", "reference", "noise", "policy"):
            if getattr(alone, axis) != getattr(base, axis):
                assert getattr(both, axis) == getattr(alone, axis)


def test_settings_are_the_objects_that_run():
    plain = settled("beta=0.3", "+ablation=[uniform_tokens_ref,label_noise]", "seed=4")
    assert plain.loss == DPO(0.3)
    assert plain.reference == Uniform(UniformOver.tokens)
    assert (plain.noise.rate, plain.noise.seed) == (0.2, 4)
    assert settled("loss=ipo", "beta=0.2").loss == IPOSum(0.2)
    assert settled("+ablation=simpo").loss == SimPO(2.0, 1.0)
    assert settled("+ablation=simpo", "beta=5").loss == SimPO(5.0, 1.0)  # the command line beats the ablation


@pytest.mark.parametrize("loss", ["cpo", "slic", "sft"])
def test_a_loss_of_the_policy_alone_takes_no_term_of_length(loss):
    with pytest.raises(schema.ConfigError, match=f"loss={loss} takes .* type loss={loss} reference=uniform"):
        settled(f"loss={loss}", "reference=uniform_tokens")
    settled("loss=simpo", "reference=uniform_tokens")  # where it cancels


def test_a_record_tells_losses_of_the_same_fields_apart():
    kinds = {recorded(f"loss={name}")["loss"]["kind"] for name in ("dpo", "hinge", "ipo", "ipo_mean")}
    assert kinds == {"dpo", "hinge", "ipo", "ipo_mean"}


@pytest.mark.parametrize("group", schema.KINDS)
def test_every_kind_has_a_choice(group, monkeypatch):
    monkeypatch.setattr(policy, "find_spec", lambda name: object())
    axis = group.split(".")[0] if group == "data.task" else group.replace(".", "/")  # a task is part of the data
    chosen = {
        type(attrgetter(group)(settled(f"{axis}={p.stem}", *NEEDED.get((axis, p.stem), []))))
        for p in (CONF / axis).iterdir()
    }
    ours = {kind for kind in schema.KINDS[group].values() if kind.__module__.startswith("dpo_lab.")}  # not a test's
    assert chosen == ours


REFUSED = [
    (["beta=abc"], "beta=abc", "type beta="),
    (["betta=0.1"], "'betta'", "type beta="),
    (["+betta=0.1"], "'betta'", "type beta="),
    (["loss.gamma=3"], "'loss.gamma'", "loss=simpo"),
    (["beta=-1"], "beta=-1", "type e.g. beta=0.1"),
    (["beta=inf"], "beta=inf", "type e.g. beta=0.1"),
    (["noise.rate=1.5"], "noise.rate=1.5", "type e.g. noise.rate=0.2"),
    (["noise.rate=nan"], "noise.rate=nan", "type e.g. noise.rate=0.2"),
    (["loss=simpo"], "loss=simpo", "reference=uniform"),
    (["loss=sft"], "loss=sft has no reference", "type loss=sft reference=uniform"),
    (["loss=unlikelihood"], "loss=unlikelihood has no reference", "reference=uniform"),
    (["loss=dpo_kl", "reference=uniform"], "loss=dpo_kl measures drift", "type loss=dpo_kl reference=cached"),
    (["loss=unlikelihood", "reference=uniform", "loss.alpha=2"], "loss.alpha=2", "type e.g. loss.alpha=0.5"),
    (["loss=dpoo"], "loss=dpoo", "dpo"),
    (["+ablation=uniform"], "ablation=uniform", "uniform_ref"),
    (["ablation=uniform_ref"], "ablation=uniform_ref", "type +ablation=uniform_ref"),
    (["data=jsonl"], "data.path", "type data.path="),
    (["policy=pretrained"], "policy.path", "type policy.path="),
    (["policy.path=folder"], "'policy.path'", "type policy=pretrained"),
    (["policy=lora", "policy.path=folder", "policy.lora.r=0"], "policy.lora.r=0", "type e.g. policy.lora.r="),
    (["reference=adapter_off"], "reference=adapter_off", "type policy=lora"),
    (["data=mix"], "data.path is empty", "type data.path=FILE.jsonl, data=mix '+data.sources="),
    (["data.path=x", "data.columns={prompt: a}"], "data.columns: its entries are added", "type +data.columns=..."),
    (["data.path=x", "+data.columns={promt: a}"], "data.columns.promt: no such column", "type one of prompt, chosen"),
    (["data=mix", "+data.sources={a: {pth: x}}"], "pth", ""),
    (["data=mix", "+data.sources={a: {weight: 2}}"], "data.sources.a.path is missing", "type +data.sources.a.path="),
    (["data=mix", "data.path=x", "+data.sources={a: {path: y}}"], "data.path and data.sources", "type data=mix"),
    (["noise=uncertainty", "noise.rate=0.1"], "'noise.rate'", "type noise=symmetric or noise=one_sided"),
    (["policy=pretrained", "policy.path=x", "policy.merge=true"], "policy.merge", "type policy.lora.r=16"),
    (["policy=pretrained", "policy.path=folder", "policy.layers=2"], "'policy.layers'", "type policy=tiny"),
    (["policy=pretrained", "policy.path=folder", "policy.dtype=int8"], "policy.dtype=int8", "float32, bfloat16"),
    (["data.tokens_per_microbatch=0"], "data.tokens_per_microbatch=0", "type e.g."),
    (["optim.max_grad_norm=0"], "optim.max_grad_norm=0", "type optim.max_grad_norm="),
    (["+data.task.tempature=2"], "data.task.tempature", "data.task.temperature"),
    (["data.task.reward=max"], "data.task.reward=max", "mean, sum"),
    (["trainer.max_stepz=5"], "trainer.max_stepz", "trainer.max_steps"),
    (["trainer.max_steps=0"], "trainer.max_steps=0", "type e.g. trainer.max_steps="),
    (["seed=1.5"], "seed=1.5", "whole number"),
    (["evals.every=-1"], "evals.every=-1: must be 0 or more", "type e.g. evals.every=40"),
    (["evals.every=2.5"], "evals.every=2.5", "whole number"),
    (["evals.every=often"], "evals.every=often", "whole number"),
    (
        ["evals.num_trajectory_prompts=1"],
        "evals.num_trajectory_prompts=1",
        "type e.g. evals.num_trajectory_prompts=128",
    ),
    (["optim.lr=-1"], "optim.lr=-1", "type e.g. optim.lr="),
    (["beta=[1"], "beta=[1", "key=value"),
    (["trainer._target_=os.system"], "os.system", "nearest"),
    (["+trainer.x._target_=builtins.eval"], "builtins.eval", "nearest"),
    (["+callbacks.x={a:[{_target_:os.system}]}"], "os.system", "nearest"),
    (["+callbacks.x._target_=${trainer.y}", "+trainer.y=os.system"], "os.system", "nearest"),
]


@pytest.mark.parametrize(("overrides", "key", "advice"), REFUSED)
def test_refused_in_one_line(overrides, key, advice):
    try:
        settled(*overrides)
    except schema.ConfigError as error:
        message = str(error)
    except schema.ConfigErrors as error:
        message = schema.explain(error)
    else:
        pytest.fail("not refused")
    assert key in message
    assert advice in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "arguments", [["betta=0.1"], ["beta=-1"], ["--multirun", "beta=0.1,abc"], ["--multirun", "beta=-1,0.1"]]
)
def test_refused_by_the_command(arguments, tmp_path):
    """By the command a user types: one line, exit code 2, no folder made for it, and before torch is loaded."""
    result = python_m("dpo_lab.train", *arguments, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    lines = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "type " in lines[0]
    assert not [line for line in result.stderr.splitlines() if line.endswith(" torch")]
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize("kind", [run_record.RunFailed, CheckpointError, MetricsLogError, NotFinite])
def test_a_run_that_cannot_go_on_ends_in_one_line(kind, capsys):
    def body(settings: schema.RunConfig) -> None:
        raise kind("step=4.ckpt: damaged; delete it")

    with pytest.raises(SystemExit) as ended:
        entry_point.validate_and_run(composed(), body)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: step=4.ckpt: damaged; delete it\n"


def test_help_and_cfg_job(tmp_path):
    shown = python_m("dpo_lab.train", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert "+ablation=uniform_ref" in shown.stdout
    assert "label_noise" in shown.stdout
    job = warm.run_module("dpo_lab.train", "--cfg", "job", "beta=0.7", cwd=tmp_path)
    assert job.returncode == 0
    assert OmegaConf.create(job.stdout).beta == 0.7


def test_keys_without_effect_are_keys_of_the_config():
    cfg = composed("trainer=ddp_cpu", "evals/judge=endpoint")
    missing = {key for key in KEYS_WITHOUT_EFFECT if not key_exists(cfg, key)}
    assert missing == {"launcher", "trainer.max_time"}  # a choice of Hydra's, and an argument that no YAML sets


def key_exists(cfg, key: str) -> bool:
    *parents, leaf = key.split(".")
    return leaf in (OmegaConf.select(cfg, ".".join(parents)) if parents else cfg)
