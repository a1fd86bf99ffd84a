"""The path of a model against padded rows with all their logits: shared prompts, padded rows, and who takes which."""

from __future__ import annotations

import copy
import logging
import random
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

from dpo_lab.core import fused_lm_head
from dpo_lab.core.losses import DPO, LOSSES, Loss
from dpo_lab.core.pairs import EncodedPair, PairLogps
from dpo_lab.data.collate import collate
from dpo_lab.models.attention import SHARED_PROMPT, mask_of_rows
from dpo_lab.models.forward import disable_dropout, forward_name, pair_logps, pair_loss, select_forward
from dpo_lab.models.paths import path_of
from dpo_lab.models.policy import load_policy
from tests.support.losses import make_loss

pytestmark = pytest.mark.slow

V = 101
LLAMA_LIKE = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WITHOUT_GROUPS = {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=1024, bos_token_id=1, eos_token_id=2)
HEAD = dict(head_dim=8)
SHARED = {
    "LlamaForCausalLM": hf.LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "Qwen2ForCausalLM": hf.Qwen2Config(**LLAMA_LIKE),
    "Qwen3ForCausalLM": hf.Qwen3Config(**LLAMA_LIKE, head_dim=8),
    "MistralForCausalLM": hf.MistralConfig(**LLAMA_LIKE, sliding_window=None),
    "GPT2LMHeadModel": hf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "GPTNeoXForCausalLM": hf.GPTNeoXConfig(**WITHOUT_GROUPS),
    "Olmo2ForCausalLM": hf.Olmo2Config(**LLAMA_LIKE),
    "SmolLM3ForCausalLM": hf.SmolLM3Config(**LLAMA_LIKE),
    "Phi3ForCausalLM": hf.Phi3Config(**LLAMA_LIKE),
    "sliding window": hf.MistralConfig(**LLAMA_LIKE, sliding_window=8),
    "a window in some layers": hf.Gemma3TextConfig(
        **LLAMA_LIKE, **HEAD, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "scaled logits": hf.CohereConfig(**LLAMA_LIKE, logit_scale=0.3),
    "divided logits": hf.GraniteConfig(**LLAMA_LIKE, logits_scaling=3.0),
    "head bias": hf.PhiConfig(**LLAMA_LIKE),
    "experts": hf.Qwen3MoeConfig(**LLAMA_LIKE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **HEAD),
}
LAYERS = dict(n_layer=2, n_head=4)
PADDED = {
    "soft-capped": (hf.Gemma2Config(**LLAMA_LIKE, **HEAD, final_logit_softcapping=5.0, sliding_window=8), "softcap"),
    "ALiBi": (hf.BloomConfig(vocab_size=V, hidden_size=32, **LAYERS), "attention"),
    "head bias": (hf.GPTJConfig(**GPT2, rotary_dim=4), "attention"),
    "state space": (
        hf.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=8),
        "linear_attention",
    ),
    "sinks": (
        hf.GptOssConfig(**LLAMA_LIKE, **HEAD, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        "s_aux",
    ),
    "segments are not passed on": (hf.StableLmConfig(**LLAMA_LIKE), "segments"),
    "own attention": (hf.GPT2Config(**GPT2, reorder_and_upcast_attn=True), "reorder_and_upcast_attn"),
}
LENGTHS = [(1, 5, 9), (600, 30, 7), (17, 1, 40), (40, 90, 60)]  # prompt, chosen, rejected


def make_model(config, attention: str = "sdpa"):
    torch.manual_seed(0)
    how = dict(attn_implementation=attention, experts_implementation="eager")  # the only one for experts in float64
    return hf.AutoModelForCausalLM.from_config(copy.deepcopy(config), **how).eval()


def make_batch(lengths=LENGTHS):
    rng = random.Random(0)
    pairs = [
        EncodedPair(f"pair-{i}", *([rng.randrange(3, V) for _ in range(n)] for n in item))
        for i, item in enumerate(lengths)
    ]
    return collate(pairs)


@pytest.fixture(scope="module")
def batch():
    return make_batch()


def run(model, batch, reference: PairLogps, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """(losses' sum, log-probs [2B], gradient) of a model by the path that it takes."""
    model.zero_grad()
    total, policy = pair_loss(model, batch, loss, reference)
    total.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return total.detach(), torch.cat((policy.chosen, policy.rejected)), gradient


def both_paths(model, batch, loss: Loss | None = None, path: str = "shared prompt"):
    """The same of the padded twin and of the selected path; the reference is another model of the same architecture."""
    loss = loss or DPO(0.1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1 + 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        reference = replace(pair_logps(other, batch), score_gap=torch.ones(len(batch)))
    assert forward_name(model) == "padded"
    twin = run(model, batch, reference, loss)
    select_forward(model)
    assert forward_name(model) == path
    assert path_of(model).vocabulary == V
    return twin, run(model, batch, reference, loss)


def errors(twin, ours) -> tuple[float, float]:
    """Relative errors: the largest of a log-probability, and of the gradient as a whole."""
    logps = ((ours[1] - twin[1]) / twin[1]).abs().max().item()
    return logps, ((ours[2] - twin[2]).norm() / twin[2].norm()).item()


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, (1e-6, 5e-5)), (torch.float64, (1e-9, 1e-7))])
def test_exact(name, dtype, most, batch):
    logps, gradient = errors(*both_paths(make_model(SHARED[name]).to(dtype), batch))
    assert logps <= most[0]
    assert gradient <= most[1]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_works_unchanged(name, batch):
    twin, ours = both_paths(make_model(SHARED["LlamaForCausalLM"]).double(), batch, make_loss(name, beta=0.1))
    assert ours[0].item() == pytest.approx(twin[0].item(), rel=1e-9)
    assert errors(twin, ours)[1] <= 1e-7


def test_inference_gives_the_training_numbers(batch):
    model = make_model(SHARED["LlamaForCausalLM"])
    select_forward(model)
    _, policy = pair_loss(model, batch, DPO(), pair_logps(model, batch).detach())
    with torch.no_grad():
        inferred = pair_logps(model, batch)
    assert inferred.chosen.tolist() == pytest.approx(policy.chosen.tolist(), rel=1e-6)
    assert inferred.rejected.tolist() == pytest.approx(policy.rejected.tolist(), rel=1e-6)


def test_pair_logps_is_differentiable(batch):
    def gradient(model) -> Tensor:
        model.zero_grad()
        logps = pair_logps(model, batch)
        (logps.chosen.sum() - 2 * logps.rejected.sum()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    model = make_model(SHARED["LlamaForCausalLM"]).double()
    twin = gradient(model)
    select_forward(model)
    assert ((gradient(model) - twin).norm() / twin.norm()).item() <= 1e-7


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_any_piece_of_the_head_gives_the_same(rows, batch, monkeypatch):
    """Pairs of more rows than a piece, several pairs a piece, one row a piece; and no piece is ever larger."""
    monkeypatch.setattr(fused_lm_head, "ROWS", rows)
    seen = []
    real = fused_lm_head._Head.score
    monkeypatch.setattr(fused_lm_head._Head, "score", lambda self, at: seen.append((at.stop - at.start, len(self.probabilities))) or real(self, at))  # fmt: skip # noqa: E501
    logps, gradient = errors(*both_paths(make_model(SHARED["LlamaForCausalLM"]).double(), batch))
    assert logps <= 1e-9
    assert gradient <= 1e-7
    assert max(max(held) for held in seen) <= rows


def test_large_vocabularies_get_fewer_rows():
    assert fused_lm_head.rows_per_chunk(8192, torch.device("cpu")) == 512
    assert fused_lm_head.rows_per_chunk(2**20, torch.device("cpu")) * 2**20 <= fused_lm_head.LOGITS
    assert fused_lm_head.rows_per_chunk(2**30, torch.device("cpu")) == 1


def test_gradient_checkpointing(batch):
    model = make_model(SHARED["LlamaForCausalLM"]).double()
    select_forward(model)
    reference = pair_logps(model, batch).detach()
    with torch.no_grad():
        model.model.norm.weight *= 1.1
    plain = run(model, batch, reference, DPO())
    model.activation_checkpointing_enable({"use_reentrant": False})
    disable_dropout(model)
    assert errors(plain, run(model, batch, reference, DPO()))[1] <= 1e-12


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_under_lora(name, batch):
    peft = pytest.importorskip("peft")
    wrapped = {"LlamaForCausalLM": ["q_proj", "v_proj", "down_proj"], "GPT2LMHeadModel": ["c_attn", "c_proj"]}[name]
    settings = peft.LoraConfig(
        r=4, target_modules=wrapped, init_lora_weights=False, fan_in_fan_out=name == "GPT2LMHeadModel"
    )
    model = peft.get_peft_model(make_model(SHARED[name]).double(), settings).eval()
    twin, ours = both_paths(model, batch)
    assert errors(twin, ours) <= (1e-9, 1e-7)
    assert all(p.grad is None for n, p in model.named_parameters() if "lora" not in n)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_lora_on_the_head(batch):
    """Its adapters are part of the head, also where they are new and change nothing, so a trial can't see them."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(make_model(hf.LlamaConfig(**LLAMA_LIKE)).double(), settings).eval()
    select_forward(model)
    assert forward_name(model) == "shared prompt"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        reference = pair_logps(model, batch)
    ours = run(model, batch, reference, DPO())
    del model.get_base_model().forward_path
    assert forward_name(model) == "padded"
    twin = run(model, batch, reference, DPO())
    assert errors(twin, ours) <= (1e-9, 1e-7)


@pytest.mark.parametrize("frozen", ["head", "body"])
def test_frozen_parts(frozen, batch):
    model = make_model(SHARED["Qwen2ForCausalLM"]).double()
    (model.lm_head if frozen == "head" else model.model).requires_grad_(False)
    twin, ours = both_paths(model, batch)
    assert errors(twin, ours)[1] <= 1e-7


def test_bf16_autocast(batch):
    """Both paths in bf16 lie about as far from float32 as each other."""
    model = make_model(SHARED["LlamaForCausalLM"])
    reference = pair_logps(model, batch).detach()
    with torch.no_grad():
        model.model.norm.weight *= 1.1
    exact = run(model, batch, reference, DPO())

    def off() -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16):
            return errors(exact, run(model, batch, reference, DPO()))

    padded = off()
    select_forward(model)
    shared = off()
    assert 0 < shared[0] <= max(2 * padded[0], 2e-3)
    assert 0 < shared[1] <= 2 * padded[1]


def test_pairs_do_not_see_each_other(batch):
    """Two pairs that share nothing: each has the numbers that it has alone, and one's tokens leave the other's alone."""
    model = make_model(SHARED["LlamaForCausalLM"]).double()
    select_forward(model)
    two = make_batch([(7, 20, 30), (11, 25, 15)])
    changed = copy.deepcopy(two)
    first = int(two.lengths[0].sum())
    changed.tokens[:first] = torch.randint(3, V, (first,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        together, alone, other = pair_logps(model, two), pair_logps(model, two.split(1)[1]), pair_logps(model, changed)
    assert together.chosen[1].item() == pytest.approx(alone.chosen[0].item(), rel=1e-12)
    assert together.rejected[1].item() == pytest.approx(other.rejected[1].item(), rel=1e-12)
    assert together.chosen[0].item() != pytest.approx(other.chosen[0].item(), rel=1e-3)


def test_rejected_does_not_see_chosen():
    model = make_model(SHARED["LlamaForCausalLM"]).double()
    select_forward(model)
    one = make_batch([(7, 20, 30)])
    changed = copy.deepcopy(one)
    changed.tokens[7:27] = 3
    with torch.no_grad():
        before, after = pair_logps(model, one), pair_logps(model, changed)
    assert before.rejected.item() == pytest.approx(after.rejected.item(), rel=1e-12)
    assert before.chosen.item() != pytest.approx(after.chosen.item(), rel=1e-3)


def test_stock_attention_over_the_flat_stream_is_wrong_and_refused():
    """Stock SDPA takes the stream, and lets rejected see chosen or take it for a text of its own: numbers, but wrong."""
    model = make_model(SHARED["LlamaForCausalLM"]).double()
    select_forward(model)
    one = make_batch([(7, 20, 30)])
    with torch.no_grad():
        right = pair_logps(model, one)
        positions = torch.tensor([[*range(27), *range(7, 37)]])
        model.set_attn_implementation("sdpa")
        stock = model(input_ids=one.tokens[None], position_ids=positions, use_cache=False).logits[0].log_softmax(-1)
    predictors = [6, *range(27, 56)]
    wrong = stock[predictors, one.tokens[27:]].sum()
    assert wrong.item() != pytest.approx(right.rejected.item(), rel=1e-6)
    with torch.no_grad():  # the model now takes the padded path, which is right
        assert pair_logps(model, one).rejected.item() == pytest.approx(right.rejected.item(), rel=1e-9)


def test_a_model_changed_after_its_choice_is_refused(batch):
    model = make_model(SHARED["LlamaForCausalLM"])
    select_forward(model)
    model.config.sliding_window = 8
    with pytest.raises(RuntimeError, match="sliding_window=8; call select_forward"):
        pair_logps(model, batch)


@pytest.mark.parametrize("name", PADDED)
def test_every_other_model_takes_padded_rows_and_says_why(name, caplog):
    config, reason = PADDED[name]
    batch = make_batch([(3, 5, 9), (17, 12, 30)])
    model = make_model(config, "eager")
    with caplog.at_level(logging.INFO):
        twin, ours = both_paths(model, batch, path="padded")
    assert len([record for record in caplog.records if record.name.startswith("dpo_lab")]) == 1
    assert "padded rows" in caplog.text
    assert reason in caplog.text
    logps, gradient = errors(twin, ours)
    assert logps <= 1e-6
    assert gradient <= 5e-5
    with torch.no_grad():
        logps = pair_logps(model, batch)
        row = torch.cat((batch.tokens[:3], batch.tokens[8:17]))  # the first pair's prompt and rejected, alone
        alone = model(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1)
    assert logps.rejected[0].item() == pytest.approx(alone[range(2, 11), row[3:]].sum().item(), rel=1e-5)


LONG = {  # beyond 8 tokens the angles of all tokens change
    "dynamic": dict(rope_type="dynamic", factor=4.0, rope_theta=1e4),
    "longrope": dict(
        rope_type="longrope",
        rope_theta=1e4,
        short_factor=[1.0] * 4,
        long_factor=[3.0, 2.0, 5.0, 1.5],
        original_max_position_embeddings=8,
        factor=4.0,
    ),
}


@pytest.mark.parametrize("rope", LONG)
def test_rows_that_would_change_the_angles_of_others_are_computed_alone(rope, caplog):
    kind = hf.LlamaConfig(**LLAMA_LIKE | {"max_position_embeddings": 8}, rope_parameters=LONG[rope])
    model = make_model(kind).double()
    with caplog.at_level(logging.INFO):
        select_forward(model)
    assert "rows of more than 8 tokens" in caplog.text
    assert forward_name(model) == "shared prompt"
    for lengths in ([(5, 20, 4), (3, 2, 5)], [(3, 5, 2), (4, 1, 3)], [(7, 20, 1)]):
        batch = make_batch(lengths)
        logps = pair_logps(model, batch)
        parts = iter(batch.tokens.split(batch.lengths.ravel().tolist()))
        for chosen, rejected in zip(logps.chosen.tolist(), logps.rejected.tolist(), strict=True):
            prompt = next(parts)
            for found, response in ((chosen, next(parts)), (rejected, next(parts))):
                row = torch.cat((prompt, response))
                with torch.no_grad():  # by a model that has seen no other row
                    alone = make_model(kind).double()(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1)
                expected = alone[range(len(prompt) - 1, len(row) - 1), response].sum()
                assert found == pytest.approx(expected.item(), rel=1e-9)


def test_sampling_and_padding_are_untouched(batch):
    """The same model generates and pads as with SDPA, and its folder says nothing of our attention."""
    model = make_model(SHARED["LlamaForCausalLM"])
    tokens = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0  # padded on the left
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask).logits[:, 4:]
        written = model.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False)
        select_forward(model)
        assert torch.equal(model(input_ids=tokens, attention_mask=mask).logits[:, 4:], expected)
        assert torch.equal(model.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False), written)


def test_a_saved_policy_is_an_ordinary_folder(policy, tmp_path):
    copied = copy.deepcopy(policy)
    select_forward(copied.model)
    copied.save(tmp_path / "policy")
    assert SHARED_PROMPT not in (tmp_path / "policy" / "config.json").read_text()
    assert forward_name(load_policy(tmp_path / "policy").model) == "shared prompt"


PADDED_ROWS = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("attention_mask", "of"),
    [
        (PADDED_ROWS, {"q_length": 1, "kv_length": 5, "q_offset": 4}),
        (PADDED_ROWS, {"q_length": 1, "kv_length": 3, "q_offset": 4, "kv_offset": 2}),
        (PADDED_ROWS, {"q_length": 1, "kv_length": 7, "q_offset": 4}),  # of a cache that has room
        (PADDED_ROWS, {"q_length": 5, "kv_length": 5}),
        (None, {"q_length": 1, "kv_length": 5, "q_offset": 4}),
        (
            PADDED_ROWS,
            {
                "q_length": 1,
                "kv_length": 5,
                "q_offset": 4,
                "local_size": 2,
                "mask_function": sliding_window_causal_mask_function(2),
            },
        ),
    ],
)
def test_the_mask_of_rows_is_that_of_transformers(attention_mask, of):
    given = {"batch_size": 2, "attention_mask": attention_mask, "allow_is_causal_skip": False, **of}
    expected, found = sdpa_mask(**given), mask_of_rows(**given)
    assert torch.equal(found.expand_as(expected), expected)
