"""Fetching VGG19, from servers of our own that are good, slow, broken, wrong or not there."""
import contextlib
import hashlib
import http.server
import os
import threading
import time

import h5py
import numpy as np
import pytest


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; `fault` is what goes wrong with it, `requests` the ranges asked for."""
    daemon_threads = True

    def __init__(self, content, fault=None):
        super().__init__(('127.0.0.1', 0), Handler)
        self.content, self.fault, self.requests = content, fault, []
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.address = f'http://127.0.0.1:{self.server_port}/'


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        fault, content = self.server.fault, self.server.content
        self.server.requests.append(self.headers['Range'])
        if fault == 'refused':
            return self.send_error(404)
        if fault == 'slow':
            time.sleep(3)
        start = int((self.headers['Range'] or 'bytes=0-')[6:-1])
        body = bytes(len(content)) if fault == 'wrong' else content[start:]
        self.send_response(206 if start and fault != 'wrong' else 200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):                              # a client that lost patience
            self.wfile.write(body[:len(body) // 2] if fault == 'broken' else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def vgg19(doodle, tmp_path, monkeypatch):
    """A small file in Keras' format that passes for VGG19, and an empty cache folder; nothing else can be fetched."""
    layers = {'1_1': (np.random.default_rng(0).random((64, 3, 3, 3), dtype=np.float32), np.ones(64, np.float32)),
              '1_2': (np.zeros((64, 64, 3, 3), np.float32), np.ones(64, np.float32))}
    with h5py.File(tmp_path / 'vgg19.h5', 'w') as file:
        for name, (W, b) in layers.items():
            group = file.create_group('block{}_conv{}'.format(*name.split('_')))
            group[f'{group.name[1:]}_W_1:0'] = W.transpose(2, 3, 1, 0)
            group[f'{group.name[1:]}_b_1:0'] = b
    content = (tmp_path / 'vgg19.h5').read_bytes()
    monkeypatch.setattr(doodle, 'KERAS', {'file': 'vgg19.h5', 'bytes': len(content),
                                          'md5': hashlib.md5(content).hexdigest()})
    monkeypatch.setattr(doodle, 'ADDRESSES', ())
    monkeypatch.setattr(doodle, 'PATIENCE', 1)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))

    def fetch(*servers):
        monkeypatch.setenv('DOODLE_ADDRESSES', ' '.join(server.address for server in servers))
        path = doodle.fetch_vgg19()
        fetched = doodle.read_weights(path)[0].layers
        assert list(fetched) == list(layers)
        for name, pair in layers.items():
            for ours, theirs in zip(fetched[name], pair):
                np.testing.assert_array_equal(ours, theirs)
        return path
    return content, fetch


def test_home_is_expanded_in_the_cache_folder(vgg19, tmp_path, monkeypatch):
    content, fetch = vgg19
    monkeypatch.setenv('HOME', str(tmp_path))
    with Server(content) as server:
        for cache, folder in (('~/mine', 'mine'), ('', '.cache')):
            monkeypatch.setenv('XDG_CACHE_HOME', cache)
            assert fetch(server) == str(tmp_path / folder / 'neural-doodle/vgg19.npz')


def test_a_good_server_is_asked_once_and_the_cache_serves_after(vgg19):
    content, fetch = vgg19
    server = Server(content)
    path = fetch(server)
    assert fetch(server) == path and server.requests == [None]
    assert sorted(os.listdir(os.path.dirname(path))) == ['lock', 'vgg19.npz']


@pytest.mark.parametrize('fault', ['refused', 'slow', 'wrong'])
def test_after_a_bad_server_the_next_one_serves(vgg19, fault):
    content, fetch = vgg19
    bad, good = Server(content, fault), Server(content)
    start = time.time()
    fetch(bad, good)
    assert len(bad.requests) == 1 and good.requests == [None] and time.time() - start < 2.5


def test_a_download_that_broke_off_is_resumed_where_it_ended(doodle, vgg19):
    content, fetch = vgg19
    broken, good = Server(content, 'broken'), Server(content)
    with pytest.raises(OSError, match='broke off'):
        fetch(broken)
    fetch(good)
    assert good.requests == [f'bytes={len(content) // 2}-']


def test_wrong_bytes_are_not_kept(doodle, vgg19):
    content, fetch = vgg19
    with pytest.raises(OSError, match='something else'):
        fetch(Server(content, 'wrong'))
    assert os.listdir(os.path.join(os.environ['XDG_CACHE_HOME'], 'neural-doodle')) == ['lock']


def test_several_at_once_fetch_once(doodle, vgg19):
    content, fetch = vgg19
    server, paths = Server(content), []
    threads = [threading.Thread(target=lambda: paths.append(fetch(server))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1 and len(paths) == 5 and server.requests == [None]


def options(doodle, *more):
    return doodle.parse_options(['--style=x.png', *more])


def test_offline_the_bundled_network_serves_with_one_warning(doodle, vgg19, monkeypatch):
    monkeypatch.setenv('DOODLE_ADDRESSES', 'http://127.0.0.1:9/')
    weights, (remark, _) = doodle.find_weights(options(doodle))
    assert weights.kind == 'vgg16' and remark.count('WARNING') == 1 and 'FIX' in remark


def test_what_is_no_address_is_one_more_that_cannot_be_reached(doodle, vgg19, monkeypatch):
    monkeypatch.setenv('DOODLE_ADDRESSES', 'no.address/x/ http://127.0.0.1:9/')
    with pytest.raises(OSError, match="unknown url type: 'no.address.*refused"):
        doodle.fetch_vgg19()


def test_a_network_asked_for_by_name_is_had_or_the_run_fails(doodle, vgg19, monkeypatch):
    monkeypatch.setenv('DOODLE_ADDRESSES', 'http://127.0.0.1:9/')
    with pytest.raises(doodle.UserError, match='cannot be fetched'):
        doodle.find_weights(options(doodle, '--network=vgg19'))
    with pytest.raises(doodle.UserError, match='is vgg16'):
        doodle.find_weights(options(doodle, '--network=vgg19', '--weights', os.path.join(
            os.path.dirname(doodle.__file__), 'vgg16.npz')))
    weights, (remark, _) = doodle.find_weights(options(doodle, '--network=vgg16'))
    assert weights.kind == 'vgg16' and remark.startswith('Network vgg16 from')
