"""The version of the store's format, and the names and texts of its JSON files.

The format of segments, the files with the rows, is in `segments.py`.
"""

from __future__ import annotations

import json
from typing import Any

from dpofast.reference.identity.description import ReferenceIdentity

FORMAT_NAME = "dpofast reference store"
FORMAT_VERSION = 1

STORE_FILE = "store.json"  # in the store's folder
IDENTITY_FILE = "identity.json"  # in the folder of each reference


def json_text(content: dict[str, Any]) -> str:
    """Write JSON in the store's only style, so that `verify` notices every changed byte."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


STORE_TEXT = json_text({"format": FORMAT_NAME, "version": FORMAT_VERSION})


def identity_text(identity: ReferenceIdentity) -> str:
    """Write the content of a reference's identity.json."""
    return json_text({"digest": identity.digest, "description": identity.description})
