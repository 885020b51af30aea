__version__ = "0.2.0"

from .core import share_cores

share_cores()  # OpenMP reads its settings when torch is loaded, so this comes first
