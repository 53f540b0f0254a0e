"""How a container starts, by .docker/start as a module: the user, the cache of each, the network; and .docker/vgg19."""
import hashlib
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import doodle
from conftest import ROOT, module

# ---- the command line ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('before', ['', 'python3 doodle.py', 'python doodle.py', 'python3.11 ./doodle.py', 'doodle.py',
                                    './doodle.py'])
def test_the_program_before_its_arguments_is_dropped(start, before):
    assert start.without_program([*before.split(), '--style', 'doodle.py']) == ['--style', 'doodle.py']


def test_other_words_stay(start):
    assert start.without_program(['python3', 'paint.py']) == ['python3', 'paint.py']


@pytest.mark.parametrize('device', ['cpu', 'gpu0'])
def test_without_arguments_an_example_for_docker_is_shown(start, monkeypatch, handlers, capsys, device):
    monkeypatch.setenv('DOODLE_DEVICE', device)
    assert start.main([]) == 2
    problem, fix = capsys.readouterr().err.splitlines()
    assert 'docker run --rm -v "$PWD:/data"' in fix and 'python3' not in fix
    options = doodle.parse_options(fix.split('neural-doodle ')[1].rstrip('.').split())
    assert (ROOT / options.style).is_file() and (ROOT / options.content).is_file()
    assert sys.argv == ['start', f'--device={device}']


# ---- the user --------------------------------------------------------------------------------------------------------

@pytest.fixture
def folders(start, tmp_path, monkeypatch):
    """folders(owners, mounted, options): what `heir` finds where folders have these owners; ones ending in : are ro."""
    def folders(owners, mounted, *arguments):
        found = {'/': None}
        for name, owner in owners.items():
            path = tmp_path / name
            path.mkdir(parents=True, exist_ok=True)
            os.chown(path, owner, owner and owner + 1)
        for name in mounted.split():
            path = tmp_path / name.rstrip(':')
            found[str(path)] = '/host'
        closed = [str(tmp_path / name.rstrip(':')) for name in mounted.split() if name.endswith(':')]
        monkeypatch.chdir(tmp_path / 'nd')
        monkeypatch.setattr(doodle, 'mounts', lambda: found)
        monkeypatch.setattr(doodle, 'is_read_only', lambda path: path in closed)
        real = os.access
        monkeypatch.setattr(os, 'access', lambda path, mode: mode != os.W_OK or (
            os.path.abspath(path) not in closed and real(path, mode)))
        heir = start.heir(doodle.parse_options(['--style=a.png', *(a.format(tmp_path) for a in arguments)]))
        return heir and (os.path.relpath(heir[0], tmp_path), *heir[1:])
    return folders


@pytest.mark.skipif(os.getuid(), reason='only root can give folders away')
@pytest.mark.parametrize('owners, mounted, arguments, heir', [
    ({'nd': 7}, 'nd', [], ('nd', 7, 8)),
    ({'nd': 0, 'data': 7}, 'data', [], ('data', 7, 8)),
    ({'nd': 0, 'nd/photos': 7}, 'nd/photos', ['--output=photos/a.png'], ('nd/photos', 7, 8)),
    ({'nd': 0, 'data': 7, 'pictures': 9}, 'data pictures', ['--output', '{}/pictures/a.png'], ('pictures', 9, 10)),
    ({'nd': 0, 'data': 7, 'pictures': 9}, 'data pictures', ['--fram={}/pictures/a'], ('pictures', 9, 10)),
    ({'nd': 0, 'in': 7, 'out': 9}, 'in: out', [], ('out', 9, 10)),      # never of a read-only one
    ({'nd': 0, 'in': 7, 'out': 0}, 'in out', ['--output={}/out/a.png'], ('out', 7, 8)),     # dockerd made it
    ({'nd': 7, 'out': 0}, 'nd: out', ['--output={}/out/a.png'], ('out', 7, 8)),
    ({'nd': 0, 'in': 7, 'out': 0, 'out/old': 0}, 'in out', ['--output={}/out/a.png'], None),    # root's for good
    ({'nd': 0, 'data': 0}, 'data', [], None),                           # shifted ids: the caller is root
    ({'nd': 0, 'in': 7}, 'in:', [], None),
    ({'nd': 7}, '', [], None)])                                         # nothing is kept
def test_files_belong_to_the_owner_of_the_folder_that_keeps_the_result(folders, owners, mounted, arguments, heir):
    assert folders(owners, mounted, *arguments) == heir


IN_A_CHILD = '''
import importlib.machinery, importlib.util, os, sys
loader = importlib.machinery.SourceFileLoader('start', '.docker/start')
start = importlib.util.module_from_spec(importlib.util.spec_from_loader('start', loader))
loader.exec_module(start)
folder, user, group, deny = sys.argv[1:]
opened = os.open(folder, os.O_RDONLY)
if deny == 'denied':
    def deny(*_): raise PermissionError(1, 'Operation not permitted')
    os.setgroups = os.setgid = os.setuid = deny
start.become(folder, int(user), int(group))
print(os.getuid(), os.getgid(), os.getgroups(), os.fstat(opened).st_uid)
'''


@pytest.mark.skipif(os.getuid(), reason='only root can become another user')
@pytest.mark.parametrize('user, denied, warned, after', [
    (7, 'allowed', False, r'7 8 \[\] 7'), (7, 'denied', True, '0 0 .+ 7'), (65534, 'allowed', True, '0 0 .+ 0')])
def test_the_user_is_taken_or_it_is_said_how(tmp_path, user, denied, warned, after):
    done = subprocess.run([sys.executable, '-B', '-c', IN_A_CHILD, tmp_path, str(user), '8', denied], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    *said, ids = done.stdout.splitlines()
    assert re.fullmatch(after, ids)
    assert len(said) == warned and all('WARNING: ' in line and '--user "$(id -u):$(id -g)"' in line for line in said)


# ---- the cache -------------------------------------------------------------------------------------------------------

@pytest.fixture
def image(tmp_path):
    """image(stamp): the folder of an image's compiled code."""
    def image(stamp):
        folder = tmp_path / stamp
        (folder / 'theano/tmp1').mkdir(parents=True)
        (folder / 'theano/tmp1/mod.so').write_text(stamp)
        (folder / 'stamp').write_text(stamp + '\n')
        return str(folder)
    return image


def test_each_user_has_a_folder_that_nobody_else_opens(start, tmp_path, capsys):
    (tmp_path / 'cache').mkdir()
    for _ in range(2):
        folder = start.own_folder()
        assert folder == str(tmp_path / f'cache/{os.getuid()}') and os.stat(folder).st_mode & 0o777 == 0o700
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('other', ['open', 'link', 'noexec'])
def test_a_folder_of_others_is_not_used(start, tmp_path, monkeypatch, capsys, other):
    (tmp_path / 'cache').mkdir()
    mine = tmp_path / f'cache/{os.getuid()}'
    if other == 'link':
        (tmp_path / 'theirs').mkdir(0o700)
        mine.symlink_to(tmp_path / 'theirs')
    else:
        mine.mkdir(0o700)
        mine.chmod(0o777 if other == 'open' else 0o700)
    if other == 'noexec':
        monkeypatch.setattr(os, 'statvfs', lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC * (path == str(mine))))
    folder = start.own_folder()
    assert folder.startswith('/tmp/') and os.stat(folder).st_mode & 0o777 == 0o700
    os.rmdir(folder)
    assert capsys.readouterr().out.count('WARNING: ') == 1


@pytest.mark.parametrize('denied, flag, problem', [
    (('cache', '/tmp'), 0, 'neither'), (('cache',), os.ST_NOEXEC, 'noexec')])
def test_without_a_folder_for_code_the_start_says_what_to_add(start, monkeypatch, denied, flag, problem):
    monkeypatch.setattr(os, 'access', lambda path, mode: not path.endswith(denied))
    monkeypatch.setattr(os, 'statvfs', lambda path: SimpleNamespace(f_flag=flag))
    with pytest.raises(doodle.UserError, match=problem) as error:
        start.own_folder()
    assert '--tmpfs /tmp:exec' in error.value.fix


def test_code_is_the_image_s_and_anew_when_the_image_changes(start, tmp_path, image):
    (tmp_path / 'mine').mkdir()
    old, new = image('old'), image('new')
    code = start.seeded(str(tmp_path / 'mine'), old)
    (tmp_path / 'mine/code-old/compiled').touch()
    (tmp_path / 'mine/code-new').mkdir()                                # a start that was killed
    assert start.seeded(str(tmp_path / 'mine'), old) == code and os.path.exists(f'{code}/compiled')
    assert not (tmp_path / 'mine/code-new').exists()
    newer = start.seeded(str(tmp_path / 'mine'), new)                    # while a run uses the old one
    assert (tmp_path / 'mine/code-new/theano/tmp1/mod.so').read_text() == 'new' and newer != code
    assert os.path.exists(f'{code}/compiled')


def test_code_of_an_image_that_nobody_uses_is_removed(start, tmp_path, image):
    (tmp_path / 'mine/code-old/theano').mkdir(parents=True)
    start.seeded(str(tmp_path / 'mine'), image('fresh'))
    assert sorted(os.listdir(tmp_path / 'mine')) == ['code-fresh', 'lock']


def test_the_gpu_image_and_its_cpu_image_keep_each_other_s_code(start, tmp_path, image):
    (tmp_path / 'mine').mkdir()
    for stamp in 'one', 'one-gpu', 'one':
        start.seeded(str(tmp_path / 'mine'), image(stamp) if not (tmp_path / stamp).exists() else str(tmp_path / stamp))
    assert sorted(os.listdir(tmp_path / 'mine')) == ['code-one', 'code-one-gpu', 'lock']


# ---- kernels ---------------------------------------------------------------------------------------------------------

COMPILED = '''
import sys, pygpu
context = pygpu.init('cuda0', kernel_cache_path=sys.argv[1])
pygpu.gpuarray.GpuKernel('#include "cluda.h"\\nKERNEL void f(float *x) { x[0] = 1; }', 'f', [], context=context)
'''
LAID_OUT = '''
import sys, doodle
from conftest import module
image, folder = sys.argv[1:]
doodle.beside = lambda name: f'{image}/../{name}'
module('start').lay_out_kernels(image, folder, 'cuda0')
'''


@pytest.mark.slow
@pytest.mark.parametrize('capability, version, found', [
    ('8.9', '12.4', '7.5'), ('12.0', '13.1', '9.0'), ('7.0', '12.4', None)])
def test_kernels_are_found_with_any_driver_on_a_card_that_can_run_them(card, tmp_path, capability, version, found):
    def process(code, *arguments, **switches):
        counts = tmp_path / 'counts'
        subprocess.run([sys.executable, '-c', code, *arguments], check=True, cwd=ROOT,
                       env=card | switches | {'EMU_COUNTS': str(counts)})
        return json.loads(counts.read_text())

    image, folder = tmp_path / 'kernels', tmp_path / 'kept'
    subprocess.run(['g++', '-shared', '-o', tmp_path / 'skein.so', '-Wl,--undefined=Skein_512', '-lgpuarray-static'],
                   check=True)
    for made in '7.5', '9.0':
        assert 'compile' in process(COMPILED, image / made, EMU_CARDS=made)
    process(LAID_OUT, image, folder, EMU_CARDS=capability, EMU_DRIVER=version)
    assert folder.exists() == bool(found)
    if found:
        laid_out, = (folder / capability).glob('*/*')
        made, = (image / found).glob('*/*')
        assert laid_out.read_bytes()[88:] == made.read_bytes()[88:]
        taken_for = min(capability, '9.0', key=float)                   # by libgpuarray
        assert 'compile' not in process(COMPILED, folder / capability, EMU_CARDS=taken_for, EMU_DRIVER=version)


# ---- the network -----------------------------------------------------------------------------------------------------

def test_the_image_s_vgg19_serves_and_without_one_nothing_is_fetched_unasked(start, tmp_path, monkeypatch):
    doodle.import_pillow()
    mine, weights = tmp_path / 'mine', tmp_path / 'weights'
    weights.mkdir()
    start.use_vgg19(str(mine), str(weights))
    assert '--build-arg VGG19=required' in os.environ['DOODLE_OFFLINE']
    monkeypatch.setenv('XDG_CACHE_HOME', str(mine))
    with pytest.raises(OSError, match='built without it'):
        doodle.fetch_vgg19(asked=False)
    weights, (remark, _) = doodle.find_weights(doodle.parse_options(['--style=x.png']))
    assert weights.kind == 'vgg16' and '--build-arg VGG19=required' in remark and 'WARNING' in remark

    (tmp_path / 'weights' / doodle.KERAS['file']).write_text('the network')
    start.use_vgg19(str(mine), str(tmp_path / 'weights'))
    with open(doodle.cached_vgg19()) as file:
        assert file.read() == 'the network'
    os.unlink(doodle.cached_vgg19())
    os.symlink('/gone', doodle.cached_vgg19())                          # an older image's
    start.use_vgg19(str(mine), str(tmp_path / 'weights'))
    assert os.path.exists(doodle.cached_vgg19())


def test_the_build_fetches_what_the_program_would():
    fetched = module('vgg19')
    assert {'file': fetched.FILE, 'bytes': fetched.BYTES, 'md5': fetched.MD5} == doodle.KERAS
    assert fetched.ADDRESSES == doodle.ADDRESSES


@pytest.mark.parametrize('wanted, there, code', [
    ('try', True, 0), ('required', True, 0), ('skip', True, 0), ('try', False, 0), ('required', False, 1),
    ('try', 'another', 0), ('required', 'another', 1), ('yes', True, 2)])
def test_vgg19_is_in_the_image_or_the_build_says_what_to_do(tmp_path, monkeypatch, capsys, wanted, there, code):
    fetched, content = module('vgg19'), b'the network'
    (tmp_path / 'server').mkdir()
    if there:
        (tmp_path / 'server' / fetched.FILE).write_bytes(content if there is True else b'another ..')
    monkeypatch.setattr(fetched, 'BYTES', len(content))
    monkeypatch.setattr(fetched, 'MD5', hashlib.md5(content).hexdigest())
    monkeypatch.setattr(fetched, 'ADDRESSES', ())
    monkeypatch.setenv('DOODLE_ADDRESSES', f'no.address/ file://{tmp_path}/server/')
    assert fetched.main(wanted, str(tmp_path / 'weights')) == code
    had = wanted in ('try', 'required') and there is True
    assert os.path.exists(tmp_path / 'weights' / fetched.FILE) == had
    assert ('--build-arg VGG19=required' in capsys.readouterr().out) == (not had and code != 2)
