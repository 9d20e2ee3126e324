"""Cross-compiles every Triton kernel for every target; run by test_aot.py in a process of its own.

Prints one line a kernel: name, target, bytes of shared memory.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dpofast_kernels.head.pairs_triton import BLOCK_N, pair_loss_kernel
from dpofast_kernels.head.rows_triton import MAX_BLOCK_V, d_logits_kernel, row_logps_kernel
from dpofast_kernels.preference.formulas_triton import FORMULAS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PLAIN_HEAD = {"HAS_BIAS": False, "SCALE": 1.0, "SOFTCAP": None, "TEMPERATURE": 1.0}
FULL_HEAD = {"HAS_BIAS": True, "SCALE": 0.0625, "SOFTCAP": 30.0, "TEMPERATURE": 0.7}


def kernel_sources() -> list[tuple[str, ASTSource]]:
    """(name, source) of each kernel with each set of options that changes its code."""
    sources = []
    for loss, formula in FORMULAS.items():
        types = {"p_per_token_logps": "*fp32", "p_bounds": "*i64"}
        constants = {"FORMULA": formula, "BN": BLOCK_N}
        sources.append((f"pair_loss:{loss}", source(pair_loss_kernel, types, constants, "*fp64")))
    for head, logits in product((PLAIN_HEAD, FULL_HEAD), ("fp32", "fp64")):
        name = f"{'full' if head['HAS_BIAS'] else 'plain'}:{logits}"
        constants = {**head, "BV": MAX_BLOCK_V}
        types = {"p_labels": "*i64", "stride": "i64", "V": "i32"}
        sources.append(
            (f"row_logps:{name}", source(row_logps_kernel, types, constants, f"*{logits}"))
        )
        for output in ("fp32", "bf16") if logits == "fp32" else ("fp64",):
            types = {**types, "d_stride": "i64", "p_d_logits": f"*{output}"}
            sources.append(
                (
                    f"d_logits:{name}:{output}",
                    source(d_logits_kernel, types, constants, f"*{logits}"),
                )
            )
    return sources


def source(kernel: Any, types: dict[str, str], constants: dict[str, Any], rest: str) -> ASTSource:
    """A kernel's source; arguments named in neither dict are pointers of the type `rest`."""
    signature = {
        name: "constexpr" if name in constants else types.get(name, rest)
        for name in kernel.arg_names
    }
    return ASTSource(kernel, signature=signature, constexprs=constants)


def main() -> None:
    for (name, kernel), (target_name, target) in product(kernel_sources(), TARGETS.items()):
        compiled = triton.compile(kernel, target=target)
        print(name, target_name, compiled.metadata.shared)


if __name__ == "__main__":
    main()
