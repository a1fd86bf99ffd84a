"""The data modules of online methods: the batch of each step is made of responses that the policy samples meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from dpo_lab.core.logps import sum_responses
from dpo_lab.core.losses import Loss
from dpo_lab.core.methods.base import Online, PolicyGradient
from dpo_lab.core.methods.online_dpo import OnlineDPO
from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import EncodedPair, PairBatch, Tokens, content_hash
from dpo_lab.core.rollouts import OF_TOKENS, Rollouts, spread
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.collate import collate, collate_responses
from dpo_lab.data.datamodule import PreferenceDataModule, StepSampler
from dpo_lab.training.actor import Actor

STEPS = 2**31 - 1  # the length of an endless loader; Lightning fetches ahead from one without a length


class OnlineDataModule(PreferenceDataModule):
    """Makes each step's batch from rollouts of the policy, and the held-out pairs as PreferenceDataModule.

    Rollout n is made at step n x method.updates from the prompts and the random numbers of (seed, n); its steps train on
    minibatches of it, divided over ranks. A subclass makes these from a rollout. What is counted of rollouts is logged with
    the metrics; it is in checkpoints, as is a rollout that later steps train on. responses: of a prompt that are trained on.
    """

    method: Online
    responses: int
    charts: ClassVar[dict[str, tuple[str, ...]]] = {
        "rollout/reward and gold": ("train/rollout/reward", "train/rollout/gold")
    }

    def __init__(
        self, method: Online, actor: Actor, prompts: Sequence[Tokens], held_out: Sequence[EncodedPair], *, seed: int
    ) -> None:
        super().__init__([], held_out, batch_size=method.prompts, num_workers=0, seed=seed)
        self.method, self.actor, self.prompts = method, actor, prompts
        self.rounds = StepSampler([len(prompt) for prompt in prompts], method.prompts, seed)
        self.rollouts: Rollouts | None = None  # those of now
        self.beta = method.beta if isinstance(method, PolicyGradient) else 0.0
        self.sums: dict[str, float] = {}  # of what is logged, since it was logged last
        self.samples = 0

    def train_dataloader(self) -> _Batches:  # type: ignore[override]
        return _Batches(self)

    def batch(self, step: int) -> Rollouts | PairBatch:
        """Return this rank's part of the minibatch of a step; sample the next rollout if the last one is used up."""
        number, update = divmod(step, self.method.updates)
        if update == 0:
            self.rollouts = self._roll_out(number)
        assert self.rollouts is not None
        rank, world_size = self._rank_and_world_size()
        size, seed = self.method.prompts_per_step, derive_seed(self.seed, f"minibatches/{number}")
        mine, all_ranks = (
            StepSampler(self.rollouts.sizes, size, seed, *place).step(update) for place in ((rank, world_size), (0, 1))
        )
        places = {prompt: place for place, prompt in enumerate(all_ranks)}
        return self.minibatch(self.rollouts, number, all_ranks, [places[prompt] for prompt in mine])

    def minibatch(
        self, rollouts: Rollouts, number: int, prompts: Sequence[int], mine: Sequence[int]
    ) -> Rollouts | PairBatch:
        """Return this rank's part of the batch of an optimizer step that trains on some prompts of rollout `number`.

        mine: the places of its part in `prompts`.
        """
        raise NotImplementedError

    def most_tokens(self, world_size: int) -> int:
        return -(-self.method.prompts_per_step // world_size) * self._most_of_a_prompt

    def _longest_prompts(self, tokens: int) -> list[Tokens]:
        """Return the longest prompt as often as it fits in `tokens` tokens with responses at their limit, at least once."""
        return [max(self.prompts, key=len)] * max(1, tokens // self._most_of_a_prompt)

    @property
    def _most_of_a_prompt(self) -> int:
        """The most tokens of a prompt with the responses that are trained on."""
        return max(map(len, self.prompts)) + self.responses * self.actor.longest

    def counters(self) -> dict[str, float]:
        """Return the means of what was counted of rollouts since the last call, and the number of samples so far."""
        sums, self.sums = self.sums, {}
        count = sums.pop("count", 0.0)
        means = {f"rollout/{name}": total / count for name, total in sums.items()} if count else {}
        return means | {"rollout/samples": float(self.samples)}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs of the rollouts so far, as plain values and tensors."""
        step = self.trainer.global_step if self.trainer else 0
        is_used_up = self.rollouts is None or step % self.method.updates == 0
        rollouts = None if is_used_up else self.rollouts.state_dict()  # type: ignore[union-attr]
        return {"rollouts": rollouts, "beta": self.beta, "sums": dict(self.sums), "samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.beta, self.sums, self.samples = state_dict["beta"], dict(state_dict["sums"]), state_dict["samples"]
        if state_dict["rollouts"] is not None:
            self.rollouts = Rollouts.from_state_dict(state_dict["rollouts"])

    def _roll_out(self, number: int) -> Rollouts:
        prompts = [self.prompts[i] for i in self.rounds.step(number)]
        keys = [content_hash([int(token) for token in prompt]) for prompt in prompts]
        rollouts = self.actor.roll_out(keys, prompts, derive_seed(self.seed, f"rollout/{number}"))
        rollouts.beta = self.beta
        self.samples += rollouts.rewards.numel()
        self._count(rollouts)
        return rollouts

    def _count(self, rollouts: Rollouts) -> None:
        lengths = torch.from_numpy(rollouts.response_lengths.copy()).double()
        found = {
            "reward": rollouts.rewards,
            "length": lengths,
            "stopped": rollouts.stopped,
        }
        if not rollouts.gold.isnan().any():
            found["gold"] = rollouts.gold
        if rollouts.behaviour is not None:
            found["kl"] = sum_responses(rollouts.log_ratios, rollouts.lengths)
            found["entropy"] = -sum_responses(rollouts.behaviour, rollouts.lengths) / lengths  # per token
            found["beta"] = torch.full_like(lengths, rollouts.beta)
        for name, values in found.items():
            self.sums[name] = self.sums.get(name, 0.0) + values.double().sum().item()
        self.sums["count"] = self.sums.get("count", 0.0) + lengths.numel()


class RolloutData(OnlineDataModule):
    """Rollouts with advantages, for methods of policy gradients."""

    method: PolicyGradient

    @property
    def responses(self) -> int:  # type: ignore[override]
        return self.method.samples

    def trial_batch(self, tokens: int) -> Rollouts:
        """Return rollouts of up to `tokens` tokens, at least of one prompt: the longest, and responses at their limit."""
        prompts, each, longest = self._longest_prompts(tokens), self.method.samples, self.actor.longest
        stream, lengths = collate_responses(prompts, [[0] * longest] * (each * len(prompts)))
        rewards, of_tokens = torch.zeros(len(prompts), each), torch.zeros(each * longest * len(prompts))
        found = Rollouts(["trial"] * len(prompts), stream, lengths, rewards, rewards, rewards.bool())
        return replace(found, **dict.fromkeys(OF_TOKENS, of_tokens))

    def minibatch(self, rollouts, number, prompts, mine):
        lengths = rollouts.response_lengths[list(prompts)]
        weights = torch.from_numpy(self.method.token_weights(lengths, self.actor.longest)[list(mine)]).float()
        part = rollouts.take([prompts[place] for place in mine])
        return replace(part, weights=spread(weights, part.response_lengths))

    def _roll_out(self, number: int) -> Rollouts:
        rollouts = super()._roll_out(number)
        kl = sum_responses(rollouts.log_ratios, rollouts.lengths).mean().item()
        self.beta = self.method.next_beta(self.beta, kl)
        advantages, returns = self.method.advantages(rollouts)
        return replace(rollouts, advantages=advantages, returns=returns)  # type: ignore[arg-type]  # of critics alone


class FreshPairs(OnlineDataModule):
    """Pairs of fresh responses, and held-out pairs, with what `loss` takes of them, see Loss.prepare."""

    method: OnlineDPO
    responses = 2

    def __init__(
        self,
        method: OnlineDPO,
        actor: Actor,
        prompts: Sequence[Tokens],
        held_out: PairTable,
        *,
        seed: int,
        loss: Loss,
    ) -> None:
        super().__init__(method, actor, prompts, loss.prepare(held_out), seed=seed)
        self.loss = loss

    def trial_batch(self, tokens: int) -> PairBatch:
        """Return pairs of up to `tokens` tokens, at least one: of the longest prompt, and responses at their limit."""
        response = [0] * self.actor.longest
        pairs = [EncodedPair("trial", prompt, response, response) for prompt in self._longest_prompts(tokens)]
        table = self.loss.prepare(PairTable.of(pairs, [0.0] * len(pairs)))
        return collate([table[place] for place in range(len(table))])

    def minibatch(self, rollouts, number, prompts, mine):
        generator = torch.Generator().manual_seed(derive_seed(self.seed, f"annotator/{number}"))
        sides = torch.stack(self.method.choose(rollouts.rewards, generator), 1).tolist()
        streams = rollouts.tokens.split(rollouts.sizes)
        pairs, gaps, golds = [], [], []
        for at in prompts:
            prompt, *responses = (part.numpy() for part in streams[at].split(rollouts.lengths[at].tolist()))
            chosen, rejected = sides[at]
            for found, values in ((gaps, rollouts.rewards), (golds, rollouts.gold)):
                found.append(float(values[at, chosen] - values[at, rejected]))
            key = content_hash([rollouts.keys[at], number, at])
            pairs.append(EncodedPair(key, prompt, responses[chosen], responses[rejected]))
        table = self.loss.prepare(PairTable.of(pairs, gaps))  # without gold, which a loss of scores would take
        return collate([replace(table[place], gold_margin=golds[place]) for place in mine])


class _Batches:
    """An endless loader whose next batch is that of the trainer's next step, so that it has no state of its own."""

    def __init__(self, data: OnlineDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[Rollouts | PairBatch]:
        assert self.data.trainer is not None
        while True:
            yield self.data.batch(self.data.trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
