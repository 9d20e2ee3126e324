"""Which back end of the head runs where, and how it is made."""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast_kernels.head.launch import has_triton, is_interpreted
from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.head.rows import RowOps
from dpofast_kernels.head.tiled import TorchRows

DEFAULT_OPTIONS = HeadOptions()
TRITON_BACKENDS = ("triton", "triton_fused")

# Triton exists only on Linux. So the files that use it are imported inside the functions below,
# never at the top of this file.


def backend_for(
    tensor: Tensor, options: HeadOptions = DEFAULT_OPTIONS, dtype: torch.dtype | None = None
) -> str:
    """The name of the back end that runs for a weight; never "auto".

    Args:
        tensor: the weight [V, H], or any tensor with its device, dtype and strides.
        options: of the op.
        dtype: dtype that the op computes in; None for that of `tensor`.

    Raises:
        ValueError: the back end in `options` can't take one of the options or the dtype, or doesn't
            run on this device; or they ask for Triton, and it isn't installed.
    """
    if options.backend == "naive" and options.weight_grad is not None:
        raise ValueError(
            "backend 'naive' can't add to weight_grad: leave it None, or choose another backend."
        )
    if options.backend == "auto":
        # PyTorch calls ROCm's devices cuda, too.
        if not (tensor.is_cuda and has_triton()):
            return "torch"
        return "triton_fused" if _can_fuse(tensor, dtype or tensor.dtype) else "triton"
    if options.backend in TRITON_BACKENDS:
        if not has_triton():
            raise ValueError(
                f"backend {options.backend!r} was asked for, but Triton isn't installed: install "
                "it (Linux only), or choose backend 'torch'."
            )
        if not tensor.is_cuda and not _is_interpreted():
            raise ValueError(
                f"backend {options.backend!r} was asked for, but the tensors are on "
                f"{tensor.device}: move them to a CUDA or ROCm device, set TRITON_INTERPRET=1 "
                "before Triton is imported (for tests), or choose backend 'torch'."
            )
    if options.backend == "triton_fused":
        _check_fused_dtype(dtype or tensor.dtype)
    return options.backend


def row_ops(
    backend: str, weight: Tensor, options: HeadOptions, statistics: tuple[str, ...] = ()
) -> RowOps:
    """The row operations of a back end for one weight [V, H].

    Args:
        backend: "torch", "triton" or "triton_fused".
        weight: [V, H], in the dtype to compute in.
        options: what the model does to its logits.
        statistics: names of the statistics that `score` computes, see `STATISTICS`.
    """
    if backend == "triton":
        from dpofast_kernels.head.rows_triton import TritonRows

        return TritonRows(weight, options, statistics)
    if backend == "triton_fused":
        from dpofast_kernels.head.fused_triton import FusedRows

        return FusedRows(weight, options, statistics)
    return TorchRows(weight, options, statistics)


def _can_fuse(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether "triton_fused" is the better back end for a weight on a CUDA or ROCm device.

    For fp16 its gradients of logits would be fp32, because exp(z - k) exceeds the range of fp16.
    Then it saves nothing over "triton". GPUs before compute capability 8 don't multiply bf16.
    """
    is_plain = weight.stride()[-1:] in ((), (1,))
    if torch.version.hip is not None or dtype != torch.bfloat16 or not is_plain:
        return False
    return torch.cuda.get_device_capability(weight.device) >= (8, 0)


def _check_fused_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError if "triton_fused" can't multiply a dtype; the interpreter multiplies all."""
    if dtype not in (torch.bfloat16, torch.float16) and not _is_interpreted():
        raise ValueError(
            f"the head computes in {dtype}, but backend 'triton_fused' multiplies bfloat16 and "
            "float16 alone: choose backend 'triton' or 'auto'."
        )


def _is_interpreted() -> bool:
    from dpofast_kernels.head.rows_triton import score_rows_kernel

    return is_interpreted(score_rows_kernel)
