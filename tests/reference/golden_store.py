"""The content of the golden store of version 1, and how it was written.

    python -m tests.reference.golden_store FOLDER

Rows are added through the store's own code; the files in golden/ are never written again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from dpofast.reference.identity.description import ReferenceIdentity
from dpofast.reference.store.keys import row_key
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.store import ReferenceStore

FOLDER = Path(__file__).parent / "golden" / "version-1"

_DESCRIPTION = {
    "weights": "5d41402abc4b2a76b9719d911017c592" * 2,
    "tensors": {"bfloat16": 290},
    "adapter": None,
    "autocast_dtype": "bfloat16",
    "attention": "sdpa",
    "head_version": 1,
    "config": {
        "model_type": "gemma2",
        "final_logit_softcapping": 30.0,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "name": "Ünïcode\u001b[31m",
    },
}
BASE = ReferenceIdentity.of(_DESCRIPTION)
TUNED = ReferenceIdentity.of({**_DESCRIPTION, "attention": "eager", "autocast_dtype": None})
BASE_DIGEST = "88c6bc2bad94b7472183c79faf52e5a6"
TUNED_DIGEST = "9d5d1bba0eedb6daa692f42924824ec2"

# prompt ids, answer ids, log-probs of the answer's tokens, log-sum-exps of the logits there
ANSWERS = [
    ([1, 2, 3], [4], [-0.5], [10.25]),
    ([1, 2, 3], [5, 6], [-1 / 3, -1e-9], [11.0, -3.5]),
    ([7], [8, 9, 10], [-2 / 7, -16.0, -0.1], [0.0, 1e-3, 104.6875]),
    ([2**31 - 1], [0], [-0.0], [1 / 3]),
    ([1] * 20, [2] * 12, [-i / 8 for i in range(12)], [i - 5.5 for i in range(12)]),
]
# summed log-probs, as they must be read
LOGPS = [
    float.fromhex(text)
    for text in (
        "-0x1.0000000000000p-1",
        "-0x1.5555556683614p-2",
        "-0x1.062be2be2be2cp+4",
        "0x0.0p+0",
        "-0x1.0800000000000p+3",
    )
]
# rank, detail and answers of each segment by reference, in the order they were written
SEGMENTS = {
    BASE: [
        (0, RowDetail.LOGPS, [0, 1, 2]),
        (3, RowDetail.LOGSUMEXPS, [2, 3]),
        (12, RowDetail.SUMS, [4, 0]),
    ],
    TUNED: [(0, RowDetail.SUMS, [4, 3, 2, 1, 0])],
}
# highest detail of each answer
DETAILS = {BASE: [1, 1, 2, 2, 0], TUNED: [0, 0, 0, 0, 0]}


def keys() -> list[bytes]:
    return [row_key(prompt, answer) for prompt, answer, _, _ in ANSWERS]


def write(folder: Path) -> None:
    store = ReferenceStore.open(folder, create=True)
    for reference, segments in SEGMENTS.items():
        for rank, detail, answers in segments:
            writer = store.namespace(reference).writer(rank, detail)
            for answer in answers:
                writer.add(keys()[answer], np.array(ANSWERS[answer][2:]))
            writer.commit()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
