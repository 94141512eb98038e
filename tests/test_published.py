"Every cell of the published tables: its settings, each with a reason, and a step of its training."
import ast
import importlib.util
from functools import cache
from itertools import chain
from math import isfinite

import pytest
import torch

from conftest import ROOT
from letkd.data.batches import Batches, Images
from letkd.distiller import Distiller
from letkd.methods import METHODS, create_terms, method_options
from letkd.models import create_model
from letkd.models.pairs import pair_taps
from letkd.results.published import ABLATIONS, published
from letkd.runs.experiments import Experiment
from letkd.runs.recipes import DATASETS, ORIGINAL
from letkd.runs.records import experiment_of, read_record
from letkd.runs.training import Training

RN50, PHOTOS = 'resnet50-mobilenetv2', ('resnet34-resnet18', 'torchvision/resnet50-mobilenet_v2')

# Why a cell differs from its method's defaults: (reason, data sets, pairs or None for all, methods
# or None for all, settings). Nothing else may differ but the options that a row of an ablation
# names, and the places of a pair's networks.
DIFFERENCES = [
    ('a smaller rate for students of the mobile families', ('cifar100', 'tiny_imagenet'),
     (RN50, 'wrn_40_2-shufflenetv1', 'resnet32x4-shufflenetv1', 'resnet32x4-shufflenetv2'), None,
     dict(lr=.01)),
    ("the papers' recipe on ImageNet, batch and weight decay QuEST's, teachers torchvision's",
     ('imagenet',), None, None,
     dict(epochs=100, teacher_epochs=100, lr=.1, milestones=(.3, .6, .9), batch_size=256,
          weight_decay=1e-4, teacher_checkpoint='IMAGENET1K_V1')),
    ("DKD's configuration, ResNets", ('cifar100',), ('resnet56-resnet20', 'resnet110-resnet32'),
     ('dkd',), dict(dkd_beta=2.)),
    ("DKD's configuration, wide ResNets", ('cifar100',), ('wrn_40_2-wrn_16_2', 'wrn_40_2-wrn_40_1'),
     ('dkd',), dict(dkd_beta=6.)),
    ("DKD's configuration, ImageNet", ('imagenet',), PHOTOS[:1], ('dkd',),
     dict(dkd_beta=.5, temperature=1., warmup=.01)),
    ("DKD's configuration, ImageNet", ('imagenet',), PHOTOS[1:], ('dkd',),
     dict(dkd_beta=2., temperature=1., warmup=.01)),
    ("letKD's alpha of this pair", ('cifar100',), (RN50,), ('letkd1',), dict(alpha_penultimate=.1)),
    ("letKD's alpha of this pair", ('cifar100',), (RN50,), ('letkd2',),
     dict(alpha_penultimate=.1, alpha_intermediate=.2)),
    ("letKD's alpha of this pair", ('tiny_imagenet',), (RN50,), ('letkd1', 'letkd2'),
     dict(alpha_penultimate=.5)),
    ("the taps of TDD's example", ('cifar100', 'tiny_imagenet'), ('resnet56-resnet20',),
     ('tdd', 'tdd+crd'),
     dict(stages=tuple((f'layer{i}', f'layer{i}.2.bn2') for i in (1, 2, 3)))),
]
STUDIES = ('', *ABLATIONS)


def cells():
    """(study, data set, pair, method, options) of each figure, and of those rows of ablations that
    have none."""
    for study in STUDIES:
        for row in published(study=study).itertuples():
            yield study, row.dataset, row.pair, row.method, row.options
    for study, about in ABLATIONS.items():
        for pair in about.pairs:
            for row in about.rows:
                yield study, 'cifar100', pair, *row.partition(' ')[::2]


CELLS = sorted(set(cells()))


def given(options):
    "The options of a row, such as 'per_class=2, kernels=True', as values."
    pairs = (option.split('=') for option in options.split(', ') if option)
    return {key: ast.literal_eval(value) for key, value in pairs}


def expected(dataset, pair, method, options):
    "{setting: value} of all that is not a default."
    teacher, _, student = pair.rpartition('-')
    where = 'teacher' if method == 'teacher' else pair  # it is trained for all of its students
    alone = method in ('teacher', 'student')
    known = {} if alone else method_options(method)
    found = {k: v for k, v in given(options).items() if v != known[k]}
    for _, sets, pairs, methods, settings in DIFFERENCES:
        if dataset not in sets or pairs and where not in pairs: continue
        if not methods or method in methods: found |= settings
    if not alone:
        known |= dict(penultimate=Experiment.penultimate, intermediate=Experiment.intermediate)
        places = pair_taps(student, teacher)
        found |= {k: v for k, v in places.items() if k in known and v != known[k]}
    return found


def different(e):
    "{setting: value} of all that an experiment has other than by default."
    names = vars(e).keys() - {'dataset', 'student', 'teacher', 'method', 'options'}
    known = method_options(e.method)
    return ({k: getattr(e, k) for k in names if getattr(e, k) != getattr(Experiment, k)}
            | {k: v for k, v in e.options.items() if v != known[k]})


@pytest.mark.parametrize('study', STUDIES)
def test_each_cell_is_its_method_but_for_differences_with_a_reason(study):
    found = [c for c in CELLS if c[0] == study]
    assert found
    for _, dataset, pair, method, options in found:
        e = Experiment.named(f'{dataset}/{pair}/{method}', **given(options))
        assert different(e) == expected(dataset, pair, method, options), e.name


def test_each_reason_is_needed():
    for reason, sets, pairs, methods, _ in DIFFERENCES:
        for pair in pairs or ['']:
            for method in methods or ['']:
                assert [c for c in CELLS if c[1] in sets and pair in (c[2], '')
                        and method in (c[3], '')], (reason, pair, method)


def test_a_pair_gives_its_settings_to_the_methods_that_it_names():
    for name, entry in DATASETS.items():
        for pair, by_method in entry.pairs.items():
            for method, options in by_method.items():
                assert options.keys() <= method_options(method).keys()
                e = Experiment.named(f'{name}/{pair}/{method}')
                assert e.options.items() >= options.items()
            for method in METHODS.keys() - by_method.keys():
                e = Experiment.named(f'{name}/{pair}/{method}')
                assert not different(e).keys() & set(chain(*by_method.values())), e.name


def test_original_recipes_are_those_of_the_papers(monkeypatch):
    "Whatever methods of one's own were registered first."
    monkeypatch.setitem(METHODS, 'mine', lambda setup: [])
    spec = importlib.util.find_spec('letkd.runs.recipes')
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert fresh.ORIGINAL == ORIGINAL


def test_every_method_has_an_original_recipe():
    assert ORIGINAL.keys() == {'ce', *METHODS}
    for _, dataset, pair, method, options in CELLS:
        if options or method in ('teacher', 'student'): continue
        changed = Experiment.named(f'{dataset}/{pair}/{method}', 'original').changed
        own = ({} if any(part in method for part in ('quest', 'letkd', 'layer'))
               else dict(nesterov=False, drop_last=False))
        if own and dataset == 'cifar100': own |= dict(padding='zeros')
        if dataset != 'imagenet': own |= dict(teacher_recipe='original')
        if (dataset, method) == ('imagenet', 'dkd'): own |= dict(batch_size=512, lr=.2)
        assert changed == own, (dataset, pair, method)


def test_records_are_read_and_named_as_they_were():
    "Settings younger than a record, and defaults that changed since, are those it was made with."
    paths = [p for p in (ROOT/'nbs'/'records').glob('*.json') if not p.name.startswith('bench')]
    assert paths
    for path in paths:
        e = experiment_of(read_record(path))
        assert e.folder.replace('/', '--') == path.stem
        assert e.amp == (e.dataset == 'digit_pairs'), path.stem
        assert e.nesterov and e.drop_last and e.padding == 'reflect'


# One step of every cell

# What stands for what: networks of one family for each other's depth and width; CIFAR's cells for
# those of Tiny-ImageNet, which are the same networks at twice the size, but for the methods that
# are built to the size of a map. Images, classes and K are few; photos are small.
FAMILIES = {'wrn_40_2-wrn_40_1': 'wrn_40_2-wrn_16_2', 'resnet110-resnet20': 'resnet56-resnet20',
            'resnet110-resnet32': 'resnet56-resnet20'}
STEPS = sorted({(dataset, FAMILIES.get(pair, pair), method, options)
                for study, dataset, pair, method, options in CELLS
                if method not in ('teacher', 'student') and study not in ('probe', 'subclasses')
                and (dataset != 'tiny_imagenet' or method in ('fitnet', 'letkd2'))})
SHALLOW = dict(resnet56='resnet20', resnet83='resnet29', wrn_40_2='wrn_16_2')  # teachers
CLASSES, COUNT = 3, 6
SMALL = dict(num_prototypes=4, num_templates=4, num_dims=2, per_class=1, num_negatives=3)


@cache
def images(dataset):
    size = dict(cifar100=32, tiny_imagenet=64, imagenet=64)[dataset]
    pixels = torch.randint(0, 256, (COUNT, 3, size, size),
                           generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Images(pixels, torch.arange(COUNT) % CLASSES, mean=(.5, .5, .5), std=(.3, .3, .3))


@cache
def teacher_of(name):
    torch.manual_seed(0)
    return create_model(SHALLOW.get(name, name), CLASSES).eval()


@pytest.mark.parametrize('dataset, pair, method, options', STEPS)
def test_a_cell_is_built_fitted_and_takes_a_step(dataset, pair, method, options):
    e = Experiment.named(f'{dataset}/{pair}/{method}', **given(options))
    torch.manual_seed(0)
    student, teacher = create_model(e.student, CLASSES), teacher_of(e.teacher)
    plain = Batches(images(dataset), 3)
    small = {k: v for k, v in SMALL.items() if k in e.options}
    terms = create_terms(e.method, student, teacher, plain, e.penultimate, e.intermediate,
                         **e.options | small)
    training = Training(Distiller(student, teacher, terms), Batches(images(dataset), 3), 2, e.lr)
    training.distiller.train()
    training.step(*next(iter(plain)))  # the meter raises where a loss is not finite
    if any(term.alone for term in terms):
        training.history = [None]  # the second epoch: the phase of their own is over
        training.step(*next(iter(plain)))
    means = training.meter.means()
    assert all(isfinite(v) for v in means.values()) and means['loss'] > 0
    assert all(p.isfinite().all() for p in training.distiller.parameters())
