"""The verbs as plain torch does them best on a CPU.

Knows what is cheap on a CPU: views instead of copies, one matrix at a time, few calls. Numbers are those of the
reference to rounding.
"""

from ernie_serve.kernels.reference import ReferenceKernels


class CpuKernels(ReferenceKernels):
    """Plain torch on a CPU, in float32 or bfloat16."""
