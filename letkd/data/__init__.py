"""What networks are trained on."""
from .. import _lazy

_modules = ('batches', 'digit_pairs', 'files', 'cifar', 'tiny_imagenet', 'imagenet', 'folders')

__all__, __getattr__, __dir__ = _lazy(__name__, {}, _modules)
