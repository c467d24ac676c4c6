"""What the CPU needs: own kernels, packed and int8 weights, memory.

build.py         compiles kernels/ (C++) for this machine, cached by hash
compiled.py      CompiledOperators: the kernels on tensors, through ctypes; `compiled()` is None without a compiler
packed.py        PackedLinear: float32 weights in the kernels' layout (or oneDNN's)
int8.py          Int8Linear and `quantize`
lazy_zeros.py    zeroed memory that is allocated page by page

Imports nothing of core.
"""
