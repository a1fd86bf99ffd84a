"""A policy that is sharded from its start: no rank holds it whole, and everything is as in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from dpo_lab.config.schema import ConfigError
from dpo_lab.data.splits import HELD_OUT
from dpo_lab.data.tasks.reviews import SyntheticReviews
from dpo_lab.distributed.collectives import rank_and_world_size
from dpo_lab.evals.evaluate import evaluate
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.forward import select_forward
from dpo_lab.models.policy import Policy, weights_digest
from dpo_lab.models.reference import Cached, Frozen
from dpo_lab.models.sharded_weights import from_rank_zero, gather_model, kept_on_disk
from dpo_lab.models.sharding import Facts
from dpo_lab.pipelines.setup import make_trainer as make_real_trainer
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.strategies.fsdp import FSDP2Strategy
from tests.conftest import make_pairs
from tests.evals.test_evals import subject_of
from tests.support.configs import recorded, settled
from tests.support.fits import Seen, flat, initial_policy, make_data, make_module, make_trainer
from tests.support.peak_weights import all_weights, bytes_of, peak_weights
from tests.support.ranks import become_rank, run_in_ranks

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.extended,
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore::FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # peft asks by the old name
]

STEPS, STOP, TOKENS, LAYERS = 4, 2, 60, 8
KINDS = {"cached": (Cached(), False), "frozen": (Frozen(), False), "adapters": (Frozen(), True)}


def initial(adapters: bool = False, layers: int = LAYERS) -> Policy:
    """A policy with tied embeddings; with adapters on it that differ from none."""
    policy = initial_policy(layers)
    if adapters:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        policy = Policy(get_peft_model(policy.model, config), policy.tokenizer)  # type: ignore[arg-type]
        select_forward(policy.model)
    return policy


def sharded(strategy: FSDP2Strategy, adapters: bool = False) -> Policy:
    """The same policy, of which rank 0 alone builds the weights."""
    tokenizer = initial_policy().tokenizer
    model = initial(adapters).model if rank_and_world_size()[0] == 0 else None
    facts = None if model is None else Facts(weights_digest(model), False)
    return Policy(from_rank_zero(strategy.sharding, model, facts), tokenizer)


def module_of(start: Policy, reference, folder: Path) -> DPOModule:
    module = make_module(start.model, folder, STEPS, TOKENS)
    pairs, held_out = make_pairs(30, vocabulary=250), make_pairs(7, seed=9, vocabulary=250)
    module.reference = reference.prepare(module.model, [*pairs, *held_out], folder)
    return module


def figures_of(seen: Seen, trainer) -> list[dict[str, float]]:
    return [*seen.figures, {name: value.item() for name, value in trainer.callback_metrics.items()}]


def evaluated(trained: Policy, start: Policy) -> dict[str, dict]:
    trained.model.eval()
    prompts = SyntheticReviews().prompts(HELD_OUT, 7, seed=0)
    subject = subject_of(trained, start, prompts, pairs=make_pairs(9, vocabulary=250), tokens=40)
    return {name: estimate.as_record() for name, estimate in evaluate(subject).items()}


def alone(folder: Path, kind: str, steps: int = STEPS, resume: Path | None = None):
    """What one process finds: figures of every step, weights, evaluation, and the trainer."""
    reference, adapters = KINDS[kind]
    start, seen = initial(adapters), Seen()
    module = module_of(start, reference, folder)
    trainer = make_trainer(steps, callbacks=[seen])
    trainer.fit(module, datamodule=make_data(), ckpt_path=resume)
    return figures_of(seen, trainer), flat(module.model.parameters()), module, start, trainer


def sizes_of(model) -> dict[str, int]:
    """Bytes of this rank's shard, and of the units that are gathered: a layer, and what lies outside of layers."""
    shards = sum(p.to_local().numel() for p in model.parameters())
    layers = [module for module in model.modules() if type(module).__name__.endswith("LlamaDecoderLayer")]
    layer = sum(p.numel() for p in layers[0].parameters())
    root = sum(p.numel() for p in model.parameters()) - len(layers) * layer
    trained = sum(p.to_local().numel() for p in model.parameters() if p.requires_grad)
    return {name: 4 * n for name, n in dict(shard=shards, layer=layer, root=root, trained=trained).items()}


def starting_rank(number: int, world_size: int, folder: str) -> None:
    become_rank(number, world_size)
    place, result, weights = Path(folder), {}, {}
    for kind, (reference, adapters) in KINDS.items():
        seen, found = Seen(), {}
        strategy = FSDP2Strategy()
        trainer = make_trainer(STEPS, world_size, strategy=strategy, callbacks=[seen])
        strategy.setup_environment()
        with peak_weights() as peak:
            start = sharded(strategy, adapters)
        found["start"], found["kept"] = peak.peak, bytes_of(all_weights())
        with peak_weights() as peak:
            module = module_of(start, reference, place)
            found["sizes"] = sizes_of(module.model)
        found["prepare"] = peak.peak
        with kept_on_disk(start.model), peak_weights() as peak:
            trainer.fit(module, datamodule=make_data())
        found["training"], found["looks"] = peak.peak, peak.looks
        found["figures"], weights[kind] = figures_of(seen, trainer), flat(module.model.parameters())
        with peak_weights() as peak:
            found["evaluated"] = evaluated(Policy(module.model, start.tokenizer), start)
        found["evaluation"] = peak.peak
        whole = gather_model(module.model)
        if whole is not None:
            assert torch.equal(flat(whole.parameters()), weights[kind])
            assert whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
        result[kind] = found
        del module, trainer, start, whole
    torch.save(weights, place / f"weights-{number}.pt")
    print("RESULT", json.dumps(result))


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """(what each rank found, its weights)."""
    folder = tmp_path_factory.mktemp("started")
    outputs = run_in_ranks("tests.training.test_sharding", "starting_rank", 2, str(folder), timeout=400)
    results = [json.loads(output.split("RESULT", 1)[1]) for output in outputs]
    return results, [torch.load(folder / f"weights-{n}.pt", weights_only=True) for n in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_and_the_evaluation_are_those_of_one_process(kind, started, tmp_path):
    results, weights = started
    figures, expected, module, start, _ = alone(tmp_path, kind)
    assert (expected - flat(start.model.parameters())).abs().max().item() > 1e-3  # it did learn
    at_end = json.loads(json.dumps(evaluated(Policy(module.model, start.tokenizer), start)))
    for of_rank, result in zip(weights, results, strict=True):
        assert (of_rank[kind] - expected).abs().max().item() < 1e-5
        assert len(result[kind]["figures"]) == len(figures) == STEPS + 1
        for mine, one in zip(result[kind]["figures"], figures, strict=True):
            assert mine == pytest.approx(one, abs=1e-5, rel=1e-5)
        assert result[kind]["evaluated"].keys() == at_end.keys()
        for name, estimate in at_end.items():
            assert result[kind]["evaluated"][name]["value"] == pytest.approx(estimate["value"], abs=1e-4), name
    assert results[0][kind]["evaluated"] == results[1][kind]["evaluated"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_rank_holds_more_than_shards_and_the_gathered_units(kind, started):
    """What is gathered at once: one layer, and the weights outside of layers, which are tied here and stay for a pass."""
    for number, result in enumerate(started[0]):
        found, sizes = result[kind], result[kind]["sizes"]
        units, whole = sizes["root"] + sizes["layer"], 2 * sizes["shard"]
        assert found["looks"] > 2 * LAYERS
        assert found["kept"] == pytest.approx(sizes["shard"], rel=0.02)
        if number > 0:
            assert found["start"] == pytest.approx(sizes["shard"], rel=0.02)
        copies = {"cached": sizes["shard"], "frozen": 2 * sizes["shard"], "adapters": sizes["shard"] + sizes["trained"]}
        assert found["training"] <= 1.01 * (copies[kind] + units)
        both = sizes["shard"] + (sizes["trained"] if kind == "adapters" else sizes["shard"])  # the initial policy too
        for phase in ("prepare", "evaluation"):
            assert found[phase] <= 1.01 * (both + units)
        if kind == "cached":
            assert found["training"] < 0.8 * whole


def meshed_rank(number: int, world_size: int, folder: str) -> None:
    become_rank(number, world_size)
    place, result = Path(folder), {}
    for kind, settings in {"mesh": {"mesh": [2, 2]}, "offload": {"offload": True}}.items():
        seen, strategy = Seen(), FSDP2Strategy(**settings)
        trainer = make_trainer(STEPS, world_size, strategy=strategy, callbacks=[seen])
        strategy.setup_environment()
        start = sharded(strategy)
        module = module_of(start, Cached(), place)
        with kept_on_disk(start.model):
            trainer.fit(module, datamodule=make_data(), ckpt_path=place / "alone.ckpt" if kind == "mesh" else None)
        sizes = [p.to_local().numel() for p in module.parameters() if isinstance(p, DTensor)]
        result[kind] = {"figures": figures_of(seen, trainer), "share": sum(sizes) / len(flat(module.parameters()))}
        result[kind]["evaluated"] = evaluated(Policy(module.model, start.tokenizer), start)
        trainer.save_checkpoint(place / f"{kind}.ckpt")
    print("RESULT", json.dumps(result))


def test_weights_are_sharded_within_groups_of_ranks_and_may_stay_on_the_host(tmp_path):
    """2 x 2 ranks go on from a checkpoint of one process; with offload, 4 ranks train all steps."""
    *_, halfway = alone(tmp_path, "cached", STOP)
    halfway.save_checkpoint(tmp_path / "alone.ckpt")
    figures, *_, module, start, trainer = alone(tmp_path, "cached")
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    expected = json.loads(json.dumps(evaluated(Policy(module.model, start.tokenizer), start)))
    outputs = run_in_ranks("tests.training.test_sharding", "meshed_rank", 4, str(tmp_path), timeout=400)
    for result in (json.loads(output.split("RESULT", 1)[1]) for output in outputs):
        assert result["mesh"]["share"] == pytest.approx(1 / 2, abs=0.02)
        assert result["offload"]["share"] == pytest.approx(1 / 4, abs=0.02)
        for kind, steps in (("mesh", figures[STOP:]), ("offload", figures)):
            assert len(result[kind]["figures"]) == len(steps)
            for mine, one in zip(result[kind]["figures"], steps, strict=True):
                assert mine == pytest.approx(one, abs=1e-5, rel=1e-5)
            for name, estimate in expected.items():
                assert result[kind]["evaluated"][name]["value"] == pytest.approx(estimate["value"], abs=1e-4), name
    end, *others = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("end", "mesh", "offload"))
    for other in others:
        assert other["state_dict"].keys() == end["state_dict"].keys()
        for name, tensor in end["state_dict"].items():
            assert (other["state_dict"][name] - tensor).abs().max().item() < 1e-5


def bf16_rank(number: int, world_size: int, folder: str) -> None:
    become_rank(number, world_size)
    seen, strategy = Seen(), FSDP2Strategy()
    trainer = make_trainer(STEPS, world_size, strategy=strategy, callbacks=[seen], precision="bf16-mixed")
    strategy.setup_environment()
    start = sharded(strategy)
    with torch.autocast("cpu", torch.bfloat16), peak_weights() as peak:
        module = module_of(start, Frozen(), Path(folder))
        trainer.fit(module, datamodule=make_data())
    kinds = [sorted({str(t.dtype) for t in tensors}) for tensors in (module.parameters(), [seen.gradient])]
    found = {"figures": figures_of(seen, trainer), "gathered": sorted(map(str, peak.dtypes)), "kept": kinds}
    print("RESULT", json.dumps(found | {"digest": weights_digest(trainable_copy(start.model))}))


def test_under_bf16_weights_are_gathered_in_bf16_and_kept_in_float32(tmp_path):
    seen = Seen()
    with torch.autocast("cpu", torch.bfloat16):
        module = module_of(initial(), Frozen(), tmp_path)
        trainer = make_trainer(STEPS, callbacks=[seen], precision="bf16-mixed")
        trainer.fit(module, datamodule=make_data())
    expected = figures_of(seen, trainer)
    for output in run_in_ranks("tests.training.test_sharding", "bf16_rank", 2, str(tmp_path)):
        found = json.loads(output.split("RESULT", 1)[1])
        assert found["gathered"] == ["torch.bfloat16"]
        assert found["kept"] == [["torch.float32"], ["torch.float32"]]
        assert found["digest"] == weights_digest(initial().model)
        for mine, one in zip(found["figures"], expected, strict=True):
            print(
                {name: abs(mine[name] - one[name]) for name in mine if "loss" in name or name.endswith("logps/chosen")}
            )
            assert mine["train/loss"] == pytest.approx(one["train/loss"], abs=5e-3)


@pytest.mark.parametrize("mesh", ["[2,4]", "[2]", "[0,2]", "[1,1,2]"])
def test_a_mesh_that_is_not_the_ranks_is_refused(mesh, tmp_path):
    config = settled("trainer=fsdp_cpu", f"trainer.strategy.mesh={mesh}")
    settings = recorded("trainer=fsdp_cpu", f"trainer.strategy.mesh={mesh}")
    with pytest.raises(
        ConfigError, match=r"trainer\.strategy\.mesh=.*number of devices, 2; type trainer.strategy.mesh="
    ):
        make_real_trainer(config, settings, tmp_path)
