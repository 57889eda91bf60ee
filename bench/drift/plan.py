"""How much is measured. Knows not how."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """`promise` is short enough to be waited for many times; `default_promise` is what the service starts with."""

    pool: int = 4000
    """Prompts of a source, at most."""
    size: int = 500
    """Prompts that a reference is made of, where their number is not the subject."""
    seed: int = 1

    promise: float = 500.0
    default_promise: float = 5000.0
    sizes: tuple[int, ...] = (200, 500, 1000)
    num_references: int = 40
    num_streams: int = 8
    """For each reference."""
    horizon: int = 4
    """Streams without drift are watched for so many promised run lengths."""
    default_references: int = 12
    conversations: int = 2000
    whole_conversations: int = 400
    """Of which all turns are used."""
    conversation_references: int = 16

    shares: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 1.0)
    quiet: int = 100
    """Prompts before the change."""
    delay: int = 1000
    """Prompts after it."""
    delay_references: int = 3
    delay_streams: int = 32
    peer_references: int = 6
    peer_streams: int = 6
    peer_windows: int = 30
    """Of a stream without drift."""

    @classmethod
    def quick(cls) -> Plan:
        return cls(
            pool=400,
            size=120,
            promise=100.0,
            default_promise=1000.0,
            sizes=(100, 200),
            num_references=2,
            num_streams=2,
            default_references=1,
            conversations=200,
            whole_conversations=60,
            conversation_references=2,
            shares=(0.0, 1.0),
            quiet=40,
            delay=128,
            delay_references=1,
            delay_streams=4,
            peer_references=1,
            peer_streams=2,
            peer_windows=3,
        )
