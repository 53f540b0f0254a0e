#!/usr/bin/env python3
"""Studies: run doodle.py for every combination of values, and show the results side by side.

    python3 samples/study.py --content samples/hopper.png --style samples/astronaut.png \\
        --style-weight 10 --content-weight 3 6 10 20

Every option of doodle.py takes one value or more. Several `--content` and `--style` mean every content in every style;
`--pair CONTENT STYLE`, given once for each, means these pairs only. Maps are found as by doodle.py; of `--output` only
the name counts, by which the map of a doodle is found. All goes into one folder, `--study`:

    content-weight=3/           a folder for each run, named by the values that differ
        result.png
        run.log                 each evaluation, as of doodle.py --log
        run.txt                 what the run printed
        run.json                its command, how it ended, and what the result depends on
    study.csv                   a row for each run: values, last loss terms, seconds, how it ended, command
    sheet.png                   contact sheet of the two options with the most values; a page for each other value

The same command again skips what is done, goes on with what was interrupted, and tries again what failed. All runs have
the same random seed and the same network, which is found once. One run at a time has all cores; `--jobs` runs several,
which share them. Ctrl-C ends all runs, which save what they have.

With `--scheduler ADDRESS` the runs are made by the workers of a Dask cluster (`pip install -r
samples/requirements.txt`; `dask scheduler`, and on each machine `dask worker ADDRESS --nthreads 1`). Workers need the
packages of requirements.txt and g++; script, network, pictures and maps travel to them, result and log back. A run
whose worker dies is made again by another.
"""
import argparse
import asyncio
import collections
import contextlib
import csv
import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import doodle  # noqa: E402

PROGRAM = doodle.beside('doodle.py')
# Options of doodle.py that a study has not, or sets itself.
LEFT_OUT = '--frames', '--log', '--figure', '--animation', '--check', '--resume', '--keep-checkpoint', '--version'
FIXED = {'--random-seed': ['1'], '--save-every': ['0']}               # where nothing else is given
WITHOUT_EFFECT = '--network', '--output', '--semantic-ext', '--print-every', '--save-every'     # but by the files read
MOST = 9999                                                           # runs of a study
SIDE, PAGE, WRAP = 256, 8000, 6       # most pixels of a picture on a sheet and of a sheet; pictures side by side
PATIENCE = 30                                                         # seconds for scheduler and workers to answer

# A run ends, as by SIGTERM, with the process that started it, however that ends: 1 is PR_SET_PDEATHSIG.
START = '''import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])'''

# An option and its values, or two options whose values go together. A value is a tuple, an item for each of `flags`,
# and so is its label.
Axis = collections.namedtuple('Axis', 'name flags values labels')
KINDS = {flag: kind for flag, _, kind, *_ in itertools.chain(*doodle.OPTIONS.values())}


@dataclasses.dataclass(eq=False)
class Job:
    """A run of the study."""

    labels: dict                                                        # {name of an axis that varies: its label here}
    given: dict                                                         # {option: value}
    options: argparse.Namespace                                         # the same as doodle.py understands it
    folder: str
    areas: tuple = ()                                                   # pixels of each phase
    depends: dict = None                                                # see `dependencies`
    record: dict = dataclasses.field(default_factory=dict)              # run.json
    begun: int = 0                                                      # work done before this study

    def path(self, name):
        """The path of a file of this run."""
        return os.path.join(self.folder, name)

    def arguments(self):
        """The command line, from this folder."""
        return command_line(self.given | {'--output': self.path('result.png'), '--log': self.path('run.log'),
                                          '--frames': self.path('frames')})

    def is_done(self):
        """Whether there is nothing more to do."""
        return (self.record.get('status') == 'done' and self.record.get('depends') == self.depends and
                all(os.path.isfile(self.path(name)) for name in ('result.png', 'run.log')))

    def prepare(self):
        """Make the folder, without the log of a run that does not go on."""
        os.makedirs(self.folder, exist_ok=True)
        if not self.begun:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path('run.log'))

    def work(self):
        """Pixels of all evaluations."""
        return self.options.iterations * sum(self.areas)

    def logged(self):
        """Pixels of the evaluations in the log."""
        entry = last_entry(self.path('run.log'))
        return entry and self.options.iterations * sum(self.areas[:entry['phase']]) + (
            entry['evaluation'] + 1) * self.areas[entry['phase']]

    def progress(self):
        """How much of the work is done."""
        status = self.record.get('status')
        return self.work() if status in ('done', 'failed') else self.logged() if status == 'running' else self.begun

    def note(self, status, seconds=0, said=''):
        """Write run.json."""
        entry = last_entry(self.path('run.log'))
        losses = {f'{kind} {layer}': loss for kind in ('content', 'style') for layer, loss in entry[kind].items()} | {
            name: entry[name] for name in ('smooth', 'total')} if entry and 'total' in entry else {}
        self.record = dict(status=status, said=said, seconds=round(self.record.get('seconds', 0) + seconds, 1),
                           losses=losses, command=shlex.join(['python3', 'doodle.py', *self.arguments()]),
                           depends=self.depends)
        write(self.path('run.json'), json.dumps(self.record, indent=1).encode())


def command_line(given):
    """{option: value} as arguments of doodle.py, which goes on where it was interrupted; 0 leaves a flag out."""
    return [flag if KINDS[flag] is bool else f'{flag}={value}' for flag, value in given.items()
            if KINDS[flag] is not bool or value == '1'] + ['--resume']


def write(path, content):
    """Write a file of bytes whole."""
    with doodle.written_whole(path) as file:
        file.write(content)


def last_entry(path):
    """The last line of a log that tells of an evaluation, or of some that are skipped, or 0 if there is none yet."""
    with contextlib.suppress(OSError, ValueError), open(path, 'rb') as file:
        file.seek(max(0, os.path.getsize(path) - 9999))
        entry = json.loads(file.read().rpartition(b'\n')[0].rpartition(b'\n')[2])
        return entry if 'evaluation' in entry else 0
    return 0


def duration(seconds):
    """A time in words."""
    return f'{seconds:.0f} s' if seconds < 100 else f'{seconds / 60:.0f} minutes'


# ---- options ---------------------------------------------------------------------------------------------------------

def parse_address(text):
    """The address of a Dask scheduler."""
    if not re.fullmatch(r'((tcp|tls)://)?[^\s/]+:[0-9]{1,5}', text):
        raise argparse.ArgumentTypeError(f'{text!r} is no address like tcp://192.168.1.2:8786')
    return text


def parse_command(arguments):
    """The study's own options, and an `Axis` for each option of doodle.py that is given."""
    parser = doodle.Parser(prog='study.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--study', type=doodle.parse_path, default='study', metavar='FOLDER',
                        help='a new folder, or that of the same study (default: study)')
    parser.add_argument('--pair', nargs=2, action='append', metavar=('CONTENT', 'STYLE'),
                        help='instead of --content and --style; may be given again')
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--jobs', type=doodle.parse_natural, default=1, metavar='N',
                       help='runs at once, which share the cores (default: 1)')
    where.add_argument('--scheduler', type=parse_address, metavar='ADDRESS', help='of a Dask cluster, which runs them')
    for title, rows in doodle.OPTIONS.items():
        group = parser.add_argument_group(f'{title}, as of doodle.py')
        for flag, _, kind, _, meaning in rows:
            if flag not in LEFT_OUT:
                how = dict(type=doodle.one_of('0', '1'), nargs='*', metavar='0|1') if kind is bool else dict(
                    nargs='*' if kind is doodle.parse_parts else '+', metavar=doodle.VALUES[kind])
                group.add_argument(flag, **how, action='extend', help=meaning)
    own, axes = parser.parse_args(arguments), []
    if own.pair:
        if own.content or own.style:
            raise doodle.UserError('--pair is given, and --content or --style as well.', 'leave one of them out')
        axes.append(make_axis('pair', ('--content', '--style'), own.pair))
    if own.scheduler and set(own.save_every or ()) - {'0'}:
        raise doodle.UserError('--save-every writes frames, which would stay with the workers of --scheduler.',
                               'leave one of them out')
    if len(own.auto_maps or ()) > 1:
        raise doodle.UserError('--auto-maps paints beside the pictures, once for all runs.', 'give it one value')
    for flag in (flag for flag in KINDS if flag not in LEFT_OUT):
        values = getattr(own, doodle.attribute(flag))
        values = FIXED.get(flag) if values is None else values or (['1'] if KINDS[flag] is bool else ['auto'])
        axes += [make_axis(flag[2:], (flag,), [[value] for value in values])] if values else []
    return own, axes


def make_axis(name, flags, values):
    """An `Axis`. Labels are the values, but of paths the names alone, if these differ."""
    def short(flag, part):
        is_path = KINDS[flag] in (doodle.parse_path, doodle.parse_seed)
        return os.path.splitext(os.path.basename(part))[0] if is_path else part
    values = list(map(tuple, values))
    labels = [tuple(map(short, flags, value)) for value in values]
    return Axis(name, flags, values, labels if len(set(labels)) == len(values) else values)


def folder_name(labels):
    """The name of a folder for {name of an axis: label}; what is not safe in a file's name is written as %2F."""
    def safe(text):
        return re.sub(r'[^\w.,-]', lambda found: ''.join(f'%{byte:02X}' for byte in os.fsencode(found[0])), text)
    name = '+'.join(f'{axis}={"+".join(map(safe, label))}' for axis, label in labels.items()) or 'run'
    code = os.fsencode(name)
    return name if len(code) <= 200 else f'{code[:180].decode(errors="ignore")}~{zlib.crc32(code):08x}'


def make_jobs(own, axes):
    """All combinations; UserError if doodle.py would not take one of them."""
    count = math.prod(len(axis.values) for axis in axes)
    if count > MOST:
        raise doodle.UserError(f'These are {count:,} runs, and a study has at most {MOST:,}.', 'give fewer values')
    jobs = []
    for chosen in itertools.product(*(zip(axis.values, axis.labels) for axis in axes)):
        given = {flag: part for axis, (value, _) in zip(axes, chosen) for flag, part in zip(axis.flags, value)}
        labels = {axis.name: label for axis, (_, label) in zip(axes, chosen) if len(axis.values) > 1}
        options = doodle.parse_options(command_line(given))
        jobs.append(Job(labels, given, options, os.path.join(own.study, folder_name(labels))))
    return jobs


# ---- checks ----------------------------------------------------------------------------------------------------------

@functools.cache
def checksum(path):
    """SHA-256 of a file."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def files_read(options):
    """The pictures, maps and weights that a run reads, {what: path}."""
    paths = {'--content': options.content, '--style': options.style, '--weights': options.weights}
    if options.seed not in ('noise', 'content'):
        paths['--seed'] = options.seed
    if options.semantic_weight:
        paths |= zip(('map of the content', 'map of the style'), doodle.map_paths(options))
    return {what: path for what, path in paths.items() if path and doodle.is_there(path)}


def dependencies(options):
    """What a result depends on, as JSON: options, and checksums of files. Automatic maps follow from these."""
    known = {flag: getattr(options, doodle.attribute(flag)) for flag in KINDS
             if flag not in (*LEFT_OUT, *WITHOUT_EFFECT, '--content', '--style', '--seed', '--weights')}
    known['--seed'] = options.seed if options.seed in ('noise', 'content') else 'a picture'
    known |= {what: checksum(path) for what, path in files_read(options).items()
              if not (options.auto_maps and 'map' in what)}
    return json.loads(json.dumps(known))


def check_place(own):
    """Refuse a folder that cannot be written, or is no study."""
    if os.path.lexists(own.study) and not os.path.isdir(own.study):
        raise doodle.UserError(f'--study {own.study!r} is not a folder.', 'choose another --study')
    doodle.check_folder(own.study, '--study', 'choose another --study')
    if os.path.isdir(own.study) and os.listdir(own.study) and not os.path.isfile(os.path.join(own.study, 'study.csv')):
        raise doodle.UserError(f'--study {own.study!r} has other files in it.', 'choose a new folder')


def check_inputs(jobs, own):
    """Refuse pictures that are missing or do not fit, and more runs at once than memory; sets the jobs' `areas`."""
    known, memory = {}, []
    for job in jobs:
        options = job.options
        key = repr([value for name, value in vars(options).items() if name not in (   # what no picture is judged by
            'content_weight', 'style_weight', 'smoothness', 'variety', 'cache', 'iterations', 'random_seed')])
        if key not in known:
            if options.auto_maps:
                doodle.import_automaps().missing_maps(options)
            inputs, _ = (doodle.read_pictures if options.auto_maps else doodle.read_inputs)(options)
            if options.device == 'cpu' and not own.scheduler:
                doodle.check_memory(inputs, options)
            known[key] = inputs.size, inputs.style.shape[1::-1]
        size, style_size = known[key]
        job.areas = tuple(math.prod(doodle.phase_size(size, phase, options.phases)) for phase in range(options.phases))
        memory.append(doodle.memory_needed(size, style_size, options) if options.device == 'cpu' else 0)
    needed, limit = sum(sorted(memory)[-own.jobs:]), doodle.memory_limit()
    if own.jobs > 1 and needed > limit:
        raise doodle.UserError(f'{own.jobs} runs at once need about {needed / 1e9:.1f} GB of memory, and there are '
                               f'{limit / 1e9:.1f} GB.', 'fewer --jobs, or a smaller --max-size')


def find_networks(jobs):
    """Find the network, or several where options ask for these, and name it in the commands; returns remarks."""
    networks, lines = {}, []
    for job in jobs:
        options = job.options
        key = str([options.weights, options.network, options.style_layers, options.content_layers])
        if key not in networks:
            weights, remarks = doodle.find_weights(options)
            networks[key] = os.path.abspath(weights.path)
            lines += [line for line in remarks if line not in lines]
        job.given['--weights'] = options.weights = networks[key]
    return lines


def check_records(jobs):
    """Refuse runs that are one and the same, or whose results would overwrite others'; reads what is recorded."""
    runs = {}
    for job in jobs:
        job.depends = dependencies(job.options)
        same = runs.setdefault(json.dumps(job.depends), job)
        if same is not job:
            raise doodle.UserError(f'{same.folder!r} and {job.folder!r} are the same run.', 'leave one of them out')
        with contextlib.suppress(OSError, ValueError), open(job.path('run.json')) as file:
            job.record = json.load(file)
        then = job.record.get('depends', {}) if isinstance(job.record, dict) else {}
        changed = sorted(what for what in job.depends.keys() | then if job.depends.get(what) != then.get(what))
        there, begun = (os.path.lexists(job.path(name)) for name in ('result.png', 'result.png.checkpoint'))
        if changed and (there or begun):
            raise doodle.UserError(f'{job.folder!r} has a run with another {doodle.examples(changed)}.',
                                   'choose another --study')
        if changed or not job.is_done():
            job.record = {'seconds': job.record['seconds']} if begun else {}
            job.begun = job.logged() if begun else 0


# ---- runs ------------------------------------------------------------------------------------------------------------

def last_words(code, printed):
    """Why a run failed, in one line: its error, or the last line that it printed."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    if code < 0:
        lines = [f'killed by {signal.Signals(-code).name}']
    first = max((k for k, line in enumerate(lines) if line.startswith('ERROR: ')), default=len(lines) - 1)
    return doodle.one_line(' '.join(lines[first:]) or f'exit code {code}')


def run_here(jobs, count):
    """Run jobs as processes, `count` at once, and end them when this generator is closed.

    Yields
    ------
    job, code, seconds, printed
        For each that ended: its exit code, the time it took, what it printed. None as long as none ends.
    """
    waiting, running = collections.deque(jobs), {}
    threads = str(max(1, int(os.environ['OMP_NUM_THREADS']) // count))

    def begin(job):
        job.prepare()
        painted = None if job.options.content else files_read(job.options).get('map of the content')
        if painted:                                                     # a doodle lies beside the output
            shutil.copyfile(painted, doodle.map_path(job.path('result.png'), job.options.semantic_ext))
        job.note('running')
        with open(job.path('run.txt'), 'wb') as file:
            running[job] = time.monotonic(), subprocess.Popen(
                [sys.executable, '-IS', '-c', START, PROGRAM, *job.arguments()], stdin=subprocess.DEVNULL,
                stdout=file, stderr=file, env=os.environ | {'OMP_NUM_THREADS': threads})
    try:
        while waiting or running:
            while waiting and len(running) < count:
                begin(waiting.popleft())
            time.sleep(0.1)
            for job in [job for job, (_, process) in running.items() if process.poll() is not None]:
                since, process = running.pop(job)
                with open(job.path('run.txt'), errors='replace') as file:
                    yield job, process.returncode, time.monotonic() - since, file.read()
            yield None
    finally:
        for _, process in running.values():
            process.terminate()
        for job, (since, process) in running.items():
            process.wait()
            job.note('interrupted', time.monotonic() - since)


def parcel(job):
    """What travels with a job: its files, {name: path}, and its command line in the folder where they are unpacked."""
    read, known = files_read(job.options), 'content' if job.options.content else 'result'
    names = {flag: flag[2:] + os.path.splitext(path)[1] for flag, path in read.items() if flag.startswith('--')}
    files = {name: read[flag] for flag, name in names.items()} | {
        name: read[what] for what, name in (('map of the content', f'{known}_sem.png'),
                                            ('map of the style', 'style_sem.png')) if what in read}
    files |= {name: job.path(name) for name in ('result.png.checkpoint', 'run.log') if job.begun}
    tools = ('samples/automaps.py', 'samples/faces.py', 'samples/faces.npz') if job.options.auto_maps else ()
    files |= {'doodle.py': PROGRAM} | {name: doodle.beside(name) for name in tools}
    given = job.given | names | {'--output': 'result.png', '--log': 'run.log', '--semantic-ext': '_sem.png'}
    return files, command_line(given)


def run_on_worker(files, arguments, hosts):
    """Run doodle.py on a Dask worker, in a folder that is removed at the end; this travels without its module.

    Parameters
    ----------
    files : {name: bytes}
    arguments : list of str
    hosts : {host: number of runs that its workers make at once}

    Returns
    -------
    code : int
    seconds : float
    printed : str
    written : {name: bytes}
    """
    import distributed
    worker = distributed.get_worker()
    key, since = worker.get_current_task(), time.monotonic()
    environment = {name: value for name, value in os.environ.items() if not name.endswith('_NUM_THREADS')}  # Dask's: 1
    share = hosts.get(urllib.parse.urlsplit(worker.address).hostname, 1)
    if share > 1:
        environment['OMP_NUM_THREADS'] = str(max(1, len(os.sched_getaffinity(0)) // share))
    with tempfile.TemporaryDirectory(dir=worker.local_directory) as folder:
        for name, content in files.items():
            path = os.path.join(folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, 'wb') as file:
                file.write(content)
        with open(os.path.join(folder, 'run.txt'), 'wb') as file:
            process = subprocess.Popen([sys.executable, '-IS', '-c', START, 'doodle.py', *arguments], cwd=folder,
                                       env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        while process.poll() is None:
            task = worker.state.tasks.get(key)
            if task is None or task.state == 'cancelled':               # nobody waits for it any more
                process.terminate()
            time.sleep(0.2)
        written = {}
        for name in {'result.png', 'run.log', 'run.txt'} & set(os.listdir(folder)):
            with open(os.path.join(folder, name), 'rb') as file:
                written[name] = file.read()
    return process.returncode, time.monotonic() - since, written.pop('run.txt').decode(errors='replace'), written


run_on_worker.__module__ = '__main__'                                   # has it pickled whole, not by its name


@contextlib.contextmanager
def connected(address):
    """The client of a Dask cluster that has workers."""
    try:
        import distributed
    except ImportError as error:
        raise doodle.UserError(f'--scheduler needs dask.distributed: {doodle.one_line(error)}.',
                               'pip install -r samples/requirements.txt') from None
    logging.disable()                                                   # its errors are told here, in one line

    async def answer():                                                 # a Client would try for ever, and leave threads
        security = distributed.Security().get_connection_args('client')
        comm = await distributed.comm.connect(address, timeout=PATIENCE, **security)
        await comm.close()
    try:
        asyncio.run(asyncio.wait_for(answer(), PATIENCE))
    except Exception as error:  # Dask has many, and another server may answer anything
        raise doodle.UserError(f'--scheduler {address!r} does not answer as one: {doodle.one_line(error)}.',
                               'see that it runs: dask scheduler') from None
    with distributed.Client(address, timeout=PATIENCE, set_as_default=False) as client:
        try:
            client.wait_for_workers(1, PATIENCE)
        except TimeoutError:
            raise doodle.UserError(f'--scheduler {address!r} has no workers.',
                                   f'start one on each machine: dask worker {address} --nthreads 1') from None
        yield client


def run_there(jobs, client):
    """Run jobs on a Dask cluster, and cancel them when this generator is closed; yields what `run_here` does."""
    hosts, sent, running = collections.Counter(), {}, {}
    for address, count in client.nthreads().items():
        hosts[urllib.parse.urlsplit(address).hostname] += count

    def send(path):                                                     # as a task, for if all that have it die
        if path not in sent:
            with open(path, 'rb') as file:
                sent[path] = client.submit(bytes, file.read())
        return sent[path]
    try:
        for job in jobs:
            files, arguments = parcel(job)
            running[job] = client.submit(run_on_worker, {name: send(path) for name, path in files.items()}, arguments,
                                         dict(hosts), key=f'{os.path.basename(job.folder)}-{secrets.token_hex(8)}')
        while running:
            time.sleep(0.1)
            for job in [job for job, future in running.items() if future.done()]:
                future = running.pop(job)
                job.prepare()
                try:
                    code, seconds, printed, written = future.result()
                except Exception as error:  # its worker died again and again, or the scheduler is gone
                    code, seconds, printed, written = 1, 0, doodle.one_line(error), {}
                for name, content in (written | {'run.txt': printed.encode()}).items():
                    write(job.path(name), content)
                if code == 0:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(job.path('result.png.checkpoint'))
                yield job, code, seconds, printed
            yield None
    finally:
        client.cancel(list(running.values()), force=True)


def run_jobs(jobs, runs, tabulate):
    """Tell of `runs`, those of `jobs`, as they end, and keep records; returns the exit code."""
    number, failed, since = 0, 0, time.monotonic()
    total, begun = sum(map(Job.work, jobs)), sum(job.begun for job in jobs)
    try:
        with contextlib.closing(runs), doodle.tqdm(
                total=total, initial=begun, disable=None, leave=False,
                bar_format='{percentage:3.0f}% {bar} {elapsed}, {remaining} left') as bar:
            for event in runs:
                done = sum(map(Job.progress, jobs))
                bar.update(done - bar.n)
                if event:
                    job, code, seconds, printed = event
                    job.note('failed' if code else 'done', seconds, last_words(code, printed) if code else '')
                    number, failed, done = number + 1, failed + bool(code), sum(map(Job.progress, jobs))
                    left = (time.monotonic() - since) * (total - done) / max(1, done - begun)
                    bar.clear()
                    doodle.say(f'  - {number} of {len(jobs)}, `{job.folder}`: ' + (
                        f'failed: {job.record["said"]}' if code else f'done in {duration(job.record["seconds"])}') +
                        (f'; about {duration(left)} left.' if number < len(jobs) else '.'))
                    tabulate()
    except KeyboardInterrupt as interruption:
        doodle.say(f'\n{doodle.bold("Interrupted")}: {number - failed} of {len(jobs)} runs are done; the same command '
                   'goes on from there.')
        return 128 + interruption.args[0]
    if failed:
        doodle.say(f'{failed} of {len(jobs)} runs failed; the same command tries them again.')
    return 1 if failed else 0


# ---- table and sheets ------------------------------------------------------------------------------------------------

def table(axes, jobs):
    """A row for each run, as the bytes of a CSV."""
    flags = [flag for axis in axes if len(axis.values) > 1 for flag in axis.flags]
    losses = list(dict.fromkeys(name for job in jobs for name in job.record.get('losses', ())))
    text = io.StringIO()
    rows = csv.DictWriter(text, ['run', *flags, *losses, 'seconds', 'status', 'command'])
    rows.writeheader()
    for job in jobs:
        rows.writerow({'run': os.path.basename(job.folder)} | {flag: job.given[flag] for flag in flags} |
                      job.record.get('losses', {}) | {'seconds': job.record.get('seconds', 0),
                      'status': job.record.get('status', 'waiting'), 'command': job.record.get('command')})
    return text.getvalue().encode(errors='surrogateescape')


def words(axis, label):
    """A label on a sheet, in characters that can be drawn."""
    text = f'{axis} {" + ".join(label)}' if axis else ''
    return ''.join(letter if letter.isprintable() else '?' for letter in text)


def thumbnail(job, side):
    """The result of a job within `side` pixels, or None."""
    if job.is_done():
        with contextlib.suppress(doodle.UserError):
            image = doodle.Image.fromarray(doodle.read_picture(job.path('result.png')).pixels)
            image.thumbnail((side, side), doodle.Image.LANCZOS)
            return image
    return None


def sheet(title, jobs, across, down, columns):
    """A page with the results of `jobs`, row by row; `across` and `down` are names of axes, or None."""
    from PIL import ImageDraw, ImageFont
    rows = -(-len(jobs) // columns)
    side = max(16, min(SIDE, PAGE // columns - 8, PAGE // rows - 32))
    font = ImageFont.load_default(max(8, side // 16))
    images = [thumbnail(job, side) for job in jobs]
    width, height = (max([image.size[k] for image in images if image] or [side]) for k in (0, 1))
    line = round(2 * font.size)

    def room(axis):                                                     # pixels for the longest label
        return max(math.ceil(font.getlength(words(axis, job.labels[axis]))) for job in jobs) if axis else 0
    left, width = min(2 * side, room(down)) + 8 + 8 * bool(down), max(width, min(2 * side, room(across)))
    size = left + columns * (width + 8), line * bool(title) + rows * (height + line) + 8
    page = doodle.Image.new('RGB', size, 'white')
    pen = ImageDraw.Draw(page)

    def put(x, y, text, most):
        while len(text) > 2 and font.getlength(text) > most:
            text = text[:-3] + '..'
        pen.text((x, y + font.size / 3), text, 'black', font)
    if title:
        put(8, 0, title, page.width - 16)
    for k, (job, image) in enumerate(zip(jobs, images)):
        x, y = left + k % columns * (width + 8), line * bool(title) + k // columns * (height + line)
        if across:
            put(x, y, words(across, job.labels[across]), width)
        if down and k % columns == 0:
            put(8, y + line, words(down, job.labels[down]), left - 16)
        if image:
            page.paste(image, (x, y + line))
        else:
            pen.rectangle((x, y + line, x + width - 1, y + line + height - 1), 'lightgrey')
            put(x + 4, y + line, job.record.get('status', 'waiting'), width - 8)
    return page


def sheets(axes, jobs):
    """The pages, {name: picture}: columns by the axis with the most values, rows by the next, pages by the others."""
    varied = sorted((axis for axis in axes if len(axis.values) > 1), key=lambda axis: -len(axis.values))
    across, down, others = varied[:1], varied[1:2], [axis.name for axis in varied[2:]]
    columns = len(across[0].values) if down else min(len(jobs), WRAP)
    across, down = (axis[0].name if axis else None for axis in (across, down))
    order = {axis.name: axis.labels.index for axis in varied}
    pages = collections.defaultdict(list)
    names = [name for name in (*others, down, across) if name]
    for job in sorted(jobs, key=lambda job: [order[name](job.labels[name]) for name in names]):
        pages[tuple(job.labels[name] for name in others)].append(job)
    for labels, page in pages.items():
        title = ', '.join(map(words, others, labels))
        name = '+'.join(['sheet', *([folder_name(dict(zip(others, labels)))] if others else [])])
        yield name, sheet(title, page, across, down, columns)


# ---- main ------------------------------------------------------------------------------------------------------------

def run(arguments):
    """The study, from its command line to its sheets; returns the exit code."""
    own, axes = parse_command(arguments)
    jobs = make_jobs(own, axes)
    doodle.prepare_process()
    doodle.import_pillow()
    check_place(own)
    check_inputs(jobs, own)
    remarks = find_networks(jobs)
    check_records(jobs)
    place, todo = os.path.join(own.study, 'study.csv'), [job for job in jobs if not job.is_done()]
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(connected(own.scheduler)) if own.scheduler else None
        remarks += stack.enter_context(doodle.locked(place))
        done = f', {len(jobs) - len(todo)} of them done before' if len(todo) < len(jobs) else ''
        for line in [*remarks, f'{len(jobs)} run{"s" * (len(jobs) > 1)}{done}.']:
            doodle.say(f'  - {line}')

        def tabulate():
            write(place, table(axes, jobs))
        tabulate()
        code = run_jobs(todo, run_there(todo, client) if client else run_here(todo, own.jobs), tabulate)
        tabulate()
        for old in glob.glob(os.path.join(glob.escape(own.study), 'sheet*.png')):
            os.unlink(old)
        pages = []
        for name, page in sheets(axes, jobs):
            pages.append(os.path.join(own.study, f'{name}.png'))
            doodle.write_picture(page, pages[-1])
    doodle.say(f'Table: `{place}`; contact sheet: {doodle.examples([f"`{path}`" for path in pages])}.')
    return code


if __name__ == '__main__':
    sys.exit(doodle.guarded(run, sys.argv[1:]))
