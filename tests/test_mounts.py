"""What the program takes for kept in a container, by the lines of its /proc/self/mountinfo, and what it says of it."""
import contextlib
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import doodle

HASH = '0b94e7ffee0cda1a7b4a2c1a0d5bd3ef61ac57c05c5fa24f7a2bbd7e0b8d7a55'
# Lines as these programs have them, and the source of the folder, or None where nothing is kept.
KEPT = [
    # Docker
    ('1172 1075 254:1 /home/me/pics /nd rw,relatime - ext4 /dev/vda1 rw,discard', '/home/me/pics'),
    ('1172 1075 254:1 /home/me/pics /tmp/pics rw,relatime - ext4 /dev/vda1 rw', '/home/me/pics'),
    ('1172 1075 254:1 /src /usr/src/app ro,relatime - ext4 /dev/vda1 rw', '/src'),
    ('1172 1075 254:1 /a /data rw,relatime master:1 - ext4 /dev/vda1 rw', '/a'),
    ('1172 1075 254:1 /my\\040pics\\134 /my\\040pics\\134 rw - ext4 /dev/vda1 rw', '/my pics\\'),
    ('880 871 0:52 / /data rw,relatime - nfs4 nas:/export rw,vers=4.2', '/'),
    ('1172 1075 0:60 /Users/me/pics /data rw - fakeowner /run/host_mark/Users rw,fakeowner', '/Users/me/pics'),
    ('1173 1075 0:40 /me/pics /data rw - tmpfs tmpfs rw,inode64', '/me/pics'),                 # the host's /tmp
    ('1173 1075 0:41 /work /data rw - overlay overlay rw,lowerdir=/l,upperdir=/u', '/work'),    # the host is one, too
    ('1075 790 0:48 / / rw,relatime master:311 - overlay overlay rw,lowerdir=/var/lib/docker/overlay2/l/Q', None),
    ('1180 1075 0:53 / /nd/frames rw,nosuid,nodev,noexec,relatime - tmpfs tmpfs rw,inode64', None),
    ('1180 1075 0:53 / /tmp rw,nosuid,nodev,relatime - tmpfs tmpfs rw', None),
    ('1076 1075 0:51 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw', None),
    ('1080 1079 0:29 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw,nsdelegate', None),
    ('1081 1077 0:49 / /dev/mqueue rw,nosuid,nodev,noexec,relatime - mqueue mqueue rw', None),
    ('1082 1077 0:54 / /dev/shm rw,nosuid,nodev,noexec,relatime - tmpfs shm rw,size=65536k', None),
    ('1083 1075 254:1 /var/lib/docker/containers/1f/resolv.conf /etc/resolv.conf rw - ext4 /dev/vda1 rw', None),
    ('1193 1076 0:52 /null /proc/keys rw,nosuid - tmpfs tmpfs rw,size=65536k', None),
    (f'1172 1075 254:1 /var/lib/docker/volumes/{HASH}/_data /data rw - ext4 /dev/vda1 rw',
     f'/var/lib/docker/volumes/{HASH}/_data'),
    ('1172 1075 254:1 /var/lib/docker/volumes/doodle-cache/_data /cache rw - ext4 /dev/vda1 rw', None),
    ('1172 1075 254:1 /home/me/.cache /cache/1000 rw - ext4 /dev/vda1 rw', None),
    # podman
    ('740 732 0:22 /containers/overlay-containers/9c/userdata/run/secrets /run/secrets rw - tmpfs tmpfs rw', None),
    ('741 732 0:22 /containers/overlay-containers/9c/userdata/.containerenv /run/.containerenv rw - tmpfs tmpfs rw',
     None),
    ('742 732 0:35 /subvol/home/me/pics /nd/samples rw,relatime - btrfs /dev/nvme0n1p3 rw', '/subvol/home/me/pics'),
    # Kubernetes
    ('2811 2790 259:1 /var/lib/kubelet/pods/d1/volumes/kubernetes.io~empty-dir/out /data rw - xfs /dev/nvme0n1p1 rw',
     '/var/lib/kubelet/pods/d1/volumes/kubernetes.io~empty-dir/out'),
    ('2812 2790 0:210 / /scratch rw,relatime - tmpfs tmpfs rw,size=4096k', None),                # emptyDir: Memory
    ('2813 2790 0:88 / /run/secrets/kubernetes.io/serviceaccount ro - tmpfs tmpfs rw', None),
    ('2814 2790 259:1 /var/lib/kubelet/pods/d1/etc-hosts /etc/hosts rw - xfs /dev/nvme0n1p1 rw', None)]
FILES = 'resolv.conf', '.containerenv', 'keys', 'hosts'


@pytest.fixture
def container(monkeypatch):
    """container(lines): the program is in a container with these mounts, whose cache is /cache."""
    def container(*lines):
        monkeypatch.setenv('DOODLE_CONTAINER', '/cache')
        monkeypatch.setattr(doodle, 'text_of', lambda path: '\n'.join(lines) + '\n')
        monkeypatch.setattr(os.path, 'isdir', lambda path: Path(path).name not in FILES)
    return container


@pytest.mark.parametrize('line, source', KEPT, ids=lambda value: str(value).split(' - ')[0][-40:])
def test_a_mount_keeps_files_or_it_does_not(container, line, source):
    container(line)
    assert list(doodle.mounts().values()) == [source] and list(doodle.keeping().values()) == [source] * bool(source)


def test_the_nearest_mount_of_all_decides(container):
    container(KEPT[9][0], KEPT[0][0], '1180 1172 0:53 / /nd/frames rw - tmpfs tmpfs rw',
              '1181 1180 254:1 /b /nd/frames/kept rw - ext4 /dev/vda1 rw')
    for path, mount in {'/a': None, '/nd': '/nd', '/nda/b': None, '/nd/a': '/nd', '/nd/frames/a': None,
                        '/nd/frames/kept/a': '/nd/frames/kept'}.items():
        assert doodle.mount_of(path) == mount


def test_outside_of_a_container_all_is_kept(monkeypatch):
    monkeypatch.delenv('DOODLE_CONTAINER', raising=False)
    assert doodle.mounts() is None and doodle.is_kept('a.png') and doodle.mount_of('a.png') is None


# ---- what is said and done -------------------------------------------------------------------------------------------

@pytest.fixture
def placed(tmp_path, monkeypatch, start):
    """placed({'samples': 'ro', 'out': 'rw'}, options): places, frames and remarks of a run with these mounts."""
    doodle.import_pillow()

    def placed(modes, *arguments):
        (tmp_path / 'nd').mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / 'nd')
        found = {'/': None} | {str(tmp_path / name): None if mode == 'tmpfs' else f'/host/{name}'
                               for name, mode in modes.items()}
        closed = [str(tmp_path / name) for name, mode in modes.items() if mode == 'ro']
        for name in modes:
            (tmp_path / name).mkdir(exist_ok=True, parents=True)
        monkeypatch.setattr(doodle, 'mounts', lambda: found)
        monkeypatch.setattr(os, 'access', lambda path, mode: mode != os.W_OK or os.path.abspath(path) not in closed)
        monkeypatch.setattr(os, 'statvfs', lambda path: SimpleNamespace(f_flag=os.ST_RDONLY if path in closed else 0))
        options = doodle.parse_options(['--style=style.png', *arguments])
        remarks = start.check_kept(options)
        places = doodle.place_output(options)
        doodle.check_files(options, places)
        return places, options.frames, remarks
    return placed


@pytest.mark.parametrize('modes', [{'nd/samples': 'ro'}, {'nd': 'ro'}, {'data': 'ro', 'nd/frames': 'tmpfs'}])
def test_a_result_that_would_be_lost_is_refused_before_it_is_computed(placed, tmp_path, monkeypatch, modes):
    with pytest.raises(doodle.UserError) as error:
        placed(modes)
    assert f'{tmp_path}/{list(modes)[0]} from /host/{list(modes)[0]} (0 entries, read-only)' in error.value.problem
    assert '-v "$PWD:/data"' in error.value.fix and '-e DOODLE_UNMOUNTED=1' in error.value.fix
    _, _, remarks = placed(modes, '--check')
    assert 'is lost with the container' in remarks[0]
    if 'nd' not in modes:
        monkeypatch.setenv('DOODLE_UNMOUNTED', '1')
        assert 'is lost with the container' in placed(modes)[2][0]


def test_a_single_file_that_is_mounted_keeps_no_result(start, container, monkeypatch):
    container(KEPT[9][0], '1172 1075 254:1 /home/me/me.jpg /nd/resolv.conf rw - ext4 /dev/vda1 rw')
    monkeypatch.chdir('/')
    for content, refused in ('/nd/resolv.conf', True), ('samples/hopper.png', False):
        options = [f'--content={content}', '--style=samples/astronaut.png']
        with pytest.raises(doodle.UserError, match='no folder is mounted') if refused else contextlib.nullcontext():
            assert len(start.check_kept(doodle.parse_options(options))) == 2
        assert len(start.check_kept(doodle.parse_options([*options, '--check']))) == 2


def test_a_demo_without_mounts_is_warned_early(placed):
    places, frames, remarks = placed({}, '--log=log')
    assert (places.output, places.copy, frames) == ('output.png', None, 'frames')
    assert [remark.split()[1] for remark in remarks] == ['--output', '--frames', '--log']


@pytest.mark.parametrize('modes, arguments, output, copy, frames, warned', [
    ({'nd': 'rw'}, [], 'output.png', None, 'frames', 0),
    ({'data': 'rw'}, [], 'output.png', 'data/output.png', 'data/frames', 0),
    ({'data': 'rw'}, ['--output={0}/data/a/b.png'], 'data/a/b.png', None, 'data/a/frames', 0),
    ({'nd': 'ro', 'data': 'rw'}, [], 'data/output.png', None, 'data/frames', 0),
    ({'nd/samples': 'rw', 'nd/frames': 'rw'}, [], 'output.png', 'nd/frames/output.png', 'frames', 0),
    ({'data': 'rw', 'nd/frames': 'tmpfs'}, ['--output=frames/a.png'], 'frames/a.png', 'data/a.png', 'data/frames', 0),
    ({'data': 'rw'}, ['--log=a.json'], 'output.png', 'data/output.png', 'data/frames', 1)])
def test_result_and_frames_go_to_a_folder_that_keeps_them(placed, tmp_path, modes, arguments, output, copy, frames,
                                                          warned):
    places, folder, remarks = placed(modes, *(argument.format(tmp_path) for argument in arguments))
    where = [path if path and '/' not in path or path == 'frames/a.png' else path and str(tmp_path / path)
             for path in (output, copy, frames)]
    assert [places.output, places.copy, folder] == where and len(remarks) == warned
    assert places.checkpoint == (where[1] or where[0]) + '.checkpoint'


@pytest.mark.parametrize('source, told', [
    (KEPT[18][1], True), ('/pods/d1/volumes/kubernetes.io~empty-dir/out', True), ('/volumes/mine/_data', False)])
def test_a_volume_that_may_go_with_its_container_is_told(start, placed, monkeypatch, tmp_path, source, told):
    placed({'nd': 'rw'})
    monkeypatch.setattr(doodle, 'mounts', lambda: {str(tmp_path / 'nd'): source})
    remarks = start.check_kept(doodle.parse_options(['--style=style.png']))
    assert [remark.split()[1] for remark in remarks] == [str(tmp_path / 'nd')] * told


# ---- reasons that are true in a container ----------------------------------------------------------------------------

@pytest.fixture
def photos(tmp_path, monkeypatch):
    """photos(): a container in which the folder photos is mounted; photos(False): outside of one."""
    doodle.import_pillow()
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos/face_style.png').touch()
    monkeypatch.chdir(tmp_path)

    def photos(inside=True):
        found = {'/': None, str(tmp_path / 'photos'): '/home/me/photos'} if inside else None
        monkeypatch.setattr(doodle, 'mounts', lambda: found)
    return photos


@pytest.mark.parametrize('inside', [True, False])
@pytest.mark.parametrize('path, fix', [
    ('photos/face-style.png', "it may be 'photos/face_style.png'"),
    ('photos/Face_style.png', "it may be 'photos/face_style.png'"),
    ('photos\\face_style.png', 'use / in paths')])
def test_what_is_near_to_a_missing_picture_is_named(photos, inside, path, fix):
    photos(inside)
    with pytest.raises(doodle.UserError, match='is not there') as error:
        doodle.decoded(path)
    assert error.value.fix.startswith(fix) and ('mounted is' in error.value.fix) == (inside and '\\' in path)


def test_a_picture_of_a_mounted_folder_is_found_by_its_name(photos, tmp_path):
    photos()
    with pytest.raises(doodle.UserError) as error:
        doodle.decoded('face_style.png')
    assert error.value.fix == f"it may be '{tmp_path}/photos/face_style.png'"


def test_a_link_out_of_the_mounted_folder_is_said_to_be_one(photos, tmp_path):
    photos()
    (tmp_path / 'photos/mine.png').symlink_to('/home/me/originals/mine.png')
    with pytest.raises(doodle.UserError, match="a link to '/home/me/originals/mine.png'") as error:
        doodle.decoded('photos/mine.png')
    assert '-v "/home/me/originals:/home/me/originals"' in error.value.fix


@pytest.mark.parametrize('label, added', [('docker-default (enforce)', 'chmod a+r'), ('unconfined', 'chmod a+r'),
                                          ('system_u:system_r:container_t:s0:c12,c34', ':z at the end of the -v')])
def test_a_file_that_may_not_be_read_is_told_with_user_and_owner(photos, monkeypatch, label, added):
    photos()
    monkeypatch.setattr(doodle, 'text_of', lambda path: label)
    error = doodle.forbidden('photos/face_style.png')
    assert re.search(r"by user \w+: '.+/face_style.png' is -rw-r--r-- and of \w+\.", error.problem)
    assert '--user "$(id -u):$(id -g)"' in error.fix and added in error.fix


def test_a_result_for_which_only_the_user_is_wrong_is_told_so(start, photos, monkeypatch):
    photos()
    monkeypatch.setattr(os, 'access', lambda path, mode: mode != os.W_OK)
    with pytest.raises(doodle.UserError, match=r'not to be written by user \w+: .+ is drwx.+ and of') as error:
        start.check_kept(doodle.parse_options(['--style=a.png']))
    assert '--user "$(id -u):$(id -g)"' in error.value.fix and '-v "$PWD:/data"' in error.value.fix


@pytest.mark.parametrize('inside', [True, False])
def test_too_little_memory_in_a_container_is_docker_s_to_raise(photos, monkeypatch, inside):
    photos(inside)
    monkeypatch.setattr(doodle, 'memory_limit', lambda: 1)
    size = SimpleNamespace(shape=(90, 90, 3))
    with pytest.raises(doodle.UserError) as error:
        doodle.check_memory(SimpleNamespace(size=(90, 90), style=size), doodle.parse_options(['--style=a.png']))
    assert ('--memory' in error.value.fix) == inside


@pytest.mark.parametrize('inside', [True, False])
def test_a_gpu_in_the_cpu_image_names_the_gpu_image(photos, monkeypatch, inside):
    photos(inside)
    monkeypatch.setitem(sys.modules, 'pygpu', None)
    problem, fix = doodle.open_gpu('cuda0').args
    assert 'pygpu' in problem and ('--target gpu' in fix) == inside
