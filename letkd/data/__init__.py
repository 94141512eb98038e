"""What networks are trained on."""
from .. import _lazy

_modules = ('batches', 'digit_pairs', 'files', 'cifar100', 'tiny_imagenet', 'imagenet')

__all__, __getattr__, __dir__ = _lazy(__name__, {}, _modules)
