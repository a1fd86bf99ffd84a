"""GPUs by their data sheets: memory, and FLOP/s of dense products."""

from __future__ import annotations

from dataclasses import dataclass

REACHED = 0.45  # an assumption: the share of its peak that a card reaches in a step
RESERVED = 1e9  # bytes that CUDA, its libraries and unused blocks of the allocator take, an assumption


@dataclass(frozen=True)
class Card:
    """A card. memory: bytes; flops16, flops32: FLOP/s of products in 16 bits and in float32."""

    name: str
    memory: float
    flops16: float
    flops32: float

    def fits(self, needed: float) -> bool:
        """Return whether `needed` bytes of tensors fit."""
        return needed + RESERVED <= self.memory

    def seconds(self, flops: float, in_16_bits: bool) -> float:
        """Return how long products take at REACHED of the peak."""
        return flops / (REACHED * (self.flops16 if in_16_bits else self.flops32))


CARDS = (
    Card("RTX 4090, 24 GB", 24e9, 165e12, 83e12),
    Card("A100, 40 GB", 40e9, 312e12, 19.5e12),
    Card("H100 SXM, 80 GB", 80e9, 989e12, 67e12),
    Card("H200, 141 GB", 141e9, 989e12, 67e12),
)
