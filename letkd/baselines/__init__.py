"""The methods that letKD is compared with, one a module."""
from .. import _lazy

_modules = ('fitnet', 'at', 'sp', 'vid', 'fsp', 'ab', 'crd', 'simkd', 'tdd')

__all__, __getattr__, __dir__ = _lazy(__name__, {}, _modules)
