"""Claims that a layer, a supervision or a term of your own must hold, by pytest or at once."""
from .. import _lazy

_names = dict(layer_checks='layer', check_layer='layer',
              function_checks='layer', check_function='layer',
              supervision_checks='supervision', check_supervision='supervision',
              term_checks='term', check_term='term', classifier='term', pictures='term',
              take_steps='term')
_modules = ('layer', 'supervision', 'term')

__all__, __getattr__, __dir__ = _lazy(__name__, _names, _modules)
