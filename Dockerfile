# Neural Doodle in a container. Targets: cpu (the default), gpu, and tests (for docker-compose.yml).
#
#   docker build -t neural-doodle .                    docker run --rm -v "$PWD:/nd" neural-doodle --style ...
#   docker build -t neural-doodle:gpu --target gpu .   docker run --rm --gpus all -v "$PWD:/nd" neural-doodle:gpu --style ...
#
# People mount their folders on /nd, which hides what lies there: the program is in /opt/doodle.

# ---- base: Debian's Python 3.11 (the one that Debian's pygpu is made for), the compiler that Theano calls, the packages
FROM debian:bookworm-slim AS base
# Debian's versions are not pinned: its mirrors keep the newest of a release only, so that a pin soon builds no more.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
 && apt-get clean && rm -rf /var/lib/apt/lists/* /usr/lib/python3.11/config-*/*.a
COPY requirements.txt /opt/doodle/
# System packages are let in for pygpu, which only Debian has. The packages' own tests are 60 MB; Theano imports its own.
RUN python3 -m venv --system-site-packages /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir -r /opt/doodle/requirements.txt \
 && find /opt/venv/lib -name tests -type d -prune ! -path '*/theano/tests' -exec rm -rf {} +
ENV PATH=/opt/venv/bin:$PATH

# ---- program: script, network, samples, and how a container starts
FROM base AS program
# 1. Root becomes the owner of the mounted folder, so that the files are the caller's. A folder that belongs to root says
#    nothing: dockerd makes one for each missing folder. An empty such /nd/frames is handed over, too.
# 2. Theano writes and loads compiled code. Where the cache in the image is not writable, a copy in /tmp serves.
#    TMPDIR is there as well, since Theano also runs a trial program in it.
# 3. The time after which Theano forgets a module, 24 days, counts from the image's birth: so ten years. The folder has
#    a fixed name, for its usual one has the kernel's version in it, and hashes are not random: some are in its keys.
# 4. Where the build could not fetch VGG19, a run does not try again, unless asked to by --weights or --network, which
#    may be abbreviated.
# The text is the container's to expand, not the build's.
# hadolint ignore=SC2016
RUN printf '%s\n' '#!/bin/sh -eu' \
    'fail() { printf "ERROR: %s\n  FIX: %s.\n" "$@" >&2; exit 2; }' \
    'if [ "$(id -u)" = 0 ]; then' \
    '    for folder in /nd /nd/frames /nd/samples; do' \
    '        mountpoint -q "$folder" || continue' \
    '        user=$(stat -c %u "$folder") group=$(stat -c %g "$folder")' \
    '        [ "$user" != 0 ] || continue' \
    '        if mountpoint -q /nd/frames; then' \
    '            find /nd/frames -maxdepth 0 -empty -user 0 -exec chown "$user:$group" {} + || true' \
    '        fi' \
    '        exec setpriv --reuid="$user" --regid="$group" --clear-groups "$0" "$@"' \
    '    done' \
    'fi' \
    'work=/opt/doodle/cache' \
    'if ! [ -w "$work" ]; then' \
    '    work=$(mktemp -d 2>/dev/null) && cp -r /opt/doodle/cache/. "$work" ||' \
    '        fail "Compiled code needs a folder, and /tmp cannot be written." "add --tmpfs /tmp:exec"' \
    'fi' \
    'cp /bin/true "$work" && "$work/true" 2>/dev/null ||' \
    '    fail "Compiled code cannot run in /tmp, which is mounted noexec." "use --tmpfs /tmp:exec"' \
    'case " $* " in' \
    '    *" --w"* | *" --n"*) ;;' \
    '    *) [ -e /opt/doodle/weights/neural-doodle/vgg19_weights_*.h5 ] || set -- --network=vgg16 "$@" ;;' \
    'esac' \
    'export HOME="$work" TMPDIR="$work" XDG_CACHE_HOME=/opt/doodle/weights DOODLE_CONTAINER=1 PYTHONHASHSEED=0' \
    'export THEANO_FLAGS="compiledir=$work/theano,cmodule.age_thresh_use=315360000,${THEANO_FLAGS:-}"' \
    'exec python3 /opt/doodle/doodle.py "$@"' \
    > /opt/doodle/start \
 && chmod 755 /opt/doodle/start \
 && mkdir -m 1777 /nd \
 && mkdir -m 777 /opt/doodle/cache /opt/doodle/weights
COPY LICENSE vgg16.npz doodle.py /opt/doodle/
COPY samples/automaps.py /opt/doodle/samples/
COPY samples/*.png /nd/samples/
WORKDIR /nd
# One evaluation of each kind of run compiles all that it needs, for this build's processor; Theano tells it by its flags
# and compiles anew on another. The first run also fetches and checks VGG19. Every user may write: the caller's id can be
# any.
RUN warm() { /opt/doodle/start --output=/tmp/warm.png --max-size=96 --phases=1 --iterations=1 --save-every=0 "$@"; } \
 && faces() { warm --style=samples/astronaut.png --content=samples/hopper.png "$@"; } \
 && { faces --network=vgg19 || echo "*** VGG19 could not be fetched: this image has the bundled VGG16. ***"; } \
 && faces --variety=0.1 --cache=1 \
 && faces --semantic-weight=0 \
 && faces --method=gatys \
 && faces --method=li-wand --scales=1 \
 && warm --style=samples/auvers.png --output=samples/my_village.png \
 && warm --style=samples/gravel.png \
 && rm samples/my_village.png /tmp/warm.png /opt/doodle/cache/true /opt/doodle/cache/theano/headers.h* \
 && chmod -R a+rwX /opt/doodle/cache && chmod 1777 samples

# ---- gpu: needs the NVIDIA container toolkit and `--gpus all`; falls back to the CPU
FROM base AS gpu
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-pygpu libgpuarray-dev \
 && apt-get clean && rm -rf /var/lib/apt/lists/*
# libgpuarray opens CUDA by names without a version, which the wheels lack, and so does the driver (mounted at start).
RUN pip install --no-cache-dir nvidia-cuda-nvrtc-cu12==12.4.127 nvidia-cublas-cu12==12.4.5.8 \
 && nvidia=/opt/venv/lib/python3.11/site-packages/nvidia \
 && ln -s libnvrtc.so.12 "$nvidia/cuda_nvrtc/lib/libnvrtc.so" \
 && ln -s libcublas.so.12 "$nvidia/cublas/lib/libcublas.so" \
 && ln -s libcuda.so.1 /usr/lib/x86_64-linux-gnu/libcuda.so \
 && printf '%s\n' "$nvidia/cuda_nvrtc/lib" "$nvidia/cublas/lib" > /etc/ld.so.conf.d/cuda.conf \
 && ldconfig
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=program /opt/doodle /opt/doodle
COPY --from=program /nd /nd
WORKDIR /nd
ENTRYPOINT ["/opt/doodle/start", "--device=gpu0"]
LABEL org.opencontainers.image.title="Neural Doodle, on an NVIDIA GPU" \
      org.opencontainers.image.description="Paint one picture with the patches of another" \
      org.opencontainers.image.licenses="MIT AND CC-BY-4.0"

# ---- tests: the checkout is mounted on /nd
FROM program AS tests
COPY tests/requirements.txt /opt/doodle/tests.txt
RUN pip install --no-cache-dir -r /opt/doodle/tests.txt
ENV PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["python3", "-m", "pytest", "-p", "no:cacheprovider"]
CMD ["tests"]

# ---- cpu: the last, and so the default
FROM program AS cpu
ENTRYPOINT ["/opt/doodle/start", "--device=cpu"]
LABEL org.opencontainers.image.title="Neural Doodle" \
      org.opencontainers.image.description="Paint one picture with the patches of another" \
      org.opencontainers.image.licenses="MIT AND CC-BY-4.0"
