"""Supervised fine-tuning on the user's rows: what is scored, what a step weighs, what is written, what it refuses."""

from __future__ import annotations

import copy
import json
import math
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers as hf
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from dpo_lab.cli.next_steps import after_sft
from dpo_lab.config import schema
from dpo_lab.core.losses import DPO
from dpo_lab.core.pair_table import PairTable
from dpo_lab.data.collate import collate
from dpo_lab.data.datamodule import PreferenceDataModule
from dpo_lab.models.forward import forward_name, pair_logps, response_nll, select_forward
from dpo_lab.models.policy import Lora, Policy, Pretrained, TinyPolicy, load_policy
from dpo_lab.models.reference import REFERENCES
from dpo_lab.models.tokenizer import train_tokenizer
from dpo_lab.pipelines.inputs import Forward, prepare_pairs, prepare_responses
from dpo_lab.pipelines.setup import forward_settings
from dpo_lab.pipelines.train_dpo import train_dpo
from dpo_lab.pipelines.train_sft import train_sft
from dpo_lab.training.optim import Optim
from dpo_lab.training.sft_module import SFTModule
from dpo_lab.training.step_zero import check_step_zero
from tests.conftest import make_pairs, python_m
from tests.support import warm
from tests.support.configs import composed
from tests.support.ranks import become_rank, run_in_ranks

STEPS = 5
SHORT = (
    "data.batch_size=8 data.max_length=64 data.max_prompt_length=32 optim.lr=1e-2 optim.warmup_steps=2"
    " trainer.max_steps=12 trainer.val_check_interval=6 trainer.log_every_n_steps=4"
).split()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore::FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # peft asks by the old name
]


def alone(count: int, seed: int = 0, vocabulary: int = 300) -> PairTable:
    return PairTable.of(make_pairs(count, seed, vocabulary)).chosen_only()


def padded_loss(model, batch) -> torch.Tensor:
    """The brute-force twin: torch's own loss over padded rows, prompts and pads ignored; a mean over tokens."""
    rows, labels = [], []
    for tokens, (prompt, chosen, _) in zip(
        batch.tokens.split(batch.lengths.sum(1).tolist()), batch.lengths, strict=True
    ):
        rows.append(tokens)
        labels.append(torch.cat((tokens.new_full((int(prompt),), -100), tokens[-int(chosen) :])))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(input_ids=pad(rows, batch_first=True), attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), pad(labels, batch_first=True, padding_value=-100)[:, 1:].flatten())


@pytest.mark.parametrize("path", ["shared prompt", "padded"])
def test_gradient_is_that_of_a_padded_twin(path, policy):
    model = copy.deepcopy(policy.model).double()
    batch = collate(list(alone(12)))

    def gradient(loss) -> torch.Tensor:
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    twin_loss = padded_loss(model, batch)
    twin = gradient(twin_loss)
    if path == "shared prompt":
        select_forward(model)
    assert forward_name(model) == path
    loss = response_nll(model, batch.tokens, batch.lengths[:, :2]) / batch.lengths[:, 1].sum()
    assert loss.item() == pytest.approx(twin_loss.item(), rel=1e-9)
    assert ((gradient(loss) - twin).norm() / twin.norm()).item() < 1e-8


@pytest.mark.parametrize("path", ["shared prompt", "padded"])
def test_exactly_the_response_tokens_are_scored(path, policy):
    """Id by id: one forward for each response token gives the loss, so the prompt's own tokens are no part of it."""
    model = copy.deepcopy(policy.model).double()
    pairs = list(alone(5))
    scored = [
        (p.prompt.tolist() + p.chosen.tolist()[:i], int(p.chosen[i])) for p in pairs for i in range(len(p.chosen))
    ]
    assert len(scored) == sum(len(p.chosen) for p in pairs)
    with torch.no_grad():
        by_hand = sum(
            -model(input_ids=torch.tensor([seen])).logits[0, -1].log_softmax(-1)[token].item() for seen, token in scored
        )
        if path == "shared prompt":
            select_forward(model)
        batch = collate(pairs)
        assert response_nll(model, batch.tokens, batch.lengths[:, :2]).item() == pytest.approx(by_hand, rel=1e-9)


def test_only_rows_that_predict_a_response_get_a_gradient(policy):
    model = copy.deepcopy(policy.model)
    batch = collate(list(alone(5)))
    held = []

    def hold(module, inputs, logits) -> None:
        logits.retain_grad()
        held.append(logits)

    model.lm_head.register_forward_hook(hold)
    response_nll(model, batch.tokens, batch.lengths[:, :2]).backward()
    touched = held[0].grad.abs().sum(-1) > 0
    for row, (prompt, chosen, _) in zip(touched.tolist(), batch.lengths.tolist(), strict=True):
        assert [at for at, is_touched in enumerate(row) if is_touched] == list(range(prompt - 1, prompt + chosen - 1))


def fit(folder: Path, tokens: int = 2048, devices: int = 1, **trainer_settings):
    """Train a small model for STEPS steps of 8 responses; gives its weights and the logged figures."""
    tokenizer = train_tokenizer(["the plot was good and its music too"], 300)
    model = TinyPolicy(hidden_size=32, layers=1, heads=4, intermediate_size=32).build(tokenizer, seed=0)
    select_forward(model)
    module = SFTModule(model, Optim(lr=1e-3, warmup_steps=0), total_steps=STEPS, tokens_per_microbatch=tokens)
    train, held_out = alone(30, vocabulary=250), alone(7, seed=9, vocabulary=250)
    data = PreferenceDataModule(train, held_out, batch_size=8, num_workers=0, seed=0)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=STEPS,
        max_epochs=-1,
        use_distributed_sampler=False,
        log_every_n_steps=STEPS,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=STEPS,
        **(quiet | trainer_settings),
    )
    module.train()
    trainer.fit(module, datamodule=data)
    weights = torch.cat([p.detach().flatten() for p in module.model.parameters()])
    return weights, {name: value.item() for name, value in trainer.callback_metrics.items()}, module


def test_micro_batches_of_one_are_a_whole_step(tmp_path):
    whole, whole_figures, _ = fit(tmp_path)
    single, single_figures, module = fit(tmp_path, tokens=1)
    assert (single - whole).abs().max().item() < 1e-6
    assert single_figures == pytest.approx(whole_figures, abs=1e-5)
    assert set(whole_figures) == {"train/loss", "train/tokens", "val/loss"}
    assert whole_figures["train/tokens"] == module.tokens


def rank(number: int, world_size: int, folder: str) -> None:
    """One rank of two, as torchrun would start it."""
    become_rank(number, world_size)
    weights, figures, _ = fit(Path(folder), tokens=60, devices=world_size)
    torch.save(weights, Path(folder) / f"rank-{number}.pt")
    print("RESULT", json.dumps(figures))
    sys.stdout.flush()


def test_two_ranks_are_one(tmp_path):
    """A mean over the tokens of both, not a mean of their means."""
    outputs = run_in_ranks("tests.training.test_sft", "rank", 2, str(tmp_path))
    weights, figures, _ = fit(tmp_path)
    for number, output in enumerate(outputs):
        of_rank = torch.load(tmp_path / f"rank-{number}.pt", weights_only=True)
        assert (of_rank - weights).abs().max().item() < 1e-6
        assert json.loads(output.split("RESULT", 1)[1]) == pytest.approx(figures, abs=1e-5)


def test_chosen_only_keeps_each_prompt_and_response_once():
    first, second = make_pairs(2)
    again = copy.copy(first)
    object.__setattr__(again, "key", "another rejected")
    pairs = PairTable.of([first, second, again])
    kept = pairs.flip(pairs.lengths[:, 0] >= 0).chosen_only()  # label noise or not
    assert [(p.key, list(p.prompt), list(p.chosen), list(p.rejected)) for p in kept] == [
        (p.key, p.prompt, p.chosen, []) for p in (first, second)
    ]
    assert kept.sizes.tolist() == [len(p.prompt) + len(p.chosen) for p in (first, second)]
    moved = (
        [*first.prompt, first.chosen[0]],
        first.chosen[1:] or [5],
    )  # the same ids, cut elsewhere, are another response
    other = copy.copy(first)
    object.__setattr__(other, "prompt", moved[0])
    object.__setattr__(other, "chosen", moved[1])
    assert len(PairTable.of([first, other]).chosen_only()) == 2


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501


@pytest.fixture(scope="module")
def shop(policy, tmp_path_factory) -> Path:
    """A user's folder: a model, pairs, chats, texts. Some prompts have several pairs with one chosen response."""
    shop = tmp_path_factory.mktemp("shop")
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.chat_template = TEMPLATE
    Policy(policy.model, tokenizer).save(shop / "model")
    rows = [
        {"prompt": f"the plot {i % 40}", "chosen": " was good." * (1 + i % 4), "rejected": f" was bad {i}."}
        for i in range(80)
    ]
    chats = [
        {
            "prompt": [{"role": "user", "content": f"plot {i}?"}],
            "chosen": [{"role": "assistant", "content": f"it is good {i}"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        }
        for i in range(40)
    ]
    texts = [{"body": f"the plot {i} was good and its music too"} for i in range(60)]
    for name, of in (("pairs", rows), ("chats", chats), ("texts", [*texts, texts[0]])):
        (shop / f"{name}.jsonl").write_text("\n".join(map(json.dumps, of)))
    return shop


def settled(shop: Path, file: str, *overrides: str) -> tuple[DictConfig, schema.RunConfig]:
    own = ["policy=pretrained", f"policy.path={shop / 'model'}"]
    path = [] if "data=mix" in overrides else [f"data.path={shop / file}"]
    cfg = composed(*own, *path, *SHORT, *overrides, name="sft")
    return cfg, schema.validate(cfg)


def said(table: PairTable) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(pair.prompt.tolist()), tuple(pair.chosen.tolist())) for pair in table]


def on_a_cpu() -> Forward:
    return forward_settings(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))


@pytest.mark.parametrize("file", ["pairs.jsonl", "chats.jsonl"])
def test_the_ids_are_those_that_dpo_sees(file, shop, tmp_path):
    _, settings = settled(shop, file)
    pairs = prepare_pairs(settings, tmp_path, on_a_cpu())
    responses = prepare_responses(settings, tmp_path, on_a_cpu())
    assert len(list(tmp_path.glob("pairs-*.lock"))) == 1  # one store
    for of_dpo, of_sft in ((pairs.train, responses.train), (pairs.held_out, responses.held_out)):
        assert Counter(said(of_sft)) == Counter(set(said(of_dpo)))
        assert not of_sft.lengths[:, 2].any()
    assert responses.counts["train responses"] == len(responses.train)
    assert (len(responses.train) < len(pairs.train)) == (file == "pairs.jsonl")
    ends = responses.encoder.end_ids
    assert all(chosen[-1] in ends for _, chosen in said(responses.train))  # the end token is scored
    held_out = {prompt for prompt, _ in said(responses.held_out)}
    assert held_out
    assert not held_out & {prompt for prompt, _ in said(responses.train)}


def test_whole_texts(shop, tmp_path):
    _, settings = settled(shop, "texts.jsonl", "sft.text_column=body")
    material = prepare_responses(settings, tmp_path, on_a_cpu())
    encoder = material.encoder
    texts = [json.loads(line)["body"] for line in (shop / "texts.jsonl").read_text().splitlines()]
    expected = [(tuple(encoder.prompt("")), tuple(encoder.response(text, encoder.prompt("")))) for text in texts[:-1]]
    train, held_out = said(material.train), said(material.held_out)
    assert sorted([*train, *held_out]) == sorted(expected)  # from the begin token to the end token, each once
    assert train[0][1][-1] == encoder.eos_id
    assert 0 < len(held_out) < 20
    assert material.counts["dropped: duplicate"] == 1
    assert (material.counts["rows"], material.counts["train pairs"]) == (61, len(train))


def sft(shop: Path, *arguments: str, code: int = 0, start=warm.run_module):
    result = start("dpo_lab.sft", *SHORT, *arguments, cwd=shop)
    assert result.returncode == code, result.stdout + result.stderr
    return result


def run_of(result, shop: Path) -> tuple[dict, Path]:
    folder = shop / result.stdout.splitlines()[0].removeprefix("dpo_lab: ")
    return json.loads((folder / "run.json").read_text()), folder


OWN = ("policy=pretrained", "policy.path=model", "data.path=pairs.jsonl")


@pytest.fixture(scope="module")
def whole(shop):
    return sft(shop, *OWN, start=python_m)


def test_a_run_on_own_pairs(whole, shop):
    record, folder = run_of(whole, shop)
    assert folder.parts[-4:-2] == ("outputs", "sft")
    assert (record["status"], record["steps"]) == ("done", 12)
    assert not {"loss", "beta", "reference", "noise"} & set(record["config"])  # settings that had no say
    metrics = {name: m["value"] for name, m in record["metrics"].items()}
    assert metrics["loss"] < metrics["initial/loss"] - 0.5
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert record["metrics"]["loss"]["n"] == record["data"]["held-out responses"]
    events = EventAccumulator(str(folder)).Reload()
    assert (
        [e.step for e in events.Scalars("train/loss")] == [e.step for e in events.Scalars("train/tokens")] == [4, 8, 12]
    )
    assert events.Scalars("train/tokens")[-1].value == record["tokens"]
    assert events.Scalars("val/loss")[-1].value == pytest.approx(metrics["loss"], rel=1e-5)
    assert events.Scalars("train-end/loss")[-1].value == pytest.approx(metrics["loss"], rel=1e-5)
    card = (folder / "policy" / "README.md").read_text()
    assert "Trained by supervised fine-tuning" in card
    assert "    python -m dpo_lab.sft " in card
    assert "| loss (nats/token, held-out) |" in card
    assert "train responses" in (folder / "run.log").read_text()


def test_a_finished_run_is_left_alone(whole, shop):
    _, folder = run_of(whole, shop)
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    before = [(p.stat().st_mtime_ns, p.read_bytes()) for p in files]
    again = sft(shop, *OWN)
    assert "done already" in again.stdout
    assert [(p.stat().st_mtime_ns, p.read_bytes()) for p in files] == before
    assert whole.stdout.splitlines()[-1] == again.stdout.splitlines()[-1]  # and says again what is next


def start_dpo(result, shop: Path) -> dict:
    """The record of the run that the closing line tells to type."""
    said = result.stdout.splitlines()[-1].removeprefix("Next: python -m dpo_lab.train ")
    small = (
        "trainer.max_steps=2 evals.num_prompts=4 evals.num_texts=4 evals.max_new_tokens=4 data.max_length=48".split()
    )
    trained = warm.run_module("dpo_lab.train", *shlex.split(said), *small, cwd=shop)
    assert trained.returncode == 0, trained.stderr
    return run_of(trained, shop)[0]


def test_dpo_starts_where_it_ended(whole, shop):
    record, _ = run_of(whole, shop)
    dpo = start_dpo(whole, shop)
    assert dpo["initial_policy"] == record["trained_policy"] != record["initial_policy"]
    assert dpo["step_zero_loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.extended  # in make test: two ranks of SFT below, and two by the command in tests/cli
def test_two_ranks_by_the_command_give_the_run_of_one(whole, shop):
    record, _ = run_of(whole, shop)
    of_two, _ = run_of(sft(shop, *OWN, "name=two", "trainer=ddp_cpu"), shop)
    assert of_two["tokens"] == record["tokens"]
    for name, metric in of_two["metrics"].items():
        assert metric["value"] == pytest.approx(record["metrics"][name]["value"], rel=1e-4), name


def test_adapters_alone_are_trained_and_dpo_goes_on_from_them(shop, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(shop)  # adapters name their base as it was typed
    lora = ("policy=lora", "policy.lora.r=4", "policy.path=model", "data.path=pairs.jsonl")
    kept, merged = (sft(shop, *lora, f"policy.merge={merge}") for merge in (False, True))
    (record, folder), (_, whole) = run_of(kept, shop), run_of(merged, shop)
    assert record["metrics"]["loss"]["value"] < record["metrics"]["initial/loss"]["value"]
    assert (folder / "policy" / "adapter_model.safetensors").exists()
    assert (whole / "policy" / "model.safetensors").exists()
    checkpoint = torch.load(folder / "checkpoints" / "step=12.ckpt", weights_only=True)["state_dict"]
    before = load_policy(shop / "model").model.state_dict()
    for name, weight in checkpoint.items():
        base = name.removeprefix("model.base_model.model.").replace(".base_layer", "")
        assert "lora_" in name or torch.equal(weight, before[base]), name
    went_on = Pretrained(path=str(folder / "policy"), lora=Lora(r=4)).load()
    pairs = make_pairs(12)
    batch = collate(pairs)
    with torch.no_grad():
        both = [
            pair_logps(model, batch).chosen.tolist() for model in (went_on.model, load_policy(whole / "policy").model)
        ]
    assert both[0] == pytest.approx(both[1], rel=1e-5)
    for policy in (went_on, load_policy(whole / "policy"), load_policy(folder / "policy")):
        for kind in ("cached", "frozen"):
            reference = REFERENCES[kind]().prepare(policy.model, pairs, tmp_path)
            assert check_step_zero(policy.model, DPO(), reference, batch) == pytest.approx(math.log(2), abs=1e-6)
    dpo = start_dpo(kept, shop)
    assert dpo["config"]["reference"]["kind"] == "frozen"
    assert dpo["initial_policy"] == record["trained_policy"]
    assert dpo["step_zero_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_another_architecture_and_texts(policy, shop):
    torch.manual_seed(0)
    gptj = hf.GPTJConfig(vocab_size=400, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=128)
    Policy(hf.AutoModelForCausalLM.from_config(gptj), policy.tokenizer).save(shop / "gptj")
    result = sft(shop, "policy=pretrained", "policy.path=gptj", "data.path=texts.jsonl", "sft.text_column=body")
    record, folder = run_of(result, shop)
    assert "padded rows for GPTJForCausalLM" in (folder / "run.log").read_text()
    assert record["metrics"]["loss"]["value"] < record["metrics"]["initial/loss"]["value"] - 0.5
    assert result.stdout.splitlines()[-1].endswith("data.path=PAIRS.jsonl")  # texts are no pairs


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["policy.dtype=bfloat16"], "policy=pretrained policy.path=run/policy policy.dtype=bfloat16"),
        (
            ["policy.lora.r=8", "policy.package=mine", "policy.chat_template=t.jinja"],
            "policy=lora policy.path={model} policy.lora.r=8 reference=frozen policy.adapter=run/policy policy.package=mine"
            " policy.chat_template=t.jinja",
        ),
        (["policy.lora.r=8", "policy.merge=true"], "policy=pretrained policy.path=run/policy"),
        (
            ["policy.lora.r=8", "policy.key_prefix=x.", "policy.allow_pickle=true"],
            "policy=lora policy.path=run/policy policy.lora.r=8 reference=frozen policy.key_prefix=x. policy.allow_pickle=True",
        ),
    ],
)
def test_the_next_command_says_what_loading_needs(overrides, says, shop):
    _, settings = settled(shop, "pairs.jsonl", *overrides)
    (command,) = after_sft(settings, [*overrides, "data.path=my pairs.jsonl", "seed=3"], Path("run"))
    assert command == f"python -m dpo_lab.train {says.format(model=shop / 'model')} 'data.path=my pairs.jsonl'"


@pytest.mark.extended  # in make test: sweeps of stand-ins and of DPO runs
def test_a_sweep(shop):
    arguments = ["--multirun", *SHORT, *OWN, "name=sweep", "seed=0,1", "trainer.max_steps=1"]
    swept = python_m("dpo_lab.sft", *arguments, cwd=shop)
    assert swept.returncode == 0, swept.stderr
    records = [json.loads(p.read_text()) for p in (shop / "outputs" / "sweep").rglob("run.json")]
    assert [(r["status"], "loss" in r["metrics"]) for r in records] == [("done", True)] * 2
    assert records[0]["trained_policy"] != records[1]["trained_policy"]


REFUSED = [
    (
        train_sft,
        ["noise=symmetric"],
        "noise: supervised fine-tuning learns chosen responses as labelled",
        "type noise=none",
    ),
    (train_sft, ["sft.text_column=body", "data.path=null"], "sft.text_column=body: the task", "type data.path="),
    (train_sft, ["evals.every=2"], "evals.every=2: supervised fine-tuning has no trajectory", "leave it out"),
    (train_dpo, ["sft.text_column=prompt"], "plain texts hold no preference", "python -m dpo_lab.sft"),
    (train_dpo, ["data.format=text"], "plain texts hold no preference", "python -m dpo_lab.sft"),
    (
        train_dpo,
        ["data=mix", "+data.sources={a: {path: a, format: text}}"],
        "plain texts hold",
        "python -m dpo_lab.sft",
    ),
]


@pytest.mark.parametrize(("command", "overrides", "what", "advice"), REFUSED)
def test_refused_before_anything_is_made(command, overrides, what, advice, shop, tmp_path):
    with pytest.raises(schema.ConfigError) as error:
        command(*settled(shop, "pairs.jsonl", *overrides), tmp_path / "run")
    assert what in str(error.value)
    assert advice in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (
            ["sft.text_column=body"],
            "pairs.jsonl:1: field 'body' is missing (the row has 'prompt', 'chosen', 'rejected')",
        ),
        (["data.batch_size=500"], "training responses; type data.batch_size=3"),
    ],
)
def test_refused_by_the_command(overrides, what, shop):
    result = sft(shop, *OWN, "name=refused", *overrides, code=2)
    (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert what in line
    assert "Traceback" not in result.stdout + result.stderr
