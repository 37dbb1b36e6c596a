"""Compiles the Triton kernels for GPUs that are not here, and reads what they would take of one.

    python -m tests.helpers.aot [--only WORD] [--target sm_80]      a table
    python -m tests.helpers.aot --json                              the same as JSON, for tests/unit/test_triton_aot.py

Every triton.py below attnzoo that has a function `aot_cases()` takes part. A case says what to compile: `name`,
`kernel`, `signature`, `constexprs`, `options`; and if it has them, `target`, the only one it is meant for, and
`aligned`, the paths of arguments that are multiples of 16 (all pointers without it).
attnzoo.ops.common.launch.Launch is one, made from the launch itself, so that what is compiled is what would run.

This module must run in a process without TRITON_INTERPRET: there the kernels are Python functions.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one program may take; Triton compiles beyond them without a word."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What one kernel takes on one target: registers a thread, bytes of shared memory, and spills to slow memory.

    `spills` counts registers on AMD and bytes of local memory on NVIDIA; `stack` is bytes a thread, where NVIDIA's
    assembler puts most of what it spills.
    """

    name: str
    target: str
    registers: int
    spills: int
    stack: int
    shared: int


def compile_kernel(
    fn: Any,
    signature: dict[str, Any],
    constexprs: dict[str, Any],
    target: str,
    options: dict[str, Any],
    *,
    name: str = "",
    aligned: set[tuple[int, ...]] | None = None,
) -> Compiled:
    """Compiles for "sm_80", "sm_90" or "gfx942". Without `aligned`, pointers count as aligned, as torch allocates."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if aligned is None:
        places = [place for i, kind in enumerate(signature.values()) for place in _aligned(kind, (i,))]
    else:
        places = sorted(aligned)
    source = ASTSource(fn, signature, constexprs, {place: [["tt.divisibility", 16]] for place in places})
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    usage = _nvidia_usage(compiled.asm["cubin"]) if "cubin" in compiled.asm else _amd_usage(compiled.asm["amdgcn"])
    return Compiled(name=name or fn.__name__, target=target, shared=compiled.metadata.shared, **usage)


def _aligned(kind: Any, place: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Where a signature holds multiples of 16, as launches do: pointers, and strides, which stand inside tuples."""
    if isinstance(kind, tuple):
        for i, inner in enumerate(kind):
            yield from _aligned(inner, (*place, i))
    elif kind.startswith("*") or (kind == "i32" and len(place) > 1):
        yield place


def _nvidia_usage(cubin: bytes) -> dict[str, int]:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return {"registers": int(found["REG"]), "spills": int(found["LOCAL"]), "stack": int(found["STACK"])}


def _amd_usage(assembly: str) -> dict[str, int]:
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size): +(\d+)", assembly))
    return {
        "registers": int(found["vgpr_count"]),
        "spills": int(found["vgpr_spill_count"]),
        "stack": int(found["private_segment_fixed_size"]),
    }


def all_cases() -> Iterator[Any]:
    for path in sorted((ROOT / "attnzoo").rglob("triton.py")):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        yield from getattr(module, "aot_cases", list)()


def cases_of(target: str, widest: bool = False) -> list[Any]:
    """What is compiled for a target. `widest`: of each kernel one case, bfloat16 with 128 channels where it has that:
    the widest that is common in models, so the first that would not fit."""
    cases = [case for case in all_cases() if getattr(case, "target", "any") in ("any", target)]
    if not widest:
        return cases
    kernels: dict[int, list[Any]] = {}
    for case in cases:
        kernels.setdefault(id(case.kernel), []).append(case)
    return [next((c for c in own if "bf16" in c.name and "128" in c.name), own[0]) for own in kernels.values()]


def compile_all(only: str, targets: list[str], widest: bool = False) -> Iterator[Compiled]:
    for target in targets:
        for case in cases_of(target, widest):
            if only in case.name:
                yield compile_kernel(
                    case.kernel,
                    case.signature,
                    case.constexprs,
                    target,
                    case.options,
                    name=case.name,
                    aligned=getattr(case, "aligned", None),
                )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--target", choices=TARGETS, action="append", help="may be repeated; all by default")
    parser.add_argument("--widest", action="store_true", help="of each kernel one case, the widest that is common")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("unset TRITON_INTERPRET: under the interpreter there is nothing to compile", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")  # Triton 3.9 warns that a default will change
    rows = []
    for row in compile_all(arguments.only, arguments.target or list(TARGETS), arguments.widest):
        rows.append(asdict(row))
        if not arguments.json:
            print(
                "{name:32} {target:7} regs={registers:3} spills={spills} stack={stack} shared={shared}".format(
                    **rows[-1]
                )
            )
    if arguments.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
