"""All losses, by name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from dpofast_kernels.preference.aot import AOTLoss, AOTUnpairedLoss
from dpofast_kernels.preference.apo import APODownLoss, APOZeroLoss
from dpofast_kernels.preference.bco_pair import BCOPairLoss
from dpofast_kernels.preference.coupled import CoupledLoss, CoupledMixture
from dpofast_kernels.preference.cpo import CPOHingeLoss, CPOIPOLoss, CPOLoss
from dpofast_kernels.preference.discopop import DiscoPOPLoss
from dpofast_kernels.preference.dpop import DPOPLoss
from dpofast_kernels.preference.exo_pair import EXOPairLoss
from dpofast_kernels.preference.hinge import HingeLoss
from dpofast_kernels.preference.ipo import IPOLoss
from dpofast_kernels.preference.loss import PairLoss, PreferenceLoss
from dpofast_kernels.preference.mixture import MixtureLoss
from dpofast_kernels.preference.nca_pair import NCAPairLoss
from dpofast_kernels.preference.orpo import ORPOLoss
from dpofast_kernels.preference.robust import RobustLoss
from dpofast_kernels.preference.sigmoid import SigmoidLoss, SigmoidNormLoss
from dpofast_kernels.preference.simpo import AlphaPOLoss, SimPOLoss
from dpofast_kernels.preference.sppo_hard import SPPOHardLoss

LOSSES: dict[str, type[PairLoss]] = {
    loss.name: loss
    for loss in (
        *(SigmoidLoss, SigmoidNormLoss, HingeLoss, IPOLoss, RobustLoss, EXOPairLoss),
        *(APOZeroLoss, APODownLoss, NCAPairLoss, BCOPairLoss, SPPOHardLoss),
        *(DiscoPOPLoss, DPOPLoss, CPOLoss, CPOHingeLoss, CPOIPOLoss, SimPOLoss, AlphaPOLoss),
        ORPOLoss,
    )
}
# Those of which a pair's loss depends on the other pairs, too.
COUPLED_LOSSES: dict[str, type[CoupledLoss]] = {
    loss.name: loss for loss in (AOTLoss, AOTUnpairedLoss)
}
_ALL: dict[str, type[PreferenceLoss]] = {**LOSSES, **COUPLED_LOSSES}
# The options that only some losses have: the names of these losses by that of the option.
LOSS_OPTIONS = {
    option: tuple(loss.name for loss in LOSSES.values() if option in loss.option_names)
    for option in dict.fromkeys(name for loss in LOSSES.values() for name in loss.option_names)
}
# Names of losses in papers and in other tools.
_OTHER_NAMES = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm"}


def make_loss(
    name: str, beta: float = 0.1, label_smoothing: float = 0.0, **options: float
) -> PairLoss:
    """Make a loss by its name; docs/losses.md has the formulas.

    Args:
        name: "sigmoid" (DPO; cDPO with label_smoothing above 0), "sigmoid_norm", "hinge", "ipo",
            "robust", "exo_pair", "apo_zero", "apo_down", "nca_pair", "bco_pair", "sppo_hard",
            "discopop" or "dpop"; or without a reference "cpo", "cpo_hinge", "cpo_ipo", "simpo",
            "alphapo" or the odds ratio part of "orpo".
        beta: strength of the pull towards the reference, above 0.
        label_smoothing: probability that a pair's labels are swapped, in [0, 0.5); only "sigmoid",
            "sigmoid_norm", "robust", "cpo", "simpo", "alphapo" and "exo_pair" take it, and
            "exo_pair" needs one above 0.
        options: the loss's own options. `discopop_tau` of "discopop" is in (0, 1], by default 0.05;
            `dpop_lambda` of "dpop" is at least 0, by default 50; `simpo_gamma` of "simpo" and
            "alphapo" is 0.5 by default, `alpha` of "alphapo" 0.

    Raises:
        TypeError: an option is not a number, or no loss has an option of that name.
        ValueError: the name is unknown, or an option is out of range or belongs to another loss.

    Example:
        >>> import torch
        >>> from dpofast_kernels import make_loss
        >>> loss = make_loss("sigmoid", beta=0.1)
        >>> zero, lengths = torch.zeros(1, dtype=torch.float64), torch.tensor([[5, 3]])
        >>> value, d_chosen, d_rejected = loss.pair_loss(zero, zero, lengths)
        >>> round(value.item(), 4), d_chosen.item(), d_rejected.item()  # log(2), -beta/2, beta/2
        (0.6931, -0.05, 0.05)
    """
    return _uncoupled(_make_any(name, beta, label_smoothing, options))


def make_mixture(
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    **options: float,
) -> PairLoss:
    """Make the weighted sum of several losses, or a loss alone if there is one of weight 1.

    Args:
        names: names of losses, as in `make_loss`.
        weights: a weight of at least 0 for each; None for 1 each.
        beta: beta of all losses.
        label_smoothing: that of the losses that have it.
        options: own options of the losses, as in `make_loss`.

    Raises:
        TypeError: an option is not a number, or no loss has an option of that name.
        ValueError: a name is unknown, an option or a weight is out of range, or none of the losses
            has an option.

    Example:
        >>> from dpofast_kernels import make_mixture
        >>> loss = make_mixture(["sigmoid", "bco_pair"], [0.8, 0.2], beta=0.1)
        >>> loss.names
        ('sigmoid', 'bco_pair')
    """
    parts = [_uncoupled(part) for part in _make_parts(names, beta, label_smoothing, options)]
    given = [1.0] * len(parts) if weights is None else list(weights)
    if len(parts) == 1 and given == [1.0]:
        return parts[0]
    return MixtureLoss(
        beta=beta, label_smoothing=label_smoothing, parts=tuple(parts), weights=tuple(given)
    )


def make_coupled_loss(
    names: str | Sequence[str],
    weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    **options: float,
) -> CoupledLoss:
    """Make a loss that couples pairs, or a weighted sum of losses of which one does.

    Args:
        names: "aot", "aot_unpaired", or a list of names with one of these among them; others are
            those of `make_loss`.
        weights, beta, label_smoothing, options: as in `make_mixture`.

    Raises:
        TypeError, ValueError: as in `make_mixture`; or none of the losses couples pairs.

    Example:
        >>> import torch
        >>> from dpofast_kernels import make_coupled_loss
        >>> loss = make_coupled_loss("aot", beta=0.5)
        >>> chosen, rejected = torch.tensor([[-3.0, -9.0], [-8.0, -5.0]]).double()
        >>> zeros, lengths = torch.zeros_like(chosen), torch.tensor([[5, 3], [4, 4]])
        >>> losses, d_chosen, d_rejected = loss.losses_and_slopes(
        ...     chosen, rejected, zeros, zeros, lengths
        ... )
        >>> [round(value, 4) for value in losses.tolist()]  # beta (5 - 0), beta (-4 - 0)
        [0.0789, 2.1269]
    """
    names = [names] if isinstance(names, str) else names
    parts = _make_parts(names, beta, label_smoothing, options)
    if not any(isinstance(part, CoupledLoss) for part in parts):
        raise ValueError(
            f"None of the losses {', '.join(names)} couples pairs, as "
            f"{' and '.join(COUPLED_LOSSES)} do; make_mixture makes them."
        )
    given = [1.0] * len(parts) if weights is None else list(weights)
    first = parts[0]
    if len(parts) == 1 and given == [1.0] and isinstance(first, CoupledLoss):
        return first
    return CoupledMixture(
        beta=beta, label_smoothing=label_smoothing, parts=tuple(parts), weights=tuple(given)
    )


def _uncoupled(loss: PreferenceLoss) -> PairLoss:
    if isinstance(loss, PairLoss):
        return loss
    raise ValueError(
        f"The {loss.name} loss couples pairs, so it isn't a sum over them; make_coupled_loss makes "
        "it."
    )


def _make_parts(
    names: Sequence[str], beta: float, label_smoothing: float, options: dict[str, float]
) -> list[PreferenceLoss]:
    """The losses of a sum; each gets the label smoothing and the options that it has."""
    if isinstance(names, str) or not names:
        raise ValueError(f"names is {names!r}, expected a list of at least one name.")
    classes = {name: _ALL.get(name) for name in names if isinstance(name, str)}
    smoothed = [name for name, loss in classes.items() if loss and loss.takes_label_smoothing]
    parts = []
    for name in names:
        # What no loss of the mixture has goes to the first one, which says so.
        own = {
            option: value
            for option, value in options.items()
            if name in LOSS_OPTIONS.get(option, ()) or not _any_has(option, names)
        }
        smoothing = label_smoothing if name in smoothed or not smoothed else 0.0
        parts.append(_make_any(name, beta, smoothing, own))
    return parts


def _make_any(
    name: str, beta: float, label_smoothing: float, options: dict[str, float]
) -> PreferenceLoss:
    if not isinstance(name, str) or name not in _ALL:
        raise ValueError(unknown_loss(name))
    for option, value in options.items():
        if option not in LOSS_OPTIONS:
            raise TypeError(
                f"No loss has an option {option!r}; there are {', '.join(sorted(LOSS_OPTIONS))}."
            )
        if name not in LOSS_OPTIONS[option]:
            raise ValueError(
                f"{option} is {value!r}, but the {name} loss has none: leave it out or choose the "
                f"{' or the '.join(LOSS_OPTIONS[option])} loss."
            )
    return _ALL[name](beta=beta, label_smoothing=label_smoothing, **options)


def _any_has(option: str, names: Sequence[str]) -> bool:
    return any(name in names for name in LOSS_OPTIONS.get(option, ()))


def unknown_loss(name: object, known: Collection[str] = _ALL.keys()) -> str:
    """The message for a name that is no loss; only a typo is near enough to a name for a hint."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.8)
    meant = _OTHER_NAMES.get(str(name)) or (near[0] if near else None)
    hint = f" Did you mean {meant!r}?" if meant else ""
    return f"Unknown loss {name!r}.{hint} The losses are: {', '.join(sorted(known))}."
