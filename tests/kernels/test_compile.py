"""Every Triton kernel compiles for real GPUs, on machines that have none.

Triton's interpreter runs what its compiler refuses, such as a variable that changes its type in a
loop. So a process of its own, without the interpreter, calls the launchers with CPU tensors, and
where they would launch a kernel it is compiled ahead of time, down to machine code.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CAPABILITIES = (90, 80)
NO_COMPILER = 77
VARIANTS = {
    "_gate_up_kernel": 1,
    "_product_kernel": 3,  # with transposed matrices, without, and the sum of two
    "_wgrad_kernel": 2,  # whole and in parts
    "_add_parts_kernel": 1,
}
"""Of fused products, whatever the shapes and counts: another would be compiled in training."""


def test_all_kernels_compile(tmp_path):
    # The variable counts when our kernels are decorated: at their first import.
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    path = str(ROOT), *filter(None, [environment.get("PYTHONPATH")])
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode == NO_COMPILER:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    compiled = done.stdout.split()
    for capability in CAPABILITIES:
        for kernel in kernels_in_sources(capability):
            assert f"{kernel}:sm_{capability}" in compiled, f"{kernel} is not launched in main()"
    assert {kernel: compiled.count(f"{kernel}:sm_90") for kernel in VARIANTS} == VARIANTS


def runs_on(capability: int, module: str) -> bool:
    """Fused products are for Hopper."""
    return capability == 90 or "grouped_triton" not in module


def kernels_in_sources(capability: int) -> set[str]:
    """All that is launched, by name."""
    files = [path for path in (ROOT / "kernels").glob("*.py") if runs_on(capability, path.name)]
    text = "".join(path.read_text() for path in files)
    return set(re.findall(r"^def (_\w+_kernel)\(", text, re.MULTILINE))


def main() -> None:
    """Compile all kernels and print `kernel:architecture` for each."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    targets = {capability: GPUTarget("cuda", capability, 32) for capability in CAPABILITIES}
    try:
        for target in targets.values():
            triton.compiler.make_backend(target)
    except RuntimeError as error:
        print(f"Triton {triton.__version__} has no compiler for NVIDIA GPUs here: {error}")
        sys.exit(NO_COMPILER)
    from ds_llep.kernels import bias, counts, grouped_triton, parcels, planner, routes, rows, swiglu
    from ds_llep.kernels.tables import HiddenBias

    pointers = {
        torch.float64: "*fp64",
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.int64: "*i64",
        torch.int32: "*i32",
    }
    done = set()

    def compile_it(kernel, *args, grid, warmup=False, **keywords):
        """As `kernel[grid](*args, **keywords)` would, which specialises on what is 1 or absent."""
        names = [parameter.name for parameter in kernel.params]
        given = dict(zip(names, args, strict=False))
        given |= {name: value for name, value in keywords.items() if name in names}
        options = {name: value for name, value in keywords.items() if name not in names}
        signature, constants = {}, {}
        for index, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = pointers[value.dtype]
            elif parameter.is_constexpr or value is None or is_one:
                signature[parameter.name], constants[(index,)] = "constexpr", value
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
        variant = kernel.__name__, str(signature), str(constants)
        if variant in done:
            return
        done.add(variant)
        for capability, target in targets.items():
            if not runs_on(capability, kernel.__module__):
                continue
            source = triton.compiler.ASTSource(kernel, signature, constants)
            triton.compile(source, target=target, options=options)
            print(f"{kernel.__name__}:sm_{capability}", flush=True)

    JITFunction.run = compile_it

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def launch_all(T: int, K: int, E: int, P: int, D: int, N: int) -> None:
        ids, scores = empty(T, K, dtype=torch.int64), empty(T, K, dtype=torch.float32)
        _, blocks = counts.count_copies(ids, scores, E, P, 1)
        counts.count_copies(ids, scores.double(), E, P, 1)
        plan = empty(P, E, dtype=torch.int64), empty(E, P, dtype=torch.int64)
        runs = routes.find_runs(*plan, 0)
        _, sent, target, number = routes.address_copies(ids, blocks, runs, 0)
        parcels.place_parcels(sent, number, empty(P))
        labels = empty(9, K), empty(9, K, dtype=torch.float32)
        parcels.label_parcels(sent, target, scores, *labels)
        bf16 = {"dtype": torch.bfloat16}
        x, row, values = empty(T, D, **bf16), empty(N, D, **bf16), empty(N, dtype=torch.float32)
        rows.scatter_rows(x, sent, row, scores, values)
        rows.scatter_rows(x, sent, row)
        rows.gather_values(values, sent, out_UK=scores)
        rows.gather_values(values, sent, scores, sent, out_UK=scores.bfloat16())
        rows.sum_rows(row, row, sent, row, sent)
        rows.sum_rows(row, row[:0], sent)
        hidden, clamp = HiddenBias(row[:P], row[:P], empty(P)), (1.7, 7.0)
        for form in ((values, None, None), (None, None, clamp), (values, hidden, clamp)):
            swiglu.swiglu_forward(row, row, *form)
            swiglu.swiglu_backward(row, row, row, *form)
        for weight in (values, None):
            bias.add_bias(row, row[:P], empty(P), weight)
            bias.gradient_of_bias(row, [N], weight)
        bias.gradient_of_bias_weight(row, row[:P], empty(P))

    def launch_products(counts: list[int], D: int, F: int) -> None:
        x, hidden = (empty(sum(counts), n, dtype=torch.bfloat16) for n in (D, F))
        w = empty(2, len(counts), F, D, dtype=torch.bfloat16)
        grouped_triton.gate_up(x, *w, counts)
        grouped_triton.product(x, w[0], counts)
        grouped_triton.product(hidden, w[0], counts, transpose=False)
        grouped_triton.dgrad(hidden, w[0], hidden, w[1], counts)
        grouped_triton.wgrad(hidden, x, counts)

    launch_all(300, 3, 12, 3, 5000, 50)
    launch_products([9000, 10, 0], 512, 768)
    launch_products([1], 8, 16)
    launch_all(1, 1, 1, 1, 1, 1)  # Triton makes a constant of an argument that is 1
    planner.plan_lla(empty(3, 12, dtype=torch.int64), 1.1, 1.3, 64, 2)


if __name__ == "__main__":
    main()
