# Neural Doodle in a container. Targets: cpu (the default), gpu, and tests (for docker-compose.yml).
#
#   DOCKER_BUILDKIT=1 docker build -t neural-doodle .
#   docker run --rm -v "$PWD:/nd" -v doodle-cache:/cache neural-doodle --style ...
#
#   DOCKER_BUILDKIT=1 docker build -t neural-doodle:gpu --target gpu .
#   docker run --rm --gpus all -v "$PWD:/nd" -v doodle-cache:/cache neural-doodle:gpu --style ...
#
# People mount their folders on /nd, which hides what lies there: the program is in /opt/doodle. Build arguments:
# BASE, which may carry a digest; VGG19=required|skip; DOODLE_ADDRESSES, more places to fetch VGG19 from; and for the
# labels SOURCE, VERSION, REVISION, CREATED.
ARG BASE=debian:bookworm-slim

# ---- base: Debian's Python 3.11 (the one that Debian's pygpu is made for), the compiler that Theano calls, the packages
FROM ${BASE} AS base
# Debian's versions are not pinned: its mirrors keep the newest of a release only, so that a pin soon builds no more.
# The lists are not cached: with /var/lib/apt mounted, buildah loses /usr/lib/apt. No program needs another user's rights.
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
 && apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* /usr/lib/python3.11/config-*/*.a \
 && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
# Files are copied, not mounted, for buildah takes what is mounted for unchanged.
COPY .docker/requirements.txt /opt/doodle/
# System packages are let in for pygpu, which only Debian has. The packages' own tests are 60 MB; Theano imports its own.
RUN --mount=type=cache,target=/root/.cache/pip python3 -m venv --system-site-packages /opt/venv \
 && /opt/venv/bin/pip install --no-deps --require-hashes -r /opt/doodle/requirements.txt \
 && find /opt/venv/lib -name tests -type d -prune ! -path '*/theano/tests' -exec rm -rf {} +
# The user can be any.
RUN mkdir -m 1777 /cache /nd /nd/samples && mkdir -m 700 /cache/tests
# Some keys of compiled code have hashes in them.
ENV PATH=/opt/venv/bin:$PATH LANG=C.UTF-8 PYTHONHASHSEED=0

# ---- vgg19: by itself, so that a change of the program does not fetch it again
FROM base AS vgg19
ARG VGG19=try
ARG DOODLE_ADDRESSES=
COPY .docker/vgg19 /opt/doodle/
RUN /opt/doodle/vgg19 "$VGG19" /weights

# ---- program: script, network, samples, compiled code, and how a container starts
FROM base AS program
COPY LICENSE vgg16.npz doodle.py .docker/warm /opt/doodle/
COPY samples/automaps.py samples/faces.* samples/figure.py samples/watch.html /opt/doodle/samples/
RUN /opt/doodle/warm cpu
COPY .docker/start /opt/doodle/
COPY --from=vgg19 /weights /opt/doodle/weights
COPY samples/*.png samples/*.jpg /nd/samples/
COPY samples/portraits /nd/samples/portraits/
WORKDIR /nd

# ---- cuda: Debian's pygpu with Nvidia's compiler and BLAS, for x86-64 only, by gpu.txt
FROM base AS cuda
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    apt-get update \
 && apt-get install -y --no-install-recommends python3-pygpu libgpuarray-dev \
 && rm -rf /var/lib/apt/lists/*
# libgpuarray opens CUDA by names without a version, which the wheels lack, and so does the driver (mounted at start).
COPY .docker/gpu.txt /opt/doodle/
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --require-hashes -r /opt/doodle/gpu.txt \
 && nvidia=/opt/venv/lib/python3.11/site-packages/nvidia \
 && ln -s libnvrtc.so.12 "$nvidia/cuda_nvrtc/lib/libnvrtc.so" \
 && ln -s libcublas.so.12 "$nvidia/cublas/lib/libcublas.so" \
 && ln -s libcuda.so.1 /usr/lib/x86_64-linux-gnu/libcuda.so \
 && printf '%s\n' "$nvidia/cuda_nvrtc/lib" "$nvidia/cublas/lib" > /etc/ld.so.conf.d/cuda.conf \
 && ldconfig

# ---- cards: compiled code for cards
FROM cuda AS cards
COPY --from=program /opt/doodle /opt/doodle
COPY tests/cuda_on_cpu.cpp .docker/warm-gpu /opt/doodle/
RUN /opt/doodle/warm-gpu

# ---- gpu: needs the NVIDIA container toolkit and `--gpus all`; falls back to the CPU
FROM cuda AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility DOODLE_DEVICE=gpu0
COPY --from=cards /opt/doodle /opt/doodle
COPY --from=program /nd/samples /nd/samples
WORKDIR /nd
ENTRYPOINT ["/opt/doodle/start"]
ARG SOURCE=
ARG VERSION=1.0.0
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.title="Neural Doodle, on an NVIDIA GPU" \
      org.opencontainers.image.description="Paint one picture with the patches of another" \
      org.opencontainers.image.licenses="MIT AND CC-BY-4.0 AND Apache-2.0" \
      org.opencontainers.image.source="$SOURCE" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED"

# ---- tests: the checkout is mounted on /nd
FROM program AS tests
COPY tests/requirements.txt /opt/doodle/tests.txt
RUN --mount=type=cache,target=/root/.cache/pip pip install -r /opt/doodle/tests.txt
ENV PYTHONDONTWRITEBYTECODE=1 HOME=/cache/tests
ENTRYPOINT ["python3", "-m", "pytest", "-p", "no:cacheprovider"]
CMD ["tests"]

# ---- cpu: the last, and so the default
FROM program AS cpu
ENTRYPOINT ["/opt/doodle/start"]
ARG SOURCE=
ARG VERSION=1.0.0
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.title="Neural Doodle" \
      org.opencontainers.image.description="Paint one picture with the patches of another" \
      org.opencontainers.image.licenses="MIT AND CC-BY-4.0 AND Apache-2.0" \
      org.opencontainers.image.source="$SOURCE" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED"
