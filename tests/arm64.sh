#!/usr/bin/env bash
# The program on linux/arm64, emulated: the image's packages install, Theano and the engine compile, and a tiny run of
# each method has the losses of this machine's run. As root on Debian, with debootstrap and qemu-user-static:
#
#   tests/arm64.sh FOLDER PYTHON
#
# FOLDER keeps the Debian of arm64 for the next time; PYTHON has the program's packages, as .venv/bin/python has.
# It takes the better part of an hour on two cores, so it is no part of .ci/run.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=$(realpath -m "$1") python=$(realpath -s "$2") root=$folder/root formats=/proc/sys/fs/binfmt_misc
mkdir -p "$folder"

# Programs of arm64 are run by qemu, which the kernel opens now (F), so that it need not be in the chroot.
mounted=
leave() {
    ! mountpoint -q "$root/proc" || umount "$root/proc"
    [ ! -e $formats/doodle-arm64 ] || echo -1 > $formats/doodle-arm64
    [ -z "$mounted" ] || umount $formats
}
trap leave EXIT
if ! [ -e $formats/register ]; then
    mount -t binfmt_misc none $formats
    mounted=yes
fi
if ! grep -qs 'interpreter.*aarch64' $formats/*; then
    magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
    mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
    echo ":doodle-arm64:M::$magic:$mask:/usr/bin/qemu-aarch64-static:F" > $formats/register
fi

if ! [ -e "$root/usr/bin/g++" ]; then
    time debootstrap --arch=arm64 --variant=minbase --include=ca-certificates,g++,python3-dev,python3-venv bookworm "$root"
fi
if ! [ -e "$root/venv/done" ]; then
    mapfile -t platforms < <(printf -- '--platform=manylinux_2_%s_aarch64\n' 17 24 26 27 28)
    "$python" -m pip download -q --no-deps --require-hashes --python-version 3.11 "${platforms[@]}" \
        --platform=manylinux2014_aarch64 -d "$root/packages" -r "$here/.docker/requirements.txt"
    cp "$here/.docker/requirements.txt" "$root/packages"
    time chroot "$root" /bin/sh -euc 'python3 -m venv /venv
        /venv/bin/pip install -q --no-index --no-deps --require-hashes -f /packages -r /packages/requirements.txt'
    touch "$root/venv/done"
fi

rm -rf "$root/doodle" && mkdir -p "$root/doodle/samples"
cp "$here"/{doodle.py,vgg16.npz} "$root/doodle"
cp "$here"/samples/{automaps.py,astronaut*.png,hopper*.png} "$root/doodle/samples"
mount -t proc none "$root/proc"
cd "$root/doodle"
flags=THEANO_FLAGS=gcc.cxxflags=-march=armv8.2-a+dotprod      # for products of bytes: g++ asks /proc, which is x86's
for kind in --method=champandard --semantic-weight=0 '--method=li-wand --scales=1' --method=gatys; do
    run="doodle.py --style=samples/astronaut.png --content=samples/hopper.png --network=vgg16 --max-size=64 --phases=1 \
        --iterations=3 --save-every=0 --random-seed=1 $kind"
    # shellcheck disable=SC2086
    "$python" $run --log=x86.json > /dev/null
    time chroot "$root" /bin/sh -c "cd /doodle && LC_ALL=C.UTF-8 $flags /venv/bin/python $run --log=arm64.json" | tail -1
    "$python" - "$kind" << 'END'
import json
import sys
x86, arm64 = ([json.loads(line)['total'] for line in list(open(name))[1:]] for name in ('x86.json', 'arm64.json'))
largest = max(abs(a - b) / abs(a) for a, b in zip(x86, arm64, strict=True))
print(f'{sys.argv[1]}: losses of {len(x86)} evaluations differ by {largest:.1e} at most.')
assert len(x86) == 3 and largest <= 1e-4
END
    rm x86.json arm64.json
done
