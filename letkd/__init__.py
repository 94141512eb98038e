"""letkd: knowledge distillation layers that let the student decide.

From a shell:

    letkd demo                # a teacher, its students and a table of what distillation gained, on real handwriting
    letkd run NAME --out DIR  # one experiment, for example digit_pairs/resnet56-resnet20/letkd2
    letkd export RUN --to student.onnx  # its student, for others

From Python, the six names to know:

    letkd.KDLayer        the layer itself: match features with templates, add what the templates mean
    letkd.Distiller      student, teacher and a list of terms; returns logits and named losses
    letkd.create_terms   the terms of a method by its name: 'kd', 'letkd1', 'letkd2', 'letkd2+kd'
    letkd.create_model   networks by their usual name: 'resnet20', 'resnet8x4'
    letkd.Experiment     everything that decides a run, as one value
    letkd.export         a student as a file that others open without this library

Nothing is imported before it is used: `import letkd` alone does not load torch.
"""
import importlib
import sys

__version__ = "0.1.0"

# public name -> the module that defines it
_names = dict(KDLayer='layer', supervised='layer', Distiller='distiller', create_terms='methods',
              create_model='models', Experiment='runs.experiments', KMeansPrototypes='prototypes',
              KernelPrototypes='prototypes', SubClasses='subclasses', export='runs.shipping')
_modules = ('solver', 'matching', 'fused', 'layer', 'taps', 'prototypes', 'subclasses', 'distiller', 'terms',
            'methods', 'baselines', 'models', 'data', 'runs', 'results', 'checks', 'cli')


def _lazy(package, names, modules):
    "`__all__`, `__getattr__` and `__dir__` of a package whose names and modules are imported when they are first used."
    def get(name):
        if name in modules: return importlib.import_module(f'{package}.{name}')
        if name not in names: raise AttributeError(f'module {package!r} has no attribute {name!r}')
        value = getattr(importlib.import_module(f'{package}.{names[name]}'), name)
        vars(sys.modules[package])[name] = value  # the next access does not come here
        return value
    public = [*names, *modules]
    return public, get, lambda: sorted({*vars(sys.modules[package]), *public})


__all__, __getattr__, __dir__ = _lazy(__name__, _names, _modules)
