"""A policy cut over ranks trains as in one process, goes on from the same checkpoints, and is saved whole."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class
from lightning.pytorch import Trainer
from torch.distributed.tensor import DTensor

from dpo_lab.config.schema import ConfigError, conf_dir
from dpo_lab.data.splits import HELD_OUT
from dpo_lab.data.tasks.reviews import SyntheticReviews
from dpo_lab.evals.evaluate import evaluate
from dpo_lab.models.forward import select_forward
from dpo_lab.models.policy import Policy, load_policy
from dpo_lab.models.sharded_weights import gather_model
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.strategies.fsdp import FSDP2Strategy
from tests.conftest import make_pairs
from tests.evals.test_evals import subject_of
from tests.support.configs import recorded, settled
from tests.support.fits import flat, initial_policy, make_data, make_module, make_trainer
from tests.support.ranks import become_rank, run_in_ranks

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore::FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # peft asks by the old name
]

STEPS, STOP, WORLD = 5, 3, 2
TOKENS = 60  # a micro-batch: ranks differ in how many they have, in training and in validation


def initial(adapters: bool = False) -> Policy:
    """Two layers; with adapters on them, every one drawn the same."""
    policy = initial_policy(layers=2)
    if adapters:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        policy = Policy(get_peft_model(policy.model, config), policy.tokenizer)  # type: ignore[arg-type]
        select_forward(policy.model)
    return policy


def train(
    folder: Path, world_size: int, steps=STEPS, adapters=False, checkpointing=False, resume=None, dtype=None, **settings
) -> tuple[DPOModule, Trainer]:
    model = initial(adapters).model
    module = make_module(model if dtype is None else model.to(dtype), folder, STEPS, TOKENS)
    if checkpointing:
        module.model.activation_checkpointing_enable({"use_reentrant": False})
    settings.setdefault("strategy", FSDP2Strategy() if world_size > 1 else "auto")
    trainer = make_trainer(steps, world_size, **settings)
    trainer.fit(module, datamodule=make_data(), ckpt_path=resume)
    return module, trainer


def figures_of(trainer: Trainer) -> dict[str, float]:
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def evaluated(trained: Policy) -> dict[str, dict]:
    trained.model.eval()
    prompts = SyntheticReviews().prompts(HELD_OUT, 6, seed=0)
    subject = subject_of(trained, initial(), prompts, pairs=make_pairs(9, vocabulary=250))
    return {name: estimate.as_record() for name, estimate in evaluate(subject).items()}


KINDS = {"plain": {}, "checkpointed": {"checkpointing": True}, "adapters": {"adapters": True}}


def sharded_rank(number: int, world_size: int, folder: str) -> None:
    """Train every kind; checkpoint the plain one half-way and go on from there; make it whole, save it, evaluate it."""
    become_rank(number, world_size)
    place, result, weights = Path(folder), {}, {}
    for kind, changes in KINDS.items():
        module, trainer = train(place, world_size, **changes)
        result[kind] = figures_of(trainer)
        weights[kind] = flat(module.model.parameters())
        if kind == "plain":
            mine = sum(p.to_local().numel() for p in module.parameters() if isinstance(p, DTensor))
            result["share"] = mine / sum(p.numel() for p in module.parameters())
            states = trainer.optimizers[0].state_dict()["state"].values()
            result["optimizer's share"] = sum(s["exp_avg"].to_local().numel() for s in states) / len(weights[kind])
        whole = gather_model(module.model)
        assert (whole is None) is (number != 0)
        if whole is not None:
            assert torch.equal(flat(whole.parameters()), weights[kind])
        if kind == "plain":
            if whole is not None:
                Policy(whole, initial().tokenizer).save(place / "policy")
            result["evaluated"] = evaluated(Policy(module.model, initial().tokenizer))
    _, trainer = train(place, world_size, STOP)
    trainer.save_checkpoint(place / "half.ckpt")
    module, _ = train(place, world_size, resume=place / "half.ckpt")
    weights["resumed"] = flat(module.model.parameters())
    module, _ = train(place, world_size, resume=place / "alone.ckpt")
    weights["from one process"] = flat(module.model.parameters())
    module, trainer = train(place, world_size, STOP, adapters=True)
    trainer.save_checkpoint(place / "half-adapters.ckpt")
    for name in ("half-adapters", "alone-adapters", "alone-with-base"):
        module, _ = train(place, world_size, adapters=True, resume=place / f"{name}.ckpt")
        weights[name] = flat(module.model.parameters())
    module, trainer = train(place, world_size, dtype=torch.bfloat16)
    weights["bf16"] = flat(module.model.parameters())
    weights["bf16 masters"] = flat(trainer.optimizers[0].state[p]["master"] for p in module.model.parameters())
    _, trainer = train(place, world_size, STOP, dtype=torch.bfloat16)
    trainer.save_checkpoint(place / "half-bf16.ckpt")
    module, _ = train(place, world_size, resume=place / "half-bf16.ckpt", dtype=torch.bfloat16)
    weights["bf16 resumed"] = flat(module.model.parameters())
    torch.save(weights, place / f"weights-{number}.pt")
    print("RESULT", json.dumps(result))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """(folder, what each rank found, its weights) of the ranks' run."""
    folder = tmp_path_factory.mktemp("sharded")
    _, trainer = train(folder, 1, STOP)
    trainer.save_checkpoint(folder / "alone.ckpt")
    module, trainer = train(folder, 1, STOP, adapters=True)
    trainer.save_checkpoint(folder / "alone-adapters.ckpt")
    earlier = torch.load(folder / "alone-adapters.ckpt", weights_only=True)  # as an earlier version wrote it
    earlier["state_dict"] |= {name: p for name, p in module.named_parameters() if not p.requires_grad}
    torch.save(earlier, folder / "alone-with-base.ckpt")
    outputs = run_in_ranks("tests.training.test_strategies", "sharded_rank", WORLD, str(folder))
    results = [json.loads(output.split("RESULT", 1)[1]) for output in outputs]
    return folder, results, [torch.load(folder / f"weights-{n}.pt", weights_only=True) for n in range(WORLD)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_cut_over_ranks_trains_as_in_one_process(kind, sharded, tmp_path):
    _, results, weights = sharded
    module, trainer = train(tmp_path, 1, **KINDS[kind])
    expected, figures = flat(module.model.parameters()), figures_of(trainer)
    assert {"train/loss", "val/loss", "val/rewards/margins"} <= set(figures)
    for of_rank, result in zip(weights, results, strict=True):
        assert (of_rank[kind] - expected).abs().max().item() < 2e-6
        assert result[kind] == pytest.approx(figures, abs=1e-5)
    assert torch.equal(weights[0][kind], weights[1][kind])
    start = flat(initial(KINDS[kind].get("adapters", False)).model.parameters())
    assert (expected - start).abs().max().item() > 1e-3  # it did learn


def test_bf16_weights_cut_over_ranks_keep_float32_masters(sharded):
    """Each weight is its master copy, rounded, after training and after going on from a checkpoint."""
    _, _, weights = sharded
    for of_rank in weights:
        assert of_rank["bf16 masters"].dtype == torch.float32
        assert torch.equal(of_rank["bf16 masters"].bfloat16(), of_rank["bf16"])
        assert torch.equal(of_rank["bf16 resumed"], of_rank["bf16"])
        assert not torch.equal(of_rank["bf16 masters"], of_rank["bf16"].float())


def test_a_rank_keeps_its_part_of_weights_and_optimizer(sharded):
    _, results, _ = sharded
    for what in ("share", "optimizer's share"):
        assert [result[what] for result in results] == pytest.approx([0.5, 0.5], abs=0.02)
        assert sum(result[what] for result in results) == pytest.approx(1)


@pytest.mark.parametrize(("checkpoint", "kind"), [("half", "resumed"), ("alone", "from one process")])
def test_a_run_goes_on_from_a_checkpoint_by_any_number_of_ranks(checkpoint, kind, sharded, tmp_path):
    """Ranks and one process, from the file that ranks wrote and from the one that one process wrote."""
    folder, _, weights = sharded
    module, _ = train(tmp_path, 1, resume=folder / f"{checkpoint}.ckpt")
    for of_rank in weights:
        assert (flat(module.model.parameters()) - of_rank[kind]).abs().max().item() < 2e-6


def test_adapters_go_on_from_a_checkpoint_without_their_base(sharded):
    """From that of ranks, of one process, and of an earlier version, which held the base too."""
    _, _, weights = sharded
    for of_rank in weights:
        assert torch.equal(of_rank["half-adapters"], of_rank["adapters"])
        for name in ("alone-adapters", "alone-with-base"):
            assert (of_rank[name] - of_rank["adapters"]).abs().max().item() < 2e-6


@pytest.mark.parametrize("adapters", ["", "-adapters"])
def test_a_checkpoint_of_several_ranks_is_that_of_one(adapters, sharded):
    folder, _, _ = sharded
    names = (f"half{adapters}.ckpt", f"alone{adapters}.ckpt")
    ours, theirs = (torch.load(folder / name, weights_only=True) for name in names)
    assert all(("lora_" in name) is bool(adapters) for name in ours["state_dict"])
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, tensor in theirs["state_dict"].items():
        assert type(ours["state_dict"][name]) is torch.Tensor
        assert (ours["state_dict"][name] - tensor).abs().max().item() < 2e-6
    (ours_state,), (theirs_state,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert ours_state["param_groups"] == theirs_state["param_groups"]
    assert ours_state["state"].keys() == theirs_state["state"].keys()
    for number, values in theirs_state["state"].items():
        for name, tensor in values.items():
            assert ours_state["state"][number][name].shape == tensor.shape
            torch.testing.assert_close(ours_state["state"][number][name], tensor, atol=1e-5, rtol=1e-4)


def test_the_policy_is_saved_whole_and_evaluated(sharded):
    folder, results, weights = sharded
    policy = load_policy(folder / "policy")
    assert torch.equal(flat(policy.model.parameters()), weights[0]["plain"])
    expected = json.loads(json.dumps(evaluated(policy)))
    assert {"kl", "accuracy", "perplexity"} <= set(expected)
    assert [result["evaluated"] for result in results] == [expected, expected]


def test_a_policy_that_nothing_cut_is_left_alone():
    policy = initial()
    assert gather_model(policy.model) is policy.model


PRESETS = sorted(path.stem for path in (Path(conf_dir()) / "trainer").glob("*.yaml"))


def test_the_presets_asked_for_are_there():
    assert {"ddp", "ddp_cpu", "fsdp", "fsdp_cpu"} <= set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_what_its_classes_take(preset):
    trainer = recorded(f"trainer={preset}")["trainer"]
    node = trainer["strategy"]
    if preset not in ("cpu", "gpu"):
        inspect.signature(get_class(node["_target_"])).bind(**{k: v for k, v in node.items() if k != "_target_"})
    inspect.signature(Trainer).bind(**{k: v for k, v in trainer.items() if k != "_target_"})
    assert trainer["accelerator"] == ("cpu" if "cpu" in preset else "gpu")


def test_adapters_are_not_switched_off_where_they_are_cut_over_ranks():
    settings = ("policy=lora", "policy.path=anywhere", "reference=adapter_off")
    with pytest.raises(ConfigError, match="reference=adapter_off.*type reference=cached, or trainer=ddp"):
        settled(*settings, "trainer=fsdp_cpu")
    settled(*settings, "trainer=ddp_cpu")
