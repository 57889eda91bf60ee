"""How much is measured: the whole run, or a quick one that only shows that everything works. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass

from bench.subject import CPU, CUDA, Sizes


@dataclass(frozen=True)
class Plan:
    """Prompts have 32 to 64 tokens, training examples 20 to 60."""

    sizes: Sizes
    num_rows: int = 32
    decode_rounds: int = 9
    decode_tokens: int = 32
    peer_rounds: int = 3
    peer_tokens: int = 48
    streaming_rounds: int = 7
    streaming_tokens: int = 64
    probe_rounds: int = 2
    probe_idle_seconds: float = 0.5
    watching_rounds: int = 40
    watching_requests: int = 4
    """One after the other, of each client, in one round of either service."""
    watching_tokens: int = 32
    watching_clients: int = 4
    watching_baseline: bool = True
    """Whether answers are watched as well: that begins after 200 of them."""
    training_rounds: int = 3
    training_steps: int = 5
    """Optimizer steps of 16 examples, for each side and round."""
    co_serving_rounds: int = 3
    co_serving_seconds: float = 4.0
    """How long each state (alone, or both in some way at some load) is watched in a round."""
    co_serving_loads: tuple[int, ...] = (25, 50, 75, 100)
    """Percent."""
    num_estimates: int = 3
    """Of runs of different shape."""

    prefix_rounds: int = 3
    prefix_tokens: int = 768
    """Of the system prompt that all requests share."""
    prefix_requests: int = 8

    tier_rounds: int = 3
    tier_registered: int = 2000
    """Adapters in the registry, against a handful."""
    tier_small_requests: int = 16
    """Of a small tenant beside a flood, at least."""
    tier_requests: int = 128
    """Of all clients together, in one round of each variant."""

    @classmethod
    def whole(cls, cuda: bool) -> Plan:
        return cls(sizes=CUDA if cuda else CPU)

    @classmethod
    def quick(cls, cuda: bool) -> Plan:
        return cls(
            sizes=CUDA if cuda else CPU,
            decode_rounds=1,
            decode_tokens=16,
            peer_rounds=1,
            peer_tokens=8,
            streaming_rounds=1,
            streaming_tokens=16,
            probe_rounds=1,
            probe_idle_seconds=0.3,
            watching_rounds=2,
            watching_tokens=8,
            watching_baseline=False,
            training_rounds=1,
            training_steps=2,
            prefix_rounds=1,
            prefix_requests=2,
            tier_rounds=1,
            tier_registered=200,
            tier_small_requests=4,
            tier_requests=16,
            co_serving_rounds=1,
            co_serving_seconds=0.5,
            co_serving_loads=(50,),
            num_estimates=1,
        )
