"""Fetching VGG19, from servers of our own that are good, slow, broken, wrong or not there."""
import contextlib
import fcntl
import hashlib
import http.server
import os
import re
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import fuzz_weights


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
def cache(doodle, tmp_path, monkeypatch):
    """An empty cache folder, for which nothing can be fetched."""
    monkeypatch.setattr(doodle, 'ADDRESSES', ())
    monkeypatch.setattr(doodle, 'PATIENCE', 1)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return tmp_path / 'cache/neural-doodle'


@pytest.fixture
def vgg19(doodle, cache, monkeypatch):
    """A VGG19 of two filters a layer as Keras' file, and what fetches it into the cache."""
    monkeypatch.setattr(doodle, 'WIDTHS', (2,) * 5)
    layers = fuzz_weights.tiny(doodle)
    content = fuzz_weights.keras(layers)
    monkeypatch.setattr(doodle, 'KERAS', {'file': 'vgg19.h5', 'bytes': len(content),
                                          'md5': hashlib.md5(content).hexdigest()})

    def fetch(*servers):
        monkeypatch.setenv('DOODLE_ADDRESSES', ' '.join(server.address for server in servers))
        path = doodle.fetch_vgg19()
        weights, remark = doodle.read_weights(path)
        assert remark is None and list(weights.layers) == list(layers)
        for name, pair in layers.items():
            for ours, theirs in zip(weights.layers[name], pair):
                np.testing.assert_array_equal(ours, theirs)
        return path
    return content, fetch


def test_home_is_expanded_in_the_cache_folder(vgg19, tmp_path, monkeypatch):
    content, fetch = vgg19
    monkeypatch.setenv('HOME', str(tmp_path))
    with Server(content) as server:
        for cache, folder in (('~/mine', 'mine'), ('', '.cache')):
            monkeypatch.setenv('XDG_CACHE_HOME', cache)
            assert fetch(server) == str(tmp_path / folder / 'neural-doodle/vgg19.h5')


def test_a_good_server_is_asked_once_and_the_cache_serves_after(vgg19):
    content, fetch = vgg19
    server = Server(content)
    path = fetch(server)
    assert fetch(server) == path and server.requests == [None]
    assert sorted(os.listdir(os.path.dirname(path))) == ['lock', 'vgg19.h5']


class Drip(Server):
    """Answers all at once up to a place, and from there byte by byte at a rate per second."""

    def __init__(self, content, start, rate):
        self.answer = b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n' % len(content) + content
        self.start, self.rate = start, rate
        super().__init__(content)

    def finish_request(self, request, _):
        request.recv(1 << 16)
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):                                      # a client that lost patience
            request.sendall(self.answer[:self.start])
            for place in range(self.start, len(self.answer), step := max(1, self.rate // 50)):
                request.sendall(self.answer[place:place + step])
                time.sleep(step / self.rate)


@pytest.mark.parametrize('start', [0, 20, 10_000])                              # in a status line, a header, the body
def test_a_download_that_drips_ends_with_its_reason_and_goes_on_later(doodle, vgg19, cache, monkeypatch, start):
    content, fetch = vgg19
    monkeypatch.setattr(doodle, 'PERIOD', .5)
    begin = time.time()
    with pytest.raises(OSError, match='less than 1 kB/s over 0.5 s'):
        fetch(Drip(content, start, 20))
    assert time.time() - begin < 2
    have = (cache / 'vgg19.h5.part').stat().st_size
    assert have > 9000 if start == 10_000 else have == 0
    good = Server(content)
    fetch(good)
    assert good.requests == [f'bytes={have}-' if have else None]


def test_a_slow_download_is_let_be(doodle, vgg19, monkeypatch):
    content, fetch = vgg19
    monkeypatch.setattr(doodle, 'PERIOD', .5)
    start = time.time()
    fetch(Drip(content, len(content) - 3000, 1500))
    assert time.time() - start > 1.5


def test_an_answer_without_an_end_is_ended(doodle, vgg19):
    content, fetch = vgg19
    endless = Drip(content, 0, 1)
    endless.answer = b'HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n' + bytes(3_000_000)
    endless.start = len(endless.answer)
    with pytest.raises(OSError, match='something else'):
        fetch(endless)


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


def test_a_run_that_waits_for_the_download_of_another_says_so_once(doodle, vgg19, cache, capsys):
    content, fetch = vgg19
    cache.mkdir(parents=True)
    with open(cache / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=fetch, args=[Server(content)])
        thread.start()
        time.sleep(.5)
        assert capsys.readouterr().out.count('Waiting for another run') == 1 and thread.is_alive()
    thread.join()
    assert 'Waiting' not in capsys.readouterr().out


@pytest.mark.parametrize('name', ['lock', 'vgg19.h5.part'])
@pytest.mark.parametrize('kind', ['link', 'dangling', 'fifo'])
def test_nothing_is_written_through_a_link_in_the_cache(vgg19, cache, tmp_path, name, kind):
    content, fetch = vgg19
    cache.mkdir(parents=True)
    target = tmp_path / 'precious'
    if kind == 'fifo':
        os.mkfifo(cache / name)
    else:
        (cache / name).symlink_to(target)
    if kind == 'link':
        target.write_text('precious')
    with pytest.raises(OSError, match=name):
        fetch(Server(content))
    assert target.read_text() == 'precious' if kind == 'link' else not target.exists()


def another(doodle, path):
    """A network that is like VGG19 but for one number."""
    layers = fuzz_weights.tiny(doodle)
    layers['5_4'][0].flat[0] += 1
    path.write_bytes(fuzz_weights.keras(layers))


BROKEN = {'empty': lambda doodle, path: path.write_bytes(b''),
          'cut': lambda doodle, path: path.write_bytes(path.read_bytes()[:-500]),
          'a wrong bit': lambda doodle, path: path.write_bytes(re.sub(rb'(?s)^(.{2000}).', rb'\1~', path.read_bytes())),
          'another network': another}


@pytest.mark.parametrize('kind', BROKEN)
def test_a_broken_cache_is_fetched_anew(doodle, vgg19, kind):
    content, fetch = vgg19
    path = Path(fetch(Server(content)))
    BROKEN[kind](doodle, path)
    assert path.read_bytes() != content
    fetch(server := Server(content))
    assert server.requests == [None] and path.read_bytes() == content


def test_a_folder_in_place_of_the_cached_file_is_said(doodle, vgg19):
    content, fetch = vgg19
    path = Path(fetch(Server(content)))
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match='Is a directory'):
        fetch(Server(content))


def options(doodle, *more):
    return doodle.parse_options(['--style=x.png', *more])


def test_offline_the_bundled_network_serves_with_one_warning(doodle, cache, monkeypatch):
    monkeypatch.setenv('DOODLE_ADDRESSES', 'http://127.0.0.1:9/')
    weights, (remark, _) = doodle.find_weights(options(doodle))
    assert weights.kind == 'vgg16' and remark.count('WARNING') == 1 and 'FIX' in remark


def test_what_is_no_address_is_one_more_that_cannot_be_reached(doodle, cache, monkeypatch):
    monkeypatch.setenv('DOODLE_ADDRESSES', 'no.address/x/ http://127.0.0.1:9/')
    with pytest.raises(OSError, match="unknown url type: 'no.address.*refused"):
        doodle.fetch_vgg19()


def test_a_network_asked_for_by_name_is_had_or_the_run_fails(doodle, cache, monkeypatch):
    monkeypatch.setenv('DOODLE_ADDRESSES', 'http://127.0.0.1:9/')
    with pytest.raises(doodle.UserError, match='cannot be fetched'):
        doodle.find_weights(options(doodle, '--network=vgg19'))
    with pytest.raises(doodle.UserError, match='is vgg16'):
        doodle.find_weights(options(doodle, '--network=vgg19', '--weights', os.path.join(
            os.path.dirname(doodle.__file__), 'vgg16.npz')))
    weights, (remark, _) = doodle.find_weights(options(doodle, '--network=vgg16'))
    assert weights.kind == 'vgg16' and remark.startswith('Network vgg16 from')
