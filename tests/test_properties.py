"""What holds for any shape, type, layout and value.

The notebooks show single cases of the solver, the layer, rows, supervisions, training and
experiments. Here hypothesis draws them: empty batches, one image, one pixel, half precision,
channels last, strides, expanded tensors, NaN and infinity. What has to happen is stated: the same
numbers as of a plain tensor, a finite result, or an error that names what is wrong.
"""
import json
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import assume, example, given, settings, strategies as st
from torch import nn

from letkd.distiller import Distiller
from letkd.runs.recipes import DATASETS
from letkd.runs.experiments import Experiment
from letkd.fused import fused_kd_layer
from letkd.layer import KDLayer
from letkd.matching import DenseTarget, kd_layer
from letkd.methods import CrossEntropy, create_terms, method_options
from letkd.prototypes import KernelPrototypes, KMeansPrototypes
from letkd.solver import kkt, match_entropic, match_linear, match_quadratic
from letkd.subclasses import SubClasses
from letkd.runs.records import experiment_of
from letkd.taps import grid_of, rows
from letkd.runs.training import NonFiniteLoss, Training, train

FLOATS = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
BAD = st.sampled_from([math.nan, math.inf, -math.inf])
SMALL = settings(max_examples=60)


def tolerance(dtype): return 8 * torch.finfo(dtype).eps


@contextmanager
def refused(*contains):
    "One clear error that says all of this."
    with pytest.raises((ValueError, RuntimeError)) as caught: yield
    for text in contains: assert text in str(caught.value)


def numbers(draw, shape, dtype=torch.float32, spread=3.):
    seed, scale = draw(st.integers(0, 2**31)), draw(st.sampled_from([1e-3, 1., 1., spread]))
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed),
                        dtype=torch.float64) * scale).to(dtype)


LAYOUTS = ['plain', 'every other', 'transposed', 'expanded', 'channels last', 'offset']


def laid_out(x, layout):
    "The same numbers, stored otherwise."
    if layout == 'every other': return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]
    if layout == 'transposed' and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == 'expanded' and len(x): return x[:1].expand_as(x)
    if layout == 'channels last' and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == 'offset': return torch.cat([torch.full_like(x, math.nan), x])[len(x):]
    return x


@st.composite
def tensors(draw, *sizes, dtypes=FLOATS):
    "A tensor in any layout, and the same numbers in a plain one."
    shape = [draw(s) if not isinstance(s, int) else s for s in sizes]
    x = laid_out(numbers(draw, shape, draw(dtypes)), draw(st.sampled_from(LAYOUTS)))
    return x, x.clone(memory_format=torch.contiguous_format)


def spoilt(draw, x):
    "`x` with one number that is none; its place."
    x, i = x.clone(), draw(st.integers(0, x.numel() - 1))
    x.view(-1)[i] = draw(BAD)
    return x, i


# The solver

SOLVERS = dict(linear=lambda s, mu, e: match_linear(s, mu), entropic=match_entropic,
               quadratic=match_quadratic)


@SMALL
@given(st.data(), st.sampled_from(list(SOLVERS)),
       tensors(st.integers(0, 4), st.integers(1, 3), st.integers(1, 7)))
def test_a_solution_is_a_solution(data, smoothing, pair):
    (scores, plain), solve = pair, SOLVERS[smoothing]
    mu = data.draw(st.sampled_from([0., .3, numbers(data.draw, scores.shape[-1:])]))
    epsilon = data.draw(st.sampled_from([.1, 1.,
                                         numbers(data.draw, scores.shape[-1:]).abs() + .05]))
    p, q, lam = found = solve(scores, mu, epsilon)
    assert p.shape == scores.shape and q.shape == lam.shape == scores.shape[:-1]
    assert p.dtype == q.dtype == scores.dtype
    assert scores.equal(plain), 'the scores were changed'
    assert all(a.equal(b) for a, b in zip(found, solve(plain, mu, epsilon)))
    if not p.numel(): return
    assert all(t.isfinite().all() for t in found) and p.min() >= 0 and q.min() >= 0
    torch.testing.assert_close((p.double().sum(-1) + q.double()),
                               torch.ones_like(q, dtype=torch.float64),
                               atol=p.shape[-1] * tolerance(p.dtype), rtol=0)
    if p.dtype in (torch.float32, torch.float64):
        assert kkt(found, scores, mu, epsilon, smoothing).max() < 100 * tolerance(p.dtype)


@SMALL
@given(st.data(), st.sampled_from(list(SOLVERS)))
def test_scores_that_are_no_numbers_are_refused(data, smoothing):
    scores, _ = spoilt(data.draw, numbers(data.draw, (3, 4)))
    with refused('scores', 'non-finite'): SOLVERS[smoothing](scores, 0., 1.)
    with refused('mu', 'non-finite'): SOLVERS[smoothing](torch.zeros(3, 4), data.draw(BAD), 1.)


# The layer

@st.composite
def layers(draw):
    "A layer, an input for it in any type and layout, and a target."
    c, k, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.booleans())
    b, h, w = draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    x, plain = draw(tensors(b, h * w, c) if tokens else tensors(b, c, h, w))
    torch.manual_seed(draw(st.integers(0, 100)))
    layer = KDLayer(c, k, alpha=draw(st.sampled_from([0., .5, 1.])))
    probs = torch.rand(b * h * w, k, generator=torch.Generator().manual_seed(0)) + .01
    if x.dtype is torch.float64:
        layer.double()  # as with any module, parameters have to be as wide as the input
    return (layer.train(draw(st.booleans())), x, plain,
            DenseTarget(probs / probs.sum(1, keepdim=True)))


@SMALL
@given(layers())
def test_the_layer_takes_any_map(case):
    layer, x, plain, target = case
    normalises = layer.training and layer.alpha != 0
    if normalises and len(target.probs) == 1:  # as nn.BatchNorm
        with refused('Expected more than 1 value per channel when training'): layer(x, target)
        return
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    out, loss = layer(x, target)
    layer.load_state_dict(state)
    again, same = layer(plain, target)
    assert out.shape == x.shape and out.dtype == x.dtype and x.equal(plain), 'the input was changed'
    assert out.isfinite().all() and loss.isfinite() and loss >= -1e-6
    torch.testing.assert_close(out, again, atol=tolerance(x.dtype), rtol=tolerance(x.dtype))
    torch.testing.assert_close(loss, same, atol=1e-6, rtol=1e-5)
    assert all(v.isfinite().all() for v in layer.state_dict().values())


@SMALL
@given(layers())
def test_both_forms_of_the_function_agree_on_any_rows(case):
    layer, x, plain, target = case
    assume(not (layer.training and layer.alpha and len(target.probs) < 2))
    r = rows(x if x.ndim == 4 else x.transpose(1, 2)[..., None]).requires_grad_()
    weights = (layer.templates, layer.semantics, layer.scale, layer.value_scale, layer.norm,
               layer.alpha, target)
    state, found = {k: v.clone() for k, v in layer.state_dict().items()}, []
    for function in (kd_layer, fused_kd_layer):
        layer.load_state_dict(state)
        out, loss = function(r, *weights)
        gradients = torch.autograd.grad(out.float().square().sum() + loss, [r, layer.templates],
                                        allow_unused=True)
        found.append((out.detach(), loss.detach(), *gradients))
    near = max(tolerance(x.dtype), 2e-5)
    for plain, fused in zip(*found):
        torch.testing.assert_close(fused, plain, atol=20 * near, rtol=50 * near)


@SMALL
@given(st.data(), st.integers(1, 3))
def test_a_pixel_that_is_no_number_stays_alone(data, b):
    "In eval mode nothing else is touched; the loss is no number, so training stops by it."
    torch.manual_seed(0)
    layer = KDLayer(3, 5).eval()
    x = numbers(data.draw, (b, 3, 2, 2))
    bad, _ = spoilt(data.draw, x)
    out, loss = layer(bad, DenseTarget(torch.full((4 * b, 5), .2)))
    hit = ~bad.isfinite().all(1, keepdim=True).expand_as(x)
    assert out[hit].isnan().any() and not loss.isfinite()
    torch.testing.assert_close(out[~hit], layer(x)[~hit])


@SMALL
@given(st.lists(st.sampled_from([0, 1, 2, 3, 5]), min_size=0, max_size=5), FLOATS)
def test_a_shape_that_is_no_map_is_refused(shape, dtype):
    assume(len(shape) not in (3, 4) or shape[1 if len(shape) == 4 else 2] != 3)
    with refused('KDLayer: found'): KDLayer(3, 2)(torch.zeros(shape, dtype=dtype))


# Rows

@SMALL
@given(st.data(), tensors(st.integers(0, 3), st.integers(1, 4), st.integers(1, 6),
                          st.integers(1, 6)))
def test_rows_are_the_pixels_in_reading_order(data, pair):
    x, plain = pair
    b, c, h, w = x.shape
    found = rows(x)
    assert found.shape == (b * h * w, c) and found.dtype == x.dtype
    for n in range(len(found)): assert found[n].equal(plain[n // (h * w), :, n // w % h, n % w])
    grid = data.draw(st.tuples(st.integers(1, h), st.integers(1, w)))
    pooled = rows(x, grid)
    assert pooled.shape == (b * math.prod(grid), c) and pooled.dtype == x.dtype
    torch.testing.assert_close(pooled, rows(plain, grid), atol=tolerance(x.dtype),
                               rtol=tolerance(x.dtype))
    if h % grid[0] == 0 and w % grid[1] == 0 and b:  # cells of equal size: the mean stays
        torch.testing.assert_close(pooled.double().mean(0), plain.double().mean((0, 2, 3)),
                                   atol=2 * tolerance(x.dtype), rtol=2 * tolerance(x.dtype))


@SMALL
@given(tensors(st.integers(0, 3), st.integers(1, 40), st.integers(1, 4)))
def test_tokens_are_rows_as_well(pair):
    x, plain = pair
    side = math.isqrt(x.shape[1])
    if x.shape[1] - side**2 > 5:
        with refused('tokens'): grid_of(x)
        return
    assert grid_of(x) == (side, side) and rows(x).equal(plain[:, -side**2:].reshape(-1, x.shape[2]))


@SMALL
@given(st.sampled_from([(0, 1), (1, 0), (-1, 2), (0, 0), (1,), (1, 2, 3), (1.5, 1)]),
       st.sampled_from([(2, 3, 4, 4), (2, 16, 3)]))
def test_a_grid_that_is_none_is_refused(grid, shape):
    with refused('grid'): rows(torch.zeros(shape), grid)


# Supervisions

MAKE = dict(kmeans=lambda: KMeansPrototypes(3), kernels=KernelPrototypes,
            whitened=lambda: KernelPrototypes(whiten=True), subclasses=lambda: SubClasses(2, 2))


def labelled(x): return x, torch.arange(len(x)) % 3


@settings(max_examples=40)
@given(st.sampled_from(list(MAKE)), tensors(st.integers(12, 30), st.integers(2, 5)))
@pytest.mark.filterwarnings('ignore:K-means')  # an expanded tensor has one distinct row
def test_a_supervision_takes_any_rows(kind, pair):
    x, plain = pair
    alike = len(plain.unique(dim=0)) == 1
    if alike and kind in ('kernels', 'whitened', 'subclasses'):
        try: MAKE[kind]().fit([labelled(x)])
        except ValueError: return  # rows that are all alike say nothing
    found, same = (MAKE[kind]().fit([labelled(t)]) for t in (x, plain))
    assert x.equal(plain), 'the rows were changed'
    for name, value in found.state_dict().items():
        assert value.isfinite().all() and value.equal(same.state_dict()[name]), name
    p = found.target(*labelled(x)).tile(0, len(x))
    assert p.shape == (len(x), found.num_templates) and p.isfinite().all() and p.min() >= 0
    torch.testing.assert_close(p.sum(1), torch.ones_like(p[:, 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(p, same.target(*labelled(plain)).tile(0, len(x)))
    none = found.target(x[:0], torch.zeros(0, dtype=torch.long))
    assert none.shape == (0, found.num_templates) and none.tile(0, 0).shape == none.shape
    one = found.target(x[:1], torch.zeros(1, dtype=torch.long))
    assert one.tile(0, 1).isfinite().all()


@SMALL
@given(st.data(), st.sampled_from(list(MAKE)), st.integers(0, 3))
def test_rows_that_are_no_numbers_name_their_piece(data, kind, number):
    pieces = [labelled(numbers(data.draw, (15, 4))) for _ in range(4)]
    bad, _ = spoilt(data.draw, pieces[number][0])
    pieces[number] = bad, pieces[number][1]
    with refused(f'piece {number} of the stream', '1 of 15 rows with NaN or infinity'):
        MAKE[kind]().fit(pieces)


@SMALL
@given(st.data(), st.sampled_from(list(MAKE)))
def test_results_that_are_no_numbers_are_not_loaded(data, kind):
    fitted = MAKE[kind]().fit([labelled(numbers(data.draw, (20, 4), spread=10.))])
    state = fitted.state_dict()
    name = data.draw(st.sampled_from([k for k, v in state.items() if v.is_floating_point()
                                      and v.numel()]))
    state[name] = spoilt(data.draw, state[name])[0]
    with refused(name): MAKE[kind]().load_state_dict(state)


# Training

class Given:
    "Batches of whatever images."
    def __init__(self, images, labels): self.images, self.labels = images, labels
    def __len__(self): return 1
    def __iter__(self): yield self.images, self.labels, torch.arange(len(self.labels))
    def state_dict(self): return {}
    def load_state_dict(self, state): pass


@settings(max_examples=15)
@given(data=st.data(), method=st.sampled_from(['ce', 'kd', 'letkd1']))
def test_images_that_are_no_numbers_end_the_run_and_spare_the_weights(
        data, method, tmp_path_factory):
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
                        for _ in range(2))
    good, labels = numbers(data.draw, (6, 3, 2, 2)), torch.arange(6) % 3
    options = dict(num_prototypes=2) if method == 'letkd1' else {}
    terms = create_terms(method, student, teacher, [(good, labels)], ('1', '1'), ('1', '1'),
                         **options)
    distiller = Distiller(student, teacher, terms)
    before = {k: v.clone() for k, v in distiller.named_parameters()}
    training = Training(distiller, Given(spoilt(data.draw, good)[0], labels), 1)
    with pytest.raises(NonFiniteLoss, match='epoch 1, step 0: .*ce = nan'):
        train(training, tmp_path_factory.mktemp('run'), quiet=True)
    assert all(v.equal(before[k]) for k, v in distiller.named_parameters())


@pytest.mark.parametrize('momentum', [0., .9])
def test_a_weight_may_get_its_first_gradient_late(momentum):
    """As the classifier does in methods with a phase of their own; PyTorch's fused optimiser alone
    does not take that."""
    ours, plain = (nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    training = Training(Distiller(ours, None, [CrossEntropy()]),
                        Given(torch.zeros(2, 3, 1, 1), torch.tensor([0, 1])), 1, lr=.1,
                        momentum=momentum)
    expected = torch.optim.SGD(plain.parameters(), .1, momentum, weight_decay=5e-4,
                               nesterov=momentum > 0)
    for step in range(4):
        for network, optimiser in ((ours, training.optimiser), (plain, expected)):
            optimiser.zero_grad()
            for p in [*network.parameters()][:2 if step < 2 else 4]:
                p.grad = p.detach() * (step + 1) + 1
            optimiser.step()
    for a, b in zip(ours.parameters(), plain.parameters()): torch.testing.assert_close(a, b)


# Experiments

VALUES = dict(seed=st.integers(0, 2**63 - 1), epochs=st.integers(1, 10**9),
              batch_size=st.integers(1, 10**6), lr=st.floats(1e-6, 10), momentum=st.floats(0, 1),
              schedule=st.sampled_from(['step', 'one-cycle']),
              milestones=st.lists(st.floats(0, 1), max_size=4).map(tuple), augment=st.booleans(),
              amp=st.booleans(), train_size=st.one_of(st.none(), st.integers(1, 10**7)),
              eval_split=st.sampled_from(['test', 'valid']),
              teacher_checkpoint=st.text(min_size=1, max_size=5),
              weight_decay=st.floats(0, 1), difficulty=st.floats(0, 2))
NAMES = st.builds('{}/{}{}/{}'.format,
                  st.sampled_from([name for name, d in DATASETS.items() if not d.identity]),
                  st.sampled_from(['resnet56-', 'wrn_40_2-', 'torchvision/resnet18-']),
                  st.sampled_from(['resnet20', 'shufflenetv1', 'torchvision/resnet50']),
                  st.sampled_from(['kd', 'letkd1', 'letkd2', 'crd+kd', 'at', 'dkd']))


@st.composite
def given_settings(draw, name):
    known = [k for k in VALUES if k not in DATASETS[name.partition('/')[0]].unread]
    chosen = draw(st.sets(st.sampled_from(known), max_size=4))
    options = {k: draw(st.floats(.01, 100) if isinstance(v, float) else st.booleans()
                       if isinstance(v, bool) else st.integers(1, 10**6))
               for k, v in method_options(name.rpartition('/')[2]).items()
               if isinstance(v, (int, float)) and draw(st.booleans())}
    settings = {k: draw(VALUES[k]) for k in chosen} | options
    if 'teacher_checkpoint' in chosen:
        ways = 'imagenet', ((.5, .5, .5), (.25, .2, .3))
        settings['teacher_normalisation'] = draw(st.sampled_from(ways))
    return settings


@SMALL
@given(st.data(), NAMES)
def test_an_experiment_survives_json_and_the_command_line(data, name):
    chosen = data.draw(given_settings(name))
    e = Experiment.named(name, **chosen)
    assert e.name == name and all((e.options | e.__dict__)[k] == v for k, v in chosen.items())
    record = dict(name=e.name, seed=e.seed, settings=e.__dict__)
    assert experiment_of(json.loads(json.dumps(record))) == e
    written = {k: v if isinstance(v, str) else repr(v) for k, v in chosen.items()}
    assert Experiment.named(name, **written) == e, 'as --set has it'
    assert Experiment.named(name, **e.changed, seed=e.seed) == e, 'what was changed makes it'


@SMALL
@given(st.data(), NAMES)
def test_folders_differ_where_settings_do(data, name):
    one, two = (Experiment.named(name, **data.draw(given_settings(name))) for _ in range(2))
    assert (one.folder == two.folder) == (one == two)
    assert one.folder.startswith(name) and len(one.folder) < 200
    assert '..' not in one.folder.split('/')


@settings(max_examples=200)
@given(st.text(max_size=60)
       | st.lists(st.sampled_from(['digit_pairs', 'resnet8', '-', '/', '..', '.', '\0', '\n', 'kd',
                                   '+', '~', ' ', 'x', '٢']), max_size=9).map(''.join))
@example('digit_pairs/../../x')
@example('/etc/passwd')
def test_no_name_leads_out_of_the_folder(name):
    try: folder = Experiment.named(name).folder
    except ValueError as e: assert 0 < len(str(e)) < 1000
    else:
        assert folder.isascii() and folder.isprintable()
        assert not {'', '.', '..'} & {*folder.split('/')}


NEVER = math.nan, math.inf, b'x', ('a',), (math.nan,), {}, []  # what no setting takes


@pytest.mark.parametrize('key', VALUES)
def test_a_setting_of_another_kind_is_refused(key):
    default = getattr(Experiment, key)
    kind = dict(train_size=int, teacher_checkpoint=str).get(key, type(default))
    for value in (None, -1, 'x', 1.5, True, (), 2**70, *NEVER):
        fits = type(value) is kind or value is default or kind is float and type(value) is int
        try: Experiment('cifar100', 'resnet20', **{key: value})
        except ValueError as error: assert str(error).startswith(f'{key}: found'), error
        else: assert fits and not any(value is never for never in NEVER), value
