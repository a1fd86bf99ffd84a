"""What is measured: two model shapes, three mixes of pairs, the arithmetic that a step can't do without."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dpo_lab.core.pairs import EncodedPair
from dpo_lab.planning.shapes import Shape, Work


def llama(hidden: int, layers: int, heads: int, key_value_heads: int, inner: int, vocabulary: int) -> LlamaConfig:
    """A Llama with tied embeddings."""
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
    )


SHAPES = {
    "small": llama(256, 6, heads=4, key_value_heads=2, inner=768, vocabulary=8192),
    "135M": llama(576, 30, heads=9, key_value_heads=3, inner=1536, vocabulary=49152),  # SmolLM2-135M's
}
MIXES = {  # median tokens and their spread (sd of the logarithm): prompt, response
    "chat": (200, 0.6, 150, 0.5),
    "long": (600, 0.2, 100, 0.4),
    "short": (16, 0.3, 32, 0.4),
}
PAIRS = {  # pairs a step
    ("small", "chat"): 16,
    ("small", "long"): 8,
    ("small", "short"): 64,
    ("135M", "chat"): 4,
    ("135M", "long"): 2,
    ("135M", "short"): 8,
}
LONGEST = 1024  # tokens of prompt and response together: TRL's default max_length


def make_pairs(mix: str, count: int, vocabulary: int, seed: int = 0) -> list[EncodedPair]:
    """Random tokens, lengths log-normal."""
    rng = random.Random(seed)
    prompt_median, prompt_spread, response_median, response_spread = MIXES[mix]

    def tokens(median: float, spread: float, most: int) -> list[int]:
        length = min(most, max(4, round(median * math.exp(rng.gauss(0, spread)))))
        return [rng.randrange(3, vocabulary) for _ in range(length)]

    pairs = []
    for number in range(count):
        prompt = tokens(prompt_median, prompt_spread, LONGEST - 256)
        chosen, rejected = (tokens(response_median, response_spread, LONGEST - len(prompt)) for _ in range(2))
        pairs.append(EncodedPair(f"pair-{number}", prompt, chosen, rejected))
    return pairs


def make_models(shape: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(policy, reference): random weights, the policy's a little different."""
    torch.manual_seed(0)
    reference = LlamaForCausalLM(SHAPES[shape]).eval()
    policy = LlamaForCausalLM(SHAPES[shape]).eval()
    with torch.no_grad():
        for ours, theirs in zip(policy.parameters(), reference.parameters(), strict=True):
            ours.copy_(theirs + 0.02 * theirs.std().nan_to_num(0) * torch.randn_like(theirs))
    return policy, reference.requires_grad_(False)


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """Token i is the word `w{i}`; three special tokens."""
    special = {"<pad>": 0, "<unk>": 1, "</s>": 2}
    words = special | {f"w{i}": i for i in range(len(special), vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def tokens_of(pairs: Sequence[EncodedPair]) -> int:
    """Real tokens as a trainer without shared prompts sees them: every prompt twice. The same count for everybody."""
    return sum(pair.size + len(pair.prompt) for pair in pairs)


def useful_flops(pairs: Sequence[EncodedPair], config: LlamaConfig) -> float:
    """FLOPs of forward and backward that the loss needs: prompts once, the head on response rows, causal attention.

    6 Nb (P + C + R) + 6 H V (C + R) + 12 H L (causal pairs of tokens); Nb: body parameters without embeddings.
    """
    shape = Shape.llama(
        config.hidden_size,
        config.num_hidden_layers,
        config.hidden_size // config.num_attention_heads * config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
    )
    lengths = [(len(pair.prompt), [len(pair.chosen), len(pair.rejected)]) for pair in pairs]
    return sum(shape.step_flops(Work.of_responses(prompt, responses)) for prompt, responses in lengths)
