#!/usr/bin/env bash
# Make an arm64 Debian folder with Python, numpy, Pillow and ONNX Runtime, and DEST/python3 that runs it under qemu-user.
# Nothing is installed on this machine, nothing in the folder runs while it is made, and no root rights are needed for
# what comes after. Needs debootstrap, qemu-user-static, unzip and python3 with pip.
#
#   scripts/arm64_root.sh DEST
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 DEST" >&2; exit 2; }
[ ! -e "$1" ] || { echo "$1 exists already" >&2; exit 2; }
for tool in debootstrap qemu-aarch64-static unzip dpkg-deb; do
  command -v "$tool" >/dev/null || { echo "missing: $tool" >&2; exit 2; }
done
mkdir -p "$1"
dest=$(cd "$1" && pwd)

# The first stage fetches the packages; the second would run their scripts under qemu, which unpacking them does not need.
debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,libstdc++6 bookworm "$dest"
for package in "$dest"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$dest"; done

# ONNX Runtime 1.22.1 is the newest that was seen to load under qemu-user 7.2; 1.23.2, 1.24.1 and 1.31.1 did not.
python3 -m pip download --quiet --no-deps --dest "$dest/opt/wheels" --python-version 3.11 --only-binary=:all: \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
  "numpy==2.2.6" "pillow>=11,<12" "onnxruntime==1.22.1"
for wheel in "$dest"/opt/wheels/*.whl; do unzip -q -o "$wheel" -d "$dest/opt/site"; done

cat >"$dest/python3" <<'LAUNCHER'
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
PYTHONPATH="$here/opt/site" exec qemu-aarch64-static -L "$here" "$here/usr/bin/python3.11" "$@"
LAUNCHER
chmod +x "$dest/python3"
"$dest/python3" -c 'import platform, numpy, PIL, onnxruntime; print("ready:", platform.machine(), onnxruntime.__version__)'
