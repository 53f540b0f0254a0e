"""samples/study.py: names, bookkeeping and sheets with a stand-in for the runs; whole runs; and a cluster."""
import csv
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import ROOT

# In place of doodle.py: a result in one colour, as red as --content-weight; what it does more, by --variety.
STAND_IN = r'''
import json, os, pathlib, signal, sys, time
given = dict(word[2:].partition('=')[::2] for word in sys.argv[1:])
here, variety = pathlib.Path(sys.argv[0]).parent, given.get('variety', '0')
print(os.environ['OMP_NUM_THREADS'], *sys.argv[1:], flush=True)
with open(given['log'], 'w') as log:
    print(json.dumps(dict(inputs={})), file=log)
    losses = dict(content={'4_2': 1.5}, style={'3_1': 2}, smooth=3, total=6.5)
    print(json.dumps(dict(phase=0, evaluation=0, **losses)), file=log)
if variety == '1' and not (here / 'mended').exists():
    print('some lines')
    sys.exit('ERROR: It fails.\n  FIX: mend it.')
if variety == '2':                                                      # until another run is there
    (here / f'there {os.getpid()}').touch()
    while len(list(here.glob('there *'))) < 2:
        time.sleep(.01)
if variety == '3':                                                      # until it is interrupted
    def end(*_):
        (here / 'ended').touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, end)
    (here / 'pid').write_text(str(os.getpid()))
    while True:
        time.sleep(.01)
red = int(float(given.get('content-weight', 0)))
pathlib.Path(given['output']).write_bytes(b'P6 40 30 255 ' + bytes(40 * 30 * [red, 0, 0]))   # PPM needs no packages
'''


def save(path, size=(64, 48), seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)).save(path)


def halves(path, angle=0):
    """Save a map, left red and right green."""
    Image.fromarray(np.repeat(np.uint8([[[255, 0, 0]] * 32 + [[0, 255, 0]] * 32]), 48, 0)).rotate(angle).save(path)


@pytest.fixture
def study(doodle, tmp_path, monkeypatch, handlers):
    """The module, in a folder with a.png and b.png, and with a stand-in for the runs: study.start('--style=a.png')."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', '4')
    module = doodle.import_beside('samples/study.py')
    module.checksum.cache_clear()
    module.PROGRAM = str(tmp_path / 'stand_in.py')
    Path(module.PROGRAM).write_text(STAND_IN)
    Path('network.npz').write_bytes(b'network')
    monkeypatch.setattr(doodle, 'find_weights', lambda options: (SimpleNamespace(path='network.npz'), ['A network.']))
    save('a.png')
    save('b.png', seed=1)
    module.start = lambda *arguments: doodle.guarded(module.run, arguments)
    yield module
    logging.disable(logging.NOTSET)                                     # it is disabled for Dask


def rows(folder='study'):
    with open(f'{folder}/study.csv', newline='') as file:
        return list(csv.DictReader(file))


def places(path, *colour):
    """Rows and columns of the pixels of a colour, (N, 2)."""
    with Image.open(path) as sheet:
        return np.argwhere((np.asarray(sheet) == colour).all(2))


def printed(run, folder='study'):
    """Threads and arguments of a run of the stand-in."""
    threads, *arguments = Path(folder, run, 'run.txt').read_text().splitlines()[0].split()
    return int(threads), arguments


# ---- bookkeeping -----------------------------------------------------------------------------------------------------

def test_every_combination_is_run_and_tabulated(study, capsys):
    assert study.start('--content', 'a.png', '--style', 'b.png', '--content-weight', '5', '10', '--phases=1',
                       '--iterations', '3', '7') == 0
    assert [(row['--content-weight'], row['--iterations']) for row in rows()] == [
        ('5', '3'), ('5', '7'), ('10', '3'), ('10', '7')]
    for row in rows():
        folder = f'study/content-weight={row["--content-weight"]}+iterations={row["--iterations"]}'
        assert folder == 'study/' + row['run'] and row['status'] == 'done' and float(row['seconds']) > 0
        assert [float(row[name]) for name in ('content 4_2', 'style 3_1', 'smooth', 'total')] == [1.5, 2, 3, 6.5]
        threads, arguments = printed(row['run'])
        assert threads == 4 and row['command'] == 'python3 doodle.py ' + ' '.join(arguments)
        assert {'--content=a.png', '--style=b.png', '--random-seed=1', f'--iterations={row["--iterations"]}',
                '--resume', f'--log={folder}/run.log', f'--weights={os.path.abspath("network.npz")}'} < set(arguments)
    assert '4 of 4, `study/content-weight=10+iterations=7`: done' in capsys.readouterr().out
    left, right = (places('study/sheet.png', red, 0, 0) for red in (5, 10))
    assert len(left) == len(right) == 2 * 40 * 30                       # a column of two each
    assert left.max(0)[1] + 40 < right.min(0)[1]                        # for the labels are longer than 40 pixels
    assert sorted(set(left[:, 0])) == sorted(set(right[:, 0])) and len(set(left[:, 0])) == 60


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(study, capsys):
    command = ['--content=a.png', '--style=b.png', '--variety', '0', '1', '2e-6', '--study=tried', '--phases=1']
    assert study.start(*command) == 1
    assert [row['status'] for row in rows('tried')] == ['done', 'failed', 'done']
    assert '`tried/variety=1`: failed: ERROR: It fails. FIX: mend it; about' in capsys.readouterr().out
    Path('mended').touch()
    before = [os.stat(f'tried/variety={variety}/result.png').st_mtime_ns for variety in ('0', '2e-6')]
    assert study.start(*command) == 0
    out = capsys.readouterr().out
    assert '3 runs, 2 of them done before.' in out and '1 of 1, `tried/variety=1`: done' in out
    assert [row['status'] for row in rows('tried')] == ['done'] * 3
    assert before == [os.stat(f'tried/variety={variety}/result.png').st_mtime_ns for variety in ('0', '2e-6')]
    os.unlink('tried/variety=0/run.log')
    os.unlink('tried/variety=1/result.png')
    Path('tried/variety=2e-6/run.json').write_text('{"status": "do')
    os.unlink('tried/variety=2e-6/result.png')
    assert study.start(*command) == 0 and '3 runs.' in capsys.readouterr().out


def test_results_of_another_run_are_not_overwritten(study, capsys):
    command = ['--content=a.png', '--style=b.png', '--content-weight', '5', '10', '--phases=1']
    for name in 'a_sem.png', 'b_sem.png':
        halves(name)
    assert study.start(*command) == 0
    before = {path: path.read_bytes() for path in Path('study').rglob('*') if path.is_file()}
    for option in '--iterations=4', '--random-seed=2':
        capsys.readouterr()
        assert study.start(*command, option) == 2
        assert f"'study/content-weight=5' has a run with another {option[:-2]}." in capsys.readouterr().err
    for change, named in ((lambda: halves('b_sem.png', 180), 'map of the style'),
                          (lambda: Path('network.npz').write_bytes(b'another'), '--weights, map of the style'),
                          (lambda: save('a.png', seed=2), '--content, --weights, map of the style')):
        change()
        study.checksum.cache_clear()
        assert study.start(*command) == 2
        assert capsys.readouterr().err == (f"ERROR: 'study/content-weight=5' has a run with another {named}.\n"
                                           '  FIX: choose another --study.\n')
    assert before == {path: path.read_bytes() for path in Path('study').rglob('*') if path.is_file()}


def test_pairs_and_paths_of_one_name(study):
    os.mkdir('other')
    save('other/a.png', seed=3)
    assert study.start('--pair', 'a.png', 'b.png', '--pair', 'b.png', 'a.png', '--phases=1', '--keep-colors') == 0
    assert all('--keep-colors' in printed(row['run'])[1] for row in rows())
    assert [(row['run'], row['--content'], row['--style']) for row in rows()] == [
        ('pair=a+b', 'a.png', 'b.png'), ('pair=b+a', 'b.png', 'a.png')]
    assert study.start('--style', 'a.png', 'other/a.png', '--content', 'b.png', 'a.png', '--phases=1') == 0
    assert [row['run'] for row in rows()] == ['style=a.png+content=b', 'style=a.png+content=a',
                                              'style=other%2Fa.png+content=b', 'style=other%2Fa.png+content=a']


def test_the_map_of_a_doodle_is_laid_beside_its_output(study):
    halves('village_sem.png')
    halves('town_sem.png', 180)
    halves('a_sem.png')
    assert study.start('--style=a.png', '--output', 'village.png', 'town.png', '--phases=1') == 0
    for name in ('village', 'town'):
        assert Path(f'study/output={name}/result_sem.png').read_bytes() == Path(f'{name}_sem.png').read_bytes()


def test_all_that_a_run_reads_travels_to_a_worker(study):
    halves('village_sem.webp')
    doodle_run = ['--style=a.png', '--output=village.jpg', '--seed=./b.png']
    swap = ['--style=a.png', '--content=b.png', '--auto-maps']
    for given_options, expected in (
            (doodle_run, {'style.png': 'a.png', 'seed.png': './b.png', 'result_sem.png': 'village_sem.webp'}),
            (swap, {'style.png': 'a.png', 'content.png': 'b.png'} | {
                name: str(ROOT / name) for name in ('samples/automaps.py', 'samples/faces.py', 'samples/faces.npz')})):
        job, = study.make_jobs(*study.parse_command(given_options))
        study.find_networks([job])
        files, arguments = study.parcel(job)
        assert files == expected | {'doodle.py': study.PROGRAM, 'weights.npz': os.path.abspath('network.npz')}
        options = study.doodle.parse_options(arguments)
        assert (options.style, options.output, options.weights) == ('style.png', 'result.png', 'weights.npz')
        assert options.seed == ('seed.png' if given_options is doodle_run else 'noise') and options.resume


@settings(max_examples=50)
@given(values=st.lists(st.text(st.characters(exclude_characters='\0'), max_size=300), min_size=2, max_size=4,
                       unique=True))
def test_names_of_folders_are_safe_and_differ(doodle, values):
    study = doodle.import_beside('samples/study.py')
    for flag in '--style', '--semantic-ext':
        axis = study.make_axis(flag[2:], (flag,), [[value] for value in values])
        names = [study.folder_name({axis.name: label, 'phases': ('1',)}) for label in axis.labels]
        assert len(set(names)) == len(values)
        for name in names:
            assert re.fullmatch(r'[\w.,=+%~-]+', name) and len(os.fsencode(name)) < 240 and name[0] != '.'


def test_jobs_run_at_once_and_share_the_cores(study):
    assert study.start('--content=a.png', '--style=b.png', '--variety=2', '--content-weight', '5', '10', '--phases=1',
                       '--jobs=2') == 0                                 # each waits for the other
    assert [printed(row['run'])[0] for row in rows()] == [2, 2]


def test_a_signal_ends_the_runs_and_is_told(study, capsys):
    def interrupt():
        while not Path('pid').exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt).start()
    assert study.start('--content=a.png', '--style=b.png', '--variety', '0', '3', '4', '--phases=1') == 130
    assert [row['status'] for row in rows()] == ['done', 'interrupted', 'waiting']
    assert 'Interrupted: 1 of 3 runs are done; the same command goes on from there.' in capsys.readouterr().out
    assert Path('ended').exists() and not is_alive(int(Path('pid').read_text()))


def is_alive(number):
    try:
        return Path(f'/proc/{number}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_three_options_make_a_page_for_each_value_of_the_third(study):
    Path('study').mkdir()
    assert study.start('--content', 'a.png', '--style=b.png', '--content-weight', '50', '100', '150', '--keep-colors',
                       '0', '1', '--variety', '1', '0', '--phases=1') == 1
    assert [row['run'] for row in rows() if '--keep-colors' in printed(row['run'])[1]] == [
        row['run'] for row in rows() if 'keep-colors=1' in row['run']] and len(rows()) == 12
    assert sorted(path.name for path in Path('study').glob('sheet*')) == [
        'sheet+variety=0.png', 'sheet+variety=1.png']
    columns = [places('study/sheet+variety=0.png', red, 0, 0)[:, 1].mean() for red in (50, 100, 150)]
    assert columns == sorted(columns)
    failed, done = (len(places(f'study/sheet+variety={variety}.png', 211, 211, 211)) for variety in (1, 0))
    assert failed > 5 * 40 * 30 and done < 100                          # light grey, which letters have a little of


# ---- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arguments, problem', [
    ('--content=a.png', 'No style picture was given.'),
    ('--style=a.png --phases 1 x', "argument --phases: 'x' is not a whole number from 1 on"),
    ('--style=a.png --phases=1 2', 'unrecognized arguments: 2'),
    ('--style=a.png --content-weight -1 5', "argument --content-weight: '-1' is neither 0 nor a number"),
    ('--style=a.png --method gatys champandard --variety 0 1', '--method=gatys has no --variety.'),
    ('--style=a.png --frames=x', 'unrecognized arguments: --frames=x'),
    ('--style=a.png --jobs=0', "argument --jobs: '0' is not a whole number from 1 on"),
    ('--style=a.png --phases 1 01', "'study/phases=1' and 'study/phases=01' are the same run."),
    ('--style=a.png --phases 1 1', "'study/phases=1' and 'study/phases=1' are the same run."),
    ('--phases=1 --style a.png c.png', "'c.png' is not there."),
    ('--style=a.png --content=c.png', "'c.png' is not there."),
    ('--style=a.png --content=b.png --phases 1 9', 'is too small for conv4_1 in the first of 9 phases'),
    ('--style=painted.png --content=b.png --phases=1', "'painted_sem.png' is a map, but 'b_sem.png' is not there."),
    ('--pair a.png b.png --style=a.png', '--pair is given, and --content or --style as well.'),
    ('--pair a.png', 'argument --pair: expected 2 arguments'),
    ('--style=a.png --content=b.png --auto-maps 6 8', '--auto-maps paints beside the pictures, once for all runs.'),
    ('--style=a.png --study=', "argument --study: '' is no path"),
    ('--style=a.png --study=a.png', "--study 'a.png' is not a folder."),
    ('--style=a.png --study=.', "--study '.' has other files in it."),
    ('--style=a.png --study=/proc/x', "--study: the folder '/proc/x' cannot be written: "),
    ('--style=a.png --scheduler=here', "argument --scheduler: 'here' is no address"),
    ('--style=a.png --scheduler=a:1 --jobs=2', 'argument --jobs: not allowed with argument --scheduler'),
    ('--style=a.png --scheduler=a:1 --save-every=5', '--save-every writes frames, which would stay'),
    ('--style=a.png --iterations ' + ' '.join(map(str, range(1, 101))) + ' --random-seed ' +
     ' '.join(map(str, range(100))), 'These are 10,000 runs, and a study has at most 9,999.'),
])
def test_mistakes_are_refused_before_anything_runs(study, capsys, arguments, problem):
    save('painted.png')
    save('painted_sem.png')
    before = sorted(os.listdir())
    assert study.start(*arguments.split()) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r'ERROR: .+\n  FIX: .+\n', err) and problem in err
    assert sorted(os.listdir()) == before


def test_more_runs_at_once_than_memory_are_refused(study, capsys, monkeypatch, doodle):
    monkeypatch.setattr(doodle, 'memory_limit', lambda: 1.5 * doodle.memory_needed((64, 48), (64, 48), options))
    options = doodle.parse_options(['--style=a.png', '--content=b.png'])
    assert study.start('--style=a.png', '--content=b.png', '--phases=1', '--iterations', '1', '2', '--jobs=2') == 2
    assert 'ERROR: 2 runs at once need about' in capsys.readouterr().err


def test_a_missing_dask_is_told_in_one_line(study, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'distributed', None)
    assert study.start('--style=a.png', '--phases=1', '--scheduler=localhost:8786') == 2
    assert re.fullmatch('ERROR: --scheduler needs dask.distributed: .+\n  FIX: pip install -r samples/requirements.txt.'
                        '\n', capsys.readouterr().err)


def test_a_scheduler_that_does_not_answer_is_told_in_one_line(study, capsys, monkeypatch):
    pytest.importorskip('distributed')
    monkeypatch.setattr(study, 'PATIENCE', 0.5)
    assert study.start('--style=a.png', '--phases=1', '--scheduler=localhost:9') == 2
    assert re.fullmatch("ERROR: --scheduler 'localhost:9' does not answer as one: .+\n  FIX: .+\n",
                        capsys.readouterr().err)
    assert not os.path.exists('study')


def test_dask_has_one_pin():
    pin, = re.findall('^distributed==.+$', (ROOT / 'samples/requirements.txt').read_text(), re.MULTILINE)
    assert pin in (ROOT / 'tests/requirements.txt').read_text().splitlines()


# ---- whole runs ------------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, ROOT / 'samples/study.py', '--content=a.png', '--style=b.png', '--network=vgg16',
           '--phases=1', '--max-size=48']


def evaluations(path):
    """How many evaluations a log tells of."""
    return max(0, path.read_bytes().count(b'\n') - 1) if path.exists() else 0


def wait_until(true, seconds=300):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_makes_what_doodle_py_makes(tmp_path, run):
    """Its run ends with it, and leaves a checkpoint; the result is that of the command in the table."""
    for seed, name in enumerate('ab'):
        save(tmp_path / f'{name}.png', seed=seed)
    command, log = [*COMMAND, '--iterations=60'], tmp_path / 'study/run/run.log'
    study = subprocess.Popen(command, cwd=tmp_path)
    wait_until(lambda: evaluations(log) > 5)
    study.kill()
    wait_until(lambda: (log.parent / 'result.png.checkpoint').exists())
    wait_until(lambda: not is_locked(log.parent))
    done = evaluations(log)
    assert study.wait() == -signal.SIGKILL and done < 60
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    assert 'Going on from' in (log.parent / 'run.txt').read_text() and evaluations(log) == 60
    row, = rows(tmp_path / 'study')
    last = json.loads(log.read_text().splitlines()[-1])
    assert float(row['total']) == last['total'] and float(row['content 4_2']) == last['content']['4_2']
    assert row['status'] == 'done'
    again(row, tmp_path, run)


def again(row, folder, run, **environment):
    """The command of a row of the table makes the same picture."""
    arguments = [word for word in row['command'].split()[2:] if not re.match('--(output|log|resume)', word)]
    assert run(folder, *arguments, '--output=again.png', **environment).returncode == 0
    assert (folder / 'again.png').read_bytes() == (folder / 'study' / row['run'] / 'result.png').read_bytes()


def is_locked(folder):
    return any(name.name.endswith('-lock') for name in folder.glob('.doodle-*'))


# ---- cluster ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def cluster(tmp_path):
    """A Dask cluster of two worker processes, each with a folder of its own below tmp_path."""
    distributed = pytest.importorskip('distributed')
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=tmp_path,
                                  host='127.0.0.1', silence_logs=50) as cluster, distributed.Client(cluster) as client:
        yield SimpleNamespace(address=cluster.scheduler_address, client=client)


@pytest.mark.slow
def test_a_worker_that_dies_in_mid_run_costs_no_result(tmp_path, cluster, run):
    """Its run is made again by another, and the result is that of a run without a cluster."""
    for seed, name in enumerate('ab'):
        save(tmp_path / f'{name}.png', seed=seed)
        halves(tmp_path / f'{name}_sem.png')
    command = [*COMMAND, '--iterations=40', '--content-weight', '5', '50', f'--scheduler={cluster.address}']
    study = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    scratch = tmp_path / 'dask-scratch-space'
    wait_until(lambda: any(evaluations(log) > 2 for log in scratch.rglob('run.log')))
    log = next(log for log in scratch.rglob('run.log') if evaluations(log) > 2)
    places = cluster.client.run(lambda dask_worker: (os.getpid(), dask_worker.local_directory))
    address, number = next((address, number) for address, (number, folder) in places.items()
                           if Path(folder) in log.parents)
    key, = cluster.client.processing()[address]
    os.kill(number, signal.SIGKILL)
    out, _ = study.communicate(timeout=300)
    assert study.returncode == 0 and out.count(': done in') == 2
    table = {row['run']: row for row in rows(tmp_path / 'study')}
    assert all(row['status'] == 'done' and float(row['total']) > 0 for row in table.values())
    killed = table[key.rpartition('-')[0]]
    assert 'style_sem.png' in (tmp_path / 'study' / killed['run'] / 'run.txt').read_text()
    again(killed, tmp_path, run, OMP_NUM_THREADS=str(max(1, len(os.sched_getaffinity(0)) // 2)))   # two workers share
    assert not list(scratch.rglob('run.log'))


@pytest.mark.slow
def test_an_interrupted_study_leaves_no_run_on_the_cluster(study, cluster, capsys):
    """And one that was begun here goes on there."""
    started = Path('pid')
    here = f'pathlib.Path({os.getcwd()!r})'
    Path(study.PROGRAM).write_text(STAND_IN.replace('pathlib.Path(sys.argv[0]).parent', here))

    def interrupt():
        wait_until(started.exists)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt).start()
    command = ['--content=a.png', '--style=b.png', '--variety', '0', '1', '3', '--phases=1',
               f'--scheduler={cluster.address}']
    assert study.start(*command) == 130
    wait_until(lambda: Path('ended').exists() and not is_alive(int(started.read_text())))
    assert 'Interrupted' in capsys.readouterr().out
    assert study.start(*command[:-3], *command[-2:]) == 1
    assert [row['status'] for row in rows()] == ['done', 'failed']
    assert 'failed: ERROR: It fails. FIX: mend it' in capsys.readouterr().out
