"""Beringia's PyTorch engine: the inner steps of one site, on any device that PyTorch knows.

The agent starts `python -m beringia_torch --socket PATH --device DEVICE` and drives it over a Unix socket; tensors
travel in a shared memory file. This package knows nothing of rounds, sites or the network, and it never reads a pickle.
"""

__version__ = "0.1.0"
PROTOCOL_VERSION = 1
