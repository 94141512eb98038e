"""Networks, loaders and loops of others: what works as with the library's own, what is refused."""
import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (CheckpointPolicy, checkpoint,
                                    create_selective_checkpoint_contexts)
from torch.utils.data import DataLoader

from letkd.checks import classifier
from letkd.distiller import CrossEntropy, Distiller, Term
from letkd.fused import fused_kd_layer
from letkd.layer import KDLayer, folded, supervised
from letkd.matching import DenseTarget
from letkd.methods import create_terms, method_options
from letkd.models.folding import fold_teacher
from letkd.runs.experiments import Experiment
from letkd.runs.running import run
from letkd.taps import capture
from letkd.terms import KD

FIRST, SECOND = ('layer1', 'layer1'), ('layer2', 'layer2')  # (student's tap, teacher's tap)
SMALL = dict(num_prototypes=6, num_dims=3, per_class=2, num_negatives=8, neighbours=3, hint=FIRST,
             stem=('layer1.0', 'layer1.0'), stages=(FIRST, SECOND), boundaries=(FIRST, SECOND))
TAPS = dict(penultimate=SECOND, intermediate=FIRST)


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def data():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(20, 3, 8, 8, generator=generator), torch.arange(20) % 10,
             torch.arange(20 * i, 20 * i + 20)) for i in range(3)]


def create(method, student, teacher, batches, **options):
    torch.manual_seed(2)
    options = {k: v for k, v in SMALL.items() if k in method_options(method)} | options
    return create_terms(method, student, teacher, batches, **TAPS, **options)


def networks():
    torch.manual_seed(3)
    return classifier(), classifier()


def losses(distiller, *batch):
    return {k: v.item() for k, v in distiller(*batch, progress=.5)[1].items()}


FORMS = {'a dictionary': lambda x, y, i: dict(image=x, label=y, index=i),
         'of a processor': lambda x, y, i: dict(pixel_values=x, labels=y, idx=i.int()),
         'numpy': lambda x, y, i: [x.numpy(), y.numpy().astype(np.uint8), i.numpy()],
         'lists': lambda x, y, i: (list(x), y.tolist(), i.tolist()),
         'a column': lambda x, y, i: (x, y[:, None].int(), i),
         'one-hot': lambda x, y, i: (x, nn.functional.one_hot(y, 10), i)}


@pytest.mark.parametrize('method', ['letkd2+kd', 'dkd', 'crd', 'tdd', 'ab', 'simkd'])
def test_batches_of_any_form_fit_and_teach_the_same(method):
    student, teacher = networks()
    expected = Distiller(student, teacher, create(method, student, teacher, data())).eval()
    before = losses(expected, *data()[0])
    for form, change in FORMS.items():
        batches = [change(*batch) for batch in data()]
        assert losses(expected, batches[0]) == before, form
        other, same_teacher = networks()
        found = Distiller(other, same_teacher, create(method, other, same_teacher, batches)).eval()
        assert losses(found, batches[0]) == pytest.approx(before, rel=1e-5), form


@pytest.mark.parametrize('method', ['dkd', 'letkd_intermediate', 'crd', 'tdd'])
def test_methods_that_need_a_class_take_the_largest_share(method):
    student, teacher = networks()
    distiller = Distiller(student, teacher, create(method, student, teacher, data())).eval()
    x, y, index = data()[0]
    shares = .7 * nn.functional.one_hot(y, 10) + .03
    hard, soft = losses(distiller, x, y, index), losses(distiller, x, shares, index)
    assert soft.pop('ce') != hard.pop('ce')
    assert soft == hard and soft


def test_crd_on_a_shuffled_loader_needs_an_index():
    student, teacher = networks()
    flat = [(x, y) for images, labels, _ in data() for x, y in zip(images, labels)]
    with pytest.raises(ValueError, match='neither shuffles nor augments'):
        create('crd', student, teacher, DataLoader(flat, 10, shuffle=True))
    assert len(create('crd', student, teacher, DataLoader(flat, 10))[1].bank_s.known) == 60


# The teacher

def exported(model, train=False):
    x = data()[0][0]
    return torch.export.export(model.train(train), (x,)).module()


TEACHERS = {'a function': lambda t: (lambda x: t.eval()(x)),
            'scripted': lambda t: torch.jit.script(t.eval()),
            'compiled': lambda t: torch.compile(t, backend='eager'), 'exported': exported}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', TEACHERS)
def test_teachers_of_any_form_give_logits(kind):
    student, teacher = networks()
    expected = losses(Distiller(student, teacher, [KD()]).eval(), *data()[0])
    other = TEACHERS[kind](copy.deepcopy(teacher))
    distiller = Distiller(student, other, create('kd', student, other, data())[1:]).eval()
    for fold in (lambda d: None, fold_teacher):
        fold(distiller)
        assert losses(distiller, *data()[0])['kd'] == pytest.approx(.9 * expected['kd'], rel=1e-4)
    with pytest.raises(ValueError, match=r"teacher: tap 'layer2': \w+ (was|has)"):
        create('letkd1', student, other, data())


@pytest.mark.filterwarnings('ignore')
def test_a_teacher_exported_in_train_mode_is_refused():
    student, teacher = networks()
    with pytest.raises(ValueError, match='exported in train mode'):
        Distiller(student, exported(teacher, train=True), [KD()])


def test_the_teacher_stays_in_eval_mode_whatever_its_owner_says():
    student, teacher = networks()
    distiller = Distiller(student, teacher, create('letkd1+kd', student, teacher, data()))
    owner = nn.ModuleDict(dict(teacher=teacher, distiller=distiller))
    before = copy.deepcopy(teacher.state_dict())
    for part in (owner, teacher.layer1):
        part.train()
        sum(distiller(*data()[0])[1].values()).backward()
        assert not any(m.training for m in teacher.modules()) and student.training
    for key, value in teacher.state_dict().items(): assert value.equal(before[key]), key


def test_a_shared_stem_is_named_and_a_shared_activation_is_none():
    student, teacher = networks()
    student.layer1[1] = teacher.layer1[1]
    with pytest.raises(ValueError, match="'layer1.1'.*copy.deepcopy"):
        Distiller(student, teacher, [KD()])
    student, teacher = networks()
    student.layer1[0].weight = teacher.layer1[0].weight
    shared = "1 parameters that the student or a term shares with the teacher .'layer1.0.weight'"
    with pytest.raises(ValueError, match=shared):
        Distiller(student, teacher, [KD()])
    student, teacher = networks()
    student.layer1[2] = teacher.layer1[2]  # a ReLU
    Distiller(student, teacher, [KD()])


# The student

@pytest.fixture
def group(tmp_path):
    dist.init_process_group('gloo', store=dist.FileStore(str(tmp_path/'store'), 1), rank=0,
                            world_size=1)
    yield
    dist.destroy_process_group()


def test_an_engine_stands_around_the_distiller(group):
    student, teacher = networks()
    wrapped = DistributedDataParallel(student)
    terms = create('letkd1', student, teacher, data())
    terms[1].layers = {'module.layer2': terms[1].layers['layer2']}
    advice = (r"found a DistributedDataParallel.*\['penultimate'\].*"
              r'DistributedDataParallel\(Distiller')
    with pytest.raises(ValueError, match=advice):
        Distiller(wrapped, teacher, terms)
    assert not hasattr(student.layer2, 'kd_layer')
    Distiller(wrapped, teacher, [CrossEntropy(), KD()])(*data()[0])  # nothing is trained beside it
    student, teacher = networks()
    distiller = Distiller(student, teacher, create('letkd1', student, teacher, data()))
    engine = DistributedDataParallel(distiller)
    sum(engine(*data()[0])[1].values()).backward()
    assert student.layer2.kd_layer.templates.grad is not None


@pytest.mark.parametrize('method', ['letkd2', 'quest', 'at', 'vid', 'fitnet'])
def test_a_checkpointed_stage_teaches_as_any_other_or_is_refused(method):
    def gradients(**options):
        student, teacher = networks()
        distiller = Distiller(student, teacher, create(method, student, teacher, data()))
        if options:
            stages = {name: getattr(student, name) for name in ('layer1', 'layer2')}
            for stage in stages.values():
                stage.forward = lambda x, run=stage.forward: checkpoint(run, x, **options)
        sum(distiller(*data()[0])[1].values()).backward()
        return {name: p.grad for name, p in student.named_parameters()}
    plain, again = gradients(), gradients(use_reentrant=False)
    for name, grad in plain.items(): torch.testing.assert_close(again[name], grad, msg=name)
    with (pytest.warns(UserWarning, match='None of the inputs'),
          pytest.raises(RuntimeError, match='use_reentrant=False')):
        gradients(use_reentrant=True)


def selective():
    "The contexts of a checkpoint that keeps all products of matrices."
    def policy(ctx, operation, *args, **options):
        kept = operation is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
    return create_selective_checkpoint_contexts(policy)


@pytest.mark.parametrize('size', [(8, 512, 16), (4, 6, 2)], ids=['in tiles', 'plain'])
def test_a_layer_is_taught_within_a_checkpoint(size):
    channels, templates, side = size
    layer, after = KDLayer(channels, templates), nn.Linear(channels, templates, bias=False)
    net = nn.Sequential(layer, after, nn.GELU()).double()
    x = torch.randn(2, side**2, channels).double()
    target = DenseTarget(torch.randn(2 * side**2, templates).double().softmax(1))
    assert (layer._function(x.reshape(-1, channels)) is fused_kd_layer) == (channels == 8)
    grads, once = [], dict(use_reentrant=False)
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, **once),
                lambda f, x: checkpoint(f, x, **once, context_fn=selective)):
        twin, v = copy.deepcopy(net), x.clone().requires_grad_()
        with supervised({twin[0]: target}) as found: out = run(twin, v)
        (out.square().sum() + 3 * found[twin[0]]).backward()
        grads.append([v.grad, *(p.grad for p in twin.parameters())])
    for again in grads[1:]:
        for a, b in zip(grads[0], again): torch.testing.assert_close(a, b)


class Stages(nn.Module):
    "Runs its children in a loop, and so does a helper of its own."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def run(self, x): return [x := m(x) for m in self.children()][-1]
    def forward(self, x): return self.run(x)


def test_a_layer_in_a_looping_module_runs_once():
    calls, network = [], nn.Sequential(Stages(), nn.Flatten(), nn.Linear(4 * 64, 10))
    layer = KDLayer(4, 5)
    layer.register_forward_hook(lambda *_: calls.append(1))
    term = Term('free', teacher=False, layers={'0': layer})
    term.silent = lambda batch: True
    term.forward = lambda maps, batch: maps.student_logits.new_zeros(())
    distiller = Distiller(network, None, [CrossEntropy(), term]).eval()
    distiller(*data()[0])
    assert len(calls) == 1
    with capture(network, '0') as maps: network(data()[0][0])
    with capture(network, '0.b') as inner: network(data()[0][0])
    torch.testing.assert_close(maps['0'], layer(inner['0.b']))


def test_a_slip_in_a_tap_is_found_before_the_teacher_is_trained(tmp_path):
    e = Experiment.named('digit_pairs/resnet14-resnet8/at', train_size=128, epochs=1,
                         teacher_epochs=1, stages=(FIRST, ('layer5', 'layer6')))
    faults = "found 2 faults\n- student: .*'layer5'.*\n- teacher: .*'layer6'"
    with pytest.raises(ValueError, match=faults):
        run(e, tmp_path, 'cpu', quiet=True)
    assert not list(tmp_path.rglob('*.safetensors'))


class Silent(nn.Sequential):
    def train(self, mode=True): super().train(mode)  # returns nothing, as in many libraries


def test_a_train_method_may_return_nothing():
    student, teacher = (Silent(*network.children()) for network in networks())
    terms = create_terms('letkd2', student, teacher, data(), ('1', '1'), ('0', '0'),
                         num_prototypes=6, num_dims=3, per_class=2)
    distiller = Distiller(student, teacher, terms)
    fold_teacher(distiller)
    assert all(np.isfinite(v) for v in losses(distiller, *data()[0]).values())
    folded(student)
