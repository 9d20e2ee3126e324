"""Parameters that text doesn't reach: those of a class's parts for pictures and sound."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import nn

from dpofast.model.parts import body_of, causal_lm

logger = logging.getLogger(__name__)

# Parts for pictures and sound that a body holds; other models have such parts beside the body.
INSIDE_BODIES = frozenset(
    {"embed_tokens_extend", "image_encoder", "img_temporal_embedding", "visual_projection"}
)


def freeze_unreached(model: nn.Module) -> None:
    """Freezes all parameters that can't have an effect on a log-prob of text.

    They would get no gradient. But an optimizer that has them in one buffer with others, as that of
    ZeRO does, would still decay them, and DDP would wait for their gradients.

    Args:
        model: causal LM or PeftModel; adapters in such parts are frozen, too.
    """
    lm = causal_lm(model)
    reached = {
        id(parameter)
        for part in (body_of(lm), lm.get_output_embeddings())
        for _, module in reached_modules(part)
        for parameter in module.parameters(recurse=False)
    }
    frozen = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in reached:
            parameter.requires_grad_(False)
            frozen.append(name)
    if frozen:
        logger.info(
            "Frozen: %d parameters that text doesn't reach, such as %s.", len(frozen), frozen[0]
        )


def reached_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A body or a head and the modules in it, with their names, but for parts that text passes by.

    Args:
        module: what `body_of` or `get_output_embeddings` has returned.
        prefix: begins each name.
    """
    yield prefix, module
    for name, child in module.named_children():
        if name not in INSIDE_BODIES:
            yield from reached_modules(child, f"{prefix}.{name}" if prefix else name)
