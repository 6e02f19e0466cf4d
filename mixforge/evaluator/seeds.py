"""Seeds for one purpose each, drawn from a budget's seed: no two purposes share random numbers."""

from __future__ import annotations

import hashlib


def seed_for(seed: int, *purpose: str) -> int:
    """A whole number from 0 to 2**63 - 1 that is the same on every machine."""
    text = "\0".join((str(seed), *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
