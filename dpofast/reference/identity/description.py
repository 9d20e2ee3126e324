"""A reference's identity: a description of everything that changes its log-probs, and its digest.

Imports no torch, because the store reads descriptions back from disk without a model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from dpofast.errors import ReferenceStoreError

DIGEST_CHARS = 32


@dataclass(frozen=True)
class ReferenceIdentity:
    """The model that made a stored log-prob, and how it scored.

    Attributes:
        digest: 32 hexadecimal characters; two references share stored rows if and only if their
            digests are equal.
        description: readable form of the same facts, made of JSON types only; its SHA-256 gives
            the digest.

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
        """Make the identity that a description determines."""
        # After a round trip the description equals the one that is read back from identity.json:
        # tuples have become lists, keys strings.
        plain = json.loads(json.dumps(description, default=str))
        return cls(description_digest(plain), plain)


def no_reference() -> ReferenceIdentity:
    """The identity in a run whose loss has no reference."""
    return ReferenceIdentity.of({"reference": None})


def description_digest(description: dict[str, Any]) -> str:
    """Hash a description.

    Returns:
        First 32 hexadecimal characters of the SHA-256 over the description's JSON, written with
        sorted keys and without spaces.
    """
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]
