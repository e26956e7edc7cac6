"""Kernels written for `mx.fast.cuda_kernel`, run on a CPU: the same sources, compiled by g++ (`emulated_cuda.h`)."""

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from troupe.policy.cuda import cuda_header

_HEADER = Path(__file__).with_name("emulated_cuda.h")
_BUILT = Path(tempfile.gettempdir()) / "emulated-cuda"
_TYPES = {
    mx.float32: "float",
    mx.bfloat16: "__nv_bfloat16",
    mx.float16: "__half",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
    mx.int64: "int64_t",
    mx.uint64: "uint64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.bool_: "bool",
}
_ALIGNED = r"((?:alignas|__align__)\([^)]*\)\s+)?"
_SHARED = re.compile(_ALIGNED + r"\b(extern\s+)?__shared__\s+" + _ALIGNED + r"([\w:]+(?:\s*<[^>]*>)?)\s+([^;]+);")


class EmulatedKernel:
    """What `mx.fast.cuda_kernel` gives, here: called alike, but the results are there at once, and inputs that the
    kernel writes to are written to in place."""

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",  # the functions of units.cuh have twins, what stands behind them counts
        ensure_row_contiguous: bool = True,
        shared_memory: int = 0,
    ) -> None:
        self._name, self._inputs, self._outputs, self._source = name, tuple(input_names), tuple(output_names), source
        self._contiguous, self._shared = ensure_row_contiguous, shared_memory
        self._header = (
            header.removeprefix(cuda_header()).replace("#pragma once", "").replace("__attribute__((global))", "")
        )

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] = (),
        init_value: float | None = None,
        stream: Any = None,
    ) -> list[mx.array]:
        if self._contiguous:
            inputs = [mx.contiguous(x) for x in inputs]
        mx.eval(inputs)
        fill = 0 if init_value is None else init_value
        outputs = [mx.full(shape, fill, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        mx.eval(outputs)
        strides = [_strides(x) for x in inputs]
        code = self._code([x.dtype for x in inputs], [x.ndim for x in inputs], output_dtypes, template)
        extents = [_extent(x, steps) for x, steps in zip(inputs, strides, strict=True)]
        lent = [_Aligned(_address(x), size) for x, size in zip(inputs, extents, strict=True)]
        lent += [_Aligned(_address(x), x.nbytes) for x in outputs]
        addresses = [x.address for x in lent]
        shapes = [n for x in inputs for n in _eight(x.shape)]
        steps = [n for x in strides for n in _eight(x)]
        blocks = [-(-g // t) for g, t in zip(grid, threadgroup, strict=True)]
        numbers = [*blocks, *threadgroup, self._shared]
        arguments = []
        for kind, values in (
            (ctypes.c_void_p, addresses), (ctypes.c_int32, shapes), (ctypes.c_int64, steps), (ctypes.c_int64, numbers)
        ):  # fmt: skip
            arguments.append((kind * len(values))(*values))
        failure = _built(code)(*arguments)
        if failure:
            raise RuntimeError(f"{self._name}: {failure.decode()}")
        for x in lent:
            x.give_back()
        return outputs

    def _code(
        self,
        inputs: Sequence[mx.Dtype],
        ndims: Sequence[int],
        outputs: Sequence[mx.Dtype],
        template: Sequence[tuple[str, Any]],
    ) -> str:
        parameters, values = [], []
        for i, (name, dtype) in enumerate(zip(self._inputs, inputs, strict=True)):
            parameters.append(f"const {_TYPES[dtype]}* {name}")
            values.append(f"static_cast<const {_TYPES[dtype]}*>(arrays[{i}])")
            if ndims[i] and f"{name}_shape" in self._source:
                parameters.append(f"const std::array<int32_t, 8> {name}_shape")
                values.append(f"eight<int32_t>(shapes + 8 * {i})")
            if ndims[i] and f"{name}_strides" in self._source:
                parameters.append(f"const std::array<int64_t, 8> {name}_strides")
                values.append(f"eight<int64_t>(steps + 8 * {i})")
        for i, (name, dtype) in enumerate(zip(self._outputs, outputs, strict=True), start=len(inputs)):
            parameters.append(f"{_TYPES[dtype]}* {name}")
            values.append(f"static_cast<{_TYPES[dtype]}*>(arrays[{i}])")
        constants = [_constant(name, value) for name, value in template]
        body = _SHARED.sub(_shared, self._source)
        return "\n".join(
            [
                f'#include "{_HEADER}"',
                self._header,
                "template <class X> static std::array<X, 8> eight(const X* x) {",
                "std::array<X, 8> all; for (int i = 0; i < 8; i++) all[i] = x[i]; return all; }",
                f"static void kernel({', '.join(parameters)}) {{",
                *constants,
                body,
                "}",
                'extern "C" const char* run(',
                "    void** arrays, const int32_t* shapes, const int64_t* steps, const int64_t* n) {",
                "(void)shapes; (void)steps;",
                "const dim3 grid{unsigned(n[0]), unsigned(n[1]), unsigned(n[2])};",
                "const dim3 threads{unsigned(n[3]), unsigned(n[4]), unsigned(n[5])};",
                f"emulated::launch(grid, threads, n[6], [=] {{ kernel({', '.join(values)}); }});",
                "return emulated::failure;",
                "}",
                "EMULATED_SHARED __attribute__((used)) char emulated_none[16];",
            ]
        )


def _shared(found: re.Match[str]) -> str:
    before, outside, after, kind, names = found.groups()
    aligned = (before or after or "alignas(16) ").replace("__align__", "alignas")
    if outside:
        name = names.split("[")[0].strip()
        return f"{kind}* {name} = static_cast<{kind}*>(emulated::dynamic_shared());"
    return f"{aligned}EMULATED_SHARED {kind} {names};"


def _constant(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};"
    if isinstance(value, int):
        return f"constexpr int {name} = {value};"
    return f"using {name} = {_TYPES[value]};"


def _eight(numbers: Sequence[int]) -> list[int]:
    return [*numbers, *[0] * (8 - len(numbers))]


class _Aligned:
    """A copy of memory at an address that is a multiple of 256, as a card's memory is, and is written back."""

    def __init__(self, origin: int, size: int) -> None:
        self._origin, self._size = origin, size
        self._memory = ctypes.create_string_buffer(size + 256)
        self.address = -(-ctypes.addressof(self._memory) // 256) * 256
        ctypes.memmove(self.address, origin, size)

    def give_back(self) -> None:
        ctypes.memmove(self._origin, self.address, self._size)


def _extent(x: mx.array, strides: Sequence[int]) -> int:
    """Bytes from the first number to the last."""
    return (1 + sum((n - 1) * step for n, step in zip(x.shape, strides, strict=True))) * x.dtype.size if x.size else 0


def _plain(x: mx.array) -> mx.array:
    """The same memory as numbers that Python's buffers know."""
    return x.view(mx.uint16) if x.dtype == mx.bfloat16 else x


def _strides(x: mx.array) -> list[int]:
    if not x.ndim:
        return []
    view = np.array(_plain(x), copy=False)
    return [step // view.itemsize for step in view.strides]


def _address(x: mx.array) -> int:
    return int(np.array(_plain(x), copy=False).__array_interface__["data"][0])


@cache
def _built(code: str) -> Any:
    _BUILT.mkdir(exist_ok=True)
    key = hashlib.sha256((code + _HEADER.read_text()).encode()).hexdigest()[:24]
    library = _BUILT / f"{key}.so"
    if not library.exists():
        source = _BUILT / f"{key}-{os.getpid()}.cpp"  # others may be building the same
        source.write_text(code)
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-ffp-contract=off"]
        command += [str(source), "-o", f"{source}.so"]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            sys.stderr.write(built.stderr[:4000])
            raise RuntimeError("the kernel does not compile")
        Path(f"{source}.so").rename(library)
    run = ctypes.CDLL(str(library)).run
    run.restype = ctypes.c_char_p
    return run
