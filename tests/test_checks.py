"The checks of `letkd.checks`: our own parts hold them, and broken parts do not."
import copy
import inspect
import random
import warnings
from functools import partial
from unittest import SkipTest

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from letkd import matching
from letkd.checks import (check_term, function_checks, layer_checks, pictures,
                          supervision_checks, term_checks)
from letkd.checks.layer import strict_world
from letkd.distiller import CrossEntropy, Setup, Term
from letkd.fused import fused_kd_layer
from letkd.layer import KDLayer
from letkd.matching import DenseTarget, kd_layer, matching_scores, precise
from letkd.prototypes import KernelPrototypes, KMeansPrototypes
from letkd.subclasses import SubClasses
from letkd.taps import stream
from letkd.terms import DKD, KD, SupervisedLayer


# Our own parts. The notebooks of the baselines check theirs.

def at(tap, supervision, alpha=1.):
    "A KD layer at a tap, with a supervision that is fitted once: every check has the same teacher."
    fitted = supervision()
    def make(student, teacher):
        if not fitted.state_dict(): fitted.fit(stream(teacher, tap, [pictures(96)]))
        ours, channels, grid = Setup(student, teacher, [pictures()]).place('student', tap)
        layer = KDLayer(channels, fitted.num_templates, alpha)
        return SupervisedLayer('kd layer', ours, tap, layer, copy.deepcopy(fitted), grid)
    return make


DENSE = dict(never_holds_all_scores='the reference computes all N x K scores')
SHIFT = dict(shifted_features_change_nothing='a response is a logit, and a constant changes it')
KMEANS = partial(KMeansPrototypes, 12, tau=4.)
OURS = {
    'KDLayer': layer_checks(KDLayer),
    'KDLayer with alpha = .5': layer_checks(partial(KDLayer, alpha=.5)),
    'KDLayer with alpha = 0': layer_checks(partial(KDLayer, alpha=0.)),
    'kd_layer': function_checks(kd_layer, expected=DENSE),
    'fused_kd_layer': function_checks(fused_kd_layer),
    'k-means': supervision_checks(KMEANS),
    'kernels': supervision_checks(KernelPrototypes, expected=SHIFT),
    'whitened kernels': supervision_checks(partial(KernelPrototypes, whiten=True)),
    'sub-classes': supervision_checks(partial(SubClasses, num_dims=3, per_class=3)),
    'cross-entropy': term_checks(lambda student, teacher: CrossEntropy()),
    'KD': term_checks(lambda student, teacher: KD()),
    'DKD': term_checks(lambda student, teacher: DKD()),
    'k-means at layer2': term_checks(at('layer2', partial(KMeansPrototypes, 8))),
    'QuEST': term_checks(at('layer2', partial(KMeansPrototypes, 8), alpha=0.)),
    'kernels at layer1': term_checks(at('layer1', KernelPrototypes)),
    'sub-classes at layer1': term_checks(at('layer1', partial(SubClasses, 4, 2)))}


@pytest.mark.parametrize('check', [pytest.param(check, id=f'{part}-{name}')
                                   for part, checks in OURS.items() for name, check in checks])
def test_our_parts_hold(check): check()


# Broken parts: each is seen by the checks that should see it.

class Unnormalised(KernelPrototypes):
    def target(self, rows, labels=None): return DenseTarget(super().target(rows).probs * 1.01)


class Reseeding(KernelPrototypes):
    "Seeds the global generator, as many a script does."
    def fit(self, stream):
        torch.manual_seed(0)
        return super().fit(stream)


class FirstPiece(KMeansPrototypes):
    "Centres by the first piece that it sees."
    def fit(self, stream):
        first = next(iter(stream))[0].mean(0)
        super().fit(stream)
        self.prototypes = self.prototypes + .1 * first
        return self


class Borrowing(KMeansPrototypes):
    "Keeps rows that it was shown, without a copy."
    def fit(self, stream):
        super().fit(stream)
        self.prototypes = stream[0][0][:self.num_prototypes]
        return self


class Keeping(KDLayer):
    "Keeps its loss, as many layers in circulation do."
    def forward(self, x, target=None):
        out = super().forward(x, target)
        self.loss = None if target is None else out[1]
        return out


class Packed(KDLayer):
    "Takes every map whose channels are neighbours in memory for a whole one."
    def forward(self, x, target=None):
        if x.ndim == 4 and x.stride(1) == 1:
            _, c, h, w = x.shape
            x = x.as_strided(x.shape, (c * h * w, 1, w * c, c))
        return super().forward(x, target)


class Together(KDLayer):
    "Saves its loss with the features, where a checkpoint looks for what it computes again."
    def _loss_alone(self, rows, target):
        function = self._function(rows)
        return function(rows, self.templates, None, self.scale, None, None, 0., target)[1]


class Scalar(KDLayer):
    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Parameter(torch.tensor(3.))


def hasty(x, templates, semantics, scale, value_scale, norm, alpha=1., target=None):
    "Trusts half precision: in float64 it is the reference to the last digit."
    s = scale * F.normalize(x) @ F.normalize(templates).T
    out = x + alpha * value_scale * F.normalize(F.relu(norm(s))) @ F.normalize(semantics).T
    if target is None: return out, None
    return out, F.kl_div(s.log_softmax(1), target.tile(0, len(x)), reduction='batchmean')


class Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, p):
        ctx.save_for_backward((scores.softmax(1) - p) / len(p))
        return F.kl_div(scores.log_softmax(1), p, reduction='batchmean')

    @staticmethod
    def backward(ctx, grad): return ctx.saved_tensors[0], None


def bare(x, templates, semantics, scale, value_scale, norm, alpha=1., target=None):
    "Its backward pass ignores the gradient that arrives; training alone would never show it."
    out, _ = kd_layer(x, templates, semantics, scale, value_scale, norm, alpha)
    if target is None: return out, None
    return out, Bare.apply(matching_scores(x, templates, scale), target.tile(0, len(x)))


class Meddling(Term):
    "Runs the teacher by itself, in training mode and with gradients."
    def __init__(self, student, teacher):
        super().__init__('meddling')
        self.__dict__['network'] = teacher

    def forward(self, maps, batch):
        return F.mse_loss(self.network.train()(batch.images), maps.student_logits)


class Leaking(Meddling):
    "Only the gradients."
    def forward(self, maps, batch):
        return F.mse_loss(self.network(batch.images), maps.student_logits)


class Owning(Term):
    "Its classifier lies on a part of the teacher's; and it puts a hook on the student."
    def __init__(self, student, teacher):
        head = nn.Linear(17, 10)
        head.weight.data = teacher.fc.weight.data[:, 1:]
        super().__init__('owning', replaces=dict(fc=nn.Sequential(nn.Linear(12, 17), head)))
        student.layer2.register_forward_hook(lambda m, x, y: self.__dict__.update(seen=y))

    def forward(self, maps, batch): return F.mse_loss(maps.student_logits, maps.teacher_logits)


class Narrow(Term):
    "Has its own idea of a batch, and a temperature without a dimension."
    def __init__(self, student, teacher):
        super().__init__('narrow')
        self.temperature = nn.Parameter(torch.tensor(4.))
        self.register_buffer('margin', torch.linspace(-1, 1, 120).view(12, 10))

    def forward(self, maps, batch):
        own = batch.labels[:, None] == torch.arange(10)
        off = maps.student_logits / self.temperature - self.margin[batch.index]
        return (off * own).square().sum(-1).mean()


class Sparse(nn.Module):
    wanted = False

    def forward(self, x):
        if self.wanted: self.loss, self.wanted = precise(x).sin().mean(), False
        return x


class Sparsity(Term):
    "A layer in the student computes its loss on its way, once in each step."
    def __init__(self, student, teacher):
        super().__init__('sparsity', teacher=False, layers=dict(layer2=Sparse()))

    def targets(self, maps, batch):
        self.layers['layer2'].wanted = True
        return {}

    def forward(self, maps, batch): return self.layers['layer2'].loss


RESPONSES = partial(supervision_checks, expected=SHIFT)
BROKEN = [  # checks of the broken part, and what those that see it say
    (RESPONSES(Unnormalised), dict(rows_are_probabilities='targets: a row sums to 1 ± 0.01',
                                   half_precision='float16: a row sums to 1 ± 0.01')),
    (RESPONSES(Reseeding), dict(rows_are_probabilities="a call changed torch's generator")),
    (supervision_checks(partial(FirstPiece, 12, tau=4.)),
     dict(form_of_the_data_does_not_matter='seven chunks',
          shifted_features_change_nothing='targets')),
    (supervision_checks(partial(Borrowing, 12, tau=4.)),
     dict(fit_leaves_its_surroundings='state, after the rows were overwritten: prototypes')),
    (layer_checks(Keeping), dict(nothing_stays_on_the_layer=r"a step left \['loss'\]")),
    (layer_checks(Packed), dict(memory_layouts_agree='layout 4 with gradient 0: features')),
    (layer_checks(Together), dict(works_within_a_checkpoint='number of tensors was saved')),
    (layer_checks(Scalar), dict(can_be_sharded=r"\['scale'\] have no dimension")),
    (function_checks(hasty), dict(half_precision_in_and_out='features times 1e-06: not finite')),
    (function_checks(bare), dict(equals_the_reference='plain, train: gradient of x',
                                 gradients_are_slopes='backward not multiplied by grad_output',
                                 backward_repeats_and_scales='unscaled gradient')),
    (term_checks(Meddling), dict(teacher_is_untouched='has 12 modules in training mode')),
    (term_checks(Leaking), dict(teacher_is_untouched='the teacher has gradients at')),
    (term_checks(Owning), dict(shares_nothing_with_the_teacher=r'student.fc.1.weight \(fc.weight\)',
                               making_changes_no_network='the student has 1 hooks; it had 0')),
    (term_checks(Narrow), dict(index_is_optional_or_asked_for='loss: Scalars are not close',
                               labels_may_be_shares='loss: Scalars are not close',
                               can_be_sharded=r"\['temperature'\] have no dimension")),
    (term_checks(Sparsity), dict(layout_of_maps_does_not_matter='loss: Scalars are not close',
                                 works_within_a_checkpoint='number of tensors was saved'))]


@pytest.mark.parametrize('check, words', [
    pytest.param(dict(checks)[name], words, id=f'{i}-{name}')
    for i, (checks, said) in enumerate(BROKEN) for name, words in said.items()])
def test_broken_parts_are_seen(check, words):
    with pytest.raises(Exception, match=words): check()


# How much do the claims see without a reference? One thing at a time is changed in the function.

SLOW = ('compiles', 'exports', 'runs_as_onnx', 'gradients_are_slopes')
BLIND = [name for name, _ in function_checks(kd_layer)
         if name not in ('equals_the_reference', *DENSE, *SLOW)] + ['gradients_are_slopes']


def mutant(old, new):
    source = inspect.getsource(matching)
    assert source.count(old) == 1, f'{old!r} occurs {source.count(old)} times'
    names = dict(vars(matching))
    exec(source.replace(old, new).split('# %% auto')[-1].split(']', 1)[1], names)
    return names['kd_layer']


def first_complaint(checks, names):
    for name in names:
        try: checks[name]()
        except SkipTest: pass
        except Exception: return name


@pytest.mark.parametrize('old, new, sees', [
    ('/ max(n, 1)', '/ (n * k)', 'loss_at_its_limits'),
    ('log_softmax(scores, dim=1)', 'log_softmax(scores, dim=0)', 'loss_at_its_limits'),
    ('x / length.masked_fill(length == 0, 1)', 'x / length', 'dead_rows_and_large_scales'),
    ('unit(a) @ unit(semantics).T', 'unit(a) @ semantics.T', 'lengths_do_not_matter'),
    ('unit(x) @ unit(templates).T', 'x @ unit(templates).T', 'lengths_do_not_matter'),
    ('F.relu(norm(s))', 'F.relu(s)', 'statistics_are_those_of_batchnorm'),
    ('F.relu(norm(s))', 'norm(F.relu(s))', 'statistics_are_those_of_batchnorm'),
    ('.to(x.dtype), loss', ', loss', 'half_precision_in_and_out'),
    ('x + alpha * v', 'x - alpha * v', None)])
def test_claims_see_mutants_without_a_reference(old, new, sees):
    "All but a sign: it breaks no law, since the network would learn the opposite of V."
    checks = dict(function_checks(mutant(old, new), alpha=.5))
    assert first_complaint(checks, BLIND) == sees
    assert sees or first_complaint(checks, ['equals_the_reference'])


# What all checks share.

cudnn = torch.backends.cudnn
CARELESS = {
    "Python's generator": random.random,
    "NumPy's generator": np.random.rand,
    "torch's generator": lambda: torch.rand(1),
    'the default type': lambda: torch.set_default_dtype(torch.float64),
    'the thread count': lambda: torch.set_num_threads(2),
    'the gradient mode': lambda: torch.set_grad_enabled(False),
    'the deterministic mode': lambda: torch.use_deterministic_algorithms(True),
    "cuDNN's flags": lambda: setattr(cudnn, 'benchmark', not cudnn.benchmark)}


def world():
    return (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_deterministic_debug_mode(), cudnn.benchmark, warnings.filters[:])


@pytest.mark.parametrize('what', CARELESS)
def test_the_world_is_strict_and_comes_back(what):
    before = world()
    with pytest.raises(AssertionError, match=f'a call changed {what}; expected it as before'):
        with strict_world(): CARELESS[what]()
    assert world() == before


def test_warnings_are_errors_and_the_world_comes_back():
    before = world()
    with pytest.raises(UserWarning, match='be careful'), strict_world():
        random.random()
        warnings.warn('be careful')
    with strict_world(): torch.rand(1, generator=torch.Generator().manual_seed(0))
    assert world() == before


def test_expected_failures_are_strict():
    reason = dict(can_be_sharded='never is')
    narrow = dict(term_checks(Narrow, expected=reason))
    with pytest.raises(SkipTest, match='fails as expected: never is'): narrow['can_be_sharded']()
    fine = dict(term_checks(lambda student, teacher: KD(), expected=reason))
    with pytest.raises(AssertionError, match="passes; expected a failure: 'never is'"):
        fine['can_be_sharded']()
    with pytest.raises(ValueError, match=r"\['sharded'\], which are no checks; .*can_be_sharded"):
        term_checks(Narrow, expected=dict(sharded=''))


def test_all_failures_are_told():
    reason = dict(index_is_optional_or_asked_for='it needs one')
    with pytest.raises(AssertionError) as caught: check_term(Narrow, expected=reason)
    said = str(caught.value)
    assert said.startswith(f'check_term: 2 of {len(term_checks(Narrow))} checks failed\n')
    assert "can_be_sharded (No parameter of the term" in said and 'labels_may_be_shares' in said
    why = dict(layout_of_maps_does_not_matter='has no taps at outputs of the student')
    assert check_term(lambda student, teacher: KD()) == why


def test_a_check_has_a_name_and_a_claim():
    for part, checks in OURS.items():
        names = [name for name, _ in checks]
        assert len(names) == len(set(names)) > 15, part
        assert all(check.__doc__ for _, check in checks), part
