"""Runs that are stopped: killed at any moment, while they write, by a signal, by a full disk.

What comes out must not show it. `LETKD_KILLS=500 pytest tests/test_resume.py -k killed` kills more
often than the 12 times of every day.
"""
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from lives import arguments, checkpoints, finished, kept, result, start, wait_for

KILLS = int(os.environ.get('LETKD_KILLS', 12))  # of each method


def number(found): return int(found[-1].name.split('-')[1]) if found else 0


def kill(process, out, method, chance):
    "SIGKILL some steps from now or in the middle of a write; True if a half-written file is left."
    before, stale = number(checkpoints(out, method)), kept(out, '.*.part', method)
    half = lambda: set(kept(out, '.*.part', method)) - set(stale)
    if chance.random() < .4: wait_for(half, process, every=.0005)
    else:
        steps = chance.randrange(4)
        wait_for(lambda: number(checkpoints(out, method)) >= before + steps, process)
        time.sleep(chance.uniform(0, .1 if steps else 1.))
    process.kill()
    process.join()
    return bool(half())


@pytest.fixture(scope='module')
def whole(server, tmp_path_factory):
    "What a run ends with that nobody disturbs, by method."
    out, found = tmp_path_factory.mktemp('whole'), {}
    def of(method):
        if method not in found:  # each in its folder, for a teacher's method is ce as well
            assert finished(server, arguments(method, out/method)) == 0
            found[method] = result(out/method, method)
        return found[method]
    return of


@pytest.mark.parametrize('method', ['letkd2', 'crd', 'ab'])
def test_a_killed_run_ends_as_if_it_had_never_died(method, server, whole, tmp_path, capsys):
    chance, kills, halves, rounds = random.Random(method), 0, 0, 0
    while kills < KILLS or not rounds:
        out = tmp_path/str(rounds)
        args = arguments(method, out, '--checkpoint-every', '1')
        while kills < KILLS:
            process = start(server, args)
            halves += kill(process, out, method, chance)
            if process.exitcode == 0: break  # it was done before it could be killed
            assert process.exitcode == -signal.SIGKILL
            kills += 1
        assert finished(server, args) == 0
        assert result(out, method) == whole(method)
        assert not list(out.rglob('*.part'))
        rounds += 1
    with capsys.disabled():
        print(f' [{method}: {kills} kills, {halves} of them in a write, {rounds} runs]', end='')


@pytest.mark.parametrize('method, signum', [('letkd2', signal.SIGTERM), ('ce', signal.SIGINT)])
def test_a_signal_leaves_a_checkpoint_and_a_code(method, signum, server, whole, tmp_path):
    args, said = arguments(method, tmp_path), tmp_path/'said'
    process = start(server, args, said)
    assert wait_for(lambda: checkpoints(tmp_path, method), process)  # of the first epoch
    before = checkpoints(tmp_path, method)
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == 128 + signum
    after = checkpoints(tmp_path, method)
    line, = filter(None, said.read_text().splitlines())
    assert number(after) > number(before) and len(after) <= 2
    assert f'stopped by {signum.name} in epoch' in line
    assert line.endswith(f'the same command goes on from {after[-1]}')
    assert finished(server, args) == 0
    assert result(tmp_path, method) == whole(method)


def test_a_signal_before_the_first_step_has_its_code(server, tmp_path):
    process = start(server, arguments('letkd2', tmp_path), tmp_path/'said')
    assert wait_for((tmp_path/'said').exists, process)
    time.sleep(.1)
    process.terminate()
    process.join(60)
    assert process.exitcode in (143, -signal.SIGTERM), (tmp_path/'said').read_text()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(server, whole, tmp_path):
    args, said = arguments('ce', tmp_path, '--checkpoint-every', '2'), tmp_path/'said'
    process = start(server, args)
    assert wait_for(lambda: number(checkpoints(tmp_path, 'ce')) > 3, process)
    process.kill()
    process.join()
    newest = checkpoints(tmp_path, 'ce')[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 3] ^= 4
    newest.write_bytes(data)
    assert finished(server, args, said) == 0
    assert f'{newest}: damaged' in said.read_text()
    assert result(tmp_path, 'ce') == whole('ce')


def intact(out, method):
    from letkd.runs.checkpoints import Checkpoints
    newest = checkpoints(out, method)[-1]
    assert Checkpoints(newest.parent).load()['conditions']
    return newest


@pytest.fixture
def disk(tmp_path):
    "A small disk of its own."
    if os.geteuid() or not shutil.which('mount'):
        pytest.skip('a file system can be mounted by root only')
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=16m', 'tmpfs', tmp_path],
                             capture_output=True, text=True)
    if mounted.returncode: pytest.skip(f'no tmpfs here: {mounted.stderr.strip()}')
    yield tmp_path
    subprocess.run(['umount', tmp_path], check=True)


def test_a_full_disk_stops_the_run_and_spares_its_checkpoint(disk, server, whole, tmp_path_factory):
    args = arguments('ce', disk, '--checkpoint-every', '1')
    said = tmp_path_factory.mktemp('said')/'said'
    process = start(server, args, said)
    assert wait_for(lambda: number(checkpoints(disk, 'ce')) > 2, process)
    with pytest.raises(OSError), open(disk/'filler', 'wb', buffering=0) as filler:
        while filler.write(b'0' * 4096) == 4096: pass
        raise OSError  # a write cut short: the disk is full
    process.join(60)
    assert process.exitcode == 2
    newest = intact(disk, 'ce')
    line, = said.read_text().splitlines()
    assert 'cannot be written (No space left on device)' in line
    assert f'the last good checkpoint is {newest}' in line
    assert not list(disk.rglob('*.part'))
    (disk/'filler').unlink()
    assert finished(server, args) == 0
    assert result(disk, 'ce') == whole('ce')


def test_a_file_that_grows_too_large_is_a_full_disk(server, tmp_path):
    """Where nothing can be mounted: a limit on the size of files, too small for the second
    network's checkpoints."""
    args, said = arguments('ce', tmp_path), tmp_path/'said'
    assert finished(server, args, said, largest_file=20_000) == 2
    line, = said.read_text().splitlines()
    assert 'cannot be written (File too large); there is no checkpoint yet' in line
    assert not list(tmp_path.rglob('*.part')) and not checkpoints(tmp_path, 'ce')
    assert finished(server, args) == 0
