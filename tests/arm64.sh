#!/usr/bin/env bash
# Tests on an emulated 64-bit ARM: the NEON kernels, and MLX's own wheel for ARM. Slow: ten times.
#
#   tests/arm64.sh FOLDER [pytest arguments]
#
# FOLDER keeps Python and wheels for the next time (700 MB). Needs Debian 12 or newer, or Ubuntu, and,
# as root: apt-get install qemu-user-static gcc-aarch64-linux-gnu
#          dpkg --add-architecture arm64 && apt-get update
# What starts Python anew is left out, and what clang compiles to emulate Metal: both are for this
# machine's own processor.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" && folder=$(cd "$1" && pwd) && shift
python=python$(apt-cache show python3-minimal | sed -n 's/^Version: \(3\.[0-9]*\).*/\1/p' | head -1)

if [ ! -e "$folder/ready" ]; then
    (
        cd "$folder" && mkdir -p debs && cd debs
        apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
            --no-replaces --no-enhances "$python-minimal:arm64" "lib$python-stdlib:arm64" libstdc++6:arm64 |
            sed -n 's/^\([a-z].*:arm64\)$/\1/p' | sort -u | xargs apt-get -q download
        for deb in *.deb; do dpkg -x "$deb" ../root; done
    )
    python3 -m venv "$folder/pip"
    FLASH_MOE_PURE=1 "$folder/pip/bin/pip" -q wheel --no-deps -w "$folder" "$here"
    platforms=$(printf -- '--platform manylinux_2_%s_aarch64 ' 35 34 31 28 27 17)
    # shellcheck disable=SC2086
    "$folder/pip/bin/pip" -q install --target "$folder/site" --only-binary=:all: $platforms \
        --platform manylinux2014_aarch64 --python-version "${python#python}" \
        "$(echo "$folder"/llm_flash_moe-*.whl)[test]"
    # The tests are to see this folder's code, not the wheel's.
    rm -rf "$folder"/site/{flash_moe,llm_flash_moe}
    touch "$folder/ready"
fi

# MLX compiles for itself as well, with a compiler for this machine: so not at all.
export MLX_DISABLE_COMPILE=1 CC=aarch64-linux-gnu-gcc XDG_CACHE_HOME="$folder/cache"
export PYTHONHOME="$folder/root/usr" PYTHONPATH="$here:$here/backend:$folder/site"
cd "$here"
[ $# -gt 0 ] || set -- tests/kernels/test_native.py tests/pack/test_fit.py tests/model/test_choice.py \
    tests/stream/test_planes_for_kernels.py tests/prefix/test_reuse.py
exec qemu-aarch64-static -L "$folder/root" "$folder/root/usr/bin/$python" -m pytest -q -p no:cacheprovider "$@"
