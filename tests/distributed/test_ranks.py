"""Several ranks are one: work dealt and gathered, evaluation, steps and validation, in one process and in real gloo ranks."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import distributed

from dpo_lab.data.splits import HELD_OUT
from dpo_lab.data.tasks.reviews import SyntheticReviews
from dpo_lab.distributed.collectives import all_reduce_max, balance_by_size, map_across_ranks
from dpo_lab.evals.context import EvalContext
from dpo_lab.evals.evaluate import Evals, evaluate
from dpo_lab.evals.evaluators.base import in_order
from dpo_lab.evals.evaluators.optimum import Optimum
from dpo_lab.evals.held_out import heldout_loss
from dpo_lab.models.policy import Policy, load_policy
from dpo_lab.models.reference_cache import cached_logps
from dpo_lab.pipelines.inputs import responses
from tests.conftest import make_pairs
from tests.evals.test_evals import perturbed, subject_of
from tests.support.fits import Seen, flat, initial_policy, make_data, make_module, make_trainer
from tests.support.ranks import become_rank, run_in_ranks

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore::FutureWarning:lightning"),
]

STEPS = 20


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 30])
def test_parts_are_dealt_evenly(count, world_size):
    sizes = [pair.size for pair in make_pairs(count)]
    dealt = balance_by_size(sizes, world_size)
    loads = [sum(size for size, to in zip(sizes, dealt, strict=True) if to == rank) for rank in range(world_size)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_equal_parts_are_dealt_in_equal_numbers():
    assert sorted(balance_by_size([1] * 9, 4)) == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_a_process_alone_computes_everything_in_order():
    seen: list[str] = []
    assert map_across_ranks(["b", "a", "c"], [1, 9, 5], lambda part: seen.append(part) or part.upper()) == [
        "B",
        "A",
        "C",
    ]
    assert seen == ["b", "a", "c"]
    assert all_reduce_max(3) == 3


def measured(folder: Path, cache: Path, pairs: int, prompts: int, texts: int) -> dict:
    """All that an evaluation says, and what it made on the way."""
    initial = load_policy(folder)
    initial.model.eval()
    subject: EvalContext = subject_of(
        perturbed(initial, 0.05),
        initial,
        SyntheticReviews().prompts(HELD_OUT, prompts, seed=0),
        pairs=make_pairs(pairs),
        texts=[(p.prompt, p.chosen) for p in make_pairs(texts, seed=3)],
        tokens=40,
        cache=cache,
    )
    optimum = Optimum(num_candidates=5, num_prompts=4)
    metrics = evaluate(subject, Evals(evaluators=in_order(), optimum=optimum).selected())
    model = subject.trained.model
    reference = cached_logps(initial.model, make_pairs(pairs), cache, nullcontext, 40)
    written = responses(initial, subject.encoder, ["the plot", "its music"] * prompts, 6, 0, cache)
    return {
        "reference": reference.rows.tolist(),
        "responses": written,
        "metrics": {name: estimate.as_record() for name, estimate in metrics.items()},
        "samples": [[list(s.tokens), s.stopped] for s in (*subject.samples, *subject.initial_samples)],
        "logps": subject.pair_logps[0].chosen.tolist(),
        "held out": {
            name: estimate.as_record()
            for name, estimate in heldout_loss(
                model, subject.initial.model, subject.pairs, subject.tokens, subject.context
            ).items()
        },
    }


SIZES = ((9, 14, 5), (1, 1, 1))  # pairs, prompts and texts: of some, and of fewer than there are ranks


def evaluating_rank(number: int, world_size: int, folder: str) -> None:
    become_rank(number, world_size)
    distributed.init_process_group("gloo")
    computed: list[int] = []
    whole = map_across_ranks(range(5), [5, 1, 1, 1, 1], lambda part: computed.append(part) or part * part)
    results = [measured(Path(folder), Path(folder) / "of ranks", *sizes) for sizes in SIZES]
    largest = all_reduce_max(10 * number)
    print("RESULT", json.dumps({"results": results, "computed": computed, "whole": whole, "most": largest}))
    distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_evaluation_by_several_ranks_is_that_of_one(world_size, policy, tmp_path):
    Policy(policy.model, policy.tokenizer).save(tmp_path)
    alone = json.loads(json.dumps([measured(tmp_path, tmp_path / "alone", *sizes) for sizes in SIZES]))
    assert [len(result["samples"]) for result in alone] == [28, 2]
    outputs = run_in_ranks("tests.distributed.test_ranks", "evaluating_rank", world_size, str(tmp_path))
    of_ranks = [json.loads(output.split("RESULT", 1)[1]) for output in outputs]
    for rank in of_ranks:
        assert rank["results"] == alone  # to the last bit
        assert rank["whole"] == [0, 1, 4, 9, 16]
        assert rank["most"] == 10 * (world_size - 1)
    assert sorted(part for rank in of_ranks for part in rank["computed"]) == [0, 1, 2, 3, 4]  # none computed twice
    files = [(tmp_path / who).glob("[!.]*") for who in ("alone", "of ranks")]
    kept = [{path.name: path.read_bytes() for path in of_one if path.suffix != ".lock"} for of_one in files]
    assert kept[0] == kept[1]
    kinds = sorted(name.split("-")[0] for name in kept[0])
    assert kinds == ["candidates"] * 2 + ["reference"] * 2 + ["responses"] * 2  # of each of the two sizes
    bars = [output.count("Samples (trained)") for output in outputs]
    assert bars[0] > 0
    assert bars[1:] == [0] * (world_size - 1)


def fit(folder: Path, tokens: int = 2048, devices: int = 1) -> tuple[torch.Tensor, Seen, dict[str, float]]:
    """STEPS steps of 8 pairs: the weights, what was seen on the way, and the held-out figures."""
    seen = Seen()
    module = make_module(initial_policy().model, folder, STEPS, tokens)
    trainer = make_trainer(STEPS, devices, strategy="ddp" if devices > 1 else "auto", callbacks=[seen])
    trainer.fit(module, datamodule=make_data())
    held_out = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return flat(module.model.parameters()), seen, held_out


def training_rank(number: int, world_size: int, folder: str, tokens: str) -> None:
    become_rank(number, world_size)
    weights, seen, held_out = fit(Path(folder), int(tokens), world_size)
    torch.save({"weights": weights, "gradient": seen.gradient}, Path(folder) / f"rank-{number}.pt")
    print("RESULT", json.dumps({"figures": seen.figures, "held out": held_out}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One process, eight pairs a backward."""
    return fit(tmp_path_factory.mktemp("whole"))


def agree(weights: torch.Tensor, gradient: torch.Tensor, figures: list[dict[str, float]], whole) -> None:
    """The same gradient, and the same figures in every one of the steps, and weights that have not drifted apart."""
    expected_weights, seen, _ = whole
    assert (gradient - seen.gradient).norm() / seen.gradient.norm() < 1e-6
    assert len(figures) == len(seen.figures) == STEPS
    for mine, expected in zip(figures, seen.figures, strict=True):
        assert "train/rewards/margins" in mine
        assert mine == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert (weights - expected_weights).abs().max().item() < 1e-6


def test_eight_micro_batches_of_a_pair_are_one_of_eight(whole, tmp_path):
    weights, seen, held_out = fit(tmp_path, tokens=1)
    agree(weights, seen.gradient, seen.figures, whole)
    assert held_out == pytest.approx(whole[2], abs=1e-5)


@pytest.mark.parametrize(("world_size", "tokens"), [(2, 2048), (3, 30)])
def test_several_ranks_train_and_validate_as_one(world_size, tokens, whole, tmp_path):
    """2 ranks of 4 pairs; 3 ranks of 3, 3 and 2 pairs in micro-batches. 7 held-out pairs are each counted once."""
    outputs = run_in_ranks("tests.distributed.test_ranks", "training_rank", world_size, str(tmp_path), str(tokens))
    for number, output in enumerate(outputs):
        of_rank = json.loads(output.split("RESULT", 1)[1])
        saved = torch.load(tmp_path / f"rank-{number}.pt", weights_only=True)
        agree(saved["weights"], saved["gradient"], of_rank["figures"], whole)
        assert of_rank["held out"] == pytest.approx(whole[2], abs=1e-5)


def saving_rank(number: int, world_size: int, folder: str) -> None:
    distributed.init_process_group("gloo", rank=number, world_size=world_size)
    if number == world_size - 1:
        load_policy(Path(folder) / "given").save(Path(folder) / "made")
    distributed.barrier()
    distributed.destroy_process_group()


def test_any_rank_may_be_the_one_that_saves(policy, tmp_path):
    policy.save(tmp_path / "given")
    run_in_ranks("tests.distributed.test_ranks", "saving_rank", 2, str(tmp_path))
    given, made = (load_policy(tmp_path / name).model.state_dict() for name in ("given", "made"))
    assert all(torch.equal(weight, given[name]) for name, weight in made.items())
    assert made.keys() == given.keys()
