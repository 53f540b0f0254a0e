"""Runs that end early, disks that are full, losses that blow up: nothing is lost, and it is said."""
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import fuzz_checkpoints
import kill
from conftest import ROOT, NoNetwork, first_quick, mostly_slow
from golden_data import FOLDER
from test_matching import brute_force

FACES = ['--style=face_style.png', '--content=face_content.png', '--output=o.png', '--network=vgg16', '--phases=2',
         '--iterations=20', '--print-every=0', '--save-every=5', '--log=log']


class Killed(BaseException):
    """As sudden as SIGKILL: nothing catches it."""


@pytest.fixture
def painted(doodle, tmp_path, monkeypatch, capsys, handlers):
    """The whole program in a folder with pictures, its loss a quadratic one without a network.

    painted('--resume', ..., at={12: action}) acts instead of evaluation 12, counted from this start, and at={'phase':
    action} when a phase is prepared; after={12: action}
    acts when the history is that after it, but nothing else is known. With pull=0 the loss is 0 everywhere. Returns
    code, out, err, `asked` (image), the history before each evaluation (None where it is fresh), and the log. An
    argument replaces the `given` one.
    """
    monkeypatch.chdir(tmp_path)
    for path in FOLDER.glob('face*.png'):
        shutil.copy(path, tmp_path)

    def painted(*arguments, given=FACES, at={}, after={}, pull=1):
        seen = SimpleNamespace(asked=[], history=[], phase=None)

        class Objective(NoNetwork):
            def set_phase(self, *_):
                at.get('phase', int)()
                super().set_phase()
                seen.phase = 0 if seen.phase is None else seen.phase + 1
                self.history = np.zeros(4)

            def __call__(self, x):
                number = len(seen.asked)
                seen.asked.append(x.copy())
                seen.history.append(None if self.fresh else self.history[0])
                difference = x - 200 * np.cos(np.arange(x.size)).reshape(x.shape)
                slope = pull * (1 + np.arange(x.size).reshape(x.shape) % 7)
                total = at[number]() if number in at else (slope * difference ** 2).sum()
                self.history = self.history + 1
                after.get(number, int)()
                if not np.isfinite(total or 0):
                    raise FloatingPointError('the loss or its gradient is not finite')
                self.fresh = False
                return doodle.Evaluation(total, {}, {}, 0., 2 * slope * difference, 0., 0.)

        monkeypatch.setattr(doodle, 'find_weights', lambda options: (
            doodle.Weights('vgg16', None, 'a file', f'checksum of {options.weights}'), []))
        monkeypatch.setattr(doodle, 'Objective', Objective)
        monkeypatch.setattr(doodle, 'REMEMBERED', 0)                    # its history is not known by the image
        monkeypatch.setattr(doodle, 'import_theano', lambda device: (device, None))
        flags = {argument.split('=')[0] for argument in arguments}
        seen.code = doodle.main([*(option for option in given if option.split('=')[0] not in flags), *arguments])
        seen.out, seen.err = capsys.readouterr()
        seen.log = [json.loads(line) for line in open('log')] if os.path.exists('log') else []
        return seen
    return painted


def stop(error):
    def stop():
        raise error
    return stop


CHECKPOINT = 'o.png.checkpoint'
NUMBERS = [(phase, k) for phase in (0, 1) for k in range(20)]


def numbers(log):
    return [(entry['phase'], entry['evaluation']) for entry in log[1:]]


# ---- resume ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('last, kept', mostly_slow(
    [(3, 0), (5, 5), (9, 5), (17, 15), (20, 20), (23, 20), (39, 35)], (3, 0), (9, 5), (20, 20)))
def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(painted, last, kept):
    whole = painted('--random-seed=3', '--frames=others')
    result = open('o.png', 'rb').read()
    with pytest.raises(Killed):
        painted('--random-seed=3', at={last: stop(Killed)})
    frames = set(os.listdir('frames'))
    again = painted('--resume', '--print-every=10', '--save-every=4', *[] if kept else ['--random-seed=3'])
    assert again.code == 0 and len(again.asked) == 40 - kept
    assert ('starting anew' in again.out) == (kept == 0)
    assert all((ours == theirs).all() for ours, theirs in zip(again.asked, whole.asked[kept:]))
    assert again.history == whole.history[kept:] and open('o.png', 'rb').read() == result
    if kept:
        assert f'after {kept} evaluations' in again.out and again.log[0]['random_seed'] == 3
        assert set(os.listdir('frames')) == frames | {f'{k:04d}.png' for k in range(kept, 40) if k % 4 == 0}
    assert numbers(again.log) == NUMBERS
    assert not os.path.exists(CHECKPOINT) and os.path.exists('o.png')


@pytest.mark.parametrize('error', mostly_slow([Killed, KeyboardInterrupt], Killed))
def test_a_run_stopped_again_and_again_has_every_evaluation_once(painted, error):
    whole = painted('--random-seed=3').log[1:]
    for _ in range(5):
        with contextlib.suppress(Killed):
            painted('--resume', '--random-seed=3', at={7: stop(error(signal.SIGTERM))})
    assert painted('--resume', '--random-seed=3').log[1:] == whole


@pytest.mark.parametrize('last, error, kept', [
    (2, Killed, 2),                                                     # the checkpoint is of before the skip
    (2, KeyboardInterrupt, 19),                                         # of after it
    (3, Killed, 20), (5, Killed, 22)])                                  # and in the next phase, before its own skip
def test_a_run_whose_log_has_a_skip_goes_on_as_if_it_had_not_been_stopped(painted, last, error, kept):
    """Each phase has converged after two evaluations, and makes its last."""
    run = '--random-seed=3', '--save-every=1'
    whole = painted(*run, pull=0)
    assert [entry.get('skipped') for entry in whole.log[1:]] == 2 * [None, None, 17, None] and len(whole.asked) == 6
    with contextlib.suppress(Killed):
        painted(*run, pull=0, at={last: stop(error(signal.SIGTERM))})
    assert 'skipped' in Path('log').read_text()
    again = painted(*run, '--resume', pull=0)
    assert f'after {kept} evaluations' in again.out and len(again.asked) == 6 - last
    assert again.log[1:] == whole.log[1:]


@pytest.mark.parametrize('number', mostly_slow([0, 13, 20, 30], 13))
def test_a_signal_when_matches_are_new_and_the_loss_is_not_known_leaves_neither(painted, number):
    whole = painted('--random-seed=3')
    stopped = painted('--random-seed=3', after={number: lambda: signal.raise_signal(signal.SIGTERM)})
    assert stopped.code == 143 and len(stopped.asked) == number + 1
    again = painted('--resume', '--random-seed=3')
    assert again.log[1:] == whole.log[1:] and again.history == whole.history[number:]


@pytest.mark.parametrize('number', mostly_slow([10, 20, 35], 10))
def test_divergence_is_resumed_like_anything_else(painted, number):
    diverge = {number: lambda: np.nan}                                  # where a checkpoint was, and is again
    whole = painted('--random-seed=3', at=diverge)
    assert numbers(whole.log) == NUMBERS and len(whole.asked) == 41
    with pytest.raises(Killed):
        painted('--random-seed=3', at=diverge | {number + 1: stop(Killed)})
    again = painted('--resume', '--random-seed=3')
    assert again.log[1:] == whole.log[1:] and again.history == whole.history[number + 1:]


DIFFERENT = {
    '--style-weight': ['--style-weight=24'], '--iterations': ['--iterations=19'], '--phases': ['--phases=1'],
    '--style-layers': ['--style-layers=3_1'], '--seed': ['--seed=content'], '--seed-range': ['--seed-range=0:9'],
    '--variety': ['--variety=1'], '--semantic-weight': ['--semantic-weight=0'], '--random-seed': ['--random-seed=0'],
    'content': ['--content=other.png'], 'style': ['--style=other.png'], 'content_map': ['--content=mapped.png'],
    'weights': ['--weights=other.npz'], '--cache': ['--cache=1'], '--max-size': ['--max-size=90'],
    '--content-layers': ['--content-layers=4_1'], '--content-weight': ['--content-weight=9'],
    '--matching': ['--matching=near'],
    '--line-search': ['--line-search=held'],
}


@pytest.mark.parametrize('what', first_quick(list(DIFFERENT), 6))
def test_another_run_is_refused_and_told_what_differs(painted, tmp_path, what):
    with pytest.raises(Killed):
        painted('--random-seed=7', at={12: stop(Killed)})
    for name in ('face_content', 'other', 'mapped'):                       # all but one pixel is the same
        pixels = np.array(Image.open('face_content.png').convert('RGB'))
        if name == 'other':
            pixels[0, 0] ^= 1
        Image.fromarray(pixels).save(f'{name}.png')
        colours = np.array(Image.open('face_content_sem.png').convert('RGB'))
        if name == 'mapped':
            colours[:9, :9] = colours[60, 60]
        Image.fromarray(colours).save(f'{name}_sem.png')
    if what == 'style':
        for end in ('', '_sem'):
            pixels = np.array(Image.open(f'face_style{end}.png').convert('RGB'))
            pixels[0, 0] ^= 0 if end else 1
            Image.fromarray(pixels).save(f'other{end}.png')
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    refused = painted('--resume', *DIFFERENT[what])
    assert refused.code == 2 and refused.err.startswith(f"ERROR: '{CHECKPOINT}' is of a run in which ")
    assert re.search(rf'in which (the picture `{what}`|the file of {what}|{what}) was another[:.]', refused.err)
    assert refused.err.count('\n') == 2 and not refused.asked
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before


def test_what_changes_nothing_in_the_picture_may_differ(painted):
    with pytest.raises(Killed):
        painted(at={12: stop(Killed)})
    shutil.copy('face_content.png', 'same.png')
    shutil.copy('face_content_sem.png', 'same_map.png')
    shutil.copy('face_style_sem.png', 'face_style_map.png')
    again = painted('--resume', '--content=same.png', '--semantic-ext=_map.png', '--auto-maps=5', '--frames=more',
                    '--slices=7', '--save-every=1', '--print-every=3')
    assert again.code == 0 and len(again.asked) == 30 and '0010.png' in os.listdir('more')


UNUSED = [
    ([], ['--max-size=4096']), (['--max-size=4096'], []), (['--max-size=124'], ['--max-size=125']),
    (['--seed=content'], ['--seed=content', '--seed-range=0:9', '--random-seed=8']),
    (['--seed=face_style.png'], ['--seed=face_style.png', '--seed-range=0:9', '--random-seed=8']),
    (['--semantic-ext=.none'], ['--semantic-ext=.none', '--semantic-weight=3']),
    (['--method=li-wand'], ['--method=li-wand', '--rotations=2', '--style-weight=10', '--semantic-weight=0']),
]
TEXTURE = [FACES[0], *FACES[2:], '--semantic-weight=0']
UNUSED_BY_TEXTURE = [
    ([], ['--output-size=124x108']), (['--output-size=124x108', '--max-size=999'], []),
    ([], ['--content-weight=3', '--content-layers=3_1,4_1', '--max-size=200'])]


@pytest.mark.parametrize('given, then, now', mostly_slow(
    [(FACES, *pair) for pair in UNUSED] + [(TEXTURE, *pair) for pair in UNUSED_BY_TEXTURE],
    (FACES, *UNUSED[0]), (FACES, *UNUSED[3]), (TEXTURE, *UNUSED_BY_TEXTURE[2])))
def test_an_option_that_changes_nothing_in_this_run_may_differ(painted, given, then, now):
    with pytest.raises(Killed):
        painted('--random-seed=7', *then, given=given, at={12: stop(Killed)})
    again = painted('--resume', *now, given=given)
    assert (again.code, len(again.asked)) == (0, 30), again.err


@pytest.mark.parametrize('option', ['--output-size=124x107', '--max-size=120', '--smoothness=2', '--random-seed=8'])
def test_an_option_that_changes_a_texture_may_not(painted, option):
    with pytest.raises(Killed):
        painted('--random-seed=7', given=TEXTURE, at={12: stop(Killed)})
    assert f'in which {option.split("=")[0]} was another: ' in painted('--resume', option, given=TEXTURE).err


def test_a_seed_is_known_by_its_pixels(painted):
    with pytest.raises(Killed):
        painted('--seed=face_style.png', at={12: stop(Killed)})
    shutil.copy('face_style.png', 'moved.png')
    for seed in ('face_content.png', 'noise'):
        assert 'seed' in painted('--resume', f'--seed={seed}').err.split(' was another')[0]
    assert len(painted('--resume', '--seed=moved.png').asked) == 30


@pytest.mark.parametrize('left, kept', [
    (lambda lines: lines[:8] + [b'{"phase": 0, "eva'], 7), (lambda lines: [], 0), *mostly_slow([
        (lambda lines: lines, 10), (lambda lines: [b'[1]\n', b'of another program\n'], 0),
        (lambda lines: lines[:1] + lines[11:], 0),
        (lambda lines: [99999 * b'[' + b'\n'], 0)])])
def test_the_log_has_each_evaluation_once_whatever_was_in_it(painted, left, kept):
    whole = painted('--random-seed=3').log
    with pytest.raises(Killed):
        painted('--random-seed=3', at={12: stop(Killed)})
    with open('log', 'rb') as log:
        lines = left(log.readlines())
    with open('log', 'wb') as log:
        log.writelines(lines)
    again = painted('--resume').log
    assert again[1:] == whole[1:1 + kept] + whole[11:] and again[0]['random_seed'] == 3


@pytest.mark.parametrize('content', [b'', b'no checkpoint', None, 'objects', 'empty', 'lacking'])
def test_a_broken_checkpoint_is_refused_and_kept(painted, content):
    with pytest.raises(Killed):
        painted(at={12: stop(Killed)})
    if content == 'objects':
        with open(CHECKPOINT, 'wb') as file:
            np.save(file, np.array([print], dtype=object))
    elif content == 'empty':
        np.savez(open(CHECKPOINT, 'wb'), image=np.zeros(3))
    elif content == 'lacking':
        rewrite(lambda numbers, arrays: arrays.pop('work'))
    else:
        with open(CHECKPOINT, 'r+b') as file:
            whole = file.read()
            file.seek(0)
            file.truncate()
            file.write(whole[:len(whole) // 2] if content is None else content)
    before = open(CHECKPOINT, 'rb').read()
    refused = painted('--resume')
    assert refused.code == 2 and 'cannot be read as a checkpoint' in refused.err and refused.err.count('\n') == 2
    assert open(CHECKPOINT, 'rb').read() == before


def rewrite(change, version='1.0.0', format=4):
    """Change the numbers and the arrays of a checkpoint, {name: array}, and make its checksum right."""
    with open(CHECKPOINT, 'rb') as file:
        file.readline()
        numbers, rest = json.loads(file.readline()), file.read()
    arrays, place = {}, 0
    for name, (kind, shape) in numbers['arrays'].items():
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(rest, kind, count, place).reshape(shape).copy()
        place += arrays[name].nbytes
    assert place == len(rest)
    change(numbers, arrays)
    numbers['arrays'] = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
    rest = b'\n'.join([json.dumps(numbers).encode(), b''.join(array.tobytes() for array in arrays.values())])
    head = f'doodle.py {version}, checkpoint of format {format}, sha256 {hashlib.sha256(rest).hexdigest()}\n'
    with open(CHECKPOINT, 'wb') as file:
        file.write(head.encode() + rest)


def test_another_version_is_resumed_and_another_format_is_not(doodle, painted):
    with pytest.raises(Killed):
        painted(at={12: stop(Killed)})
    shutil.copy(CHECKPOINT, 'kept')
    rewrite(lambda *_: None, version='9.8.7', format=99)
    new = open(CHECKPOINT, 'rb').read()
    with open(CHECKPOINT, 'wb') as file:
        np.save(file, '{"format": 1}')
    for content, words in ((new, 'format 99 by doodle.py 9.8.7'), (open(CHECKPOINT, 'rb').read(), 'format 1 by')):
        with open(CHECKPOINT, 'wb') as file:
            file.write(content)
        refused = painted('--resume')
        assert refused.code == 2 and words in refused.err and f'this is {doodle.__version__}, ' in refused.err
        assert refused.err.count('\n') == 2 and not refused.asked
    shutil.copy('kept', CHECKPOINT)
    rewrite(lambda *_: None, version='0.9')
    assert painted('--resume').code == 0


@pytest.mark.slow
def test_damaged_and_forged_checkpoints_are_refused_or_harmless():
    """The short form of fuzz_checkpoints.py."""
    found = fuzz_checkpoints.fuzz(300, seed=1)
    assert set(found.damaged) <= {'refused', 'identical'} and found.damaged['refused'] > 250
    assert set(found.forged) <= {'refused', 'identical', 'another'} and found.forged['refused'] > 150
    assert found.forged['identical'] + found.forged['another'] > 10                    # what it makes can be read


FORGED = {
    'phase': -1, 'evaluation': 21, 'number': 11, 'error': -1., 'frames': 7, 'header': None, 'limit': -1.,
    'x': 300., 'image': np.nan, 'work': np.inf, 'gradient': np.nan, 'indices 3': -1, 'indices -1': 10**9,
    'integers 3': 10**6, 'integers 15': -1, 'integers 26': 5, 'integers 27': 6, 'integers 28': -1, 'integers 30': -3,
    'integers 37': 10**9, 'task': 1, 'logicals 1': 0, 'doubles': np.nan, 'unknown': 0,
    'restarts': {'': [99, 1.]}, 'starts': [0, 0], 'cycle': 99, 'excess': 1e9, 'losses': -1, 'losses 3': .5,
    'losses 6': 1, 'losses -3': 10, 'losses 1': np.inf}


@pytest.mark.parametrize('field', mostly_slow(FORGED, 'header', 'limit', 'work', 'indices -1', 'integers 3',
                                              'losses 6'))
def test_a_forged_checkpoint_is_refused_before_anything_uses_it(painted, field):
    with pytest.raises(Killed):
        painted(at={12: stop(Killed)})
    name, *place = field.split()

    def forge(numbers, arrays):
        if name in arrays:
            arrays[name].ravel()[int(place[0]) if place else 0] = FORGED[field]
        else:
            (numbers['state'] if name in numbers['state'] else numbers)[name] = FORGED[field]
    rewrite(forge)
    refused = painted('--resume')
    assert refused.code == 2 and 'cannot be read as a checkpoint: ' in refused.err and refused.err.count('\n') == 2
    assert not refused.asked and not os.path.exists('o.png')


def test_losses_of_another_run_s_terms_are_refused_once_the_terms_are_known(painted):
    with pytest.raises(Killed):
        painted(at={12: stop(Killed)})
    rewrite(lambda numbers, arrays: arrays.update(losses=arrays['losses'][:, :2]))
    forged = open(CHECKPOINT, 'rb').read()
    refused = painted('--resume', '--figure=figure.png')
    assert refused.code == 2 and 'its losses are not those of this run.\n  FIX: leave --resume out' in refused.err
    assert not refused.asked and open(CHECKPOINT, 'rb').read() == forged


def test_a_checkpoint_that_lacks_what_nobody_needs_is_resumed(painted):
    """Its losses may be as large as they like, too."""
    with pytest.raises(Killed):
        painted(at={12: stop(Killed)})

    def forge(numbers, arrays):
        for name in ('frames', 'log', 'style'):
            del numbers['header']['options'][name]
        del numbers['header']['slices'], numbers['header']['device']
        arrays['losses'][:2, 1] = 1e308, 5e-324
    rewrite(forge)
    done = painted('--resume', '--figure=figure.png')
    assert done.code == 0 and len(done.asked) == 30 and '0010.png' in os.listdir('frames/run-2')
    assert '  - Figure: `figure.png`.' in done.out


@pytest.mark.parametrize('frames', mostly_slow(
    ['elsewhere', 'frames/../elsewhere', 'frames/away', 'frames/missing', '/'], 'frames/away'))
def test_a_checkpoint_does_not_lead_the_frames_elsewhere(painted, frames):
    os.makedirs('elsewhere')
    with pytest.raises(Killed):
        painted(at={12: stop(Killed)})
    os.symlink('../elsewhere', 'frames/away')
    rewrite(lambda numbers, arrays: numbers.update(frames=frames))
    assert painted('--resume').code == 0
    assert os.listdir('elsewhere') == [] and len(os.listdir('frames/run-2')) == 9


def test_an_interruption_before_a_resumed_run_has_prepared_its_phase(painted):
    """Then it knows no names of losses: page, figure and animation are as they were."""
    def terminated():
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Killed):
        painted(at={12: stop(Killed)})
    again = painted('--resume', '--figure=figure.png', '--animation=moving.gif', at={'phase': terminated})
    assert again.code == 143 and 'Interrupted' in again.out and not again.asked and os.path.exists('o.png')
    assert not os.path.exists('figure.png') and painted('--resume').code == 0


def test_a_file_of_the_users_with_the_name_of_the_page_stays(painted):
    os.mkdir('frames')
    with open('frames/watch.html', 'w') as file:
        file.write('mine')
    assert painted().code == 0 and os.path.exists('frames/run-2/watch.js')
    assert open('frames/watch.html').read() == 'mine'


def test_a_run_that_fails_is_shown_as_failed(painted):
    assert painted(at={12: lambda: np.nan, 13: lambda: np.nan}).code == 2
    assert '"state": "failed"' in open('frames/watch.js').read()


def test_what_a_checkpoint_says_is_shown_without_its_escapes(painted):
    with pytest.raises(Killed):
        painted(at={12: stop(Killed)})
    rewrite(lambda numbers, arrays: numbers['header']['options'].update(seed='\033[31m' + 1000 * 'x'))
    error = painted('--resume').err
    assert "--seed was another: '\\x1b[31mxxx" in error and '\033' not in error and len(error) < 400
    rewrite(lambda *_: None, version='\033[31m')
    assert 'does not begin like one' in painted('--resume').err


def test_a_checkpoint_is_not_read_through_a_link(painted):
    with pytest.raises(Killed):
        painted(at={12: stop(Killed)})
    os.rename(CHECKPOINT, 'another')
    os.symlink('another', CHECKPOINT)
    assert 'cannot be read as a checkpoint' in painted('--resume').err
    os.remove(CHECKPOINT)
    os.mkfifo(CHECKPOINT)
    assert 'is not a file' in painted('--resume').err


def test_a_checkpoint_that_is_not_wanted_is_mentioned_and_replaced(painted):
    with pytest.raises(Killed):
        painted(at={12: stop(Killed)})
    before = open(CHECKPOINT, 'rb').read()
    short = painted('--phases=1', '--iterations=5')                                    # it writes none
    assert short.code == 0 and open(CHECKPOINT, 'rb').read() == before
    again = painted()
    assert f'`{CHECKPOINT}` of a run before will be replaced' in again.out and len(again.asked) == 40
    assert not os.path.exists(CHECKPOINT)


@pytest.mark.parametrize('slices, threads, made', [(1, '2', 30 - 9), (7, '2', 30), (1, '3', 30)])
def test_a_cycle_is_believed_only_where_the_same_is_computed(painted, monkeypatch, slices, threads, made):
    """9 evaluations, three whole cycles, are not made."""
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    with pytest.raises(Killed):
        painted(at={12: stop(Killed)})
    rewrite(lambda numbers, arrays: numbers.update(cycle=3))
    monkeypatch.setenv('OMP_NUM_THREADS', threads)
    again = painted('--resume', f'--slices={slices}')
    assert again.code == 0 and len(again.asked) == made
    assert ('  - Phase #0 has converged: it only repeats its last 3 evaluations.\n' in again.out) == (made < 30)


def test_after_a_loss_that_is_no_number_there_is_no_cycle(painted):
    """Nor in the checkpoint of a run that has ended, which may go on."""
    with pytest.raises(Killed):
        painted('--phases=1', at={12: stop(Killed)})
    rewrite(lambda numbers, arrays: numbers.update(cycle=7))
    given = '--resume', '--keep-checkpoint', '--phases=1'
    ended = painted(*given, at={1: lambda: np.nan})
    assert ended.code == 0 and len(ended.asked) == 1 + 20 - 10 - 7
    more = painted(*given, '--iterations=40')
    assert more.code == 0 and len(more.asked) == 20 and 'has converged' not in more.out


def test_an_interruption_leaves_a_checkpoint_of_all_that_was_done(painted):
    stopped = painted(at={13: stop(KeyboardInterrupt(signal.SIGTERM))})
    assert stopped.code == 143 and '--resume goes on from there' in stopped.out
    assert len(painted('--resume').asked) == 27


@pytest.mark.parametrize('where', mostly_slow(['write_log', 'write_picture', 'keep'], 'write_log'))
def test_a_signal_between_evaluations_waits_until_all_know_of_the_last(doodle, painted, monkeypatch, where):
    whole, calls, owner = painted('--random-seed=3'), [], doodle if where == 'write_picture' else doodle.Journal
    function = getattr(owner, where)

    def signalled(*arguments, **how):
        function(*arguments, **how)
        calls.append(signal.raise_signal(signal.SIGTERM) if len(calls) == 3 else None)
    with monkeypatch.context() as patched:
        patched.setattr(owner, where, signalled)
        stopped = painted('--random-seed=3')
    assert stopped.code == 143 and 'Traceback' not in stopped.err
    again = painted('--resume')
    assert again.log[1:] == whole.log[1:] and len(stopped.asked) + len(again.asked) == 40
    assert stopped.history + again.history == whole.history


def test_an_interruption_right_after_resuming_loses_nothing(painted):
    with pytest.raises(Killed):
        painted(at={12: stop(Killed)})
    stopped = painted('--resume', at={0: stop(KeyboardInterrupt(signal.SIGINT))})
    assert stopped.code == 130 and os.path.exists('o.png') and len(painted('--resume').asked) == 30


@pytest.mark.slow
def test_three_kills_of_a_real_run(tmp_path):
    """The short form of kill.py."""
    (tmp_path / 'whole').mkdir()
    (tmp_path / 'killed').mkdir()
    whole, killed = (kill.kills(count, 4, 2, ['--phases=2', '--iterations=8', '--style-layers=3_1'], tmp_path / name,
                                say=lambda _: None) for count, name in ((0, 'whole'), (3, 'killed')))
    assert len(killed.lost) == 3 and max(killed.lost) <= 2 and killed.left == 0
    assert killed.log == whole.log and len(whole.log) == 16
    assert (tmp_path / 'killed/o.png').read_bytes() == (tmp_path / 'whole/o.png').read_bytes()


def test_checkpoints_are_ten_evaluations_apart_also_where_some_are_skipped(doodle, monkeypatch):
    written, places = [], SimpleNamespace(checkpoint='a file')
    monkeypatch.setattr(doodle, 'write_checkpoint', lambda path, at: written.append(at.number))
    journal = SimpleNamespace(options=SimpleNamespace(save_every=0), places=places, tried=0,
                              spared=lambda path: contextlib.nullcontext())
    for number in *range(59), *range(111, 135):
        doodle.Journal.keep(journal, SimpleNamespace(number=number))
    assert written == [10, 20, 30, 40, 50, 111, 120, 130]


# ---- more iterations -------------------------------------------------------------------------------------------------

def ran(painted, *arguments, **how):
    """`painted`, with all that it wrote: frames and result in `files`; and the numbers that the page was told."""
    done = painted(*arguments, **how)
    done.files = {path.name: path.read_bytes() for path in [*Path('frames').glob('0*.png'), Path('o.png')]}
    page = json.loads(re.fullmatch(r'watch\((.*)\)\n', Path('frames/watch.js').read_text())[1])
    done.page = [page[name] for name in ('number', 'total', 'phase', 'left')]
    return done


def anew():
    """Remove what runs wrote."""
    shutil.rmtree('frames')
    for path in {'log', 'o.png', CHECKPOINT} & set(os.listdir()):
        os.remove(path)


def test_a_run_that_ended_goes_on_with_more_iterations(painted):
    whole = ran(painted, '--random-seed=3', '--phases=1', '--iterations=33')
    anew()
    for before, number in ((0, 12), (12, 20), (20, 33)):
        more = ran(painted, '--resume', '--keep-checkpoint', *['--random-seed=3'] * (not before), '--phases=1',
                   f'--iterations={number}')
        assert (more.code, len(more.asked), more.page) == (0, number - before, [number, number, 0, 0])
        assert f'  - Checkpoint: `{CHECKPOINT}`; --resume with more --iterations goes on from there.\n' in more.out
        assert not before or (f'  - Going on from `{CHECKPOINT}`, after {before} evaluations, with {number} instead of '
                              f'{before} in phase #0.\n') in more.out
    assert more.log[1:] == whole.log[1:] and more.files == whole.files and more.history == whole.history[20:]


def test_the_checkpoint_s_phase_and_later_ones_have_the_new_number(doodle, painted):
    """Also where the run was killed in the second of three phases, continued, killed there again, and continued."""
    given = '--random-seed=3', '--phases=3', '--save-every=4'
    for number, at in ((12, 17), (20, 9), (20, 12)):                               # evaluations of this start
        with pytest.raises(Killed):
            painted('--resume', *given, f'--iterations={number}', at={at: stop(Killed)})
    more = ran(painted, '--resume', *given, '--iterations=25', '--figure=figure.png')
    line = doodle.going_on('it', doodle.Checkpoint({}, number=5), 20, SimpleNamespace(iterations=25, phases=2))
    assert ' in phase #2.\n' in more.out and line.endswith(' in phase #0 and later ones.')
    assert [entry['evaluation'] for entry in more.log[1:]] == [*range(12), *range(20), *range(25)]
    assert [entry['phase'] for entry in more.log[1:]] == 12 * [0] + 20 * [1] + 25 * [2]
    assert more.code == 0 and more.page == [57, 57, 2, 0] and not os.path.exists(CHECKPOINT)
    assert sorted(more.files) == [*(f'{number:04d}.png' for number in range(0, 57, 4)), 'o.png']


def test_a_phase_that_goes_on_is_that_of_a_run_that_had_more_at_once(painted):
    """The second phase of a run that ended, and of one that was interrupted; the first stays as it was."""
    given, runs = ['--random-seed=3', '--keep-checkpoint'], []
    for at in ({}, {18: stop(KeyboardInterrupt(signal.SIGTERM))}):
        first = painted(*given, '--iterations=12', at=at)
        runs.append(ran(painted, '--resume', *given, '--iterations=20'))
        assert first.code == (143 if at else 0) and len(first.asked) + len(runs[-1].asked) == 32 + bool(at)
        anew()
    assert runs[0].log[1:] == runs[1].log[1:] and runs[0].files == runs[1].files and runs[0].page == [32, 32, 1, 0]
    assert numbers(runs[0].log) == [*((0, k) for k in range(12)), *((1, k) for k in range(20))]


def test_a_run_that_ended_has_nothing_left_to_do_and_keeps_its_checkpoint(painted):
    whole = ran(painted, '--random-seed=3', '--keep-checkpoint')
    kept = open(CHECKPOINT, 'rb').read()
    again = ran(painted, '--resume')
    assert (again.code, again.asked, again.files, again.log, again.page) == (0, [], whole.files, whole.log, whole.page)
    assert (f'  - The run of `{CHECKPOINT}` has ended after 40 evaluations: nothing is left to do; it goes on with '
            '--resume and more than --iterations=20.\n') in again.out and 'Going on' not in again.out
    assert open(CHECKPOINT, 'rb').read() == kept
    fewer = painted('--resume', '--iterations=19')
    assert fewer.code == 2 and '  FIX: resume with what it was or more, or leave --resume out' in fewer.err
    assert painted('--resume', '--iterations=21').code == 0 and not os.path.exists(CHECKPOINT)


@pytest.mark.parametrize('starts, evaluation', mostly_slow(
    [([0, 13], 2), ([0, 0], 15), ([-2, 10], 5), ([2, 12], 3), ([0], 15), ([0, 5, 10], 5), ([], 3), (None, 3), ('09', 3),
     ([0, 10.], 5)], ([0, 13], 2)))
def test_phases_that_began_where_none_can_are_refused(painted, starts, evaluation):
    """In a run of 12, of which 15 were made."""
    given = '--iterations=12', '--save-every=5'
    with pytest.raises(Killed):
        painted(*given, at={17: stop(Killed)})
    rewrite(lambda numbers, arrays: numbers.update(starts=starts, evaluation=evaluation))
    refused = painted('--resume', *given)
    assert refused.code == 2 and 'cannot be read as a checkpoint: ' in refused.err and not refused.asked
    rewrite(lambda numbers, arrays: numbers.update(starts=[0, 12], evaluation=3))
    assert len(painted('--resume', *given).asked) == 9


def test_check_tells_what_is_left(doodle, painted, monkeypatch, capsys):
    monkeypatch.setattr(doodle, 'product_rate', lambda: 1e11)
    with pytest.raises(Killed):
        painted('--iterations=12', at={17: stop(Killed)})
    capsys.readouterr()
    before = {path: path.read_bytes() for path in Path().rglob('*') if path.is_file()}
    for arguments, lines in (([], ['Phase #0: 48x56, 12', 'Phase #1: 96x112, 12']),
                             (['--resume'], ['Phase #1: 96x112, 9']),
                             (['--resume', '--iterations=20'], ['Phase #1: 96x112, 17'])):
        checked = painted('--iterations=12', *arguments, '--check')
        assert checked.code == 0 and re.findall('Phase #.*(?= evaluations of)', checked.out) == lines
        assert ('Going on' in checked.out) == ('--resume' in arguments) != ('will be replaced' in checked.out)
        assert 'Random seed' not in checked.out
    assert painted('--resume', '--iterations=11', '--check').code == 2
    assert {path: path.read_bytes() for path in Path().rglob('*') if path.is_file()} == before
    os.remove('face_content_sem.png')
    checked = painted('--resume', '--auto-maps=4', '--check')
    assert checked.code == 0 and 'Going on' not in checked.out
    assert '  - --resume looks at the checkpoint once the maps are there.\n' in checked.out


def test_a_new_log_of_a_later_phase_tells_where_the_phases_began(painted):
    with pytest.raises(Killed):
        painted('--iterations=12', at={17: stop(Killed)})
    os.remove('log')
    again = painted('--resume', '--iterations=14')
    assert again.log[0]['starts'] == [0, 12] and numbers(again.log) == [(1, k) for k in range(3, 14)]


# ---- disk ------------------------------------------------------------------------------------------------------------

def full():
    """From now on no file may grow beyond a few bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))


def roomy(*_):
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def and_a_loss(action):
    """For `at`: act, and go on with a loss that any image is better than."""
    def act():
        action()
        return 1e12
    return act


def warnings(out):
    return re.findall(r'^WARNING: `(.+?)` cannot be written: (.+?)\. The run goes on', out, re.MULTILINE)


def test_a_disk_that_fills_up_costs_frames_and_checkpoints_and_nothing_else(painted):
    try:
        done = painted(at={7: and_a_loss(full), 33: and_a_loss(roomy)})
    finally:
        roomy()
    assert done.code == 0 and len(done.asked) == 40 and os.path.exists('o.png')
    told = warnings(done.out)
    assert sorted(path for path, _ in told) == sorted(['log', 'frames', CHECKPOINT, 'o.png'])
    assert {reason for _, reason in told} == {os.strerror(errno.EFBIG)}
    assert sorted(os.listdir('frames')) == ['0000.png', '0005.png', '0035.png', 'command.txt', 'watch.html', 'watch.js']
    assert numbers(done.log) == NUMBERS                                                  # what waited was written


def test_a_result_that_cannot_be_written_goes_elsewhere(painted, doodle):
    os.makedirs('deep')

    def block():
        shutil.rmtree('deep')
        open('deep', 'w').close()
    done = painted('--output=deep/o.png', at={5: and_a_loss(block)})
    place, = re.search(r'on device `cpu`: `(.+)`\.$', done.out.strip().splitlines()[-1]).groups()
    assert done.code == 0 and os.path.dirname(place) == 'frames' and place.endswith('-o.png')
    assert dict(warnings(done.out))['deep/o.png'] == os.strerror(errno.EEXIST)
    assert doodle.read_picture(place).pixels.shape == (112, 96, 3)


def test_a_result_that_no_place_takes_leaves_a_checkpoint(painted):
    try:
        done = painted(at={37: and_a_loss(full)})
    finally:
        roomy()
    assert done.code == 2 and 'could not be written anywhere' in done.err and os.path.exists(CHECKPOINT)
    assert painted('--resume').code == 0 and os.path.exists('o.png')


@pytest.mark.parametrize('calls, words', [(0, 'this run leaves no checkpoint'), (6, 'that of 30 evaluations is kept')])
def test_a_last_checkpoint_that_cannot_be_written_is_told_as_it_is(painted, doodle, monkeypatch, calls, words):
    write, called = doodle.write_checkpoint, []

    def full_then(path, at):
        called.append(at.number)
        if len(called) > calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, at)
    monkeypatch.setattr(doodle, 'write_checkpoint', full_then)
    done = painted('--keep-checkpoint')
    told = re.findall(rf'`{CHECKPOINT}` cannot be written: {os.strerror(errno.ENOSPC)}(.+)', done.out)
    assert done.code == 0 and called[-1] == 40 and told == [
        '. The run goes on. FIX: make room, or let the folder be written.',
        f'; {words}. FIX: make room, or let the folder be written, and {"--resume" if calls else "run it again"}.']
    assert '--resume with more' not in done.out and os.path.exists(CHECKPOINT) == bool(calls)
    stopped = painted(at={3: stop(KeyboardInterrupt(signal.SIGTERM))})
    assert stopped.code == 143 and 'this run leaves no checkpoint. FIX: ' in stopped.out
    assert stopped.out.endswith(' after 3 evaluations on device `cpu`: the image so far is in `o.png`.\n')


def test_folders_that_vanish_are_made_again(painted):
    def vanish():
        shutil.rmtree('a')
        shutil.rmtree('frames')
    done = painted('--output=a/o.png', at={12: and_a_loss(vanish)})
    assert done.code == 0 and not warnings(done.out) and os.path.exists('a/o.png')
    assert sorted(os.listdir('frames')) == [
        '0015.png', '0020.png', '0025.png', '0030.png', '0035.png', 'watch.html', 'watch.js']


def test_a_full_log_does_not_end_a_run(painted):
    os.symlink('/dev/full', 'full')
    open('log', 'w').close()
    done = painted('--log=full')
    assert done.code == 0 and warnings(done.out) == [('full', os.strerror(errno.ENOSPC))]


def lines_of(content):
    """The entries of a log as bytes, all of them whole lines."""
    assert content.endswith(b'\n')
    return [json.loads(line) for line in content.splitlines()]


def test_a_log_into_a_fifo_waits_for_its_reader_and_the_run_does_not(painted):
    os.mkfifo('fifo')
    assert painted('--log=fifo').code == 0                                               # nobody ever reads
    reader = os.open('fifo', os.O_RDONLY | os.O_NONBLOCK)
    done = painted('--log=fifo')
    assert done.code == 0 and 'lines are lost' not in done.out
    assert numbers(lines_of(os.read(reader, 1 << 20))) == NUMBERS
    os.close(reader)


def test_a_log_that_is_read_late_has_all_lines(painted):
    os.mkfifo('fifo')
    reader = os.open('fifo', os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    read, late = [], {k: and_a_loss(lambda: read.append(os.read(reader, 1 << 20))) for k in range(30, 40)}
    done = painted('--log=fifo', at=late)
    read.append(os.read(reader, 1 << 20))
    assert done.code == 0 and 'lines are lost' not in done.out and numbers(lines_of(b''.join(read))) == NUMBERS
    os.close(reader)


def test_a_log_that_is_not_read_loses_whole_lines_and_says_so_once(painted, doodle, monkeypatch):
    monkeypatch.setattr(doodle, 'WAITING', 2500)
    os.mkfifo('fifo')
    reader = os.open('fifo', os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    read = []
    done = painted('--log=fifo', at={35: and_a_loss(lambda: read.append(os.read(reader, 1 << 20)))})
    read.append(os.read(reader, 1 << 20))
    found = numbers(lines_of(b''.join(read)))
    assert done.code == 0 and done.out.count('lines are lost') == 1
    assert found[:5] == NUMBERS[:5] and set(found) < set(NUMBERS) and len(set(found)) == len(found)
    os.close(reader)


@pytest.mark.parametrize('place', ['/dev/null', 'terminal'])
def test_a_log_may_go_to_a_terminal_or_nowhere(painted, place):
    ours, theirs = pty.openpty()
    done = painted(f'--log={os.ttyname(theirs) if place == "terminal" else place}')
    assert done.code == 0
    if place == 'terminal':
        assert b'"random_seed"' in os.read(ours, 4096)
    os.close(ours)
    os.close(theirs)


def special(kind, path):
    """Make a FIFO, a socket, or a link to a device at `path`."""
    if kind == 'fifo':
        os.mkfifo(path)
    elif kind == 'socket':
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
    else:
        os.symlink(f'/dev/{kind}', path)


@pytest.mark.parametrize('flag, name, kind', [
    *(('--output', 'o.png', kind) for kind in ('fifo', 'socket', 'null')),
    *(('--output', 'o.png.checkpoint', kind) for kind in ('fifo', 'socket', 'zero')),
    *(('--log', 'other', kind) for kind in ('socket', 'zero', 'random'))])
@pytest.mark.parametrize('resume', [[], ['--resume']])
def test_what_is_no_file_is_refused_at_once(painted, flag, name, kind, resume):
    special(kind, name)
    before = os.lstat(name)
    done = painted(*resume, *['--log=other'] * (flag == '--log'))
    assert done.code == 2 and f"{flag} '{name}' is not a file" in done.err and not done.asked
    assert os.lstat(name) == before


@pytest.mark.parametrize('redirected', first_quick(['> out', '| cat > out'], 1))
def test_lines_and_log_share_stdout(tmp_path, redirected):
    command = [ROOT / 'doodle.py', f'--style={FOLDER / "texture_style.png"}', '--network=vgg16', '--semantic-weight=0',
               '--phases=1', '--iterations=3', '--save-every=0', '--style-layers=1_1', '--log=/dev/stdout']
    done = subprocess.run(['bash', '-c', f'echo before > out; "$0" "$@" {redirected.replace("> ", ">> ")}',
                           sys.executable, *command], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    lines = (tmp_path / 'out').read_text().splitlines()
    assert lines[:2] == ['before', 'Neural Doodle for semantic style transfer.'] and 'finished' in lines[-1]
    assert [json.loads(line)['evaluation'] for line in lines if line.startswith('{"phase')] == [0, 1, 2]


@pytest.mark.slow
def test_a_terminal_that_takes_no_more_does_not_end_a_run(tmp_path):
    command = [ROOT / 'doodle.py', f'--style={FOLDER / "texture_style.png"}', '--network=vgg16', '--semantic-weight=0',
               '--phases=1', '--iterations=1', '--frames=.', '--style-layers=1_1']
    for number, redirected in enumerate(('>/dev/full', '>&-', '| true', '2>&-', '>&- 2>&-')):
        done = subprocess.run(['bash', '-c', f'"$0" "$@" --output={number}.png {redirected}', sys.executable, *command],
                              capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, '') and (tmp_path / f'{number}.png').exists(), redirected


# ---- divergence ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('loss', [np.nan, np.inf, 1e30])
def test_a_loss_that_blows_up_once_is_overcome(painted, doodle, loss):
    done = painted(at={13: lambda: loss})
    assert done.code == 0 and done.out.count('WARNING') == 1 and 'last good image' in done.out
    assert len(done.asked) == 40 + (not np.isfinite(loss)) and numbers(done.log) == NUMBERS
    best = np.argmin([entry['total'] for entry in done.log[1:14]])
    assert best > 5 and (done.asked[14] == done.asked[best]).all()                       # back to the last good one
    assert done.history[14] is None and done.history[15] == 14          # with new matches, and nothing of the bad image
    assert done.log[19]['total'] < 1.01 * min(entry['total'] for entry in done.log[1:20])


@pytest.mark.parametrize('loss, problem, count', [(np.nan, 'The loss or its gradient is not finite', 13),
                                                  (1e30, 'The loss blew up', 15)])
def test_a_loss_that_blows_up_again_is_reported_and_the_image_kept(painted, doodle, loss, problem, count):
    done = painted(at={k: lambda: loss for k in range(13, 40)})
    assert done.code == 2 and len(done.asked) == 15
    assert re.match(rf'ERROR: {problem} after {count} evaluations; the last good image is in `o.png`\.\n'
                    r'  FIX: try .+\n\Z', done.err)
    assert doodle.read_picture('o.png').pixels.std() > 10


def test_each_phase_has_its_second_chance(painted):
    assert painted(at={13: lambda: np.nan, 33: lambda: np.nan}).code == 0


# ---- signals ---------------------------------------------------------------------------------------------------------

def test_a_signal_after_the_last_evaluation_changes_nothing(doodle, painted, monkeypatch):
    unlink = os.unlink

    def signalled(path, **rest):
        unlink(path, **rest)
        if path == CHECKPOINT:
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(os, 'unlink', signalled)
    done = painted()
    assert done.code == 0 and 'Optimization finished' in done.out and 'Interrupted' not in done.out


def test_a_signal_is_heard_in_the_midst_of_matching_and_the_next_call_is_right(doodle):
    """What takes a minute here takes 20 seconds of an evaluation at 1024x1024."""
    u, v = doodle.T.tensor3(), doodle.T.tensor3()
    matches, rng = doodle.theano.function([u, v], doodle.fast_match(u, v)[0]), np.random.default_rng(0)
    large, small, other = (rng.random(shape, dtype=np.float32) for shape in ((400, 400, 64), (9, 8, 64), (7, 11, 64)))

    def handler(number, frame):
        raise KeyboardInterrupt(number)
    before, start = signal.signal(signal.SIGALRM, handler), time.time()
    try:
        signal.setitimer(signal.ITIMER_REAL, .3)
        with pytest.raises(KeyboardInterrupt) as error:
            matches(large, large)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.time() - start < 4 and str(error.value) == str(int(signal.SIGALRM))
    assert (matches(small, other) == brute_force(small, other).argmax(axis=0)).all()


# ---- memory ----------------------------------------------------------------------------------------------------------

def test_a_lack_of_memory_leaves_the_image_and_is_not_called_divergence(painted):
    done = painted(at={13: stop(MemoryError())})
    assert done.code == 2 and 'not enough memory' in done.err and 'no longer a number' not in done.err
    assert 'After 13 evaluations the image so far is in `o.png`' in done.out and os.path.exists('o.png')
    assert len(painted('--resume').asked) == 30


ROOM = {'/proc/meminfo': 'MemTotal:  9000000 kB\nMemAvailable:    4000000 kB\nSwapFree:     100 kB\n'}


@pytest.mark.parametrize('files, limit', [
    ({}, 4_000_100 * 1024), ({'/proc/self/cgroup': ''}, 4_000_100 * 1024),
    ({'/proc/self/cgroup': '0::/\n', '/sys/fs/cgroup/memory.max': 'max\n'}, 4_000_100 * 1024),
    ({'/proc/self/cgroup': '0::/\n', '/sys/fs/cgroup/memory.max': '1000\n'}, 1000),
    ({'/proc/self/cgroup': '0::/a/b\n', '/sys/fs/cgroup/a/b/memory.max': '1000\n'}, 1000),
    ({'/proc/self/cgroup': '0::/a/b\n', '/sys/fs/cgroup/a/memory.max': '99\n',
      '/sys/fs/cgroup/a/b/memory.max': '1000\n'}, 99),
    ({'/proc/self/cgroup': '3:cpu:/\n2:memory:/docker/1\n', '/sys/fs/cgroup/memory/memory.limit_in_bytes': '77\n'}, 77),
    ({'/proc/self/cgroup': '2:memory:/s\n', '/sys/fs/cgroup/memory/s/memory.limit_in_bytes': '78\n'}, 78),
    ({'/proc/self/cgroup': '2:memory:/\n', '/sys/fs/cgroup/memory/memory.limit_in_bytes': '9223372036854771712\n'},
     4_000_100 * 1024)])
def test_memory_is_what_the_machine_has_to_spare_or_less_by_the_cgroup(doodle, monkeypatch, files, limit):
    def opened(path, *_, **__):
        if path not in ROOM | files:
            raise FileNotFoundError(path)
        return io.StringIO((ROOM | files)[path])
    monkeypatch.setattr(doodle, 'open', opened, raising=False)
    assert doodle.memory_limit() == limit


@pytest.mark.parametrize('arguments, fix', [
    ([], r'--max-size=(\d+)'), (['--content=huge.png'], r'--max-size=(\d+)'),
    (['--output-size=3000x2000'], r'--output-size=(\d+)x\d+')])
def test_a_run_that_would_not_fit_is_refused_with_the_size_that_would(doodle, refused, monkeypatch, arguments, fix):
    Image.new('RGB', (200, 150)).save('a.png')
    Image.new('RGB', (900, 700)).save('huge.png')
    Image.new('RGB', (1800, 900)).save('style.png')
    style = 'a.png' if 'output' in fix else 'style.png'
    monkeypatch.setattr(doodle, 'memory_limit', lambda: 800e6)
    arguments = [f'--style={style}', '--network=vgg16', *arguments]
    problem, answer = refused(*arguments)
    answer = answer.rstrip('.')
    assert re.search(r'need about \d+\.\d GB of memory, and there are 0\.8 GB', problem)
    fitting = int(re.fullmatch(fix, answer).group(1))

    def passed(*_):
        raise doodle.UserError('passed', 'this check')
    monkeypatch.setattr(doodle, 'find_weights', passed)
    larger = answer.replace(str(fitting), str(fitting + 9))
    assert refused(*arguments, answer)[0] == 'passed' and 'memory' in refused(*arguments, larger)[0]


@pytest.mark.parametrize('kind', [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_memory_is_what_ulimit_leaves(doodle, monkeypatch, kind):
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    without = doodle.memory_limit()
    limits = {kind: (10 ** 9, -1)}
    monkeypatch.setattr(resource, 'getrlimit', lambda other: limits.get(other, (resource.RLIM_INFINITY,) * 2))
    assert doodle.memory_limit() == 536_000_000 < without
    limits[kind] = 4 * 10 ** 8, -1
    assert doodle.memory_limit() == 0


@pytest.mark.parametrize('limit', [400_000, 500_000, 700_000])
def test_a_run_under_ulimit_never_hangs(tmp_path, limit):
    command = ['bash', '-c', f'ulimit -v {limit}; "$0" "$@"', sys.executable, ROOT / 'doodle.py', '--network=vgg16',
               f'--style={FOLDER / "texture_style.png"}', '--style-layers=1_1', '--phases=1', '--iterations=1']
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert done.returncode == 2 and re.fullmatch(r'ERROR: .*(memory).*\n  FIX: .*ulimit -v.*\n', done.stderr)


@pytest.mark.slow
def test_the_size_that_ulimit_is_good_for_is_told_and_works(tmp_path):
    def limited(*arguments):
        command = [sys.executable, ROOT / 'doodle.py', f'--style={ROOT / "samples/astronaut.png"}', '--network=vgg16',
                   '--phases=1', '--iterations=1', '--semantic-weight=0', *arguments]
        return subprocess.run(['bash', '-c', 'ulimit -v 900000; "$0" "$@"', *command], cwd=tmp_path, text=True,
                              capture_output=True, timeout=600, env=os.environ | {'OMP_NUM_THREADS': '2'})
    refused = limited()
    size = re.search(r'FIX: (--max-size=\d+)\.$', refused.stderr)
    assert refused.returncode == 2 and limited(size[1]).returncode == 0


def test_a_machine_too_small_for_any_size_is_said_to_be_so(doodle, refused, monkeypatch):
    monkeypatch.setattr(doodle, 'memory_limit', lambda: 300e6)
    Image.new('RGB', (200, 150)).save('a.png')
    assert 'more memory' in refused('--style=a.png', '--network=vgg16')[1]


# ---- several runs at once --------------------------------------------------------------------------------------------

def contents(folder):
    return {path: path.read_bytes() if path.is_file() else os.lstat(path).st_mtime_ns for path in folder.rglob('*')}


@pytest.mark.parametrize('arguments', mostly_slow(
    [['--resume'], ['--log=other'], ['--output=p.png'], ['--output=link.png', '--log=other'], ['--frames=new/frames'],
     ['--resume', '--output=../{}/o.png']], ['--resume'], ['--output=p.png']))
def test_a_second_run_with_an_output_or_log_is_refused_and_touches_nothing(painted, tmp_path, monkeypatch, arguments):
    os.symlink('o.png', 'link.png')

    def second():
        before = contents(tmp_path)
        command = [sys.executable, ROOT / 'doodle.py', *FACES, *(text.format(tmp_path.name) for text in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and done.stderr.count('\n') == 2, done.stderr
        assert f' is being written by another run, process {os.getpid()}.' in done.stderr
        assert contents(tmp_path) == before
        return 1e12
    first = painted(at={13: second})
    assert (first.code, first.err) == (0, '') and len(first.asked) == 40 and not list(tmp_path.glob('.doodle-*'))


def test_the_log_of_another_run_is_refused_by_any_of_its_names(doodle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log, _ = doodle.open_log('log', doodle.Checkpoint({}))
    log.write(b'a line\n')
    os.link('log', 'hard')
    with pytest.raises(doodle.UserError, match="'hard' is being written by another run"):
        doodle.open_log('hard', doodle.Checkpoint({}))
    assert Path('log').read_bytes() == b'a line\n'
    log.close()
    doodle.open_log('hard', doodle.Checkpoint({}))[0].close()


def test_a_run_of_another_machine_is_named_with_its_host(painted, doodle, monkeypatch):
    with doodle.locked('o.png'):
        monkeypatch.setattr(doodle.socket, 'gethostname', lambda: 'another')
        here = os.uname().nodename
        assert f'process {os.getpid()} on host {here!r}.' in painted().err


def test_a_lock_that_a_killed_run_left_is_taken_over_and_removed(painted, tmp_path):
    code = 'import doodle, os; lock = doodle.locked("o.png"); lock.__enter__(); os._exit(9)'
    subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert len(list(tmp_path.glob('.doodle-*-lock'))) == 1
    assert painted().code == 0 and not list(tmp_path.glob('.doodle-*'))


def test_of_many_runs_only_one_at_a_time_has_a_lock(tmp_path):
    code = '''
import doodle, os, time
for _ in range(300):
    try:
        with doodle.locked('o.png'):
            os.close(os.open('alone', os.O_CREAT | os.O_EXCL))
            os.unlink('alone')
    except doodle.UserError:
        pass
'''
    runs = [subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)})
            for _ in range(6)]
    assert [process.wait() for process in runs] == [0] * 6 and os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_told_and_painted_on(painted, doodle, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(doodle.fcntl, 'flock', flock)
    done = painted('--log=/dev/null')
    assert done.code == 0 and done.out.count('cannot be locked: No locks available') == 1
    assert not list(tmp_path.glob('.doodle-*-lock'))


@pytest.mark.slow
def test_ten_runs_at_once_do_not_disturb_each_other(tmp_path):
    """One folder, one cache of compiled code, one folder of frames: each paints what it paints alone."""
    shutil.copy(FOLDER / 'texture_style.png', tmp_path / 'a.png')
    arguments = ['--style=a.png', '--network=vgg16', '--style-layers=2_1', '--phases=1', '--iterations=4',
                 '--random-seed=1', '--save-every=1', '--resume']
    runs = [subprocess.Popen([sys.executable, ROOT / 'doodle.py', *arguments, f'--output={k}.png', f'--log={k}.log'],
                             cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env={**os.environ, 'OMP_NUM_THREADS': '1'}) for k in range(10)]
    for process in runs:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, out + err
    assert len({(tmp_path / f'{k}.png').read_bytes() for k in range(10)}) == 1
    assert len({tuple(entry['total'] for entry in map(json.loads, lines[1:])) for k in range(10)
                if (lines := (tmp_path / f'{k}.log').read_text().splitlines())}) == 1
    folders = [tmp_path / 'frames', *(tmp_path / f'frames/run-{k}' for k in range(2, 11))]
    frames = [tuple((folder / f'{k:04d}.png').read_bytes() for k in range(4)) for folder in folders]
    assert len(set(frames)) == 1
    assert not list(tmp_path.glob('*.npz')) + list(tmp_path.rglob('.doodle-*'))
