"""Channel interaction (Gao et al., AAAI 2020), fast and exact.

>>> import torch, cin_fast
>>> cin_fast.sci(torch.relu(torch.randn(1, 256, 14, 14))).shape
torch.Size([1, 256, 14, 14])
"""

from pathlib import Path as _Path

# In a bare checkout the Triton kernels lie beside the package, in kernels/.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "__init__.py").exists() and (_checkout / "setup.py").exists():
    __path__.append(str(_checkout))

from cin_fast.ops import cci, empty_cache, load_backends, sci, sci_weights, tap_means

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "cci",
    "empty_cache",
    "load_backends",
    "sci",
    "sci_weights",
    "tap_means",
]
