"""Every kernel compiles for GPUs, which the interpreter cannot tell. Triton brings the compiler: no GPU is needed."""

import importlib
import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

ATTENTION = {"STEPS": 4, "MOST": 4, "D": 32, "WIDTH": 32, "BLOCK": 64, "PRECISION": "tf32x3", "UPCAST": False}
UNNORMED = ATTENTION | {f"{name}_{part}_ptr": None for name in "qk" for part in ("inverse", "weight")}
ROWS = {"ROWS": 1, "WIDTH": 4096}
PICTURE = {"STRIP": 16, "COLUMNS": 8, "CHANNELS": 64}
KERNELS = [
    ("linear_attention", "_state_kernel", UNNORMED),
    ("linear_attention", "_output_kernel", UNNORMED),
    ("linear_attention", "_query_gradient_kernel", UNNORMED),
    ("linear_attention", "_key_value_gradient_kernel", UNNORMED),
    ("linear_attention", "_state_kernel", ATTENTION),
    ("linear_attention", "_output_kernel", ATTENTION),
    ("linear_attention", "_query_gradient_kernel", ATTENTION),
    ("linear_attention", "_key_value_gradient_kernel", ATTENTION),
    ("qk_norm", "_inverse_kernel", ROWS),
    ("qk_norm", "_norm_gradient_kernel", {**ROWS, "STEPS": 4}),
    ("modulate", "_modulate_kernel", {"WIDTH": 4096}),
    ("modulate", "_gradient_kernel", {"WIDTH": 4096, "ROWS": 8}),
    ("gated_residual", "_gated_residual_kernel", {"ROWS": 8, "COLUMNS": 256}),
    ("gated_residual", "_gradient_kernel", {"ROWS": 8, "COLUMNS": 256, "STEPS": 4}),
    ("gated_depthwise", "_glu_kernel", {**PICTURE, "GRADIENT": False}),
    ("gated_depthwise", "_glu_kernel", {**PICTURE, "GRADIENT": True}),
    ("gated_depthwise", "_input_gradient_kernel", PICTURE),
    ("rms_norm", "_rms_norm_kernel", {"RESIDUAL": True, "ROWS": 32, "WIDTH": 128}),
    ("rms_norm", "_gradient_kernel", {"ROWS": 4, "WIDTH": 1024, "STEPS": 4}),
]
PARTIAL = (
    "inverse_ptr",
    "states_ptr",
    "totals_ptr",
    "gradients_ptr",
    "dshift_ptr",
    "dscale_ptr",
    "dgate_ptr",
    "dweight_ptr",
    "dbias_ptr",
)


@pytest.mark.parametrize("module, name, constants", KERNELS)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(module, name, constants, capability):
    kernel = getattr(importlib.import_module(f"sana_core.kernels.fused.{module}"), name)

    def kind(argument):
        if argument.endswith("_ptr") and argument not in constants:
            return "*fp32" if argument.endswith(PARTIAL) else "*bf16"
        return "constexpr" if argument in constants else "fp32" if argument == "eps" else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    given = {argument: constants[argument] for argument, what in signature.items() if what == "constexpr"}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, what in enumerate(signature.values())
        if what[0] == "*" or what == "i32"
    }
    source = ASTSource(kernel, signature, given, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert compiled.asm["cubin"]
