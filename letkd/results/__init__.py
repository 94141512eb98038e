"""How results are read: tables, published figures, pictures, probes and the benchmark."""
from .. import _lazy

_modules = ('tables', 'analysis', 'pictures', 'probes', 'published', 'bench')

__all__, __getattr__, __dir__ = _lazy(__name__, {}, _modules)
