"""Networks of the field, and how they run fast."""
from .. import _lazy

_names = dict(create_model='zoo', model_names='zoo')
_modules = ('resnet', 'wrn', 'resnet50', 'mobilenetv2', 'shufflenet', 'imports', 'others', 'zoo', 'pairs', 'places', 'folding')

__all__, __getattr__, __dir__ = _lazy(__name__, _names, _modules)
