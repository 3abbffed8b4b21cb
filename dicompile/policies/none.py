"""No caching."""

from __future__ import annotations

from dicompile.plan import Policy


def NoCache() -> Policy:
    """Compute everything at every step: compilation alone, and the reference for every other policy."""
    return Policy(name="none")
