"""Several processes, with gloo on this machine: the same run as one, in parts."""
import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lives

METHODS = ('letkd2', 'ab')


def together(server, target, count, *args, **options):
    "Run a function in some processes that are one group; their exit codes."
    call = target.__module__, target.__name__, *args
    members = [server.Process(target=lives.call, args=call, kwargs=dict(options, place=place))
               for place in lives.places(count)]
    for m in members: m.start()
    for m in members: m.join(300)
    return [m.exitcode for m in members]


# One training step by step: by two processes, and by one that takes two halves

def prepared(method, out, lr=.02):
    import torch
    from letkd.runs.experiments import Experiment
    from letkd.runs.running import prepare
    torch.manual_seed(0)
    e = Experiment.named(f'{lives.PAIR}/{method}', **lives.SMALL | lives.OPTIONS[method], lr=lr)
    return e, prepare(e, out, 'cpu', quiet=True)[0]


def some(e, share=(0, 1)):
    from letkd.data.batches import Batches
    return Batches(e.load('train').subset(slice(333)), 50, share=share)


def untimed(rows): return [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]


def sums(module): return {name: p.sum().item() for name, p in module.named_parameters()}


def by_two(out, place):
    "What a process of two does; the first leaves what came out."
    import torch
    from letkd.runs.meters import evaluate
    from letkd.runs.processes import from_first, gathered, joined, processes, rank
    os.environ |= place
    torch.set_num_threads(1)
    with joined('cpu'):
        for method in METHODS:
            e, training = prepared(method, out)
            for epoch in range(2):  # of 9 steps; the phase of AB ends in the second
                training.epochs = 3
                for batch in training.rest(): training.step(*batch)
                training.end_epoch()
            from_first(training.distiller.student.buffers())
            found = evaluate(training.distiller.student, some(e, (rank(), processes())))
            weights, history = training.distiller.state_dict(), untimed(training.history)
            same = gathered([history, sums(training.distiller)])
            assert same[0] == same[1], 'the processes have drifted apart'
            if not rank():
                torch.save(dict(weights=weights, history=history, found=found),
                           Path(out)/f'{method}.pt')


def by_halves(training, batches):
    """One process, two halves of each batch one after the other; the running statistics are those
    of the first half."""
    import torch
    from torch import nn
    distiller = training.distiller
    norms = [m for m in distiller.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for images, labels, index in batches:
        progress = (training.epoch + training.meter.step / training.steps) / training.epochs
        found = []
        training.optimiser.zero_grad()
        for half in (slice(0, 32), slice(32, 64)):
            before = [copy.deepcopy(m._buffers) for m in norms]
            found.append(distiller(images[half], labels[half], index[half], progress))
            (sum(found[-1][1].values()) / 2).backward()
            if half.start:
                for m, buffers in zip(norms, before): m._buffers.update(buffers)
        (logits, losses), (others, more) = found
        training.meter.add({k: (losses[k] + more[k]) / 2 for k in losses},
                           torch.cat([logits, others]), labels)
        training.optimiser.step()
        training.lr, = training.schedule.get_last_lr()
        training.schedule.step()
    training.end_epoch()


def test_two_processes_equal_two_halves(server, tmp_path):
    import torch
    from letkd.runs.meters import evaluate
    for method in METHODS: prepared(method, tmp_path)  # the teacher and the supervisions, for both
    assert together(server, by_two, 2, str(tmp_path)) == [0, 0]
    for method in METHODS:
        e, one = prepared(method, tmp_path)
        two = torch.load(tmp_path/f'{method}.pt', weights_only=True)
        one.epochs = 3
        one.distiller.train()
        for _ in range(2): by_halves(one, one.batches)
        history = untimed(one.history)
        assert len(history) == len(two['history']) == 2
        for a, b in zip(history, two['history']): assert a == pytest.approx(b, rel=1e-4)
        theirs = {k.removeprefix('student.'): v for k, v in two['weights'].items()
                  if k.startswith('student.')}
        for name, x in one.distiller.student.state_dict().items():
            torch.testing.assert_close(theirs[name], x, atol=2e-4, rtol=2e-3,
                                       msg=lambda m: f'{method} {name}: {m}')
        one.distiller.student.load_state_dict(theirs)
        # 333 images, each once
        assert evaluate(one.distiller.student, some(e)) == pytest.approx(two['found'], rel=1e-5)


def steps_of_all(out, place):
    "Every method takes three steps, in and after the phase of its own where it has one."
    import torch
    from letkd.runs.experiments import Experiment
    from letkd.runs.running import prepare
    from letkd.methods import METHODS as methods
    from letkd.runs.processes import gathered, joined
    os.environ |= place
    torch.set_num_threads(1)
    with joined('cpu'):
        for method in methods:
            small = dict(num_prototypes=16, num_dims=10, per_class=2, num_negatives=8,
                         num_templates=16)
            name = f'digit_pairs/resnet8-resnet8/{method}'  # FSP wants equal widths
            known = Experiment.named(name).options
            options = {k: v for k, v in small.items() if k in known}
            e = Experiment.named(name, **lives.SMALL, **options)
            training = prepare(e, out, 'cpu', quiet=True)[0]
            for progress, batch in zip((0, 0, 3), training.rest()):
                training.history = [None] * progress
                training.step(*batch)
            same = gathered(sums(training.distiller))
            assert same[0] == same[1], method


def test_every_method_trains_in_two_processes(server, tmp_path):
    assert together(server, steps_of_all, 2, str(tmp_path)) == [0, 0]


# A term whose state changes from step to step

def centred(epochs, out):
    """A loss against a running mean of the logits, a buffer, and a sum, which is none: weights and
    state after some of three epochs."""
    import torch
    from letkd.data.batches import Batches
    from letkd.data.digit_pairs import digit_pairs
    from letkd.distiller import CrossEntropy, Distiller, Term
    from letkd.models import create_model
    from letkd.runs.processes import processes, rank
    from letkd.runs.training import Training, train

    class Centre(Term):
        def __init__(self):
            super().__init__('centre', teacher=False)
            self.register_buffer('mean', torch.zeros(100))
            self.sums = 0.
        def get_extra_state(self): return self.sums
        def set_extra_state(self, state): self.sums = state
        def forward(self, maps, batch):
            z = maps.student_logits
            loss = (z - self.mean - self.sums).square().mean()
            self.mean = .5 * self.mean + .5 * z.detach().mean(0)
            self.sums += 1e-3 * z.detach().mean().item()
            return loss

    torch.manual_seed(0)
    distiller = Distiller(create_model('resnet8x0.5', 100), None, [CrossEntropy(), Centre()])
    batches = Batches(digit_pairs('train', 128), 32, shuffle=True, share=(rank(), processes()))
    training = Training(distiller, batches, 3)
    training.epochs = epochs
    train(training, out, quiet=True)
    return [*sums(distiller).values(), *distiller.terms[1].mean.tolist(), distiller.terms[1].sums]


def centred_whole_and_in_parts(out, place):
    import torch
    from letkd.runs.processes import gathered, joined
    os.environ |= place
    torch.set_num_threads(1)
    with joined('cpu'):
        whole = centred(3, f'{out}/whole')
        for epochs in 1, 3: parts = centred(epochs, f'{out}/parts')
        for found in gathered((whole, parts)): assert found == (whole, whole)


def test_terms_with_a_state_agree_and_resume(server, tmp_path):
    assert together(server, centred_whole_and_in_parts, 2, str(tmp_path)) == [0, 0]


# CRD, whose banks belong to all

def contrast(seed=0):
    import torch
    from letkd.baselines.crd import Contrast
    torch.manual_seed(seed)
    term = Contrast('s', 't', (6, 9), torch.arange(40) % 5, num_negatives=16, dims=8).train()
    maps = [torch.randn(40, c, 2, 2) for c in (6, 9)]
    return term, maps, [torch.randperm(40)[:16] for _ in range(4)]


def losses_of(term, maps, index):
    import torch
    from letkd.distiller import Batch, Maps
    found = Maps(teacher={'t': maps[1][index]}, student={'s': maps[0][index]})
    return term(found, Batch(torch.zeros(len(index)), index % 5, index))


def banks_of_two(out, place):
    import torch
    from letkd.runs.processes import gathered, joined, rank
    os.environ |= place
    with joined('cpu'):
        term, maps, batches = contrast()
        half = lambda index: index.view(2, 8)[rank()]
        losses = [sum(gathered(losses_of(term, maps, half(index)).item())) / 2 for index in batches]
        everyone = gathered([term.bank_s.known.sum().item(), term.bank_t.known.sum().item(),
                             term.bank_s.log_z.item()])
        assert everyone[0] == everyone[1]
        if not rank():
            torch.save(dict(losses=losses, state=term.state_dict()), Path(out)/'banks.pt')


def test_banks_are_those_of_the_whole_batch(server, tmp_path):
    import torch
    assert together(server, banks_of_two, 2, str(tmp_path)) == [0, 0]
    two = torch.load(tmp_path/'banks.pt', weights_only=True)
    term, maps, batches = contrast()
    losses = [losses_of(term, maps, index).item() for index in batches]
    assert losses == pytest.approx(two['losses'], rel=1e-5)
    for name, x in term.state_dict().items():
        if torch.is_tensor(x): torch.testing.assert_close(two['state'][name], x)


# What the processes cannot share, and what one of them alone meets

def tiny():
    "A student with parameters that it does not use, and a frozen batch norm."
    import torch
    from torch import nn
    from letkd.distiller import CrossEntropy, Distiller

    class Student(nn.Sequential):
        def forward(self, x):
            for module in [*self][:-1]: x = module(x)
            return x

    torch.manual_seed(0)
    student = Student(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                      nn.Linear(4, 5), nn.Linear(3, 3))
    student[1].eval()
    return Distiller(student, None, [CrossEntropy()])


def pictures(count):
    import torch
    from letkd.data.batches import Images
    g = torch.Generator().manual_seed(0)
    return Images(torch.randint(0, 256, (count, 3, 8, 8), generator=g, dtype=torch.uint8),
                  torch.arange(count) % 5, mean=(.5,) * 3, std=(.5,) * 3)


def unequal(out, place):
    import torch
    from fastcore.test import test_fail
    from letkd.data.batches import Batches
    from letkd.runs.processes import FirstFailed, agreed, all_here, joined, processes, rank
    from letkd.runs.training import Training, train
    os.environ |= place
    torch.set_num_threads(1)
    with joined('cpu'):
        share = dict(share=(rank(), processes()))
        test_fail(lambda: Training(tiny(), Batches(pictures(11), 8, **share), 1),
                  contains='found a batch of 3 images for 2 processes')
        some = [(torch.zeros(2, 3, 8, 8), torch.arange(2))] * (2 + rank())
        test_fail(lambda: Training(tiny(), some, 1),
                  contains='found [2, 3] batches in the 2 processes')
        training = Training(tiny(), Batches(pictures(16), 8, **share), 2)
        train(training, f'{out}/{processes()}', quiet=True)
        if not rank(): torch.save(training.distiller.state_dict(), f'{out}/two.pt')

        def broken(): raise ValueError('in the first')
        test_fail(lambda: agreed(broken), exc=FirstFailed if rank() else ValueError)
        assert all_here('both')
        if rank(): assert not all_here('one of them', .1)
        agreed(lambda: None)


def test_unequal_shares_are_refused_and_unused_parameters_are_not(server, tmp_path):
    import torch
    from letkd.data.batches import Batches
    from letkd.runs.training import Training, train
    assert together(server, unequal, 2, str(tmp_path)) == [0, 0]
    one = Training(tiny(), Batches(pictures(16), 8), 2)
    train(one, tmp_path/'1', quiet=True)
    found = torch.load(tmp_path/'two.pt', weights_only=True)
    for name, x in one.distiller.state_dict().items(): torch.testing.assert_close(found[name], x)
    assert found['student.1.num_batches_tracked'] == 0


def test_a_sweep_of_two_goes_on_after_a_run_that_fails(server, tmp_path):
    "For one row the images have fewer positions than prototypes."
    words = ['sweep', 'ablation/capacity', '--dataset', 'digit_pairs', '--pair',
             'resnet8-resnet8x0.5', '--out', str(tmp_path), '--quiet', '--device', 'cpu',
             *lives.sets(**lives.SMALL | dict(epochs=1, num_prototypes=10**6))]
    assert together(server, lives.command, 2, words, tmp_path/'said') == [2, 2]
    said = (tmp_path/'said').read_text()
    assert said.count('1 of 5 runs failed') == 1 and 'num_prototypes = 1000000' in said
    assert len(lives.kept(tmp_path, 'record.json')) == 4


# A student whose parameters are shards

def sharded_steps(out, place):
    "Two processes teach a student with KD layers whose parameters FSDP shares between them."
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from letkd.runs.processes import gathered, joined, rank
    os.environ |= place
    torch.set_num_threads(1)
    with joined('cpu'):
        student, layers, images, targets = supervised_student()
        mesh = init_device_mesh('cpu', (2,))
        for layer in layers: fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
        optimiser = torch.optim.SGD(student.parameters(), lr=.1)
        half = slice(2 * rank(), 2 * rank() + 2)
        two_steps(student, layers, images[half], [target(half) for target in targets], optimiser)
        found = {name: p.full_tensor() for name, p in student.named_parameters()}
        if not rank(): torch.save(found, Path(out)/'sharded.pt')
        gathered(None)


def supervised_student():
    "With normalisations by their running statistics, so that halves of a batch are its parts."
    import torch
    from torch import nn
    from letkd.layer import KDLayer
    from letkd.matching import DenseTarget
    from letkd.taps import insert
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU()),
                            nn.Flatten(), nn.Linear(6 * 16, 5))
    layers = [KDLayer(6, 7), KDLayer(8, 4, alpha=0)]
    for tap, layer in zip(('1', '1:input'), layers): insert(student, tap, layer)
    layers[0].norm.eval()
    probs = torch.rand(4, 16, 7).softmax(2), torch.rand(4, 36, 4).softmax(2)
    return (student, layers, torch.randn(4, 3, 8, 8),
            [lambda part, p=p: DenseTarget(p[part].flatten(0, 1)) for p in probs])


def two_steps(student, layers, images, targets, optimiser):
    from letkd.layer import supervised
    for _ in range(2):
        with supervised(dict(zip(layers, targets))) as losses: logits = student(images)
        (logits.square().mean() + sum(losses.values())).backward()
        optimiser.step()
        optimiser.zero_grad()


def test_a_student_can_be_sharded(server, tmp_path):
    import torch
    import torch.distributed.fsdp as fsdp
    if not hasattr(fsdp, 'fully_shard'): pytest.skip('PyTorch 2.6 or later')
    assert together(server, sharded_steps, 2, str(tmp_path)) == [0, 0]
    found = torch.load(tmp_path/'sharded.pt', weights_only=True)
    student, layers, images, targets = supervised_student()
    optimiser = torch.optim.SGD(student.parameters(), lr=.1)
    two_steps(student, layers, images, [target(slice(4)) for target in targets], optimiser)
    for name, p in student.named_parameters():
        torch.testing.assert_close(found[name], p.detach(), msg=lambda m: f'{name}: {m}')


# The command

@pytest.fixture(scope='module')
def undisturbed(server, tmp_path_factory):
    out = tmp_path_factory.mktemp('two')
    assert together(server, lives.command, 2, lives.arguments('crd', out)) == [0, 0]
    return lives.result(out, 'crd')


def test_one_record_of_both(undisturbed):
    assert undisturbed['record']['processes'] == 2 and undisturbed['record']['steady']
    assert undisturbed['record']['settings']['batch_size'] == 64


def test_a_stopped_run_of_two_goes_on_to_the_same_bits(server, undisturbed, tmp_path):
    args = lives.arguments('crd', tmp_path)
    members = [lives.start(server, args, place=place) for place in lives.places(2)]
    assert lives.wait_for(lambda: lives.checkpoints(tmp_path, 'crd'), members[0])
    members[1].terminate()  # one of them is told; both stop after the same step
    for m in members: m.join(120)
    assert [m.exitcode for m in members] == [143, 143]
    assert not lives.kept(tmp_path, 'record.json', 'crd')
    assert together(server, lives.command, 2, args) == [0, 0]
    assert lives.result(tmp_path, 'crd') == undisturbed


def test_more_processes_than_before_may_go_on_and_say_so(server, tmp_path):
    args, said = lives.arguments('ce', tmp_path), tmp_path/'said'
    alone = lives.start(server, args)
    assert lives.wait_for(lambda: lives.checkpoints(tmp_path, 'ce'), alone)
    alone.terminate()
    alone.join(120)
    assert alone.exitcode == 143
    assert together(server, lives.command, 2, args, said) == [0, 0]
    line, = said.read_text().splitlines()
    assert 'going on, but not to the same bits as without the stop: ' in line
    assert 'processes 1 before and 2 now' in line
    record = lives.result(tmp_path, 'ce')['record']
    assert record['processes'] == 2 and not record['steady']


@pytest.mark.parametrize('settings, says', [
    (dict(batch_size=63), 'batch_size: found 63 for 2 processes; expected a multiple of 2'),
    (dict(sync_bn=True), 'sync_bn: found the device cpu; expected cuda')])
def test_what_cannot_be_shared_is_refused(settings, says, server, tmp_path):
    args = lives.arguments('ce', tmp_path/'out', '--device', 'cpu', **settings)
    codes = together(server, lives.command, 2, args, tmp_path/'said')
    assert codes == [2, 2] and says in (tmp_path/'said').read_text()
    assert not list(tmp_path.rglob('record.json'))


def worker(torchrun, rank):
    "The process of that rank which torchrun has started, or None."
    for child in Path(f'/proc/{torchrun}/task/{torchrun}/children').read_text().split():
        try:
            if f'\0RANK={rank}\0'.encode() in Path(f'/proc/{child}/environ').read_bytes():
                return int(child)
        except OSError: continue


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='finds the worker in /proc')
def test_torchrun_starts_a_killed_worker_again(undisturbed, tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
               '--nproc-per-node', '2', '--max-restarts', '1', '-m', 'letkd.cli',
               *lives.arguments('crd', tmp_path, '--checkpoint-every', '1')]
    env = dict(os.environ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')  # see nbs/runs/processes.ipynb
    with open(tmp_path/'said', 'w') as said:
        run = subprocess.Popen(command, stdout=said, stderr=said, env=env, start_new_session=True)
    try:
        assert lives.wait_for(lambda: len(lives.checkpoints(tmp_path, 'crd')) > 1, run)
        os.kill(worker(run.pid, 1), signal.SIGKILL)
        assert run.wait(200) == 0, (tmp_path/'said').read_text()
    finally:
        if run.poll() is None: os.killpg(run.pid, signal.SIGKILL)
    assert lives.result(tmp_path, 'crd') == undisturbed
    assert 'going on' not in (tmp_path/'said').read_text()
