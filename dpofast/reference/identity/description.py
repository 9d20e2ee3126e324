"""Which model scored: a digest of everything that changes a log-prob, and the same in words."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from dpofast.errors import ReferenceStoreError

DIGEST_CHARS = 32


@dataclass(frozen=True)
class ReferenceIdentity:
    """Who made a row of the store.

    Attributes:
        digest: 32 hexadecimal characters; two references share rows if, and only if, it is equal.
        description: the same in words, JSON types alone; the digest is its SHA-256.

    Raises:
        ReferenceStoreError: the digest doesn't belong to the description.
    """

    digest: str
    description: dict[str, Any] = field(hash=False)

    def __post_init__(self) -> None:
        if self.digest != description_digest(self.description):
            raise ReferenceStoreError(
                f"The reference identity {self.digest!r} does not belong to its description, so "
                "what named it is damaged or was edited; take it from an undamaged copy, or let "
                "the reference be identified anew."
            )

    @classmethod
    def of(cls, description: dict[str, Any]) -> ReferenceIdentity:
        """The identity that a description stands for."""
        plain = json.loads(json.dumps(description, default=str))
        return cls(description_digest(plain), plain)


def description_digest(description: dict[str, Any]) -> str:
    """First 32 hexadecimal characters of SHA-256 over the JSON with sorted keys, no spaces."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]
