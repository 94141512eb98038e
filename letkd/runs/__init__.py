"""How a run is made: an experiment as a value, its training, and what it leaves."""
from .. import _lazy

_modules = ('jobs', 'processes', 'checkpoints', 'meters', 'training', 'recipes', 'experiments', 'records', 'running', 'shipping')

__all__, __getattr__, __dir__ = _lazy(__name__, {}, _modules)
