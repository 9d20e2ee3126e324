"""Cross-compiles every Triton kernel for the architectures given as arguments.

The first argument says which variants: see `chosen`. test_aot.py runs this as a process of its own,
because Triton decides at import whether kernels are interpreted. It prints one line of JSON per
kernel: name, target, bytes of shared memory, spills, matrix instructions.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dpofast_kernels import STATISTICS, HeadOptions
from dpofast_kernels.head import (
    cast_triton,
    finish_triton,
    fused_triton,
    pairs_triton,
    rescale_triton,
    rows_triton,
    singles_triton,
    tiles_triton,
)
from dpofast_kernels.head.launch import launch_table
from dpofast_kernels.head.logits_triton import logit_constants
from dpofast_kernels.head.statistics_triton import statistic_constants
from dpofast_kernels.preference.formulas_triton import FORMULAS, UNPAIRED_FORMULAS
from tests.kernels.machine_code import disassembled

MODULES = (
    *(pairs_triton, singles_triton, rows_triton, tiles_triton, finish_triton),
    *(cast_triton, rescale_triton),
)
KERNELS = {
    name.removesuffix("_kernel"): kernel
    for module in MODULES
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}
# Kernels without an entry in the launch table, and the kernel whose entry they use.
LAUNCHED_AS = {"sequence_loss": "pair_loss"}
# Kernels that are launched in the same way everywhere.
LAUNCHED_EVERYWHERE = {
    "scale_cast": cast_triton.CAST_OPTIONS,
    "rescale": rescale_triton.RESCALE_OPTIONS,
}
TYPES = {
    "p_labels": "*i64",
    "p_bounds": "*i64",
    "p_pairs": "*i64",
    "p_is_desirable": "*i1",
    "n": "i32",
    "V": "i32",
    "H": "i32",
    "num_tiles": "i32",
    "num_programs": "i32",
    "stride": "i64",
    "stride_x": "i64",
    "stride_w": "i64",
    "stride_h": "i64",
    "stride_d": "i64",
}
# What Triton finds to be a multiple of 16 at run time: pointers, H and the strides of rows.
ALIGNED = ("p_", "stride", "H", "hidden_states", "weight", "d_logits")
HEADS = {
    "plain": logit_constants(HeadOptions()),
    "scaled": logit_constants(HeadOptions(logit_scale=0.25, temperature=0.7)),
    "cap": logit_constants(HeadOptions(softcap=30.0)),
    "bias": {**logit_constants(HeadOptions()), "HAS_BIAS": True},
    "full": {
        **logit_constants(HeadOptions(softcap=30.0, logit_scale=0.0625, temperature=0.7)),
        "HAS_BIAS": True,
    },
}
NO_STATISTICS, ALL_STATISTICS = statistic_constants(()), statistic_constants(STATISTICS)
EVEN_VOCABULARY = {"V": "i32 aligned", "*": "*fp32"}  # a multiple of 16
# Pairs of any sequences, with soft labels: what a kernel reads is the same whatever its formula.
GENERAL = ("sigmoid_norm", "apo_down", "custom")
Variant = tuple[str, dict[str, str], dict[str, Any]]


def variants(kernel: str) -> Iterator[Variant]:
    """(name, types, constants) for each set of options that changes a kernel's code."""
    if kernel == "pair_loss":
        types = {"p_per_token_logps": "*fp32", "*": "*fp64"}
        for loss, formula in {**FORMULAS, "custom": pairs_triton.no_formula}.items():
            for general in (False, True) if loss in GENERAL else (False,):
                constants = {"FORMULA": formula, "HAS_PAIRS": general, "HAS_SMOOTHING": general}
                constants["PER_TOKEN"] = general
                yield f"{loss}:general" if general else loss, types, constants
    elif kernel == "sequence_loss":
        types = {"p_per_token_logps": "*fp32", "*": "*fp64"}
        for loss, formula in UNPAIRED_FORMULAS.items():
            for weighted in (False, True):
                constants = {"FORMULA": formula, "HAS_WEIGHTS": weighted}
                yield f"{loss}:weighted" if weighted else loss, types, constants
    elif kernel == "target_products":
        for dtype in ("bf16", "fp16"):
            yield dtype, {"p_targets": "*fp32", "*": f"*{dtype}"}, {}
    elif kernel == "scale_cast":
        for dtype in ("bf16", "fp16", "fp32"):
            yield dtype, {"p_factor": "*fp64", "p_out": f"*{dtype}", "*": "*fp32"}, {}
    elif kernel == "rescale":
        for dtype in ("bf16", "fp16", "fp32"):
            yield dtype, {"p_factor": "*fp32", "*": f"*{dtype}"}, {}
    elif kernel == "score_rows":
        for d_logits in ("bf16", "fp32"):
            types = {"p_d_logits": f"*{d_logits}", "*": "*fp32"}
            yield from head_variants(d_logits, types, ("plain", "full"), {})
            yield from head_variants(f"{d_logits}:all", types, ("plain", "full"), ALL_STATISTICS)
        types = {"p_d_logits": "*bf16", **EVEN_VOCABULARY}
        yield from head_variants("bf16:even", types, ("plain", "cap"), {})
        yield from head_variants("fp64", {"*": "*fp64"}, ("full",), {})
        yield from head_variants("fp64:all", {"*": "*fp64"}, ("full",), ALL_STATISTICS)
    elif kernel == "finish_rows":
        # The rows of the weight have no gaps, and Triton makes a constant of a stride of 1.
        constants = {"MAX_REST": finish_triton.MAX_REST, "stride_h": 1}
        yield from head_variants("bf16", input_types("bf16", "bf16"), ("plain", "full"), constants)
        yield from head_variants("fp16", input_types("fp16", "fp32"), ("full",), constants)
        constants = {**constants, **ALL_STATISTICS}
        yield from head_variants("bf16:all", input_types("bf16", "bf16"), ("full",), constants)
        yield from head_variants("fp16:all", input_types("fp16", "fp32"), ("full",), constants)
    elif kernel == "score_tiles":
        heads = ("plain", "scaled")
        yield from head_variants("bf16", input_types("bf16", "bf16"), heads, {"UPCAST": False})
    else:
        heads = ("bias", "full")
        types = input_types("bf16", "bf16")
        yield from head_variants("bf16", types, ("cap", *heads), {"UPCAST": False})
        yield from head_variants("fp16", input_types("fp16", "fp32"), heads, {"UPCAST": False})
        constants = {"UPCAST": False, **ALL_STATISTICS}
        yield from head_variants("bf16:all", input_types("bf16", "bf16"), heads, constants)
        yield from head_variants("fp16:all", input_types("fp16", "fp32"), heads, constants)
        # Unaligned rows, which descriptors can't read.
        odd = {"H": "i32 odd", "stride_x": "i64 odd", "stride_w": "i64 odd"}
        constants = {"UPCAST": False, "DESCRIPTORS": False}
        types = {**input_types("bf16", "bf16"), **odd}
        yield from head_variants("bf16:odd", types, ("plain", "full"), constants)
        types = {**input_types("fp16", "fp32"), **odd}
        yield from head_variants("fp16:odd", types, ("full",), constants)
        constants = {**constants, **ALL_STATISTICS}
        yield from head_variants("fp16:odd:all", types, heads, constants)


def head_variants(
    name: str, types: dict[str, str], heads: tuple[str, ...], constants: dict[str, Any]
) -> Iterator[Variant]:
    for head, keep in product(heads, (True, False)):
        given = {**HEADS[head], **NO_STATISTICS, "KEEP": keep, **constants}
        yield f"{name}:{head}:{keep}", types, given


def input_types(inputs: str, d_logits: str) -> dict[str, str]:
    names = ("p_hidden_states", "p_weight", "hidden_states", "weight")
    outputs = dict.fromkeys(("p_d_logits", "d_logits"), f"*{d_logits}")
    return {**dict.fromkeys(names, f"*{inputs}"), **outputs, "*": "*fp32"}


def compiled(
    kernel: str, architecture: str, types: dict[str, str], constants: dict[str, Any]
) -> Any:
    options = launched(kernel, architecture)
    if kernel == "score_tiles_wide" and needs_narrow_tiles(constants):
        options = fused_triton.narrowed(options)
    names = ("num_warps", "num_stages", "maxnreg")
    launch = {name: options.pop(name) for name in names if name in options}
    constants = {**options, **constants}
    types = {**TYPES, **types}
    if constants.get("DESCRIPTORS"):
        dtype = types["weight"].removeprefix("*")
        for name, rows in (("hidden_states", "BM"), ("weight", "BN")):
            types[name] = f"tensordesc<{dtype}[{options[rows]}, {options['BK']}]>"
        if constants["KEEP"]:
            dtype = types["d_logits"].removeprefix("*")
            types["d_logits"] = f"tensordesc<{dtype}[{options['BM']}, {options['BN']}]>"
    function = KERNELS[kernel.removesuffix("_wide")]
    kinds = {name: types.get(name, types["*"]) for name in function.arg_names}
    signature = {
        name: "constexpr"
        if name in constants
        else kind.removesuffix(" aligned").removesuffix(" odd")
        for name, kind in kinds.items()
    }
    unknown = {each.name for each in function.params if each.do_not_specialize_on_alignment}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(kinds.items())
        if (name.startswith(ALIGNED) or "aligned" in kind)
        and "odd" not in kind
        and name not in unknown
        and not signature[name].startswith(("tensordesc", "constexpr"))
    }
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target(architecture), options=launch)


def launched(kernel: str, architecture: str) -> dict[str, Any]:
    """A copy of the constexprs, warps and stages that a kernel is launched with."""
    options = {**launch_table()[architecture], **LAUNCHED_EVERYWHERE}
    return {"num_stages": 1, **options[LAUNCHED_AS.get(kernel, kernel)]}


def needs_narrow_tiles(constants: dict[str, Any]) -> bool:
    """The case of `FusedRows.score`: statistics, with a gradient."""
    return constants["KEEP"] and constants["ENTROPY"] is not None


def target(architecture: str) -> GPUTarget:
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def inspected(binary: Any) -> dict[str, int]:
    """Numbers of spills to memory and of matrix instructions in the machine code."""
    if "amdgcn" in binary.asm:
        code = binary.asm["amdgcn"]
        # Scalar registers spill into vector registers, so only these count.
        spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", code)
        return {"spills": sum(map(int, spills)), "matrix": len(re.findall(r"\bv_mfma", code))}
    code = disassembled(binary.asm["cubin"])
    return {
        "spills": code.count("STL", "LDL"),
        "matrix": code.count("HMMA", "HGMMA", "UTCHMMA"),
    }


def report(job: tuple[str, str, str]) -> dict[str, Any]:
    kernel, architecture, variant = job
    types, constants = {name: rest for name, *rest in variants(kernel)}[variant]
    binary = compiled(kernel, architecture, types, constants)
    return {
        "kernel": kernel,
        "variant": variant,
        "target": architecture,
        "shared": binary.metadata.shared,
        **inspected(binary),
    }


def jobs() -> Iterator[tuple[str, str, str]]:
    """Every (kernel, architecture, variant).

    Entries that sm_86 has in common with sm_80 are left out, because it runs sm_80's machine code.
    """
    table = {name: entry for name, entry in launch_table().items() if name != "cpu"}
    for architecture, entry in table.items():
        for kernel in (*entry, *LAUNCHED_AS, *LAUNCHED_EVERYWHERE):
            launched = LAUNCHED_AS.get(kernel, kernel)
            other = table["sm_80"].get(launched)
            is_repeat = architecture == "sm_86" and entry.get(launched) == other
            if kernel != "measured" and not is_repeat:
                for variant, *_ in variants(kernel):
                    yield kernel, architecture, variant


def chosen(variants: str, architectures: list[str]) -> list[tuple[str, str, str]]:
    """The jobs of some architectures: "plain", "statistics", or "quick", the first of a kernel."""
    found = [job for job in jobs() if job[1] in architectures]
    if variants == "quick":
        return list({job[:2]: job for job in reversed(found)}.values())
    return [job for job in found if (":all:" in job[2]) == (variants == "statistics")]


def main(arguments: list[str]) -> None:
    with ProcessPoolExecutor(max_workers=2) as pool:
        for line in pool.map(report, chosen(arguments[0], arguments[1:])):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
