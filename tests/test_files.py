"""Whole runs on small pictures: what they print, write, log and leave when they are stopped."""
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import twin
from conftest import ROOT, mostly_slow
from golden_data import FOLDER

COMMON = ['--network=vgg16', '--print-every=1', '--log=log']
TEXTURE = [*COMMON, '--style=texture_style.png', '--style-layers=3_1', '--phases=2', '--iterations=3', '--save-every=2',
           '--random-seed=7']


@pytest.fixture(scope='module')
def painted(run, tmp_path_factory):
    """Run the program in a folder that has the golden pictures; returns what it printed and logged."""
    def painted(*arguments, folder=None):
        if folder is None:
            folder = tmp_path_factory.mktemp('run')
            for path in FOLDER.glob('*.png'):
                shutil.copy(path, folder)
        done = run(folder, *arguments)
        errors = [line for line in done.stderr.splitlines() if 'compilelock' not in line]    # waiting for another run
        assert (done.returncode, errors) == (0, []), done.stderr
        assert not [name for _, _, names in os.walk(folder) for name in names if name.startswith('.')]
        header, *log = map(json.loads, (folder / 'log').read_text().splitlines())
        return SimpleNamespace(folder=folder, lines=done.stdout.splitlines(), header=header, log=log)
    return painted


@pytest.fixture(scope='module')
def texture(painted):
    return painted(*TEXTURE, '--output=new/deep/texture.png')


@pytest.fixture(scope='module')
def faces(painted):
    return painted(*COMMON, '--style=face_style.png', '--content=face_content.png', '--phases=2', '--iterations=2',
                   '--output=faces.jpg', '--save-every=0')


def read(path):
    return np.asarray(Image.open(path).convert('RGB'))


def contents(folder):
    """{path: bytes} of a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


# ---- the result ------------------------------------------------------------------------------------------------------

def test_the_result_has_the_size_of_the_content_and_the_format_of_its_ending(faces):
    with Image.open(faces.folder / 'faces.jpg') as image:
        assert (image.size, image.format, image.mode) == ((96, 112), 'JPEG', 'RGB')
    assert os.stat(faces.folder / 'faces.jpg').st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_missing_folder_of_the_result_is_made(texture):
    assert read(texture.folder / 'new/deep/texture.png').shape == (52, 60, 3)


@pytest.mark.slow
def test_output_size_is_width_x_height_and_a_drawn_seed_is_told(painted):  # faults 5, 9
    arguments = [argument for argument in TEXTURE if 'random-seed' not in argument]
    wide = painted(*arguments, '--iterations=1', '--output-size=71x41', '--output=wide.webp')
    with Image.open(wide.folder / 'wide.webp') as image:
        assert (image.size, image.format) == ((71, 41), 'WEBP')
    assert 'Phase #0: resolution 35x20  scale 0.5' in wide.lines
    assert f'  - Random seed {wide.header["random_seed"]}.' in wide.lines
    assert wide.header['shapes']['output'] == [41, 71]


@pytest.mark.slow
def test_a_doodle_has_the_size_of_its_map_and_replaces_its_output(painted, tmp_path):
    for path in FOLDER.glob('tiny*.png'):
        shutil.copy(path, tmp_path)
    shutil.copy(FOLDER / 'face_content.png', tmp_path / 'tiny_target.png')             # an earlier result, no content
    doodled = painted(*COMMON, '--style=tiny_style.png', '--output=tiny_target.png', '--style-layers=3_1', '--phases=1',
                      '--iterations=1', '--save-every=0', folder=tmp_path)
    assert read(tmp_path / 'tiny_target.png').shape == (64, 56, 3)
    assert doodled.header['shapes']['map_channels'] == 3 and doodled.log[0]['content'] == {}


def test_what_a_killed_run_left_of_a_file_goes_with_the_next(doodle, tmp_path):
    folder, code = tmp_path / 'run', 'import doodle, os; w = doodle.written_whole({!r}); w.__enter__(); os._exit(9)'
    for name in ('a', 'b'):
        subprocess.run([sys.executable, '-c', code.format(str(folder / name))], cwd=ROOT)
    assert len(list(folder.iterdir())) == 2
    with doodle.written_whole(str(folder / 'a')) as file:
        file.write(b'whole')
    assert len(list(folder.iterdir())) == 2 and (folder / 'a').read_bytes() == b'whole'


def test_what_another_run_is_writing_stays(doodle, tmp_path):
    path = tmp_path / 'a'
    with doodle.written_whole(str(path)) as slow:
        with doodle.written_whole(str(path)) as quick:
            quick.write(b'the first')
        slow.write(b'the last')
        assert path.read_bytes() == b'the first'
    assert contents(tmp_path) == {path.relative_to(tmp_path): b'the last'}


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir, lambda path: os.symlink('other', path)])
def test_what_is_no_leftover_but_has_the_name_of_one_stays_and_holds_up_nothing(doodle, tmp_path, make):
    path, other = tmp_path / 'a', tmp_path / 'other'
    other.write_bytes(b'kept')
    names = [str(tmp_path / doodle.hidden(str(path))) + end for end in ('lock', 'x')]
    for name in names:
        make(name)
    with doodle.written_whole(str(path)) as file:
        file.write(b'whole')
    with doodle.locked(str(path)) as remarks:
        assert 'cannot be locked' in remarks[0]
    assert all(map(os.path.lexists, names)) and path.read_bytes() == b'whole' and other.read_bytes() == b'kept'


def test_an_output_that_is_a_link_stays_one_and_its_mode_stays(doodle, tmp_path):
    (tmp_path / 'deep').mkdir()
    target, link = tmp_path / 'deep/target.png', tmp_path / 'link.png'
    target.write_bytes(b'before')
    target.chmod(0o640)
    link.symlink_to('deep/target.png')
    doodle.write_picture(np.zeros((2, 2, 3), np.uint8), doodle.given_target(str(link)))
    assert os.readlink(link) == 'deep/target.png' and target.stat().st_mode & 0o7777 == 0o640
    assert read(target).shape == (2, 2, 3)


def test_a_link_that_another_user_laid_there_is_replaced(doodle, tmp_path, monkeypatch):
    (tmp_path / 'mine').write_bytes(b'kept')
    (tmp_path / 'o.png').symlink_to('mine')
    lstat = os.lstat
    monkeypatch.setattr(os, 'lstat', lambda path: SimpleNamespace(st_uid=12345, st_mode=lstat(path).st_mode))
    assert doodle.given_target(str(tmp_path / 'o.png')) == str(tmp_path / 'o.png')


def test_frames_are_not_written_through_links_that_lie_there(doodle, tmp_path):
    frames, away = tmp_path / 'frames', tmp_path / 'away'
    away.mkdir()
    assert doodle.claim_frames(str(frames)) == str(frames)
    (frames / 'run-2').symlink_to(away)
    (frames / '0000.png').symlink_to(away / 'a.png')
    doodle.write_picture(np.zeros((2, 2, 3), np.uint8), str(frames / '0000.png'))
    assert doodle.claim_frames(str(frames)).endswith('run-3') and os.listdir(away) == []


@pytest.mark.parametrize('durable', [True, False])
def test_what_must_survive_a_loss_of_power_is_on_the_disk_before_it_is_there(doodle, tmp_path, monkeypatch, durable):
    synced, fsync = [], os.fsync

    def noted(descriptor):
        synced.append((os.path.realpath(f'/proc/self/fd/{descriptor}'), (tmp_path / 'a.png').exists()))
        fsync(descriptor)
    monkeypatch.setattr(os, 'fsync', noted)
    doodle.write_picture(np.zeros((2, 2, 3), np.uint8), str(tmp_path / 'a.png'), durable)
    if not durable:
        assert synced == []
        return
    (file, there), folder = synced
    assert os.path.dirname(file) == str(tmp_path) and not there and folder == (str(tmp_path), True)


def test_many_may_write_one_file_at_once(doodle, tmp_path):
    """None takes what another has just begun, or has just ended, for a leftover."""
    def write(number):
        with doodle.written_whole(str(tmp_path / 'a')) as file:
            file.write(b'%d' % number)
        return number
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(write, range(2000))) == list(range(2000))
    assert os.listdir(tmp_path) == ['a']


def test_a_picture_is_written_whole_or_not_at_all(doodle, tmp_path, monkeypatch):
    path = tmp_path / 'a.png'
    path.write_bytes(b'the one before')

    def broken(image, file, **_):
        file.write(b'half a pict')
        raise OSError('disk full')
    monkeypatch.setattr(Image.Image, 'save', broken)
    monkeypatch.setattr(doodle, 'image_format', lambda path: 'PNG')
    with pytest.raises(OSError, match='disk full'):
        doodle.write_picture(np.zeros((2, 2, 3), np.uint8), str(path))
    assert contents(tmp_path) == {path.relative_to(tmp_path): b'the one before'}


# ---- lines -----------------------------------------------------------------------------------------------------------

def shape(line):
    """A line with its measured numbers replaced by letters."""
    return re.sub(r'[ \d]\d\.\d%', ' Q%', re.sub(r'\d\.\d\de[+-]\d\d', 'L', re.sub(r'\d[\d.,]*(s|kb)', r'N\1', line)))


LINES_OF_THE_ORIGINAL = '''\
Neural Doodle for semantic style transfer.
  - Using device `cpu` for processing the images.
  - Loading `face_content.png` for content data.
  - Adding `face_content_sem.png` as semantic map.
  - Loading `face_style.png` for style data.
  - Adding `face_style_sem.png` as semantic map.
Phase #0: resolution 48x56  scale 0.5
  - Style layer 3_1: (143, 259, 3, 3) patches in Nkb.
  - Style layer 4_1: (20, 515, 3, 3) patches in Nkb.
  - Content layer conv4_2: 512 features in Nkb.
  0   loss L   content 4_2 L   style 3_1 L  4_1 L   quality  Q%   time Ns
  1   loss L   content 4_2 L   style 3_1 L  4_1 L   quality  Q%   time Ns
Phase #1: resolution 96x112  scale 1.0
  - Style layer 3_1: (725, 259, 3, 3) patches in Nkb.
  - Style layer 4_1: (143, 515, 3, 3) patches in Nkb.
  - Content layer conv4_2: 512 features in Nkb.
  2   loss L   content 4_2 L   style 3_1 L  4_1 L   quality  Q%   time Ns
  3   loss L   content 4_2 L   style 3_1 L  4_1 L   quality  Q%   time Ns
'''


def test_lines_are_those_of_the_original(faces):
    printed = [shape(line) for line in faces.lines]
    for line in LINES_OF_THE_ORIGINAL.splitlines():
        assert line in printed
    order = [printed.index(line) for line in LINES_OF_THE_ORIGINAL.splitlines() if 'loss' in line or 'Phase' in line]
    assert order == sorted(order)


def test_lines_say_what_the_log_says(faces):
    printed = [line for line in faces.lines if 'loss' in line]
    for line, entry in zip(printed, faces.log, strict=True):
        terms = [entry['total'], *entry['content'].values(), *entry['style'].values()]
        assert re.findall(r'\d\.\d\de[+-]\d\d', line) == [f'{term / 1000:.2e}' for term in terms]
    quality = [twin.quality([entry['gradient_max'] for entry in faces.log if entry['phase'] == k]) for k in (0, 1)]
    percents = [float(re.search(r'([\d.]+)%', line).group(1)) for line in printed]
    assert percents == pytest.approx(sum(quality, []), abs=.051)


def test_the_last_line_tells_time_error_device_and_file(texture):
    seconds, error = re.fullmatch(r'Optimization finished in ([\d.]+)s, average pixel error ([\d.]+), '
                                  r'on device `cpu`: `new/deep/texture.png`\.', texture.lines[-1]).groups()
    quality = twin.quality([entry['gradient_max'] for entry in texture.log if entry['phase'] == 1])[-1]
    assert float(error) == pytest.approx(255 * (1 - quality / 100) ** 2, abs=.051) and float(seconds) >= 0


# ---- a content that hardly counts ------------------------------------------------------------------------------------

FACES = ['--style=face_style.png', '--content=face_content.png', '--phases=2', '--save-every=0']


@pytest.mark.slow
def test_a_content_that_hardly_counts_is_told_once_with_a_weight_that_helps(painted, faces):
    lost = painted(*COMMON, *FACES, '--iterations=2', '--style-weight=5000')
    warning, = (line for line in lost.lines if 'WARNING' in line)
    assert lost.lines.index(warning) < lost.lines.index('Phase #1: resolution 96x112  scale 1.0')
    entry = lost.log[1]
    share = entry['content']['4_2'] / entry['total']
    assert share < .01 and f'the content is {100 * share:.1g} % of the loss' in warning
    fix = re.search(r'FIX: (--content-weight=[1-9]0*)\.$', warning).group(1)
    again = painted(*COMMON, *FACES, '--iterations=2', '--style-weight=5000', fix)
    assert .2 < again.log[1]['content']['4_2'] / again.log[1]['total'] < .8
    for fine in (again, faces):
        assert 'WARNING' not in ''.join(fine.lines)


@pytest.mark.parametrize('content, total, options, told', [
    (9.9, 1000, [], '--content-weight=1000.'), (9.9, 1000, ['--method=li-wand'], '--content-weight=1000.'),
    (10.1, 1000, [], None), (9.9, 1000, ['--content-weight=1'], '--content-weight=100.'),
    (9.9, 1000, ['--content-weight=0.9'], None), (9.9, 1000, ['--method=gatys'], None), (0, 1000, [], None),
    (None, 1000, [], None)])
def test_whom_a_lost_content_is_told(doodle, content, total, options, told):
    terms = {} if content is None else {'4_2': content / 2, '3_1': content / 2}
    evaluation = doodle.Evaluation(total, terms, {}, 0., None, 0., 0.)
    remark = doodle.lost_content(evaluation, doodle.parse_options(['--style=-', *options]))
    assert remark is None if told is None else remark.endswith(told)


# ---- the log ---------------------------------------------------------------------------------------------------------

def test_the_log_begins_with_the_provenance_of_the_run(doodle, texture, faces):
    assert texture.header['random_seed'] == 7 and texture.header['network'] == 'vgg16'
    assert texture.header['device'] == 'cpu' and len(texture.header['weights']['sha256']) == 64
    assert texture.header['options']['style_layers'] == ['3_1'] and texture.header['options']['iterations'] == 3
    assert faces.header['shapes'] == {'output': [112, 96], 'style': [108, 124], 'map_channels': 3}
    assert list(texture.header) == ['version', 'device', 'network', 'weights', 'random_seed', 'options', 'inputs',
                                    'shapes', 'slices', 'threads', 'starts']
    assert texture.header['version'] == doodle.__version__
    assert (texture.header['slices'], texture.header['starts']) == (1, [])
    assert texture.header['threads'] == doodle.thread_count()


@pytest.mark.parametrize('run_of', ['texture', 'faces'])
def test_the_log_has_every_evaluation(request, run_of):
    log = request.getfixturevalue(run_of).log
    evaluations = 3 if run_of == 'texture' else 2
    numbers = [(entry['phase'], entry['evaluation']) for entry in log]
    assert numbers == [(phase, k) for phase in (0, 1) for k in range(evaluations)]
    for entry in log:
        assert list(entry) == ['phase', 'evaluation', 'total', 'content', 'style', 'smooth', 'gradient_l2',
                               'gradient_max', 'seconds', 'matching_seconds']
        terms = [*entry['content'].values(), *entry['style'].values(), entry['smooth']]
        assert all(term > 0 for term in terms) and entry['total'] == pytest.approx(sum(terms), rel=1e-6)
        assert 0 < entry['gradient_max'] < entry['gradient_l2']
        assert 0 < entry['matching_seconds'] < entry['seconds']
    assert set(log[0]['style']) == ({'3_1'} if run_of == 'texture' else {'3_1', '4_1'})
    assert set(log[0]['content']) == (set() if run_of == 'texture' else {'4_2'})


# ---- frames, and the same run again ----------------------------------------------------------------------------------

def test_frames_count_across_phases(texture):
    frames = texture.folder / 'frames'
    assert sorted(os.listdir(frames)) == ['0000.png', '0002.png', '0004.png', 'command.txt', 'watch.html', 'watch.js']
    assert [read(frames / f'000{k}.png').shape[:2] for k in (0, 2, 4)] == [(26, 30), (26, 30), (52, 60)]
    assert '--random-seed=7' in (frames / 'command.txt').read_text()


def test_save_every_0_makes_no_frames(faces):
    assert not (faces.folder / 'frames').exists()


@pytest.mark.slow
def test_the_same_seed_paints_the_same_picture_and_frames_do_not_mix(texture, painted):  # fault 9
    before = contents(texture.folder / 'frames')
    again = painted(*TEXTURE, '--output=again.png', folder=texture.folder)
    assert (again.folder / 'again.png').read_bytes() == (texture.folder / 'new/deep/texture.png').read_bytes()
    assert [entry['total'] for entry in again.log] == [entry['total'] for entry in texture.log]
    after = contents(texture.folder / 'frames')
    assert {path: after.pop(path) for path in before} == before
    assert sorted(map(str, after)) == [f'run-2/{name}' for name in sorted(map(str, before))]


def test_a_third_run_takes_a_third_folder(doodle, tmp_path):  # fault 9
    frames = str(tmp_path / 'frames')
    assert [os.path.relpath(doodle.claim_frames(frames), frames) for _ in range(3)] == ['.', 'run-2', 'run-3']
    os.makedirs(tmp_path / 'old')
    Image.new('RGB', (1, 1)).save(tmp_path / 'old/0000.png')                           # of the original: no command.txt
    assert doodle.claim_frames(str(tmp_path / 'old')).endswith('run-2')


# ---- matching --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_more_slices_than_patches_give_the_same_losses(texture, painted):  # fault 7
    sliced = painted(*TEXTURE, '--slices=1000', '--iterations=1', '--output=sliced.png')
    assert sliced.log[0]['total'] == pytest.approx(texture.log[0]['total'], rel=1e-5)


def test_a_cache_lasts_for_a_phase_and_counts_the_warm_up_of_variety(texture, painted):  # fault 8
    cached = painted(*TEXTURE, '--cache=1', '--variety=3', '--iterations=2', '--output=cached.png')
    assert [entry['matching_seconds'] > 0 for entry in cached.log] == [True, False, True, False]
    assert cached.log[0]['total'] == pytest.approx(texture.log[0]['total'], rel=1e-5)  # there was no history yet


# ---- runs that end early ---------------------------------------------------------------------------------------------

def stopped(folder, number, line, *arguments):
    """Send the program a signal once it has printed a line that begins so; its exit code and the lines after that."""
    process = subprocess.Popen([sys.executable, ROOT / 'doodle.py', *arguments], cwd=folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not process.stdout.readline().startswith(line):
        assert process.poll() is None
    process.send_signal(number)
    printed, _ = process.communicate(timeout=600)
    return process.returncode, printed.splitlines()


@pytest.fixture
def pictures(tmp_path):
    for path in FOLDER.glob('texture*.png'):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.parametrize('number, code', mostly_slow(
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], (signal.SIGINT, 130)))
def test_a_signal_saves_the_image_painted_so_far(pictures, number, code):  # fault 16
    returned, lines = stopped(pictures, number, '  6   loss', *TEXTURE, '--phases=1', '--iterations=100000',
                              '--save-every=1', '--output=o.png')
    assert returned == code
    assert re.match(r'Interrupted after \d+ evaluations on device `cpu`: .*`o\.png`', lines[-1])
    result = read(pictures / 'o.png')
    frames = sorted((pictures / 'frames').glob('*.png'))
    same = [k for k, frame in enumerate(frames) if np.array_equal(read(frame), result)]
    assert same and same[-1] > 3                                                       # not what it started with
    totals = [json.loads(line)['total'] for line in (pictures / 'log').read_text().splitlines()[1:]]
    assert totals[same[-1]] < totals[0]


def test_a_signal_before_the_first_evaluation_says_that_there_is_nothing(pictures):
    returned, lines = stopped(pictures, signal.SIGINT, '  - Compiling', *TEXTURE, '--output=o.png')
    assert returned == 130
    assert 'Interrupted' in lines[-1] and 'nothing' in lines[-1]
    assert not (pictures / 'o.png').exists()


@pytest.mark.slow
def test_a_terminal_that_closes_ends_a_run_as_a_signal_does(pictures):
    process, terminal = pty.fork()
    if not process:
        os.chdir(pictures)
        os.execv(sys.executable, [sys.executable, ROOT / 'doodle.py', *TEXTURE, '--phases=1', '--iterations=100000',
                                  '--output=o.png'])
    printed = b''
    while b'  6   loss' not in printed:
        printed += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 129
    assert (pictures / 'o.png').exists() and (pictures / 'o.png.checkpoint').exists()


@pytest.mark.parametrize('number', mostly_slow([signal.SIGINT, signal.SIGHUP]))
def test_a_signal_that_the_caller_ignores_stays_ignored(pictures, number):
    before = signal.signal(number, signal.SIG_IGN)                      # as nohup, and as sh for what runs in its &
    try:
        returned, lines = stopped(pictures, number, '  6   loss', *TEXTURE, '--phases=1', '--iterations=30',
                                  '--save-every=1', '--output=o.png')
    finally:
        signal.signal(number, before)
    assert returned == 0 and 'Optimization finished' in lines[-1]


def ends_with(folder, code, *arguments):
    """The problem that a run ends with, `code` run before it."""
    code = f'import sys, doodle\n{code}\nsys.exit(doodle.main(sys.argv[1:]))'
    done = subprocess.run([sys.executable, '-c', code, *arguments], cwd=folder, capture_output=True, text=True,
                          timeout=600, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OPENBLAS_NUM_THREADS': '1'})
    assert done.returncode == 2, done.stderr
    return re.search(r'^ERROR: (.+)\n  FIX: .+\n\Z', done.stderr, re.MULTILINE).group(1)


@pytest.mark.slow
def test_a_lack_of_memory_is_called_so(pictures):  # fault 11
    Image.new('RGB', (600, 450)).save(pictures / 'texture_style.png')
    limit = '''
import resource
set_phase = doodle.Objective.set_phase
def with_16_mb_left(*arguments):                                                       # conv1_1 alone needs 69
    held = resource.getpagesize() * int(open('/proc/self/statm').read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (held + (16 << 20), resource.RLIM_INFINITY))
    set_phase(*arguments)
doodle.Objective.set_phase = with_16_mb_left'''
    assert 'not enough memory' in ends_with(pictures, limit, *TEXTURE, '--phases=1', '--output-size=60x52')


@pytest.mark.parametrize('error', [
    MemoryError(), RuntimeError('GpuCorrMM failed to allocate working memory of 576 x 3000000\n'),
    RuntimeError('BaseGpuCorrMM: Failed to allocate output of 1 x 64 x 1500 x 2000\nApply node: ..'),
    Exception("b'cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY: out of memory'")])
@pytest.mark.slow
def test_a_lack_of_memory_is_called_so_on_a_gpu_as_well(doodle, refused, monkeypatch, error):  # fault 11
    def run(arguments):
        raise error
    monkeypatch.setattr(doodle, 'run', run)
    assert 'not enough memory' in refused()[0]


def test_a_loss_that_is_no_number_is_called_so_and_nothing_is_written(pictures):  # fault 11
    large = 'doodle.smoothness_loss = lambda x, power: doodle.T.sum(x ** 2) * doodle.np.float32(1e38)'
    problem = ends_with(pictures, large, *TEXTURE, '--phases=1', '--iterations=2', '--output=o.png')
    assert 'is not finite' in problem and 'nothing was saved' in problem
    assert not (pictures / 'o.png').exists()
