"""`python -m dpofast` is the command `dpofast`."""

from __future__ import annotations

import sys

from dpofast.cli import main

sys.exit(main())
