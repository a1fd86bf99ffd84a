"""A model is what its folder says: weights by name, what it can be, lengths and ids that it takes; else one line says why."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.evals.judges import JudgeError
from dpo_lab.evals.judges.classifier import Classifier
from dpo_lab.models import probes
from dpo_lab.models.decoding import uses_cache
from dpo_lab.models.limits import Limits
from dpo_lab.models.policy import Policy, PolicyError, Pretrained, weights_digest
from tests.support.architectures import BIDIRECTIONAL, CACHED, ENCODER_DECODERS, UNCACHED, made

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about their own kernels and settings
V = 400


def saved(policy: Policy, folder: Path, kind: str, settings: dict) -> Path:
    """A random model with the fixture's tokenizer, as a folder."""
    Policy(made(kind, settings | {"vocab_size": V}), policy.tokenizer).save(folder)
    return folder


def rename(folder: Path, new_name) -> None:
    """Write the weights again under new_name(name); those without one are left out."""
    path = folder / "model.safetensors"
    weights = {new: weight for name, weight in load_file(path).items() if (new := new_name(name)) is not None}
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("Llama", "_orig_mod."), ("GPT-2", "module."), ("Qwen2", "policy."), ("Gemma", "base_model.model.")],
)
def test_a_prefix_is_named_and_taken_off_where_asked(name, prefix, policy, tmp_path):
    folder = saved(policy, tmp_path, *CACHED[name])
    digest = weights_digest(Pretrained(path=str(folder)).load().model)
    rename(folder, lambda name: prefix + name)
    with pytest.raises(
        PolicyError, match=rf"names of \d+ weights begin with '{prefix}'.*type policy.key_prefix={prefix}$"
    ):
        Pretrained(path=str(folder)).load()
    assert weights_digest(Pretrained(path=str(folder), key_prefix=prefix).load().model) == digest


@pytest.mark.parametrize(
    ("name", "left", "said"),
    [
        (
            "Llama",
            "lm_head",
            r"1 weight is missing from the files \(lm_head.weight\); if the head is tied to the embedding",
        ),
        ("Llama", "layers.1.", r"9 weights are missing .*layers.1.*, \.\.\.\); type the path of a folder with all"),
        ("GPT-NeoX", "final_layer_norm.bias", r"1 weight is missing .*final_layer_norm.bias"),
    ],
)
def test_missing_weights_are_refused_by_name(name, left, said, policy, tmp_path):
    folder = saved(policy, tmp_path, *CACHED[name])
    rename(folder, lambda name: None if left in name else name)
    with pytest.raises(PolicyError, match=said):
        Pretrained(path=str(folder)).load()


@pytest.mark.parametrize("setting", [{"num_hidden_layers": 1}, {"intermediate_size": 40}, {"attention_bias": True}])
def test_a_config_of_another_model_is_refused(setting, policy, tmp_path):
    folder = saved(policy, tmp_path, *CACHED["Llama"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | setting))
    said = {"num_hidden_layers": "no place for", "intermediate_size": "of another shape", "attention_bias": "missing"}
    with pytest.raises(PolicyError, match=said[next(iter(setting))]):
        Pretrained(path=str(folder)).load()


@pytest.mark.parametrize("extra", ["score.weight", "v_head.summary.weight", "model.vision_tower.layer.0.weight"])
def test_whole_parts_that_the_model_has_not_are_left_out_and_said(extra, policy, tmp_path, caplog):
    folder = saved(policy, tmp_path, *CACHED["Llama"])
    path = folder / "model.safetensors"
    save_file(load_file(path) | {extra: torch.ones(1, 32)}, path, {"format": "pt"})
    with caplog.at_level(logging.WARNING, logger="dpo_lab"):
        Pretrained(path=str(folder)).load()
    assert f"1 weights are left out, and not saved with the trained policy ({extra})" in caplog.text


def test_a_state_of_unmerged_adapters_is_refused(policy, tmp_path):
    folder = saved(policy, tmp_path, *CACHED["Llama"])
    rename(folder, lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"))
    with pytest.raises(PolicyError, match=r"adapters inside the model .*merge_and_unload"):
        Pretrained(path=str(folder)).load()


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_and_a_decoder_are_refused_before_weights_are_read(name, policy, tmp_path):
    kind, settings = ENCODER_DECODERS[name]
    getattr(hf, f"{kind}Config")(**settings).save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="has an encoder and a decoder.*type the path of a causal language model"):
        Pretrained(path=str(tmp_path)).load()


def test_what_is_no_language_model_is_refused(tmp_path):
    hf.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="a vit is not a causal language model; type the path of one"):
        Pretrained(path=str(tmp_path)).load()


@pytest.mark.parametrize("name", ["BERT", "XLM"])
def test_bidirectional_attention_is_refused(name, policy, tmp_path):
    folder = saved(policy, tmp_path, *BIDIRECTIONAL[name])
    with pytest.raises(
        PolicyError, match=f"policy.path={folder}: its attention is bidirectional.*type the path of a causal"
    ):
        Pretrained(path=str(folder)).load()


def test_how_a_model_behaves_is_looked_at_once(policy, tmp_path, caplog, monkeypatch):
    folder = saved(policy, tmp_path / "model", *UNCACHED["Falcon-Mamba"])
    with caplog.at_level(logging.INFO, logger="dpo_lab"):
        assert not uses_cache(Pretrained(path=str(folder)).load(cache=tmp_path / "cache").model)
    assert "sampling: a full forward pass per token, without a KV cache: its logits differ" in caplog.text
    monkeypatch.setattr(probes, "_probe", lambda model: pytest.fail("looked at again"))
    assert not uses_cache(Pretrained(path=str(folder)).load(cache=tmp_path / "cache").model)
    other = saved(policy, tmp_path / "other", "FalconMamba", UNCACHED["Falcon-Mamba"][1] | {"state_size": 4})
    with pytest.raises(pytest.fail.Exception, match="looked at again"):
        Pretrained(path=str(other)).load(cache=tmp_path / "cache")


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3 MoE"])
@pytest.mark.parametrize("asked", [True, False])
def test_an_auxiliary_loss_that_is_asked_for_is_said_to_be_left_out(name, asked, policy, tmp_path, caplog):
    kind, settings = CACHED[name]
    folder = saved(policy, tmp_path, kind, settings | {"output_router_logits": asked, "router_aux_loss_coef": 0.02})
    with caplog.at_level(logging.WARNING, logger="dpo_lab"):
        Pretrained(path=str(folder)).load()
    assert caplog.text.count("asks for a mixture-of-experts auxiliary loss") == asked


def table(*lengths: tuple[int, int, int], token: int = 3) -> PairTable:
    return PairTable.of(
        EncodedPair(f"pair-{i}", *([token + j % 2] * n for j, n in enumerate(of))) for i, of in enumerate(lengths)
    )


@pytest.mark.parametrize(
    "name", ["GPT-2", "OPT", "GPT-J", "XGLM", "GPT-Neo", "CTRL", "BioGPT", "MPT", "RoBERTa, decoder"]
)
def test_more_tokens_than_positions_are_refused(name):
    model = made(*(CACHED | UNCACHED)[name])
    limits = Limits.of(model)
    assert limits.positions == (63 if name == "RoBERTa, decoder" else 64)
    fits = limits.positions
    with torch.no_grad():
        model(input_ids=torch.full((1, fits), 3), use_cache=False)
    limits.check_rows(table((fits - 8, 3, 8)), max_length=512)
    with pytest.raises(
        PolicyError, match=rf"data.max_length=512: pair pair-1 is {fits + 1} .*type data.max_length={fits}$"
    ):
        limits.check_rows(table((1, 1, 1), (fits - 8, 3, 9)), max_length=512)
    limits.check_samples([[3] * 10], fits - 10, "evals.max_new_tokens")
    with pytest.raises(PolicyError, match=f"longest prompt, of 10 tokens.*type evals.max_new_tokens={fits - 10}$"):
        limits.check_samples([[3], [3] * 10], fits, "evals.max_new_tokens")


@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX", "BLOOM", "Mamba"])
def test_more_tokens_than_it_was_made_for_are_said_where_they_can_be_computed(name, caplog):
    limits = Limits.of(made(*(CACHED | UNCACHED)[name]))
    with caplog.at_level(logging.WARNING, logger="dpo_lab"):
        limits.check_rows(table((60, 3, 8)), max_length=512)
    assert caplog.text.count("68 tokens long, the model has 64 positions") == (name in ("Llama", "GPT-NeoX"))


@pytest.mark.parametrize(
    ("kind", "rope", "positions"),
    [
        ("Llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 64),
        (
            "Phi3",
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
            32,
        ),
    ],
)
def test_positions_that_depend_on_the_longest_row_of_a_batch_are_refused(kind, rope, positions):
    limits = Limits.of(
        made(kind, CACHED["Llama"][1] | {"rope_parameters": rope, "original_max_position_embeddings": 32})
    )
    limits.check_rows(table((positions - 8, 3, 8)), max_length=512)
    with pytest.raises(PolicyError, match=f"a longer row changes the others; type data.max_length={positions}$"):
        limits.check_rows(table((positions - 7, 3, 8)), max_length=512)


def test_ids_that_occur_are_held_against_the_embedding_and_no_others(policy, tmp_path):
    kind, settings = CACHED["Gemma 3"]
    Policy(made(kind, settings | {"vocab_size": V - 1}), policy.tokenizer).save(tmp_path)  # one row fewer than tokens
    loaded = Pretrained(path=str(tmp_path)).load()
    limits = Limits.of(loaded.model)
    limits.check_ids(table((2, 3, 3), token=V - 3), loaded)
    with pytest.raises(
        PolicyError, match=rf"pair pair-0: token {V - 1} \('.*'\) is beyond the {V - 1} rows.*type policy.path="
    ):
        limits.check_ids(table((2, 3, 3), token=V - 2), loaded)
    with pytest.raises(
        PolicyError, match=f"a prompt has token {V - 1}, the model's embedding {V - 1} rows.*type policy.path="
    ):
        limits.check_samples([[3], [3, V - 1]], 4, "evals.max_new_tokens")


def test_a_pad_token_beyond_the_embedding_is_replaced_and_an_end_token_refused(policy, tmp_path):
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    for rows in (1, 2):  # begin, end and pad are tokens 0, 1 and 2
        Policy(made("Llama", settings | {"vocab_size": rows}), policy.tokenizer).save(tmp_path / str(rows))
    loaded = Pretrained(path=str(tmp_path / "2")).load()
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id == 1
    with pytest.raises(
        PolicyError, match="the end token of its tokenizer is token 1, its model's embedding has 1 rows"
    ):
        Pretrained(path=str(tmp_path / "1")).load()


def judge(folder: Path, policy: Policy, kind: str, **settings) -> Path:
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(**CACHED["Llama"][1] | {"vocab_size": V, "num_labels": 2} | settings)
    hf.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def test_a_judge_without_its_head_is_refused(policy, tmp_path):
    folder = judge(tmp_path, policy, "Llama")
    assert Classifier(path=str(folder)).load() is not None
    rename(folder, lambda name: None if name == "score.weight" else name)
    with pytest.raises(JudgeError, match=r"evals.judge.path=.*1 weight is missing from the files \(score.weight\)"):
        Classifier(path=str(folder)).load()


def test_a_judge_of_fewer_positions_than_asked_is_refused(policy, tmp_path):
    folder = judge(tmp_path, policy, "Bert")
    assert Classifier(path=str(folder), max_length=64).load() is not None
    with pytest.raises(JudgeError, match=r"max_length=65: the judge has 64 positions; type evals.judge.max_length=64$"):
        Classifier(path=str(folder), max_length=65).load()
