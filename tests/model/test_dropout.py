"""With its dropouts and noise switched off, a model in training mode equals itself in eval mode."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpofast.model.dropout import disable_dropout, dropouts
from dpofast.model.packable import why_not_packed
from tests.families import _LATENT, _PAD, BASE, EXPERTS, SIZES
from tests.support import TINY_FIELDS, tiny_llama

INPUT_IDS = torch.tensor([[5, 7, 11, 13, 17, 19, 23]] * 3)
FALCON = {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 4}
