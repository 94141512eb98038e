"""letkd: knowledge distillation layers that let the student decide.

From a shell:

    letkd demo                # a teacher, its students and a table of what distillation gained, on real handwriting
    letkd run NAME --out DIR  # one experiment, for example digit_pairs/resnet56-resnet20/letkd2

From Python, the five names to know:

    letkd.KDLayer        the layer itself: match features with templates, add what the templates mean
    letkd.Distiller      student, teacher and a list of terms; returns logits and named losses
    letkd.create_terms   the terms of a method by its name: 'kd', 'letkd1', 'letkd2', 'letkd2+kd'
    letkd.create_model   the networks of the field by their name: 'resnet20', 'resnet8x4'
    letkd.Experiment     everything that decides a run, as one value

Nothing is imported before it is used: `import letkd` alone does not load torch.
"""
import importlib

__version__ = "0.1.0"

# public name -> the module that defines it
_names = dict(KDLayer='layer', supervised='layer', Distiller='distiller', create_terms='methods',
              create_model='models', Experiment='experiments', KMeansPrototypes='prototypes',
              KernelPrototypes='prototypes', SubClasses='subclasses')
_modules = ('solver', 'matching', 'fused', 'layer', 'taps', 'prototypes', 'subclasses', 'distiller', 'checks', 'models', 'data',
            'baselines', 'imports', 'processes', 'checkpoints', 'meters', 'methods', 'training', 'experiments', 'tables', 'analysis', 'pictures',
            'probes', 'published', 'bench', 'cli')

__all__ = [*_names, *_modules]


def __getattr__(name):
    if name in _modules: return importlib.import_module(f'{__name__}.{name}')
    if name not in _names: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(importlib.import_module(f'{__name__}.{_names[name]}'), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__(): return sorted({*globals(), *__all__})
