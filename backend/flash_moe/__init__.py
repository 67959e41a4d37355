"""flash_moe: run a Mixture-of-Experts model that is bigger than memory, on MLX.

The engine knows files and arrays, and nothing of `llm`. Importing it loads no MLX: heavy
modules are imported by the call that needs them.
"""

from flash_moe.errors import FlashMoeError

__version__ = "0.1.0"
__all__ = ["FlashMoeError", "__version__"]
