"""Beside TRL (extra [bench]): rows that its DPO trainer reads too become the same ids, and what it makes a loss of the same
loss, or the difference is stated here.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_lab.core.losses import (
    AOT,
    BCO,
    DPO,
    EXO,
    KTO,
    NCA,
    RDPO,
    RPO,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    DPOMean,
    Hinge,
    IPOMean,
    SFTChosen,
)
from dpo_lab.core.losses.base import Divergence
from dpo_lab.core.pairs import EncodedPair, PairLogps
from dpo_lab.data.formats import Shape
from dpo_lab.data.splits import TRAIN
from dpo_lab.data.tasks.reviews import SyntheticReviews
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.models.tokenizer import train_tokenizer
from tests.support.templates import tokenizer_of

pytestmark = pytest.mark.filterwarnings("ignore")  # what packages that the lab does not depend on warn of is theirs
ROWS = 200


@pytest.fixture(scope="module")
def trl_ids():
    """trl_ids(rows, tokenizer): (prompt, chosen, rejected) of every row, as DPOTrainer prepares them."""
    pytest.importorskip("trl", reason="needs pip install -c constraints.txt -e '.[bench]'")
    datasets = pytest.importorskip("datasets")
    from trl import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    datasets.disable_progress_bars()
    config = SimpleNamespace(
        **{name: getattr(DPOConfig, name, None) for name in ("dataset_num_proc", "truncation_mode")}
    )
    config.max_length = None

    def prepared(rows, tokenizer) -> list[tuple[list[int], list[int], list[int]]]:
        trainer = SimpleNamespace(_tokenizer=tokenizer, _is_vision_dataset=False)
        data = DPOTrainer._prepare_dataset(trainer, datasets.Dataset.from_list(rows), tokenizer, config, "train")
        return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in data]

    return prepared


def ours(rows, tokenizer) -> list[EncodedPair]:
    pairs = [pair for row in rows for pair in Shape().read(row)]
    return PairTokenizer(tokenizer, 4000, 2000).pairs(pairs, Counter())


def reviews(seed: int) -> tuple[random.Random, list[str]]:
    return random.Random(seed), SyntheticReviews().texts(TRAIN, 3 * ROWS, seed)


def text_rows() -> list[dict]:
    """Prompts that end in a word, a space, a line break, half a word; unicode; empty ones."""
    rng, texts = reviews(1)
    ends, starts = ["", " ", "\n", "é", " a", "\nAnswer:"], ["", " ", "\n", "é ", "b", "  "]
    rows = []
    for i in range(ROWS):
        prompt = texts[3 * i] + rng.choice(ends) if i % 20 else ""
        chosen, rejected = (rng.choice(starts) + texts[3 * i + j] for j in (1, 2))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def chat_rows(explicit: bool, system: bool) -> list[dict]:
    rng, texts = reviews(2)
    rows = []
    for i in range(ROWS):
        turns = [
            {"role": ("user", "assistant")[j % 2], "content": rng.choice(texts)} for j in range(rng.choice([1, 3, 5]))
        ]
        prompt = [{"role": "system", "content": texts[i]}, *turns] if system else turns
        sides = [[{"role": "assistant", "content": texts[3 * i + j]}] for j in (1, 2)]
        row = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
        rows.append(row if explicit else {"chosen": prompt + sides[0], "rejected": prompt + sides[1]})
    return rows


def parts(pair: EncodedPair) -> tuple[list[int], list[int], list[int]]:
    return list(pair.prompt), list(pair.chosen), list(pair.rejected)


@pytest.mark.parametrize("family", ["plain", "begins"])
def test_text_is_the_same(family, trl_ids):
    """But for the empty prompt of a tokenizer that begins texts with nothing: a response is predicted from something here."""
    rows, tokenizer = text_rows(), tokenizer_of(family)
    theirs = [(prompt or [tokenizer.eos_token_id], *sides) for prompt, *sides in trl_ids(rows, tokenizer)]
    assert [parts(pair) for pair in ours(rows, tokenizer)] == theirs


def test_text_differs_where_a_token_would_lie_across_the_border(trl_ids):
    """Theirs is the ids of the whole, and what of the prompt does not stand there whole is left out of prompt and loses its
    place before the response; ours are prompt and response apart. Where no token crosses the border they are the same.
    """
    rows = text_rows()
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], 600)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    crossed = 0
    for row, pair, (prompt, *sides) in zip(rows, ours(rows, tokenizer), trl_ids(rows, tokenizer), strict=True):
        assert parts(pair) == (
            [tokenizer.bos_token_id, *ids(row["prompt"])],
            [*ids(row["chosen"]), tokenizer.eos_token_id],
            [*ids(row["rejected"]), tokenizer.eos_token_id],
        )
        if all(
            ids(row["prompt"] + row[side]) == ids(row["prompt"]) + ids(row[side]) for side in ("chosen", "rejected")
        ):
            assert (prompt, *sides) == parts(pair)
        else:
            crossed += 1
            whole = [tokenizer.bos_token_id, *ids(row["prompt"] + row["chosen"]), tokenizer.eos_token_id]
            assert [*prompt, *sides[0]] == whole
            assert (prompt, *sides) != parts(pair)
    assert 0 < crossed < ROWS


def test_an_implicit_prompt_of_text_ends_at_a_word_here_and_at_a_letter_there(trl_ids):
    """The same where the sides part at a word's first letter; where two words begin alike, theirs cuts the word."""
    rng, texts = reviews(3)
    words = ["good", "great", "bad", "bland", "blue", "odd"]
    rows = []
    for text in texts[:ROWS]:
        first, second = rng.sample(words, 2)
        rows.append({"chosen": f"{text} It was {first}.", "rejected": f"{text} It was {second} indeed."})
    tokenizer = tokenizer_of("plain")
    same = 0
    for row, pair, (prompt, chosen, rejected) in zip(
        rows, ours(rows, tokenizer), trl_ids(rows, tokenizer), strict=True
    ):
        assert [*pair.prompt, *pair.chosen] == [*prompt, *chosen]
        assert [*pair.prompt, *pair.rejected] == [*prompt, *rejected]
        assert tokenizer.decode(pair.prompt).endswith("It was")
        begin_alike = row["chosen"].split()[-1][0] == row["rejected"].split()[-2][0]
        assert (list(pair.prompt) == prompt) != begin_alike
        same += not begin_alike
    assert 0 < same < ROWS


AFTER_TURN = {"chatml": "\n", "llama3": "", "mistral": "", "gemma": "\n"}


@pytest.mark.parametrize("family", AFTER_TURN)
@pytest.mark.parametrize("explicit", [True, False])
def test_chats_are_the_same_up_to_the_turns_end(family, explicit, trl_ids):
    """They score what the template writes after the token that ends the turn, too: a line break in ChatML and Gemma. A policy
    stops before it, so here it is no part of the response.
    """
    rows, tokenizer = chat_rows(explicit, system=family in ("chatml", "llama3")), tokenizer_of(family)
    after = tokenizer(AFTER_TURN[family], add_special_tokens=False)["input_ids"]
    expected = [
        (prompt, chosen + after, rejected + after) for prompt, chosen, rejected in map(parts, ours(rows, tokenizer))
    ]
    assert expected == trl_ids(rows, tokenizer)


# TRL's losses and their weights beside ours, at beta 0.3 and TRL's label_smoothing 0.2.
SAME_LOSS = {
    "dpo": (DPO(0.3), ["sigmoid"], [1.0]),
    "hinge": (Hinge(0.3), ["hinge"], [1.0]),
    "ipo_mean": (IPOMean(0.3), ["ipo"], [1.0]),
    "rdpo": (RDPO(0.3, 0.2), ["robust"], [1.0]),
    "exo": (EXO(0.3, 0.2), ["exo_pair"], [1.0]),
    "nca": (NCA(0.3), ["nca_pair"], [1.0]),
    "sppo": (SPPO(0.3), ["sppo_hard"], [1.0]),
    "apo_zero": (APOZero(0.3), ["apo_zero"], [1.0]),
    "apo_down": (APODown(0.3), ["apo_down"], [1.0]),
    "discopop": (DiscoPOP(0.3, tau=0.05), ["discopop"], [1.0]),
    "dpo_mean": (DPOMean(0.3), ["sigmoid_norm"], [1.0]),
    "aot": (AOT(0.3), ["aot"], [1.0]),
    "aot_unpaired": (AOTUnpaired(0.3), ["aot_unpaired"], [1.0]),
    "bco": (BCO(0.3, shift=False), ["bco_pair"], [1.0]),
}
SMOOTHED = ("robust", "exo_pair")  # those of theirs that take label_smoothing as ours does
DIVERGENCES = {  # TRL's name, its coefficient
    Divergence.forward_kl: ("forward_kl", None),
    Divergence.js: ("js_divergence", None),
    Divergence.alpha: ("alpha_divergence", 0.6),  # theirs is 1 - alpha
}
BATCHES = 200


@pytest.fixture(scope="module")
def scored() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of tokens [8, 12] by a policy and by a reference, and which of them are a response's [8, 13]: four
    chosen ones above four rejected ones, of 1 to 12 tokens.
    """
    return scored_batch(0, (12, 3, 1, 7, 2, 9, 5, 4))


def scored_batch(seed: int, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    by_policy, by_reference = -3 * torch.rand(2, 8, 12, generator=generator, dtype=torch.float64)
    mask = torch.zeros(8, 13, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 13 - length :] = 1
    return by_policy * mask[:, 1:], by_reference * mask[:, 1:], mask


class Says(torch.nn.Module):
    """A model that gives its tokens these log-probabilities."""

    def __init__(self, logps: torch.Tensor, log_squares: torch.Tensor | None = None) -> None:
        super().__init__()
        self.logps, self.log_squares = logps, log_squares

    def forward(self, **inputs) -> SimpleNamespace:
        zeros = torch.zeros_like(self.logps)
        says = dict(log_probs=self.logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        return SimpleNamespace(**says, log_sum_sq_probs=self.log_squares)


def trl_loss(
    of_policy,
    of_reference,
    mask,
    losses: list[str],
    weights: list[float],
    divergence="reverse_kl",
    coefficient=0.5,
    ld_alpha: float | None = None,
    log_squares: torch.Tensor | None = None,
    **settings,
) -> float:
    """What TRL's trainer makes of the log-probabilities of a batch's tokens."""
    from trl.trainer.dpo_trainer import DPOTrainer

    model = Says(of_policy, log_squares)
    trainer = SimpleNamespace(
        model=model,
        ref_model=Says(of_reference),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        ld_alpha=ld_alpha,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=coefficient,
        loss_types=losses,
        loss_weights=weights,
        use_weighting=log_squares is not None,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    inputs = {"input_ids": mask, "completion_mask": mask, "attention_mask": torch.ones_like(mask)}
    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False).item()


def our_logps(of_tokens, mask) -> PairLogps:
    chosen, rejected = of_tokens.sum(1).chunk(2)
    return PairLogps(chosen, rejected, *mask[:, 1:].sum(1).chunk(2))


@pytest.fixture(scope="module")
def without_checkpointing():
    """Their switch of a model's gradient checkpointing, which ours here does not have."""
    module = pytest.importorskip("trl.trainer.dpo_trainer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "disable_gradient_checkpointing", lambda *_: nullcontext())
        yield


@pytest.mark.parametrize("name", SAME_LOSS)
def test_a_batch_costs_the_same(name, without_checkpointing):
    loss, types, weights = SAME_LOSS[name]
    rng = random.Random(0)
    for seed in range(BATCHES):
        batch = by_policy, by_reference, mask = scored_batch(seed, [rng.randint(1, 12) for _ in range(8)])
        ours = loss(our_logps(by_policy, mask), our_logps(by_reference, mask)).mean().item()
        smoothing = 0.2 if types[0] in SMOOTHED else 0.0
        theirs = trl_loss(*batch, types, weights, beta=0.3, label_smoothing=smoothing)
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", ["dpo", "hinge", "exo", "dpo_mean"])
def test_a_batch_costs_the_same_by_every_divergence(name, divergence, without_checkpointing):
    loss, types, weights = SAME_LOSS[name]
    loss = replace(loss, divergence=divergence, divergence_alpha=0.4)
    theirs, coefficient = DIVERGENCES[divergence]
    for seed in range(20):
        batch = by_policy, by_reference, mask = scored_batch(seed, [1, 5, 2, 8, 3, 12, 2, 9])
        ours = loss(our_logps(by_policy, mask), our_logps(by_reference, mask)).mean().item()
        settings = dict(beta=0.3, label_smoothing=0.2, divergence=theirs, coefficient=coefficient)
        found = trl_loss(*(rows.float() if rows is not mask else rows for rows in batch), types, weights, **settings)
        assert ours == pytest.approx(found, rel=1e-4)  # theirs takes float32 at most


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["dpo", "hinge", "apo_zero"])
def test_a_batch_costs_the_same_with_the_longer_response_weighed_less(name, alpha, without_checkpointing):
    loss, types, weights = SAME_LOSS[name]
    rng = random.Random(1)
    for seed in range(BATCHES):
        lengths = [rng.randint(1, 12) for _ in range(8)]
        batch = by_policy, by_reference, mask = scored_batch(seed, lengths)
        pairs = [
            EncodedPair(str(at), [0], range(lengths[at]), range(lengths[at + 4]), tail_weight=alpha) for at in range(4)
        ]
        sides = [np.split(pair.token_weights, [len(pair.chosen)]) for pair in pairs]
        of_tokens = torch.zeros(8, 12, dtype=torch.float64)
        for row, weight in enumerate([chosen for chosen, _ in sides] + [rejected for _, rejected in sides]):
            of_tokens[row, 12 - len(weight) :] = torch.from_numpy(weight)
        policy, reference = (our_logps(rows * of_tokens, mask) for rows in (by_policy, by_reference))
        theirs = trl_loss(*batch, types, weights, beta=0.3, label_smoothing=0.0, ld_alpha=alpha)
        assert loss(policy, reference).mean().item() == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("name", ["dpo", "ipo_mean", "sppo"])
def test_a_batch_costs_the_same_with_pairs_weighed_by_the_policy(name, without_checkpointing):
    loss, types, weights = SAME_LOSS[name]
    rng = random.Random(2)
    for seed in range(BATCHES):
        batch = by_policy, by_reference, mask = scored_batch(seed, [rng.randint(1, 12) for _ in range(8)])
        generator = torch.Generator().manual_seed(1000 + seed)
        log_squares = -2 * torch.rand(8, 12, generator=generator, dtype=torch.float64)
        relative = ((by_policy - log_squares) * mask[:, 1:]).sum(1)
        plain = our_logps(by_policy, mask)
        lengths = torch.stack((plain.chosen_length, plain.rejected_length), 1)
        sums = torch.stack((plain.chosen, plain.rejected, *relative.chunk(2)), 1)
        policy = PairLogps.of(sums, lengths)
        ours = policy.weigh(loss(policy, our_logps(by_reference, mask))).mean().item()
        theirs = trl_loss(*batch, types, weights, beta=0.3, label_smoothing=0.0, log_squares=log_squares)
        assert ours == pytest.approx(theirs, rel=1e-6)


class Rows(Says):
    """A model that gives the tokens of a batch of completions, or of its mismatched ones, these log-probabilities."""

    def __init__(self, logps: torch.Tensor, unrelated: torch.Tensor) -> None:
        super().__init__(logps)
        self.unrelated = unrelated

    def forward(self, **inputs) -> SimpleNamespace:
        is_own = inputs["input_ids"][0, 0] == 0
        return SimpleNamespace(**vars(super().forward()) | {"log_probs": self.logps if is_own else self.unrelated})


def trl_kto(batch, unrelated, labels: torch.Tensor, **weights: float) -> float:
    """What TRL's KTO trainer makes of the tokens' log-probabilities of rows, and of their mismatched completions."""
    from trl.trainer.kto_trainer import KTOTrainer

    (by_policy, by_reference, mask), (other_policy, other_reference, other_mask) = batch, unrelated
    trainer = SimpleNamespace(
        model=Rows(by_policy, other_policy),
        ref_model=Rows(by_reference, other_reference),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        calculate_KL=True,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        loss_type="kto",
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **weights,
    )
    trainer._compute_kl_logps = lambda model, inputs: KTOTrainer._compute_kl_logps(trainer, model, inputs)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "attention_mask": torch.ones_like(mask),
        "KL_input_ids": torch.ones_like(other_mask),  # tells the models which of the two they score
        "KL_completion_mask": other_mask,
        "KL_attention_mask": torch.ones_like(other_mask),
        "label": labels,
    }
    return KTOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False).item()


def test_a_batch_of_rows_costs_the_same_by_kto():
    """Of rows of one response each; in some batches their mismatched responses say that the policy has not moved, z = 0."""
    module = pytest.importorskip("trl.trainer.kto_trainer", reason="needs pip install -c constraints.txt -e '.[bench]'")
    rng, baselines = random.Random(3), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "disable_gradient_checkpointing", lambda *_: nullcontext())
        for seed in range(BATCHES):
            batch, unrelated = (scored_batch(1000 * i + seed, [rng.randint(1, 12) for _ in range(8)]) for i in range(2))
            labels = torch.tensor([seed % 50 != 0, *(rng.random() < 0.6 for _ in range(7))])
            weights = dict(desirable_weight=rng.uniform(0.5, 2), undesirable_weight=rng.uniform(0.5, 2))
            lengths = batch[2][:, 1:].sum(1)
            policy, reference = (
                PairLogps(
                    *(rows.sum(1) * label for label in (labels, ~labels)),
                    *(lengths * label for label in (labels, ~labels)),
                    unrelated=others.sum(1),
                )
                for rows, others in zip(batch[:2], unrelated[:2], strict=True)
            )
            loss = KTO(0.3, **weights)
            baselines.append(loss.baseline(policy, reference).item())
            theirs = trl_kto(batch, unrelated, labels, beta=0.3, **weights)
            assert loss(policy, reference).mean().item() == pytest.approx(theirs, rel=1e-6)
    assert 50 < sum(z > 0 for z in baselines) < 150


def test_fine_tuning_beside_dpo_costs_the_same_in_a_batch_of_one(scored, without_checkpointing):
    """In larger ones theirs is a mean over the tokens of a batch, see below."""
    by_policy, by_reference, mask = scored
    ours = RPO(0.3, alpha=0.7)(our_logps(by_policy, mask), our_logps(by_reference, mask)).tolist()
    pairs = [[rows[[pair, pair + 4]] for rows in scored] for pair in range(4)]
    theirs = [trl_loss(*pair, ["sigmoid", "sft"], [1.0, 0.7], beta=0.3, label_smoothing=0.2) for pair in pairs]
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_fine_tuning_weighs_every_token_alike_here_and_there(scored, without_checkpointing):
    """Theirs is a mean over a batch's tokens, ours a sum over a response's: the same but for how many tokens a pair has. In
    `rpo` ours is the mean over each response, theirs over the batch: not the same, a response of one token among them.
    """
    by_policy, _, mask = scored
    policy = our_logps(by_policy, mask)
    theirs = trl_loss(*scored, ["sft"], [1.0], beta=0.3)
    tokens = policy.chosen_length.sum().item()
    assert SFTChosen()(policy, policy).sum().item() / tokens == pytest.approx(theirs, rel=1e-9)
    assert RPO(0.3)(policy, policy).mean().item() - math.log(2) != pytest.approx(theirs, rel=1e-3)
