"""The Dockerfile, built and run with podman, as a caller would with docker. Takes some minutes and 3 GB in /var/tmp.

No registry of images is needed: the base image is made with debootstrap. What this machine needs to reach its package
registries (certificates, pip's settings) is mounted into the builds, so that none of it is in the Dockerfile.
Set DOODLE_CONTAINERS to a folder to keep the images there for the next time.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import doodle

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
CALLER = 1234
FACES = '--style=samples/astronaut.png --content=samples/hopper.png'.split()
QUICK = '--max-size=96 --phases=1 --iterations=1'.split()


def run(*command, **options):
    """What a command says, stdout and stderr together, and its exit code."""
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    return done.stdout, done.returncode


def checked(*command, **options):
    said, code = run(*command, **options)
    assert code == 0, said
    return said


def tool(name):
    """A command of this Python's environment, or else of the machine."""
    path = shutil.which(name, path=os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH'])
    return path or pytest.skip(f'there is no {name}')


@pytest.fixture(scope='module')
def store():
    """podman's settings and images, apart from the machine's own."""
    missing = [name for name in ('podman', 'runc', 'debootstrap') if not shutil.which(name)]
    if missing or os.getuid():
        pytest.skip(f'root builds images with podman, runc and debootstrap; missing: {" ".join(missing) or "root"}')
    kept = os.environ.get('DOODLE_CONTAINERS')
    store = Path(kept or tempfile.mkdtemp(dir='/var/tmp', prefix='doodle-'))
    (store / 'tmp').mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        (store / 'containers.conf').write_text(
            '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=30000:30000"]\nnetns = "host"\n'
            '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
            f'env = ["TMPDIR={store}/tmp"]\n')  # for what builds cache, too
        (store / 'storage.conf').write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{store}/graph"\nrunroot = "{store}/run"\n')
        patch.setenv('CONTAINERS_CONF', str(store / 'containers.conf'))
        patch.setenv('CONTAINERS_STORAGE_CONF', str(store / 'storage.conf'))
        patch.setenv('BUILDAH_ISOLATION', 'chroot')
        patch.delenv('https_proxy', raising=False)  # conftest.py shuts the net, which podman would pass on to builds
        yield store
        run('podman', 'rm', '--all', '--force')
        run('podman', 'volume', 'rm', '--all', '--force')
        if not kept:
            run('podman', 'rmi', '--all', '--force')
            run('umount', store / 'graph/overlay')
            shutil.rmtree(store)


def registries(store):
    """Mounts by which a build reaches this machine's package registries: pip's settings, certificates."""
    lines, files = ['[global]'], {os.environ.get('SSL_CERT_FILE', '/etc/ssl/certs/ca-certificates.crt')}
    for line in checked(sys.executable, '-m', 'pip', 'config', 'list').splitlines():
        name, value = re.fullmatch(r"[\w:]+\.([\w-]+)='(.*)'", line).groups()
        if name in ('cert', 'client-cert', 'index-url', 'extra-index-url', 'trusted-host') and 'file:' not in value:
            lines.append(f'{name} = {value}')
            files |= {value} if value.startswith('/') else set()
    (store / 'pip.conf').write_text('\n'.join(dict.fromkeys(lines)) + '\n')
    folders = {os.path.dirname(file) for file in files if os.path.exists(file)}  # with what links there point at
    return [f'--volume={folder}:{folder}:ro' for folder in folders] + [f'--volume={store}/pip.conf:/etc/pip.conf:ro']


@pytest.fixture(scope='module')
def build(store):
    """build(target) -> the image's name, as in docker-compose.yml."""
    base = 'docker.io/library/debian:bookworm-slim'
    if run('podman', 'image', 'exists', base)[1]:
        root = store / 'debian'
        checked('debootstrap', '--variant=minbase', '--include=ca-certificates', 'bookworm', root)
        # As in the real one, which is slim.
        checked('sh', '-c', 'cd "$0" && rm -rf var/cache/apt/archives/*.deb var/lib/apt/lists/* '
                            'usr/share/doc/* usr/share/man/* usr/share/locale/* && '
                            'tar -c . | podman import - "$1"', root, base)
        shutil.rmtree(root)

    def build(target, *options, expected=0):
        name = f'neural-doodle:{target}'
        said, code = run('podman', 'build', '--pull=never', '--layers', *registries(store), '--target', target,
                         '-t', name, *options, ROOT)
        assert code == expected, said
        return said if options else name
    return build


@pytest.fixture(scope='module')
def image(build):
    return build('cpu')


def size(image):
    """Megabytes, as `docker images` counts them."""
    return int(checked('podman', 'image', 'inspect', '--format={{.Size}}', image)) / 1e6


@pytest.fixture
def folder(tmp_path):
    """A caller's folder: samples and an empty frames."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "the caller's"
    shutil.copytree(ROOT / 'samples', folder / 'samples')
    (folder / 'frames').mkdir()
    for path in (folder, *folder.rglob('*')):
        os.chown(path, CALLER, CALLER)
    return folder


def two(folder):
    return [f'--volume={folder}/{name}:/nd/{name}' for name in ('samples', 'frames')]


def owners(folder):
    """Who owns the files in a folder and in all below it."""
    return {path.stat().st_uid for path in folder.rglob('*')}


def test_the_default_target_is_cpu_and_the_image_is_small(image):
    assert (ROOT / 'Dockerfile').read_text().rpartition('\nFROM ')[2].startswith('program AS cpu\n')
    assert size(image) <= 800


def test_the_posts_usage_two_mounts(image, folder):
    said = checked('podman', 'run', '--rm', *two(folder), image, 'python3', 'doodle.py', *FACES, *QUICK,
                   '--output=face_transfer.png', '--device=gpu0')
    assert 'WARNING: cuda0 cannot be used' in said and '--target gpu' in said
    assert said.splitlines()[-1].endswith('`/nd/frames/face_transfer.png`, on the mounted folder /nd/frames.')
    assert {path.name for path in (folder / 'frames').iterdir()} == {
        'face_transfer.png', '0000.png', 'command.txt', 'watch.html', 'watch.js'}
    assert owners(folder) == {CALLER}


def test_one_mount(image, folder):
    said = checked('podman', 'run', '--rm', f'--volume={folder}:/nd', image, *FACES, *QUICK, '--output=faces/swap.png')
    assert said.splitlines()[-1].endswith('`faces/swap.png`, on the mounted folder /nd.')
    assert (folder / 'faces/swap.png').exists() and owners(folder) == {CALLER}


def test_an_empty_frames_folder_that_dockerd_made_is_handed_to_the_caller(image, folder):
    os.chown(folder / 'frames', 0, 0)
    checked('podman', 'run', '--rm', *two(folder), image, *FACES, *QUICK)
    assert (folder / 'frames/output.png').exists() and owners(folder) == {CALLER}


def test_any_other_user(image, folder):
    (folder / 'frames').chmod(0o777)
    checked('podman', 'run', '--rm', '--user=4321:99', '--env=HOME=/nowhere', *two(folder), image, *FACES, *QUICK)
    assert {path.stat().st_uid for path in (folder / 'frames').iterdir()} == {4321}


@pytest.mark.parametrize('mount', ['/data', '/pictures', '/nd/photos', '/tmp/pics', '/usr/src/app', 'here'])
def test_files_are_the_caller_s_on_any_mount(image, folder, mount):
    if mount == 'here':
        options = [f'--volume={folder}:{folder}', f'--workdir={folder}']
    else:
        options = [f'--volume={folder}:{mount}']
    said = checked('podman', 'run', '--rm', *options, image, *FACES, *QUICK)
    assert said.splitlines()[-1].endswith(f'on the mounted folder {folder if mount == "here" else mount}.')
    assert (folder / 'output.png').exists() and (folder / 'frames/0000.png').exists() and owners(folder) == {CALLER}


def test_nothing_is_computed_that_would_be_lost(image, folder):
    pictures = f'--volume={folder}/samples:/nd/samples:ro'
    for more in [], ['--tmpfs=/nd/frames'], ['--volume=doodle-test:/cache']:
        said, code = run('podman', 'run', '--rm', pictures, *more, image, *FACES, *QUICK)
        assert code == 2 and 'add -v "$PWD:/data"' in said and len(said.splitlines()) == 2
        assert 'is lost with the container' in checked('podman', 'run', '--rm', pictures, *more, image, *FACES,
                                                       *QUICK, '--check')
    said = checked('podman', 'run', '--name=fetched', '--env=DOODLE_UNMOUNTED=1', pictures, image, *FACES, *QUICK)
    assert 0 < said.index('is lost with the container') < said.index('Phase')
    checked('podman', 'cp', 'fetched:/nd/output.png', folder)


def test_a_single_picture_that_is_mounted_keeps_no_result(image, folder):
    said, code = run('podman', 'run', '--rm', f'--volume={folder}/samples/hopper.png:/nd/me.png', image, *FACES[:1],
                     '--content=me.png', *QUICK)
    assert code == 2 and 'no folder is mounted' in said and 'add -v "$PWD:/data"' in said


def test_a_demo_on_no_mount_is_warned(image):
    said = checked('podman', 'run', '--rm', image, *FACES, *QUICK)
    assert 0 < said.index('is lost with the container') < said.index('Neural Doodle')
    assert 'WARNING: VGG19 cannot be fetched' in said and '--build-arg VGG19=required' in said


def test_without_the_right_to_change_the_user_that_is_named(image, folder):
    caller = '--user "$(id -u):$(id -g)"'
    command = ['podman', 'run', '--rm', '--cap-drop=ALL', f'--volume={folder}:/data', image, *FACES, *QUICK,
               '--save-every=0']
    said, code = run(*command)
    assert code == 2 and caller in said and f'drwxr-xr-x and of {CALLER}' in said
    folder.chmod(0o777)
    said = checked(*command)
    assert 'WARNING: files will be root' in said and caller in said and (folder / 'output.png').stat().st_uid == 0


def test_no_arguments_show_a_command_for_docker(image):
    said, code = run('podman', 'run', '--rm', image)
    assert code == 2 and 'FIX: ' in said and 'docker run --rm -v "$PWD:/data"' in said and 'python3' not in said


def test_a_failed_fetch_stops_a_build_that_requires_it(build):
    said = build('vgg19', '--build-arg=VGG19=required', expected=1)
    assert 'To try again: docker build --build-arg VGG19=required' in said
    build('vgg19', '--build-arg=VGG19=skip')
    assert 'none of try, required, skip' in build('vgg19', '--build-arg=VGG19=yes', expected=2)


def test_any_user_can_fetch_vgg19_to_the_volume(image, folder):
    said, code = run('podman', 'run', '--rm', '--user=4321', '--volume=doodle-test:/cache',
                     '--env=DOODLE_ADDRESSES=http://127.0.0.1:9/', image, *FACES, *QUICK, '--network=vgg19')
    assert code == 2 and '127.0.0.1:9: <urlopen error [Errno 111] Connection refused>' in said


def test_what_is_compiled_is_kept_for_each_user(image, folder):
    new = 'Some of it is new'
    folder.chmod(0o777)
    for user, said_new in (CALLER, True), (CALLER, False), (4321, False):
        flags = ['--env=THEANO_FLAGS=gcc.cxxflags=-DANOTHER=1'] * (user == CALLER)
        options = [f'--user={user}'] if user != CALLER else []
        said = checked('podman', 'run', '--rm', *options, *flags, '--volume=doodle-test:/cache',
                       f'--volume={folder}:/data', image, *FACES, *QUICK, '--save-every=0')
        assert (new in said) == said_new
    ls = checked('podman', 'run', '--rm', '--volume=doodle-test:/cache', '--entrypoint=ls', image, '-ln', '/cache')
    for user in CALLER, 4321:
        assert re.search(rf'^drwx------ +\d+ {user} ', ls, re.MULTILINE)


def test_too_little_memory_is_said(image):
    said, code = run('podman', 'run', '--rm', '--memory=200m', image, *FACES, *QUICK)
    if 'memory' not in said or 'OCI' in said:
        pytest.skip(f'no limits of memory here: {said}')
    assert code == 2 and 'docker run --memory' in said and 'has 0.2 GB' in said


def test_no_program_has_the_rights_of_another_user(image):
    assert checked('podman', 'run', '--rm', '--entrypoint=find', image, '/', '-xdev', '-type', 'f', '-perm', '/6000'
                   ) == ''


def test_anyone_may_write_where_people_work(image):
    said = checked('podman', 'run', '--rm', '--entrypoint=stat', image, '--format=%a', '/cache', '/nd', '/nd/samples')
    assert said.split() == ['1777'] * 3


def test_labels_and_locale(image):
    said = checked('podman', 'image', 'inspect', '--format={{json .Config}}', image)
    for label in 'source', 'version', 'revision', 'created':
        assert f'"org.opencontainers.image.{label}"' in said
    assert f'image.version":"{doodle.__version__}"' in said and 'LANG=C.UTF-8' in said


def test_an_output_on_no_mount_never_overwrites_an_input(image, folder):
    said, code = run('podman', 'run', '--rm', f'--volume={folder}/samples:/nd/samples', image, *FACES, *QUICK,
                     '--output=hopper.png')
    assert code == 2 and 'is one of the inputs' in said


def test_read_only(image, folder):
    rules = ['--read-only', '--read-only-tmpfs=false', '--rm']
    said = checked('podman', 'run', *rules, '--tmpfs=/tmp:exec', *two(folder), image, *FACES, *QUICK)
    assert said.splitlines()[-1].endswith('`/nd/frames/output.png`, on the mounted folder /nd/frames.')
    for tmp in ([], ['--tmpfs=/tmp:noexec']):
        said, code = run('podman', 'run', *rules, *tmp, *two(folder), image, *FACES, *QUICK)
        assert code == 2 and said.startswith('ERROR: ') and '--tmpfs /tmp:exec' in said and len(said.splitlines()) == 2
    checked('podman', 'run', '--rm', '--tmpfs=/tmp:noexec', *two(folder), image, *FACES, *QUICK)


def test_stop_leaves_the_image_so_far_and_resume_goes_on(image, folder):
    command = ['--detach', '--name=stopped', *two(folder), image, *FACES, '--max-size=96', '--phases=1',
               '--iterations=100000', '--save-every=1', '--random-seed=1']
    for more, awaited in ([], '0003.png'), (['--resume'], None):
        checked('podman', 'run', *command, *more)
        end = time.time() + 120
        while not ((folder / 'frames' / awaited).exists() if awaited else
                   '\nPhase #0' in checked('podman', 'logs', 'stopped')):
            assert time.time() < end
            time.sleep(0.2)
        checked('podman', 'stop', 'stopped')
        said = checked('podman', 'logs', 'stopped')
        assert not more or 'Going on from `/nd/frames/output.png.checkpoint`' in said
        assert 'the image so far is in `/nd/frames/output.png`' in said
        assert checked('podman', 'inspect', '--format={{.State.ExitCode}}', 'stopped').strip() == str(128 + 15)
        assert (folder / 'frames/output.png').exists() and owners(folder) == {CALLER}
        checked('podman', 'rm', 'stopped')


def test_a_missing_or_wrong_mount_is_named(image, folder):
    command = [image, '--style=samples/gollum.png']
    said, code = run('podman', 'run', '--rm', *command)
    assert code == 2 and 'looked for /nd/samples/gollum.png, and mounted is nothing.' in said
    said, code = run('podman', 'run', '--rm', f'--volume={folder}/frames:/nd/samples', *command)
    assert code == 2 and f'/nd/samples from {folder}/frames (0 entries)' in said


def test_automatic_maps_lie_where_no_mount_hides_them(image, folder):
    shutil.rmtree(folder / 'samples')
    (folder / 'samples').mkdir()
    for name in ('astronaut.png', 'hopper.png'):
        shutil.copy(ROOT / 'samples' / name, folder / 'samples')
    for path in (folder / 'samples', *(folder / 'samples').iterdir()):
        os.chown(path, CALLER, CALLER)
    said = checked('podman', 'run', '--rm', *two(folder), image, *FACES, '--auto-maps=4', '--check')
    assert said.count('it will be painted') == 2


def test_maps_of_portraits_on_a_read_only_mount_lie_beside_the_result(image, folder):
    said = checked('podman', 'run', '--rm', f'--volume={folder}/samples/portraits:/pictures:ro',
                   f'--volume={folder}/frames:/out', image, '--style=/pictures/andersson.jpg',
                   '--content=/pictures/dahlgren.jpg', '--auto-maps', '--output=/out/a.png', *QUICK, '--save-every=0')
    assert said.count('Painted 10 parts') == 2 and said.count('its map goes to `/out/') == 2
    maps = {f'{name}_sem{end}' for name in ('andersson', 'dahlgren') for end in ('.png', '_preview.jpg')}
    assert {path.name for path in (folder / 'frames').iterdir()} == {'a.png'} | maps and owners(folder) == {CALLER}


# g++ as it is, but every module that it compiles is counted, and it takes the processor for an $ARCH; then the first
# module is enough.
COUNTED = r'''
mv /usr/bin/g++ /usr/bin/real-g++
cat > /usr/bin/g++ <<'E'
#!/bin/sh
case "$*" in
    *-shared*) echo >> /tmp/compiled; [ $ARCH = native ] || exit 1 ;;
    *-march=native*) exec real-g++ -march=$ARCH -E -v - ;;
esac
exec real-g++ "$@"
E
chmod 755 /usr/bin/g++
find /opt/doodle/cache -exec touch -d 2020-01-01 {} +
/opt/doodle/start --save-every=0 "$@" || [ $ARCH != native ]
touch /tmp/compiled
wc -l < /tmp/compiled
'''


def compiled(image, processor, *options, podman=()):
    """How many modules a run compiles in an old image, on that processor."""
    said = checked('podman', 'run', '--rm', f'--env=ARCH={processor}', *podman, '--entrypoint=sh', image, '-euc',
                   COUNTED, 'sh', *QUICK, *options)
    return int(said.splitlines()[-1])


@pytest.mark.parametrize('options', [FACES, FACES + ['--semantic-weight=0'], ['--style=samples/gravel.png'],
                                     ['--style=samples/auvers.png', '--output=samples/my_village.png'],
                                     ['--style=samples/raccoon.jpg', '--content=samples/cat.jpg']])
def test_a_run_finds_its_code_compiled_however_old_the_image(image, options):
    assert compiled(image, 'native', *options) == 0


def test_code_for_another_processor_is_compiled_anew(image):
    assert compiled(image, 'haswell', *FACES) >= 1


def test_gpu_image_has_its_libraries(build):
    image = build('gpu')
    assert size(image) <= 1600
    test_anyone_may_write_where_people_work(image)
    said = checked('podman', 'run', '--rm', '--entrypoint=python3', image, '-c', '''
import ctypes, pygpu
for name in 'libnvrtc.so', 'libcublas.so':
    ctypes.CDLL(name)
try:
    pygpu.init('cuda0')
except pygpu.gpuarray.GpuArrayException as error:  # all that is missing without a GPU is its driver
    print(error)
''')
    assert 'libcuda.so' in said
    said = checked('podman', 'run', '--rm', image, *FACES, *QUICK)
    assert "WARNING: cuda0 cannot be used: Nvidia's driver" in said and '--gpus all' in said
    assert 'on device `cpu`' in said


KERNELS = r'''
import collections, glob, re
found = collections.Counter()
for path in glob.glob('/opt/doodle/kernels/*/*/*'):
    with open(path, 'rb') as file:
        entry = file.read()
    code = entry[16 + int.from_bytes(entry[:8], 'big'):].decode()
    assert code.startswith('//\n// Generated by NVIDIA NVVM Compiler\n'), path
    major, minor = re.search(r'\.target sm_(.+)(.)', code).groups()
    assert f'/{major}.{minor}/' in path
    found[f'{major}.{minor}'] += 1
print(*sorted(found), len(set(found.values())), min(found.values()) > 100)
'''


def test_gpu_image_has_kernels_that_the_real_compiler_made_and_nothing_else(build):
    image = build('gpu')
    assert checked('podman', 'run', '--rm', '--entrypoint=python3', image, '-c', KERNELS) == '7.5 8.6 8.9 9.0 1 True\n'
    traces = 'cuda_on_cpu|CUDA on the CPU|EMU_CARDS|emu_counts'         # of cards that are none
    assert run('podman', 'run', '--rm', '--entrypoint=grep', image, '-rlE', traces, '/opt/doodle', '/cache', '/tmp',
               '/root', '/etc/ld.so.cache') == ('', 1)


# A newer card needs a small library, which is compiled at each start.
@pytest.mark.parametrize('capability, version, modules', [('8.6', '12.4', 0), ('12.0', '13.0', 1)])
def test_gpu_image_finds_its_code_compiled(build, card, tmp_path, capability, version, modules):
    (tmp_path / 'out').mkdir(mode=0o777)
    switches = {'EMU_CARDS': capability, 'EMU_DRIVER': version, 'EMU_HOLLOW': 1, 'EMU_COUNTS': '/out/counts',
                'EMU_DIR': '/tmp/kernels', 'LD_LIBRARY_PATH': '/card'}
    options = [f'--env={name}={value}' for name, value in switches.items()]
    options += [f'--volume={card["LD_LIBRARY_PATH"]}:/card:ro', f'--volume={tmp_path}/out:/out',
                '--env=DOODLE_UNMOUNTED=1']
    assert compiled(build('gpu'), 'native', '--device=gpu0', *FACES, podman=options) == modules
    counts = json.loads((tmp_path / 'out/counts').read_text())
    assert 'launch' in counts and 'compile' not in counts


def test_compose(image, build, folder):
    checked(tool('check-jsonschema'), '--builtin-schema', 'vendor.compose-spec', ROOT / 'docker-compose.yml')
    shutil.copy(ROOT / 'docker-compose.yml', folder)
    compose = [tool('podman-compose'), '--file', folder / 'docker-compose.yml', 'run', '--rm']
    checked(*compose, 'doodle', *FACES, *QUICK)
    assert (folder / 'output.png').exists() and owners(folder / 'frames') == {CALLER}
    build('tests')
    shutil.copytree(ROOT / 'tests', folder / 'tests', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('doodle.py', 'requirements.txt', 'vgg16.npz'):
        shutil.copy(ROOT / name, folder)
    assert ' passed' in checked(*compose, 'tests', 'tests/test_losses.py')


def test_hadolint_and_shellcheck():
    checked(tool('hadolint'), ROOT / 'Dockerfile')
    checked(tool('shellcheck'), *(ROOT / name for name in ('.ci/run', '.docker/warm', '.docker/warm-gpu',
                                                      'tests/arm64.sh')))
