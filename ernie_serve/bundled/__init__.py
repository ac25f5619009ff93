"""Where the bundled model lies.

Knows a path. Knows nothing about tensors, tokens or text.
"""

from pathlib import Path

ERNIE_TINY = Path(__file__).parent / "ernie-tiny"
"""The folder of `ernie-tiny`, in the layout of a published checkpoint."""
