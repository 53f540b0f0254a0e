"""Weights in every form they come in, and the features made with them."""
import bz2
import hashlib
import io
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from skimage import data

import golden_data
import twin
from conftest import ROOT, first_quick

BUNDLE = str(ROOT / 'vgg16.npz')
WIDTHS = 3, 64, 128, 256, 512, 512


def hollow(doodle, kind):
    """{'1_1': (W, b), ...} of the right shapes: conv1_1 begins as the genuine, each other layer has its own numbers."""
    layers, channels = {}, 3
    for number, name in enumerate(doodle.layer_names(kind)):
        width = WIDTHS[int(name[0])]
        W = np.zeros((width, channels, 3, 3), np.float32)
        W[-1, -1], channels = number + np.arange(9.).reshape(3, 3), width
        layers[name] = W, np.full(width, number, np.float32)
    layers['1_1'][0][0, 0, 0] = doodle.FIRST[kind]
    return layers


def as_list(layers):
    """[W, b, W, b, ...], filters turned, as the original's pickle has them."""
    return [array for W, b in layers.values() for array in (W[:, :, ::-1, ::-1], b)]


def save_npz(path, layers):
    np.savez(path, **{f'conv{name}.{kind}': array for name, pair in layers.items() for kind, array in zip('Wb', pair)})
    return str(path)


def save_h5(path, layers):
    with h5py.File(path, 'w') as file:
        for name, (W, b) in layers.items():
            group = 'block{}_conv{}'.format(*name.split('_'))
            file[f'{group}/{group}_W_1:0'] = W.transpose(2, 3, 1, 0)
            file[f'{group}/{group}_b_1:0'] = b
        file.create_group('block1_pool')
    return str(path)


def save_pickle(path, layers, protocol=2):
    with (bz2.open if path.suffix == '.bz2' else open)(path, 'wb') as file:
        pickle.dump(as_list(layers), file, protocol)
    return str(path)


def same(ours, theirs):
    return list(ours) == list(theirs) and all(
        a.dtype == np.float32 and np.array_equal(a, b) for name in ours for a, b in zip(ours[name], theirs[name]))


@pytest.fixture
def top(doodle):
    """The first two layers of the bundled network, enough for a file of its own."""
    layers = doodle.read_weights(BUNDLE)[0].layers
    return {name: layers[name] for name in ('1_1', '1_2')}


# ---- formats ---------------------------------------------------------------------------------------------------------

def test_the_bundle_is_vgg16_up_to_conv5_1(doodle):
    weights, remark = doodle.read_weights(BUNDLE)
    assert (weights.kind, list(weights.layers), remark) == ('vgg16', doodle.layer_names('vgg16')[:11], None)
    assert weights.path == BUNDLE
    assert all(array.dtype == np.float32 for pair in weights.layers.values() for array in pair)


def test_the_checksum_of_the_file_is_known(doodle, tmp_path, top):  # fault 15
    path = save_npz(tmp_path / 'a.npz', top)
    assert doodle.read_weights(path)[0].sha256 == hashlib.sha256((tmp_path / 'a.npz').read_bytes()).hexdigest()


@pytest.mark.parametrize('name, kind', [('a.pkl.bz2', 'vgg19'), ('a.pkl', 'vgg16'), ('a.h5', 'vgg19'),
                                        ('a.hdf5', 'vgg16'), ('a.npz', 'vgg19')])
def test_every_format_gives_the_same_layers(doodle, tmp_path, name, kind):
    save = {'npz': save_npz, 'h5': save_h5, 'hdf5': save_h5}.get(name.split('.')[1], save_pickle)
    layers = hollow(doodle, kind)
    weights, remark = doodle.read_weights(save(tmp_path / name, layers))
    assert weights.kind == kind and remark is None and same(weights.layers, layers)


@pytest.mark.parametrize('save', [save_npz, save_h5])
@pytest.mark.parametrize('rgb', [False, True])
@pytest.mark.parametrize('turned', [False, True])
def test_colours_and_filters_are_mended_to_bgr_and_correlation(doodle, tmp_path, top, save, rgb, turned):
    step = -1 if turned else 1
    layers = {name: (W[:, :, ::step, ::step], b) for name, (W, b) in top.items()}
    if rgb:
        layers['1_1'] = layers['1_1'][0][:, ::-1], layers['1_1'][1]
    weights, remark = doodle.read_weights(save(tmp_path / f'a.{save.__name__[5:]}', layers))
    assert same(weights.layers, top)
    assert ('RGB' in (remark or ''), 'flipped' in (remark or '')) == (rgb, turned)


def test_a_pickle_that_was_not_turned_is_mended(doodle, tmp_path):
    layers = hollow(doodle, 'vgg16')
    turned = {name: (W[:, :, ::-1, ::-1], b) for name, (W, b) in layers.items()}
    weights, remark = doodle.read_weights(save_pickle(tmp_path / 'a.pkl', turned))
    assert 'flipped' in remark and same(weights.layers, layers)


def test_an_unknown_network_is_taken_as_it_lies_and_said_to_be_unknown(doodle, tmp_path, top):
    unknown = {name: (W + 1, b) for name, (W, b) in top.items()}
    weights, remark = doodle.read_weights(save_npz(tmp_path / 'a.npz', unknown))
    assert 'not a known' in remark and same(weights.layers, unknown)


def test_fake_vgg19_weights_load_as_unknown(doodle, tmp_path):
    fake = {name[4:]: pair for name, pair in golden_data.weights('fake').items() if name < 'conv4'}
    weights, remark = doodle.read_weights(save_npz(tmp_path / 'a.npz', fake))
    assert weights.kind == 'vgg19' and 'not a known' in remark and same(weights.layers, fake)


# ---- files that are wrong --------------------------------------------------------------------------------------------

def refusal(doodle, path):
    with pytest.raises(doodle.UserError) as error:
        doodle.read_weights(str(path))
    problem, fix = error.value.args
    assert repr(str(path)) in problem and '--weights' in fix and '\n' not in problem
    return problem


def peak(path):
    """The most memory in MB of a process that reads this file, and refuses it."""
    program = ('import doodle, sys\ndoodle.import_pillow()\ntry:\n    doodle.read_weights(sys.argv[1])\n'
               'except doodle.UserError:\n    print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])')
    return 1e-3 * int(subprocess.check_output([sys.executable, '-c', program, path], cwd=ROOT, timeout=60,
                                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))))


def test_wrong_shapes_name_the_layer(doodle, tmp_path, top):
    W, b = top['1_2']
    for wrong in [(W[:, 1:], b), (W[1:], b), (W, b[1:]), (W[:, :, 1:], b), (W.transpose(2, 3, 1, 0), b), (b, W)]:
        assert 'conv1_2' in refusal(doodle, save_npz(tmp_path / 'a.npz', {**top, '1_2': wrong}))


def test_a_gap_names_the_layer(doodle, tmp_path, top):
    assert 'conv1_1' in refusal(doodle, save_npz(tmp_path / 'a.npz', {'1_2': top['1_2']}))
    assert 'conv1_2' in refusal(doodle, save_npz(tmp_path / 'b.npz', {'1_1': top['1_1'], '2_1': top['1_2']}))
    assert 'conv1_1' in refusal(doodle, save_npz(tmp_path / 'c.npz', {}))


@pytest.mark.parametrize('name', ['a.pkl.bz2', 'a.pkl', 'a.h5', 'a.npz', 'a.dat'])
def test_files_that_are_broken_missing_or_folders_are_refused(doodle, tmp_path, name):
    path = tmp_path / name
    refusal(doodle, path)
    path.mkdir()
    refusal(doodle, path)
    path.rmdir()
    for content in (b'', b'no weights', (ROOT / 'vgg16.npz').read_bytes()[:100_000], bz2.compress(b'no pickle'),
                    bz2.compress(pickle.dumps([np.ones(3)] * 32))[:-10]):
        path.write_bytes(content)
        refusal(doodle, path)


@pytest.mark.parametrize('content', [{'a': 1}, [], [np.ones(3)] * 31, [1] * 32, [None] * 26, 7, [np.array(None)] * 32])
def test_a_pickle_of_something_else_is_refused(doodle, tmp_path, content):
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(content))
    refusal(doodle, tmp_path / 'a.pkl')


# ---- pickles ---------------------------------------------------------------------------------------------------------

def unpickled(doodle, content):
    """The arrays in a pickle, filters turned as the network has them."""
    arrays = doodle.ArrayUnpickler(doodle.Bounded(io.BytesIO(content)), encoding='latin1').load()
    return [doodle.pickled_array(array).read() for array in arrays]


@pytest.mark.parametrize('protocol', range(6))
def test_pickles_of_arrays_load_in_every_protocol(doodle, protocol):
    numbers = np.random.default_rng(0).random((2, 3), np.float32)
    arrays = [numbers.astype(kind, order) for kind in ('<f4', '>f4', '<f8', '>f8') for order in 'CF']
    arrays.append(numbers[:, ::2])
    for core in (b'numpy.core', b'numpy._core')[:1 + (protocol < 4)]:                   # names that NumPy 2 writes
        content = pickle.dumps(arrays, protocol).replace(b'numpy.core', core)
        for array, loaded in zip(arrays, unpickled(doodle, content), strict=True):
            assert array.dtype == loaded.dtype and np.array_equal(array, loaded)


def test_a_pickle_of_python_2_loads(doodle):
    """Its strings are bytes, with the opcode U, and an array's numbers are one of them."""
    numbers = struct.pack('<6f', *range(250, 256))
    array = (b'cnumpy.core.multiarray\n_reconstruct\n' b'cnumpy\nndarray\n' b'K\x00\x85' b'U\x01b' b'\x87R'
             b'(K\x01' b'K\x02K\x03\x86' b'cnumpy\ndtype\n' b'U\x02f4K\x00K\x01\x87R' b'(K\x03U\x01<NNN'
             b'J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb' b'\x89U\x18' + numbers + b'tb')
    loaded, = unpickled(doodle, b'\x80\x02](' + array + b'e.')
    assert loaded.dtype == np.float32 and loaded.tolist() == [[250, 251, 252], [253, 254, 255]]


def test_a_pickle_of_python_2_loads_in_protocol_0(doodle):
    numbers = struct.pack('<3d', 1.5, -1 / 3, 1e300)
    array = (b"cnumpy.core.multiarray\n_reconstruct\np0\n(cnumpy\nndarray\np1\n(I0\ntp2\nS'b'\np3\ntp4\nRp5\n"
             b"(I1\n(L3L\ntp6\ncnumpy\ndtype\np7\n(S'f8'\np8\nI0\nI1\ntp9\nRp10\n(I3\nS'<'\np11\nNNNI-1\nI-1\nI0\ntp12\nbI00\n"
             b'S' + repr(numbers)[1:].encode() + b'\np13\ntp14\nb')
    loaded, = unpickled(doodle, b'(lp15\n' + array + b'a.')
    assert loaded.tolist() == [1.5, -1 / 3, 1e300]


def forged(shape=(64, 3, 3, 3), numbers=bytes(64 * 27 * 4), name='f4', state=(3, '<', None, None, None, -1, -1, 0)):
    """What pickles as a float32 array does, but for its shape and numbers, or its type's name and state."""
    return Calls(np.zeros(0).__reduce__()[0], np.ndarray, (0,), b'b', state=(
        1, shape, Calls(np.dtype, name, False, True, state=state), False, numbers))


def flags(*values):
    return 3, '<', None, None, None, *values


@pytest.mark.parametrize('forgery', [
    dict(name='O8', state=(3, '|', None, None, None, -1, -1, 63)),                      # numbers that are addresses
    dict(name='O8', state=(3, '|', None, None, None, -1, -1, 0)), dict(state=flags(-1, -1, 63)), dict(name='i4'),
    dict(state=flags(8, 8, 0)), dict(state=(*flags(-1, -1, 0), None)), dict(state=(3, '=', *flags(-1, -1, 0)[2:])),
    dict(state=(3, '<', ('f4', (3,)), None, None, -1, -1, 0)), dict(numbers=bytes(64 * 27 * 4 - 1)),
    dict(name='V4', state=(3, '|', None, ('a',), {}, 4, 1, 0)), dict(numbers=bytes(64 * 27 * 4 + 4)),
    dict(numbers=[1.0] * 1728), dict(shape=(1 << 62, 4, 3, 3)), dict(shape=(64, 3, -3, -3)), dict(shape=64 * 27),
    dict(shape='6433')])
def test_a_forged_array_is_refused(doodle, tmp_path, forgery):
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps([forged(**forgery), np.zeros(64, np.float32)] * 16))
    refusal(doodle, tmp_path / 'a.pkl')


@pytest.mark.parametrize('content', first_quick([
    b'\x80\x02]r\x00\x00\x00\x10.', b'\x80\x05\x96' + struct.pack('<Q', 5 << 30) + b'.',     # a memo, a bytearray
    b'\x80\x04' + b']' * 20_000_000, b"S'", b'\x80\x04X' + struct.pack('<I', 130_000_000) + '\U0001f600'.encode()], 2))
def test_a_small_pickle_does_not_fill_the_memory(tmp_path, content):
    (tmp_path / 'a.pkl.bz2').write_bytes(bz2.compress(content) + 200 * bz2.compress(bytes(10_000_000)))
    assert peak(tmp_path / 'a.pkl.bz2') < 800




class Calls:
    """Pickles as a call, which unpickling then makes."""

    def __init__(self, function, *arguments, state=None):
        self.call = function, arguments, state

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('protocol', [0, 2, 4])
@pytest.mark.parametrize('call', [
    Calls(os.system, 'touch touched'), Calls(eval, 'open("touched", "w")'), Calls(exec, 'open("touched", "w")'),
    Calls(getattr, np.zeros(3), 'tofile'), Calls(np.zeros(3).tofile, 'touched'), Calls(np.save, 'touched.npy', 1),
    Calls(np.load, 'a.npy'), Calls(np.fromfile, 'a'), Calls(io.open, 'touched', 'w'), Calls(print, 'touched')])
def test_a_pickle_that_calls_anything_is_refused(doodle, tmp_path, monkeypatch, capsys, call, protocol):  # fault 15
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps([call] * 32, protocol))
    assert 'which no array needs' in refusal(doodle, 'a.pkl')
    assert os.listdir() == ['a.pkl'] and capsys.readouterr().out == ''


@pytest.mark.parametrize('module, name', [
    ('numpy.f2py.__main__', 'main'), ('numpy.testing', 'runstring'), ('numpy', 'ndarray.tofile'), ('os', 'dtype'),
    ('numpy.lib.npyio', 'DataSource'), ('numpy.ctypeslib', 'load_library'), ('builtins', '_reconstruct')])
def test_a_pickle_that_names_anything_but_an_array_is_refused(doodle, module, name):  # fault 15
    content = b'\x80\x04' + b''.join(b'\x8c' + bytes([len(text)]) + text.encode() for text in (module, name)) + b'\x93.'
    with pytest.raises(pickle.UnpicklingError, match=module):
        unpickled(doodle, content)


# ---- HDF5 and .npz ---------------------------------------------------------------------------------------------------

def elsewhere(folder):
    """A file with a data set of the shape of conv1_1, outside of the one that is read."""
    with h5py.File(folder / 'elsewhere.h5', 'w') as file:
        file['W'] = np.zeros((3, 3, 3, 64), np.float32)
    (folder / 'raw').write_bytes(bytes(27 * 64 * 4))


def virtual(group):
    layout = h5py.VirtualLayout((3, 3, 3, 64), np.float32)
    layout[:] = h5py.VirtualSource('elsewhere.h5', 'W', (3, 3, 3, 64))
    group.create_virtual_dataset('W', layout)


def data_set(dtype='f4', shape=(3, 3, 3, 64), **how):
    return lambda group: group.create_dataset('W', shape, dtype, **how)


def bomb(group):
    item = group.create_dataset('W', (3, 3, 3, 64), 'f4', chunks=(3, 3, 3, 64), compression='gzip')
    item.id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(200_000_000), 1))


def grains(group):
    group.create_dataset('W', (3, 3, 3, 64), 'f4', np.zeros((3, 3, 3, 64)), maxshape=(None,) * 4,
                         chunks=(99, 99, 99, 64))


H5 = {'external storage': data_set(external=[('raw', 0, h5py.h5f.UNLIMITED)]), 'a virtual data set': virtual,
      'an external link': lambda group: group.__setitem__('W', h5py.ExternalLink('elsewhere.h5', 'W')),
      'a soft link': lambda group: group.__setitem__('W', h5py.SoftLink('/other')), 'a bomb': bomb,
      'huge pieces': grains, 'another filter': data_set(compression='lzf', chunks=True), 'integers': data_set('i4'),
      'scaled numbers': data_set(scaleoffset=2, chunks=True), 'records': data_set([('a', 'f4')]),
      'an enumeration': data_set(h5py.enum_dtype({'a': 1})),
      'strings': data_set(h5py.string_dtype()), 'a claim': data_set('f4', (3, 3, 3, 1 << 40), chunks=(3, 3, 3, 64)),
      'long floats': data_set('f16'), 'nothing': lambda group: group.create_group('W'),
      'itself': lambda group: group.__setitem__('W', group)}


@pytest.mark.parametrize('kind', H5)
def test_hdf5_that_is_more_than_plain_arrays_is_refused(doodle, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    elsewhere(tmp_path)
    with h5py.File('a.h5', 'w') as file:
        file['other'] = np.zeros((3, 3, 3, 64), np.float32)
        group = file.create_group('block1_conv1')
        group['b'] = np.zeros(64, np.float32)
        H5[kind](group)
    refusal(doodle, 'a.h5')
    assert kind not in ('a bomb', 'huge pieces', 'a claim') or peak(tmp_path / 'a.h5') < 150


def test_hdf5_packed_as_h5py_offers_is_read(doodle, tmp_path, top):
    for how in (dict(compression='gzip'), dict(compression='gzip', shuffle=True, fletcher32=True),
                dict(fletcher32=True), dict(chunks=(2, 2, 2, 48), compression=9),
                dict(chunks=True, maxshape=(None,) * 4)):
        with h5py.File(tmp_path / 'a.h5', 'w') as file:
            for name, (W, b) in top.items():
                group = file.create_group('block{}_conv{}/deeper'.format(*name.split('_')))
                group.create_dataset('W', data=W.transpose(2, 3, 1, 0), **how)
                group['b'] = b
        assert same(doodle.read_weights(str(tmp_path / 'a.h5'))[0].layers, top)


def zipped(path, W, method):
    b = io.BytesIO()
    np.save(b, np.zeros(64, np.float32))
    with zipfile.ZipFile(path, 'w', method) as file:
        file.writestr('conv1_1.W.npy', W)
        file.writestr('conv1_1.b.npy', b.getvalue())


def header(shape=(64, 3, 3, 3), dtype='<f4', version=(1, 0)):
    content = io.BytesIO()
    write = getattr(np.lib.format, 'write_array_header_{}_{}'.format(*version))
    write(content, dict(descr=dtype, fortran_order=False, shape=shape))
    return content.getvalue()


NPZ = {'a claim': header((64, 3, 3, 1 << 40)), 'more than it says': header() + bytes(200_000_000),
       'less than it says': header() + bytes(27 * 64 * 4 - 1), 'negative': header((-64, -3, 3, 3)) + bytes(27 * 64 * 4),
       'a long header': header(version=(2, 0)) + bytes(27 * 64 * 4), 'objects': header(dtype='|O') + bytes(27 * 64 * 8),
       'a huge header': b'\x93NUMPY\x02\x00\x00\x00\x00\x0b' + bytes(200_000_000),
       'long floats': header(dtype='<f16') + bytes(27 * 64 * 16)}


@pytest.mark.parametrize('kind', NPZ)
def test_an_npz_of_other_sizes_than_it_says_is_refused(doodle, tmp_path, kind):
    zipped(tmp_path / 'a.npz', NPZ[kind], zipfile.ZIP_DEFLATED)
    refusal(doodle, tmp_path / 'a.npz')
    assert len(NPZ[kind]) < 1e8 or peak(tmp_path / 'a.npz') < 150


def test_an_npz_packed_in_another_way_is_refused(doodle, tmp_path):
    zipped(tmp_path / 'a.npz', header() + bytes(100_000_000), zipfile.ZIP_BZIP2)
    refusal(doodle, tmp_path / 'a.npz')
    assert peak(tmp_path / 'a.npz') < 100


def test_an_npz_with_a_wrong_bit_is_refused(doodle, tmp_path, top):
    content = bytearray(Path(save_npz(tmp_path / 'a.npz', top)).read_bytes())
    content[3000] ^= 1
    (tmp_path / 'a.npz').write_bytes(content)
    assert 'CRC' in refusal(doodle, tmp_path / 'a.npz')


def test_damaged_files_of_every_format_are_read_or_refused():
    done = subprocess.run([sys.executable, ROOT / 'tests/fuzz_weights.py', '--count=480'], text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]
    assert int(re.search(r'peak (\d+) MB', done.stdout)[1]) < 150


# ---- which weights ---------------------------------------------------------------------------------------------------

def find(doodle, *arguments):
    return doodle.find_weights(doodle.parse_options(['--style=a.png', *arguments]))


def test_a_layer_that_the_network_lacks_is_named(doodle):
    for layer in ('5_2', '3_4'):
        for option in ('style', 'content'):
            with pytest.raises(doodle.UserError) as error:
                find(doodle, '--network=vgg16', f'--{option}-layers=1_1,{layer}')
            assert f'conv{layer}' in error.value.args[0] and 'conv5_1' in error.value.args[0]


def test_weights_of_another_network_than_asked_for_are_refused(doodle):
    with pytest.raises(doodle.UserError, match='vgg16, not vgg19'):
        find(doodle, '--network=vgg19', f'--weights={BUNDLE}')
    assert find(doodle, '--network=vgg16', f'--weights={BUNDLE}')[0].kind == 'vgg16'


def test_the_original_file_is_found_beside_the_script_then_in_this_folder(doodle, tmp_path, monkeypatch):
    for folder in ('script', 'here'):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    monkeypatch.setattr(doodle, '__file__', str(tmp_path / 'script/doodle.py'))
    shutil.copy(BUNDLE, tmp_path / 'script')
    script, here = tmp_path / 'script/vgg19_conv.pkl.bz2', tmp_path / 'here/vgg19_conv.pkl.bz2'

    save_pickle(script, hollow(doodle, 'vgg19'))
    os.link(script, here)
    assert find(doodle)[0].path == str(script)
    script.unlink()
    assert (find(doodle)[0].path, find(doodle)[0].kind) == ('vgg19_conv.pkl.bz2', 'vgg19')
    assert find(doodle, '--network=vgg16')[0].path == str(tmp_path / 'script/vgg16.npz')


def test_a_file_that_is_found_is_named_with_its_checksum(doodle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(save_pickle(tmp_path / 'vgg19_conv.pkl.bz2', hollow(doodle, 'vgg19')))
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert [line for line in find(doodle)[1] if checksum in line and 'found' in line]
    assert not [line for line in find(doodle, f'--weights={path.name}')[1] if 'found' in line]


def test_a_file_that_is_found_is_a_known_network_or_refused(doodle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = hollow(doodle, 'vgg19')
    layers['1_1'][0][0, 0, 0] += 1
    path = Path(save_pickle(tmp_path / 'vgg19_conv.pkl.bz2', layers))
    with pytest.raises(doodle.UserError) as error:
        find(doodle)
    assert path.name in error.value.args[0] and f'--weights {path.name}' in error.value.args[1]
    assert 'not a known' in find(doodle, f'--weights={path.name}')[1][0]
    path.write_bytes(b'')
    with pytest.raises(doodle.UserError) as error:
        find(doodle)
    assert 'remove this file' in error.value.args[1]


# ---- balance ---------------------------------------------------------------------------------------------------------

def test_every_layer_has_a_factor_and_those_of_vgg19_change_nothing(doodle):
    assert set(doodle.BALANCE) == set(doodle.BLOCKS)
    for kind, factors in doodle.BALANCE.items():
        assert list(doodle.balance(kind)) == doodle.layer_names(kind) and len(factors) == len(doodle.layer_names(kind))
    assert set(doodle.BALANCE['vgg19']) == {1}


@pytest.mark.slow
@pytest.mark.parametrize('content, style, share', [('raccoon.jpg', 'cat.jpg', .240),        # VGG19's
                                                   ('motorcycle_left.png', 'retina.jpg', .222)])
def test_content_is_as_large_a_part_of_the_loss_as_with_vgg19(doodle, content, style, share):
    """Of the first evaluation, at pictures on which nothing was fitted."""
    folder = ROOT / 'samples' if content == 'raccoon.jpg' else Path(data.data_dir)
    pictures = (doodle.read_picture(folder / name).pixels for name in (content, style))
    content, style = (doodle.to_planes(doodle.limited(picture, 120, doodle.Image.LANCZOS)) for picture in pictures)
    objective = doodle.Objective(doodle.read_weights(BUNDLE)[0], doodle.parse_options(['--style=-']), True, False, True)
    objective.set_phase(content, style, None, None, content.shape[:0:-1])
    found = objective(np.random.default_rng(1).uniform(16, 240, content.shape))
    assert share / 1.2 < found.content['4_2'] / found.total < share * 1.2


@pytest.mark.parametrize('kind', ['vgg19', 'vgg16'])
def test_scaled_losses_are_said_to_be(doodle, tmp_path, monkeypatch, capsys, kind):
    def stop(*_):
        raise doodle.UserError('so far.', 'nothing')
    monkeypatch.setattr(doodle, 'read_weights', lambda path, given: (
        doodle.Weights(kind, dict.fromkeys(doodle.layer_names(kind)), path, ''), None))
    monkeypatch.setattr(doodle, 'import_theano', lambda device: (device, None))
    monkeypatch.setattr(doodle, 'handle_signals', lambda _: None)
    monkeypatch.setattr(doodle, 'Objective', stop)
    monkeypatch.chdir(tmp_path)
    assert doodle.main([f'--style={ROOT / "samples/gravel.png"}', '--save-every=0', '--weights=a file']) == 2
    assert capsys.readouterr().out.count('Losses of vgg16 are scaled') == (kind == 'vgg16')


# ---- features --------------------------------------------------------------------------------------------------------

def test_features_are_those_of_the_twin(doodle):
    names, fake = ['4_1', '1_2', '2_1', '3_2'], golden_data.weights('fake')
    weights = doodle.Weights('vgg19', {name[4:]: pair for name, pair in fake.items()}, '', '')
    image = np.random.default_rng(0).uniform(0, 255, (3, 45, 38)).astype(np.float32)    # odd sizes lose rows in pooling
    x = doodle.T.tensor3()
    symbols = doodle.features(doodle.build_network(weights, names), x, names)
    assert list(symbols) == names
    expected = twin.features(fake, np.float64(image), '4_1')                            # {layer: (C, H, W)}
    for name, ours in zip(names, doodle.theano.function([x], list(symbols.values()))(image)):
        truth = np.moveaxis(expected[name], 0, 2)
        assert ours.shape == truth.shape and ours.dtype == np.float32
        np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=1e-5 * truth.max())


@pytest.mark.parametrize('names', [['1_1'], ['3_1', '2_2'], ['1_2', '4_1']])
def test_the_network_is_built_as_deep_as_needed_and_no_deeper(doodle, names):
    weights, _ = doodle.read_weights(BUNDLE)
    order = list(weights.layers)
    assert list(doodle.build_network(weights, names)) == order[:order.index(max(names)) + 1]
