"""The Triton kernels compiled for GPUs that are not here, as they are launched at the published sizes: what they take of one.

``python -m comfyui_hywu.benchmarks.compiled [--targets 80 89 90] [--record]``: shared memory, registers and spilled bytes of a
thread, and whether tensor cores are used, after Triton's own assembler. Needs no GPU; nothing runs, so it says nothing about
speed. Launches are caught on their way to the driver: the arguments are the wrappers' own, tensors have sizes but no memory.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from ..hywu_core.config import BackboneConfig
from ..hywu_core.json_fields import read_json
from ..kernels.reference import Adapter
from .edit import ROOT
from .load import CONFIG
from .record import between, record

# Compute capability: whose it is, and KB of shared memory that a program may have there (CUDA programming guide).
TARGETS = {80: ("A100", 163), 86: ("RTX 30", 99), 89: ("RTX 40", 99), 90: ("H100, H200", 227), 100: ("B200", 227),
           120: ("RTX 50", 99)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RANKS = (16, 64)  # one published LoRA, and four of them in a row
TOKENS = 8194
FP8 = "fp8 experts of a token"
FP8_FROM = 89  # older ones have no e4m3: there experts are unpacked first


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each wrapper's name and a call of it with tensors of the published sizes."""
    from ..kernels import few_tokens_triton, grouped_gemm_triton, swiglu_lora_triton, token_attention_triton

    config = BackboneConfig.from_dict(read_json(CONFIG))
    width, inner, experts, top_k = (
        config.hidden_size, config.moe_intermediate_size[0], config.num_experts, config.moe_topk[0])
    pairs, head_dim = TOKENS * top_k, config.attention_head_dim

    def of(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    ends = of(experts, kind=torch.int32)
    wide = of(experts, 2 * inner + 2 * RANKS[0], width)
    yield "grouped product", lambda: grouped_gemm_triton.kernel(of(pairs, width), wide, ends)
    for rank in RANKS:
        up, gate = (Adapter(of(experts, rank, width), of(experts, inner, rank), None) for _ in range(2))
        down = Adapter(of(experts, rank, inner), of(experts, width, rank), None)
        yield f"experts' LoRA, rank {rank}", lambda rank=rank, up=up, gate=gate, down=down: swiglu_lora_triton.kernel(
            of(pairs, 2 * inner + 2 * rank), up, gate, down, ends, of(pairs, inner + rank))
    choice = of(1, top_k, kind=torch.int64), of(1, top_k, kind=torch.float32)
    yield "experts of a token", lambda: few_tokens_triton.kernel(
        of(1, width), wide[:, : 2 * inner], of(experts, width, inner + 2 * RANKS[0])[:, :, :inner], *choice)
    packed = of(experts, 2 * inner, width, kind=torch.float8_e4m3fn), of(experts, width, inner, kind=torch.float8_e4m3fn)
    scales = tuple(of(*each.shape[:2], 1, kind=torch.float32) for each in packed)
    yield FP8, lambda: few_tokens_triton.kernel(of(1, width), *packed, *choice, scales)
    keys = of(1, config.num_key_value_heads, 9000, head_dim)
    yield "attention of a token", lambda: token_attention_triton.kernel(
        of(1, config.num_attention_heads, 1, head_dim), keys, keys, of(1, kind=torch.int64))


@contextmanager
def caught() -> Iterator[list]:
    """While the block runs, a launch does nothing but leave its kernel and arguments in the list."""
    from triton.runtime.jit import JITFunction

    made: list = []
    with patch.object(JITFunction, "run", lambda kernel, *given, grid, warmup, **named: made.append((kernel, given, named))):
        yield made


def specialised(kernel, given: tuple, named: dict):
    """What Triton makes of these arguments: pointers and numbers that 16 divides are known to be so, ones are constants."""
    from triton.compiler import ASTSource

    types, constants, attributes = {}, {}, {}
    names = {torch.float8_e4m3fn: "fp8e4nv", torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32",
             torch.int64: "i64"}
    for place, name in enumerate(kernel.arg_names):
        value = given[place] if place < len(given) else named[name]
        if name in named or (type(value) is int and value == 1):
            types[name], constants[place,] = "constexpr", value
            continue
        types[name] = (f"*{names[value.dtype]}" if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float)
                       else "i32" if value < 2**31 else "i64")
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, types, constants, attributes)


def compiled(target: int, kernel, given: tuple, named: dict) -> dict:
    """Compile one launch for a compute capability; raises what Triton and its assembler raise."""
    import triton
    from triton.backends.compiler import GPUTarget

    binary = triton.compile(specialised(kernel, given, named), target=GPUTarget("cuda", target, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True,
                               check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return {"shared": binary.metadata.shared, "registers": registers, "spilled": stack,
            "tensor_cores": bool(re.search(r"mma\.sync|wgmma|tcgen05\.mma", binary.asm["ptx"]))}


def table(rows: list[dict]) -> str:
    """What docs/kernels.md shows of it."""
    found = {}
    for row in rows:
        if row["dtype"] == "bf16":
            found.setdefault((row["what"], row["kernel"]), {})[row["target"]] = (
                f"{row['shared'] / 1024:.0f} KB, {row['registers']}, {row['spilled']}")
    lines = ["| kernel | " + " | ".join(f"{name} (sm_{target})" for target, (name, _) in TARGETS.items()) + " |",
             "| --- |" + " --- |" * len(TARGETS)]
    return "\n".join(lines + [f"| {what}: `{kernel}` | " + " | ".join(cells.get(target, "–") for target in TARGETS) + " |"
                              for (what, kernel), cells in found.items()])


def main() -> None:
    """Compile, print, and record if asked to; exits with 1 if a kernel takes more shared memory than a GPU has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", type=int, nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    rows = []
    for dtype_name, dtype in DTYPES.items():
        for name, launch in launches(dtype):
            with caught() as made:
                launch()
            for kernel, given, named in made:
                targets = [target for target in options.targets if name != FP8 or target >= FP8_FROM]
                for target in targets:
                    rows.append({"what": name, "kernel": kernel.__name__, "dtype": dtype_name, "target": target,
                                 **compiled(target, kernel, given, named)})
                print(f"{name:24s}{kernel.__name__:16s}{dtype_name}: " + ", ".join(
                    f"sm_{row['target']} {row['shared'] / 1024:.0f} KB, {row['registers']} registers, {row['spilled']} spilled"
                    for row in rows[len(rows) - len(targets):]))
    print("compiled for", ", ".join(f"sm_{target} ({TARGETS[target][0]})" for target in options.targets), "and not run")
    if options.json:
        options.json.write_text(json.dumps(rows))
    if options.record:
        record("compiled", {"targets": TARGETS, "run": "not measured", "kernels": rows})
        page = ROOT / "docs" / "kernels.md"
        page.write_text(between(page.read_text(encoding="utf-8"), "compiled", table(rows)), encoding="utf-8")
    if any(row["shared"] > TARGETS[row["target"]][1] * 1024 for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
