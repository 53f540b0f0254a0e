"""The command line, and what the machine must have, from the outside."""
import ast
import os
import pty
import pwd
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

import doodle as program
from conftest import ROOT, first_quick, mostly_slow
from golden_data import FOLDER

DEFAULTS = dict(
    content=None, content_weight=10.0, content_layers=['4_2'],
    style=None, style_weight=25.0, style_layers=['3_1', '4_1'],
    semantic_ext='_sem.png', semantic_weight=10.0,
    output='output.png', output_size=None, phases=3, slices=None, cache=0,
    smoothness=1.0, variety=0.0, seed='noise', seed_range=(16.0, 240.0),
    iterations=100, device='cpu', print_every=10, save_every=10)
OURS = dict(method='champandard', rotations=0, scales=0, max_size=None, random_seed=None, network=None, weights=None,
            frames='frames', log=None, resume=False, keep_checkpoint=False, check=False, auto_maps=0,
            style_scale=1, keep_colors=False, figure=None, animation=None,
            stop_when_converged=1, matching='exact', line_search='fresh')

NATURAL = ['0', '-1', '1.5', 'ten', '']
WHOLE = ['-1', '1.5', 'ten', '']
WEIGHT = ['-1', 'nan', 'inf', '-inf', '1e999', 'ten', '', '1.1e20', '9e-7', '1e-45', '1_0', '0x10', '٣', ' 1', '1,5',
          '.', 'e5']
BIAS = [*WEIGHT, '1.1e6', '1e38']
LAYERS = ['6_1', '0_1', '1_3', '3_5', '3-1', 'conv3_1', '3_1,', '3_1 4_1', '']
BAD = {
    '--output-size': ['640', '640x', 'x480', '0x480', '640x0', '640X480', '-640x480', '6.4x4', '6x4x3', ''],
    '--max-size': NATURAL, '--phases': NATURAL, '--iterations': NATURAL, '--slices': NATURAL,
    '--random-seed': WHOLE, '--print-every': WHOLE, '--save-every': WHOLE,
    '--cache': ['2', '-1', 'yes', ''], '--stop-when-converged': ['2', 'yes', ''], '--line-search': ['hold', ''],
    '--auto-maps': ['1', '17', '-2', 'yes', ''],
    '--seed-range': ['16', '240:16', '-1:5', '0:256', 'a:b', 'nan:240', '16:nan', '1:2:3', ':', '1_6:240', '٣:9', ''],
    '--content-weight': WEIGHT, '--style-weight': WEIGHT, '--smoothness': WEIGHT, '--semantic-weight': BIAS,
    '--variety': BIAS, '--style-scale': ['0', '0.09', '10.1', '-1', 'nan', '1e400', 'big', ''],
    '--content-layers': LAYERS, '--style-layers': LAYERS,
    '--method': ['Gatys', 'li', ''], '--rotations': WHOLE + ['13'], '--scales': WHOLE + ['13'],
    '--matching': ['Near', 'far', ''], '--network': ['vgg', 'VGG19', 'resnet', ''],
    '--device': ['tpu', 'GPU0', 'gpu-1', 'cuda:0', 'gpu0,gpu1', 'opencl0', 'cpu0', 'gpu٣', ''],
}
GOOD = [
    ('--output-size=640x480', (640, 480)), ('--auto-maps=2', 2), ('--auto-maps=16', 16),
    ('--seed-range=0:255', (0, 255)), ('--seed-range=7:7', (7, 7)), ('--seed-range=1.5:.2e3', (1.5, 200)),
    ('--random-seed=0', 0), ('--print-every=0', 0), ('--save-every=0', 0),
    ('--style-weight=0', 0), ('--smoothness=1e-3', 1e-3), ('--content-weight=1e20', 1e20), ('--style-weight=.5', .5),
    ('--smoothness=1e-6', 1e-6), ('--semantic-weight=1E6', 1e6), ('--variety=+1.', 1), ('--cache=1', 1),
    ('--style-scale=.1', .1), ('--style-scale=10', 10),
    ('--matching=near', 'near'),
    ('--slices=1000', 1000), ('--style-layers=5_4,1_1,5_4', ['5_4', '1_1']),
    ('--device=gpu0', 'cuda0'), ('--device=gpu12', 'cuda12'), ('--device=gpu', 'cuda'), ('--device=cuda1', 'cuda1'),
    ('--device=opencl0:1', 'opencl0:1'),
]

PATHS = ['--style', '--content', '--output', '--seed', '--weights', '--frames', '--log', '--figure', '--animation']

TEXTURE = [f'--style={FOLDER / "texture_style.png"}', '--network=vgg16', '--style-layers=2_1', '--phases=1',
           '--iterations=1']


def python(code, *arguments, **environment):
    """The output of Python code in a process of its own, in which `import doodle` works."""
    return subprocess.run([sys.executable, '-c', code, *arguments], cwd=ROOT, timeout=600, text=True, check=True,
                          env=os.environ | environment, capture_output=True).stdout


# ---- the command line ----------------------------------------------------------------------------------------------

def test_defaults_are_those_of_the_original():
    options = vars(program.parse_options(['--style=a.png']))
    assert options == {**DEFAULTS, **OURS, 'style': 'a.png'}


def test_a_method_has_defaults_of_its_own():
    gatys = program.parse_options(['--style=a.png', '--method=gatys', '--content-weight=7'])
    assert (gatys.style_layers, gatys.content_layers) == (['1_1', '2_1', '3_1', '4_1', '5_1'], ['4_2'])
    assert (gatys.content_weight, gatys.smoothness, gatys.semantic_weight) == (7, 0, 0)
    published = program.parse_options(['--method=li-wand', '--scales=1', '--style=a.png'])
    assert (published.style_layers, published.rotations, published.scales) == (['3_1', '4_1'], 2, 1)


@pytest.mark.parametrize('name, own', [(name, own) for name, (_, own) in program.METHODS.items()])
def test_what_a_method_has_not_is_refused(refused, name, own):
    for flag in (f'--{key.replace("_", "-")}' for key, default in own.items() if default is None):
        problem, _ = refused('--style=a.png', f'--method={name}', f'{flag}=1')
        assert name in problem and flag in problem
        assert not getattr(program.parse_options(['--style=a.png', f'--method={name}', f'{flag}=0']),
                           flag[2:].replace('-', '_'))


@pytest.mark.parametrize('other', ['--variety=1', '--cache=1', '--matching=near', '--method=gatys'])
def test_matches_can_be_held_only_where_the_image_alone_determines_them(refused, other):
    assert other.split('=')[0] in refused('--style=a.png', '--line-search=held', other)[0]
    assert program.parse_options(['--style=a.png', '--line-search=fresh', other]).line_search == 'fresh'


def test_the_command_of_the_post_is_understood():
    options = program.parse_options(
        '--style samples/gollum.png --content samples/jim_carrey.png --output face_transfer.png --device=gpu0 '
        '--phases=4 --iterations=1000 --content-weight=10 --style-weight=10'.split())
    assert (options.device, options.phases, options.iterations, options.content_weight) == ('cuda0', 4, 1000, 10)


@pytest.mark.parametrize('option, value', GOOD)
def test_good_values_are_taken(option, value):
    name = option[2:].split('=')[0].replace('-', '_')
    assert getattr(program.parse_options(['--style=a.png', option]), name) == value


@pytest.mark.parametrize('option, value', [(option, value) for option, values in BAD.items() for value in values])
def test_bad_values_are_refused_by_name(refused, option, value):
    problem, _ = refused('--style=a.png', f'{option}={value}')
    assert problem.startswith(f'argument {option}: ')


def test_every_option_that_is_no_text_has_bad_values_above():
    kinds = {flag: kind for rows in program.OPTIONS.values() for flag, _, kind, *_ in rows}
    assert set(BAD) == {flag for flag, kind in kinds.items() if kind not in (str, bool, 'version')} - set(PATHS)


@pytest.mark.parametrize('seed', ['42', '-1', '4.5', '1e9', 'random', 'style', 'Noise', 'contnet', 'my seed'])
def test_a_seed_that_is_no_path_is_told_what_there_is(refused, tmp_path, seed):
    problem, fix = refused('--style=a.png', f'--seed={seed}')
    assert repr(seed) in problem and 'noise, content' in problem and 'path' in problem and '--random-seed' in fix
    (tmp_path / seed).touch()
    assert program.parse_options(['--style=a.png', f'--seed={seed}']).seed == seed


@pytest.mark.parametrize('seed', ['noise', 'content', 'nothing.png', 'a/b', './42'])
def test_any_other_seed_is_taken(seed):
    assert program.parse_options(['--style=a.png', f'--seed={seed}']).seed == seed


@pytest.mark.parametrize('option', ['--style', '--content'])
def test_two_styles_or_contents_are_refused(refused, option):
    style = ['--style=a.png'] * (option != '--style')
    problem, _ = refused(*style, f'{option}=b.png', '--phases=2', option, 'c.png')
    assert option in problem and "'b.png'" in problem and "'c.png'" in problem
    assert getattr(program.parse_options([*style, *[f'{option}=b.png'] * 3]), option[2:]) == 'b.png'


def test_of_all_other_options_the_last_counts():
    options = vars(program.parse_options([
        '--style=a.png', '--device=gpu0', '--network=vgg16', '--output=b.png', '--phases=2', '--seed=noise',
        '--device=cpu', '--network=vgg19', '--output=c.png', '--phases=4', '--seed=content', '--method=li-wand',
        '--method=champandard']))
    assert options == {**DEFAULTS, **OURS, 'style': 'a.png', 'device': 'cpu', 'network': 'vgg19', 'output': 'c.png',
                       'phases': 4, 'seed': 'content'}


def test_an_abbreviation_is_one_option_or_refused(refused):
    flags = [flag for rows in program.OPTIONS.values() for flag, *_ in rows]
    for flag in flags:
        for name in (flag[:k] for k in range(3, len(flag))):
            fitting = [other for other in flags if other.startswith(name)]
            if name not in flags and len(fitting) > 1:
                problem, _ = refused('--style=a.png', name, 'x')
                assert all(other in problem for other in fitting)
    assert program.parse_options(['--style=a.png', '--iter=7', '--content-w=3']).iterations == 7


# ---- paths -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('option', PATHS)
def test_home_is_expanded_in_every_path(monkeypatch, option):
    monkeypatch.setenv('HOME', '/home/me')
    root = pwd.getpwuid(0).pw_dir
    for text, expected in (('~/a.png', '/home/me/a.png'), ('~', '/home/me'), ('~root/a.png', f'{root}/a.png'),
                           ('./~/a.png', './~/a.png'), ('a~.png', 'a~.png'), ('a/~root', 'a/~root')):
        options = program.parse_options([f'{option}={text}', *['--style=a.png'] * (option != '--style')])
        assert getattr(options, option[2:]) == expected


@pytest.mark.parametrize('option', PATHS)
def test_the_home_of_nobody_is_refused_and_a_file_of_that_name_is_not(refused, tmp_path, option):
    style = ['--style=a.png'] * (option != '--style')
    problem, fix = refused(*style, f'{option}=~nobody known/a.png')
    assert "'~nobody known/a.png'" in problem and './~nobody known/a.png' in fix
    (tmp_path / '~$draft.png').touch()
    assert getattr(program.parse_options([*style, f'{option}=~$draft.png']), option[2:]) == '~$draft.png'
    assert os.listdir(tmp_path) == ['~$draft.png']


@pytest.mark.parametrize('option', PATHS)
@pytest.mark.parametrize('text, mount, instead', [
    ('~/pictures/a.png', '-v "$HOME:$HOME"', '"$HOME/pictures/a.png"'), ('~', '-v "$HOME:$HOME"', '"$HOME/"'),
    ('~jim/a.png', '-v "/home/jim:/home/jim"', '"/home/jim/a.png"')])
def test_in_a_container_home_is_not_the_caller_s(refused, tmp_path, monkeypatch, option, text, mount, instead):
    monkeypatch.setenv('DOODLE_CONTAINER', '1')
    problem, fix = refused(*['--style=a.png'] * (option != '--style'), f'{option}={text}')
    assert repr(text) in problem and mount in fix and instead in fix and not os.listdir(tmp_path)


@pytest.mark.parametrize('arguments', [['--nonsense'], ['a.png'], ['--style'], ['--phases=two'], ['--content=a.png']])
def test_a_mistake_ends_the_process_with_2_and_two_lines(run, tmp_path, arguments):
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, '')
    assert re.fullmatch(r'ERROR: .+\n  FIX: .+\n', done.stderr)


def test_no_arguments_show_a_command_to_try(run, tmp_path):  # fault 12
    done = run(tmp_path)
    assert done.returncode == 2
    _, fix = done.stderr.splitlines()
    command = re.search('python3 doodle.py (.+?)[.]?$', fix).group(1).split()
    options = program.parse_options(command)
    assert (ROOT / options.style).is_file() and (ROOT / options.content).is_file()


def test_the_largest_random_seed_that_is_drawn_can_be_given_again(tmp_path, monkeypatch, capsys):  # fault 9
    largest = SimpleNamespace(randbits=lambda bits: 2 ** bits - 1, randbelow=lambda end: end - 1)
    monkeypatch.setattr(program, 'secrets', largest)
    monkeypatch.setattr(program, 'import_theano', lambda device: (device, None))
    monkeypatch.setattr(program, 'Objective', lambda *_: sys.exit())
    with pytest.raises(SystemExit):
        program.run([*TEXTURE, f'--output={tmp_path / "o.png"}', '--save-every=0'])
    seed = int(re.search(r'Random seed (\d+)', capsys.readouterr().out).group(1))
    assert program.parse_options(['--style=a.png', f'--random-seed={seed}']).random_seed == seed


def light(option):
    """What an option prints that needs none of the packages."""
    text, modules = python(
        'import runpy, sys\n'
        f'sys.argv = ["doodle.py", "{option}"]\n'
        'try: runpy.run_path("doodle.py", run_name="__main__")\n'
        'except SystemExit as end: assert not end.code\n'
        'print("MODULES", *sys.modules)', COLUMNS='120').split('MODULES')
    assert not {'numpy', 'PIL', 'theano', 'lasagne', 'scipy', 'h5py', 'tqdm'} & set(modules.split())
    return text


def test_the_version_needs_no_package():
    assert light('--version') == f'doodle.py {program.__version__}\n' and program.__version__.count('.') == 2


def test_help_needs_no_package_and_lists_every_option_in_its_group():
    text = light('--help')
    for title, rows in program.OPTIONS.items():
        section = text.split(f'\n{title}:\n')[1].split('\n\n')[0]
        assert re.findall(r'^  (--\S+)', section, re.MULTILINE) == [flag for flag, *_ in rows]


SCRIPTS = [path for folder in ('samples', 'tests') for path in sorted((ROOT / folder).glob('*.py'))
           if not path.name.startswith('test_') and re.search('argparse|guarded', path.read_text())]


@pytest.mark.parametrize('path', mostly_slow(SCRIPTS, ROOT / 'samples/measure_memory.py', ROOT / 'tests/kill.py'),
                         ids=lambda path: path.name)
def test_help_of_each_script_comes_before_any_work(tmp_path, path):
    (tmp_path / 'theano.py').write_text('raise ImportError("not for --help")')
    done = subprocess.run([sys.executable, path, '--help'], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(tmp_path)})
    missing = re.search("No module named '.+'", done.stderr)
    if missing and path.read_text().startswith('# /// script'):         # with packages of its own
        pytest.skip(missing[0])
    assert (done.returncode, done.stderr) == (0, '') and done.stdout.startswith(f'usage: {path.name}')


# ---- the terminal ----------------------------------------------------------------------------------------------------

def on_a_terminal(folder, **environment):
    """What a run that ends early prints on a terminal."""
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, ROOT / 'doodle.py', '--style=none.png'], cwd=folder, stdout=theirs,
                   stderr=subprocess.DEVNULL, env={**os.environ, 'NO_COLOR': '', **environment})
    os.close(theirs)
    with open(ours, 'rb', buffering=0) as terminal:
        return terminal.read(1000).decode()


def test_a_terminal_gets_bold_a_pipe_and_no_color_get_plain_text(run, tmp_path):
    assert '\033[1mNeural Doodle\033[0m for' in on_a_terminal(tmp_path)
    for plain in (on_a_terminal(tmp_path, NO_COLOR='1'), run(tmp_path, '--style=none.png', NO_COLOR='').stdout):
        assert 'Neural Doodle for semantic style transfer.' in plain and '\033' not in plain


# ---- the machine -----------------------------------------------------------------------------------------------------

def test_another_python_is_refused_in_a_sentence():
    assert ast.parse((ROOT / 'doodle.py').read_text(), feature_version=(3, 8))    # older ones understand it so far
    for version in ((3, 8, 20), (3, 10, 13), (3, 15, 0)):
        problem, fix, code = python('import sys\n'
                                    'sys.stderr = sys.stdout\n'
                                    f'sys.version_info = {version}\n'
                                    'try:\n'
                                    '    import doodle\n'
                                    'except SystemExit as end:\n'
                                    '    print(end.code)\n').splitlines()
        assert f'ERROR: This is Python 3.{version[1]},' in problem and '3.11 to 3.14' in problem and code == '2'
        assert all(way in fix for way in ('FIX: install python3.11', 'docker', 'uv run'))


def test_no_compiler_is_a_sentence(run, tmp_path):
    done = run(tmp_path, *TEXTURE, PATH=str(tmp_path), THEANO_FLAGS='')
    assert done.returncode == 2
    assert re.fullmatch(r'ERROR: There is no g\+\+.*\n  FIX: install g\+\+.*\n', done.stderr)


@pytest.mark.parametrize('how', mostly_slow([['-W', 'error'], ['-X', 'dev']]))
def test_warnings_turned_on_change_nothing(tmp_path, how):
    done = subprocess.run([sys.executable, *how, ROOT / 'doodle.py', *TEXTURE, '--log=log'], cwd=tmp_path, text=True,
                          capture_output=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, '') and (tmp_path / 'output.png').exists()


@pytest.mark.slow
@pytest.mark.parametrize('how', [['-W', 'error'], ['-X', 'dev']])
def test_warnings_turned_on_change_nothing_of_painted_maps(tmp_path, how):
    for name in ('astronaut', 'hopper'):
        shutil.copy(ROOT / f'samples/{name}.png', tmp_path)
    done = subprocess.run([sys.executable, *how, ROOT / 'doodle.py', '--style=astronaut.png', '--content=hopper.png',
                           '--network=vgg16', '--max-size=64', '--phases=1', '--iterations=1', '--auto-maps=4'],
                          cwd=tmp_path, text=True, capture_output=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, '') and (tmp_path / 'output.png').exists()


def test_a_python_without_docstrings_is_refused(tmp_path):
    done = subprocess.run([sys.executable, '-OO', ROOT / 'doodle.py', *TEXTURE], cwd=tmp_path, text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == 2 and '-OO' in done.stderr and done.stderr.count('\n') == 2


def limited(limit, *arguments):
    """A run in a shell after `ulimit` with some arguments."""
    return subprocess.run(['bash', '-c', f'ulimit {limit} && "$0" "$@"', sys.executable, ROOT / 'doodle.py',
                           *arguments], text=True, capture_output=True, timeout=60)


@pytest.mark.slow
def test_few_open_files_are_a_sentence_and_what_may_be_raised_is(tmp_path):
    done = limited('-n 10', *TEXTURE)
    assert done.returncode == 2 and re.fullmatch(r'ERROR: Only 10 files .+\n  FIX: .*ulimit -n.+\n', done.stderr)
    assert limited('-Sn 10', *TEXTURE, f'--output={tmp_path}/o.png', '--save-every=0').returncode == 0


@pytest.mark.parametrize('text, threads', [('2', '2'), ('2,1', '2'), (' 03 , 2', '3'), ('999', '999')])
def test_of_several_numbers_of_threads_the_first_counts(monkeypatch, text, threads):
    monkeypatch.setenv('OMP_NUM_THREADS', text)
    program.prepare_process()
    assert os.environ['OMP_NUM_THREADS'] == threads


@pytest.mark.parametrize('text', ['abc', '0', '-1', '1.5', ',2', '2 1', '1000', '٣'])
def test_what_is_no_number_of_threads_is_refused(refused, monkeypatch, text):
    monkeypatch.setenv('OMP_NUM_THREADS', text)
    assert refused('--style=a.png')[0] == f'OMP_NUM_THREADS={text!r} is not a number of threads from 1 to 999.'


@pytest.mark.parametrize('name', first_quick(['numpy', 'theano', 'PIL', 'tqdm', 'lasagne', 'skimage'], 2))
def test_a_missing_package_is_a_sentence(tmp_path, name):
    printed = python('import doodle, sys\n'
                     'sys.stderr = sys.stdout\n'
                     f'sys.modules[{name!r}] = None\n'
                     'print(doodle.main(sys.argv[1:]))', '--style=samples/astronaut.png', '--auto-maps=4',
                     '--content=samples/hopper.png', '--network=vgg16', f'--output={tmp_path}/o.png', '--save-every=0')
    problem, fix, code = printed.splitlines()[-3:]
    assert name in problem and problem.startswith('ERROR') and 'pip install -r requirements.txt' in fix and code == '2'


def test_a_broken_package_is_a_sentence(tmp_path):
    (tmp_path / 'PIL').mkdir()
    (tmp_path / 'PIL/__init__.py').write_text('raise ImportError("libjpeg.so.62: cannot open shared object file")')
    printed = python('import doodle, sys\n'
                     'sys.stderr = sys.stdout\n'
                     'print(doodle.main(sys.argv[1:]))', '--style=samples/gravel.png', PYTHONPATH=str(tmp_path))
    problem, fix, code = printed.splitlines()
    assert problem == 'ERROR: libjpeg.so.62: cannot open shared object file.' and 'pip install' in fix and code == '2'


def test_no_python_headers_are_a_sentence(tmp_path, monkeypatch):
    program.check_compiler()
    monkeypatch.setattr(program.sysconfig, 'get_paths', lambda: {'include': str(tmp_path)})
    with pytest.raises(program.UserError, match='headers') as error:
        program.check_compiler()
    assert 'python3-dev' in error.value.args[1]


def theano_flags(**environment):
    """THEANO_FLAGS as Theano would find them."""
    made = python('import doodle, os, sys\n'
                  'sys.modules["theano"] = None\n'
                  'doodle.import_pillow()\n'
                  'try: doodle.import_theano("cpu")\n'
                  'except (ImportError, doodle.UserError): print(os.environ["THEANO_FLAGS"])', **environment)
    return dict(flag.split('=', 1) for flag in made.strip().split(','))


def test_theano_flags_of_the_user_win_key_by_key():
    ours = theano_flags(THEANO_FLAGS='')
    assert ours['floatX'] == 'float32' and ours['blas.ldflags'] and ours['dnn.enabled'] == 'False'
    theirs = {'optimizer': 'fast_compile', 'dnn.enabled': 'auto', 'blas.ldflags': '-lmyblas'}
    both = theano_flags(THEANO_FLAGS=', '.join(f'{key}={value}' for key, value in theirs.items()))
    assert 'scipy' not in both.pop('gcc.cxxflags', '')
    assert both == {**{key: value for key, value in ours.items() if key != 'gcc.cxxflags'}, **theirs}


def test_names_that_the_headers_of_numpy_2_lack_are_told_the_compiler(doodle):
    flags = theano_flags(THEANO_FLAGS='blas.ldflags=-lmyblas').get('gcc.cxxflags', '').split()
    old = np.__version__.startswith('1.')
    assert flags == ([] if old else [f'-D{name}={stands}' for name, stands in doodle.C_NAMES.items()])


def test_names_that_numpy_lacks_are_put_back_and_no_others(doodle, monkeypatch):
    lacking = SimpleNamespace(prod=np.prod, dtype=np.dtype, get_include=np.get_include, product='its own')
    monkeypatch.setattr(doodle, 'np', lacking)
    monkeypatch.setattr(doodle.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setitem(sys.modules, 'numpy.distutils', None)
    doodle.put_back()
    assert (lacking.bool, lacking.complex, lacking.product) == (bool, complex, 'its own')
    assert lacking.sctype2char('float32') == 'f'
    assert sys.modules['numpy.distutils'].misc_util.get_numpy_include_dirs() == [np.get_include()]
    assert np.bool is (bool if np.__version__.startswith('1.') else np.bool_)


def test_compiler_flags_of_the_user_join_those_that_the_blas_needs():
    ours = theano_flags(THEANO_FLAGS='').get('gcc.cxxflags', '').split()
    both = theano_flags(THEANO_FLAGS='gcc.cxxflags=-march=native -O1')['gcc.cxxflags'].split()
    assert set(both) == {*ours, '-march=native', '-O1'}


def test_theano_takes_the_flags():
    config = python('import doodle, sys\n'
                    'doodle.import_pillow()\n'
                    'print(doodle.import_theano("cpu"))\n'
                    'config = doodle.theano.config\n'
                    'print(config.optimizer, config.floatX, config.device, config.cxx != "")',
                    THEANO_FLAGS='optimizer=fast_compile')
    assert config == "('cpu', None)\nfast_compile float32 cpu True\n"


@pytest.mark.slow
def test_the_headers_are_read_once(tmp_path):
    python('import doodle, os\n'
           'doodle.import_pillow()\n'
           'doodle.import_theano("cpu")\n'
           'from doodle import T, theano\n'
           'x = T.fvector()\n'
           'theano.function([x], x + 1)\n'
           'header = os.path.join(theano.config.compiledir, "headers.h")\n'
           'assert os.path.exists(header + ".gch")\n'
           'open(header, "w").write("#error")\n'
           'theano.function([x], x * x - 3)', THEANO_FLAGS=f'base_compiledir={tmp_path}')


def test_a_home_that_cannot_be_written_moves_the_compile_cache(tmp_path):
    flags = theano_flags(HOME=str(tmp_path / 'none'), TMPDIR=str(tmp_path), THEANO_FLAGS='')
    assert flags['base_compiledir'].startswith(str(tmp_path))
    assert theano_flags(THEANO_FLAGS='')['base_compiledir'] == os.path.expanduser('~/.theano')
    assert 'base_compiledir' not in theano_flags(THEANO_FLAGS=f'compiledir={tmp_path}')


def others(path, how):
    """Make a folder of compiled code that others have, or could have, written to; skipped if that needs root."""
    path.mkdir(0o755)
    inside = path / 'compiledir_x'
    if how == 'writable':
        path.chmod(0o777)
    elif how == 'writable inside':
        inside.mkdir()
        inside.chmod(0o775)
    elif os.getuid():
        pytest.skip('needs root')
    elif how == "another user's":
        os.chown(path, 12345, 12345)
    elif how == "another user's link":
        path.rename(path.with_name('mine'))
        path.symlink_to('mine')
        os.lchown(path, 12345, 12345)


@pytest.mark.parametrize('how', ['writable', 'writable inside', "another user's", "another user's link"])
@pytest.mark.parametrize('home', ['home', 'none'])
def test_compiled_code_that_others_may_have_made_is_not_run(tmp_path, monkeypatch, capsys, how, home):
    (tmp_path / 'home').mkdir()
    monkeypatch.setenv('HOME', str(tmp_path / home))
    monkeypatch.setattr(program.tempfile, 'tempdir', str(tmp_path))
    place = tmp_path / ('home/.theano' if home == 'home' else f'theano-{os.getuid()}')
    assert program.compile_cache() == str(place) and place.stat().st_mode & 0o777 == 0o700
    assert program.compile_cache() == str(place) and not capsys.readouterr().out
    place.rmdir()
    others(place, how)
    fresh = program.compile_cache()
    assert os.path.dirname(fresh) == str(tmp_path) and os.stat(fresh).st_mode & 0o777 == 0o700
    assert re.fullmatch(r'WARNING: others can write in .+ FIX: .+\n', capsys.readouterr().out)


def test_a_link_of_ones_own_to_the_compile_cache_is_followed(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'other disk').mkdir(0o700)
    (tmp_path / '.theano').symlink_to('other disk')
    assert program.compile_cache() == str(tmp_path / '.theano')


BREAKING = ('mode=DebugMode', 'linker=py', 'compute_test_value=raise', 'cast_policy=numpy+floatX', 'floatX=float64',
            'warn_float64=raise', 'numpy.seterr_all=raise', 'int_division=raise')


@pytest.mark.parametrize('where', mostly_slow(['THEANO_FLAGS', 'THEANORC']))
def test_keys_that_break_the_program_are_overridden(run, tmp_path, where):
    (tmp_path / 'rc').write_text('\n'.join(['[global]', *BREAKING, '']))
    done = run(tmp_path, *TEXTURE, **{where: ','.join(BREAKING) if where == 'THEANO_FLAGS' else 'rc'})
    assert (done.returncode, done.stderr) == (0, '') and (tmp_path / 'output.png').exists()


@pytest.mark.parametrize('flags, named', first_quick([
    ('cxx=', 'cxx= '), ('cxx=none', 'cxx=none'), ('cxx=/bin/false', '/bin/false'),
    ('optimizer=fast', '"optimizer"'),
    ('base_compiledir=/dev/null/x', "'/dev/null/x/"), ('compiledir=/dev/null/x', "'/dev/null/x'"),
    ('optimizer_verbose=perhaps', 'optimizer_verbose'), ("gcc.cxxflags='-O1", 'THEANO_FLAGS'),
    ('compiledir_format=%(none)s', "'none'")], 3))
def test_flags_that_theano_cannot_take_are_refused_by_name(run, tmp_path, flags, named):
    (tmp_path / 'rc').write_text(f'[global]\n{flags}\n')
    for where in {'THEANO_FLAGS': flags} | ({'THEANORC': 'rc'} if 'gcc' not in flags else {}):
        done = run(tmp_path, *TEXTURE, **{where: flags if where == 'THEANO_FLAGS' else 'rc'})
        assert done.returncode == 2 and re.fullmatch(r'ERROR: .+\n  FIX: .+\n', done.stderr), done.stderr
        assert named in done.stderr


@pytest.mark.parametrize('kind', ['garbage', 'bytes', 'folder', 'fifo'])
def test_a_theanorc_that_cannot_be_read_is_named(tmp_path, monkeypatch, kind):
    path = tmp_path / 'rc'
    {'garbage': lambda: path.write_text('cxx\n'), 'bytes': lambda: path.write_bytes(b'\xff'), 'folder': path.mkdir,
     'fifo': lambda: os.mkfifo(path)}[kind]()
    monkeypatch.setenv('THEANORC', f'{tmp_path}/missing:{path}')
    with pytest.raises(program.UserError) as error:
        program.read_theanorc()
    assert repr(str(path)) in error.value.problem
    monkeypatch.setenv('THEANORC', '')
    assert program.read_theanorc() == {}


@pytest.mark.slow
def test_the_compiler_of_the_user_is_the_one_that_compiles(tmp_path):
    """... also where there is no g++ on the path, and with a comma in a quoted flag."""
    wrapper, flags = tmp_path / 'my-g++', f"cxx={tmp_path}/my-g++,gcc.cxxflags='-O0 -Wl,-O1',base_compiledir={tmp_path}"
    wrapper.write_text(f'#!/bin/sh\necho used >> {tmp_path}/used\nexec {shutil.which("g++")} "$@"\n')
    wrapper.chmod(0o755)
    python('import doodle\n'
           'doodle.import_pillow()\n'
           'doodle.import_theano("cpu")\n'
           'assert "-Wl,-O1" in doodle.theano.config.gcc.cxxflags\n'
           'x = doodle.T.fvector()\n'
           'doodle.theano.function([x], x + 1)', THEANO_FLAGS=flags)
    assert len((tmp_path / 'used').read_text().splitlines()) > 3


def test_a_gpu_that_cannot_be_had_is_one_warning_and_the_cpu_does_the_work(run, tmp_path):
    done = run(tmp_path, *TEXTURE, '--device=gpu99', '--log=log', THEANO_FLAGS='')
    assert done.returncode == 0 and 'Traceback' not in done.stderr
    warning, = re.findall('^WARNING.*$', done.stdout, re.MULTILINE)
    assert 'cuda99' in warning and 'FIX' in warning
    assert 'Using device `cpu`' in done.stdout and '`cpu`' in done.stdout.splitlines()[-1]
    assert '"device": "cpu"' in (tmp_path / 'log').read_text().splitlines()[0]


def test_the_warning_names_the_device_of_theano_flags(tmp_path):
    printed = python('import doodle, sys\n'
                     'doodle.Objective = lambda *_: sys.exit()\n'
                     'doodle.main(sys.argv[1:])', *TEXTURE, f'--output={tmp_path / "o.png"}', '--save-every=0',
                     THEANO_FLAGS='device=cuda98')
    assert 'cuda98 cannot be used' in printed and 'cpu cannot' not in printed


def fake_compiler(folder, code):
    """A g++ in `folder`, a shell script that runs `code` where it would compile; the PATH with it."""
    script = folder / 'g++'
    script.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) {code} ;; esac\nexec {shutil.which("g++")} "$@"\n')
    script.chmod(0o755)
    return f'{folder}:{os.environ["PATH"]}'


@pytest.mark.parametrize('problem, code', [
    ('error writing to /tmp/x.s: No space left', 'echo "x.s: fatal error: error writing to /tmp/x.s: No space left on '
                                                 'device" >&2; exit 1'),
    ("unrecognized option '--x'", '''echo "g++: error: unrecognized option '--x'" >&2; exit 1''')])
@pytest.mark.parametrize('warm', first_quick([True, False], 1))
def test_a_compiler_that_fails_is_a_sentence_and_leaves_nothing(run, tmp_path, problem, code, warm):
    (tmp_path / 'tmp').mkdir()
    if warm:                                                            # else it fails while Theano is imported
        code = f'[ ! -e {tmp_path}/cache/*/lazylinker_ext/lazylinker_ext.so ] || {{ {code}; }}'
    done = run(tmp_path, *TEXTURE, '--style-layers=1_2', PATH=fake_compiler(tmp_path, code),
               TMPDIR=str(tmp_path / 'tmp'), THEANO_FLAGS=f'base_compiledir={tmp_path}/cache')
    assert done.returncode == 2 and re.fullmatch(r'ERROR: .+\n  FIX: .+\n', done.stderr), done.stderr
    assert problem in done.stderr and 'temporary file' not in done.stdout and not os.listdir(tmp_path / 'tmp')
    assert ('TMPDIR' in done.stderr) == ('space' in problem)


def test_a_full_temporary_folder_is_told_whatever_needs_it_first():
    with pytest.raises(program.UserError) as error, program.compiling():
        raise AssertionError('[Errno 28] No space left on device')                       # as Theano's import ends
    assert 'TMPDIR' in error.value.fix


COMPILE = '''
import doodle
doodle.import_pillow()
doodle.import_theano("cpu")
x = doodle.T.fvector()
print(doodle.theano.function([x], x * x - 3)([2]))
'''


@pytest.mark.slow
@pytest.mark.parametrize('damage', [lambda path: os.truncate(path, path.stat().st_size // 2),
                                    lambda path: os.truncate(path, 10), lambda path: os.truncate(path, 0),
                                    lambda path: path.write_bytes(path.read_bytes()[:5000].ljust(path.stat().st_size,
                                                                                                 b'\0'))])
def test_compiled_modules_that_are_cut_off_are_compiled_anew(tmp_path, damage):
    flags = f'base_compiledir={tmp_path},gcc.cxxflags=-O0'
    assert python(COMPILE, THEANO_FLAGS=flags).splitlines()[-1] == '[1.]'
    modules = list(tmp_path.rglob('*.so'))
    assert len(modules) >= 3
    for path in modules:
        damage(path)
    assert python(COMPILE, THEANO_FLAGS=flags).splitlines()[-1] == '[1.]'
    assert python('import doodle, sys; assert all(map(doodle.is_whole, sys.argv[1:]))',
                  *map(str, tmp_path.rglob('*.so'))) == ''


# ---- another run that compiles ---------------------------------------------------------------------------------------

@pytest.fixture
def lock(doodle, tmp_path, monkeypatch):
    """lock(owner): lock a compile cache as `owner`, try to take it; what is said, and after how many seconds."""
    monkeypatch.setattr(doodle, 'FORGOTTEN', 1.5)
    folder = tmp_path / 'lock_dir'

    def lock(owner, change=lambda path: None):
        folder.mkdir()
        if owner is not None:
            (folder / 'lock').write_text(owner + '\n')
        timer = threading.Thread(target=change, args=(folder / 'lock',))
        said, start = [], time.time()
        with mock.patch.object(doodle, 'say', said.append):
            timer.start()
            doodle.take_lock(str(folder))
        timer.join()
        assert (folder / 'lock').read_text().split('_')[0] == str(os.getpid())
        shutil.rmtree(folder)
        return said, time.time() - start
    return lock


HOST = socket.gethostname()


def left(path):
    """What an owner does who lives for 4 seconds, and changes the file as often as refreshing does."""
    for number in range(8):
        path.write_text(re.sub('_.*?_', f'_{number}_', path.read_text(), count=1))
        time.sleep(.5)
    path.unlink()
    path.parent.rmdir()


@pytest.mark.slow
def test_the_lock_of_a_run_that_is_gone_is_passed_over_and_said(lock):
    gone = subprocess.Popen(['true'])
    gone.wait()
    said, seconds = lock(f'{gone.pid}_1_{HOST}')
    assert len(said) == 1 and 'gone' in said[0] and seconds < 1
    for owner in (f'{os.getpid()}_1_other-host', '', None, 'no lock at all'):
        said, seconds = lock(owner)
        assert len(said) == 2 and 'Waiting' in said[0] and 'gone' in said[1] and 1.4 < seconds


def test_a_process_that_got_the_number_of_one_that_is_gone_is_not_it(lock):
    said, seconds = lock(f'{os.getpid()}_1_{HOST}', lambda path: os.utime(path, (0, 0)))
    assert 'gone' in said[-1] and seconds < 1.4


@pytest.mark.parametrize('host', mostly_slow([HOST, 'other-host', 'host_with_bars']))
def test_a_live_lock_is_waited_for_and_said_once(lock, host):
    said, seconds = lock(f'{os.getpid()}_1_{host}', left)
    assert len(said) == 1 and f'process {os.getpid()} on {host}' in said[0] and 3.9 < seconds


def test_who_compiles_shows_that_it_lives(doodle, tmp_path, monkeypatch):
    monkeypatch.setattr(doodle, 'FORGOTTEN', .3)
    compilelock, path = doodle.theano.gof.compilelock, f'{doodle.theano.config.compiledir}/lock_dir/lock'
    compilelock.get_lock()
    try:
        with doodle.refreshed_lock():
            owners = {doodle.lock_owner(path) for _ in range(10) if not time.sleep(.05)}
    finally:
        compilelock.release_lock()
    assert len(owners - {''}) > 2 and {owner.split('_')[0] for owner in owners - {''}} == {str(os.getpid())}
    with doodle.refreshed_lock():                                       # not this process's: nothing to refresh
        time.sleep(.2)
    assert not os.path.exists(path)


# ---- through a link --------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_script_finds_its_files_through_a_link(tmp_path):
    for path, target in (('bin/doodle', '../link.py'), ('link.py', ROOT / 'doodle.py')):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).symlink_to(target)
    for name in ('astronaut', 'hopper'):
        shutil.copy(ROOT / f'samples/{name}.png', tmp_path)
    done = subprocess.run([sys.executable, tmp_path / 'bin/doodle', '--style=astronaut.png', '--content=hopper.png',
                           '--auto-maps=2', '--max-size=48', '--phases=1', '--iterations=1', '--network=vgg16'],
                          cwd=tmp_path, text=True, capture_output=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, '') and f'`{ROOT / "vgg16.npz"}`' in done.stdout
