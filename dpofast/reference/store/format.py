"""The names and the JSON texts of a store's own files."""

from __future__ import annotations

import json
from typing import Any

from dpofast.reference.identity.description import ReferenceIdentity
from dpofast.reference.store.segments import FORMAT_VERSION

STORE_FILE = "store.json"
IDENTITY_FILE = "identity.json"
FORMAT_NAME = "dpofast reference store"


def json_text(content: dict[str, Any]) -> str:
    """The one way in which the store writes JSON, so that `verify` can tell every changed byte."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


STORE_TEXT = json_text({"format": FORMAT_NAME, "version": FORMAT_VERSION})


def identity_text(identity: ReferenceIdentity) -> str:
    return json_text({"digest": identity.digest, "description": identity.description})
