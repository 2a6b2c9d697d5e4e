#!/bin/sh
# Builds device.engine from model.onnx with NVIDIA's trtexec, on the machine that will run it. Needs no Python.
# The precision is in model.onnx (a strongly typed network): no --fp16 and no --int8 here.
set -eu
cd "$(dirname "$0")"
trtexec="${TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}"
if [ ! -x "$trtexec" ]; then
    echo "error: trtexec was not found; set TRTEXEC to its path, or run: python3 build_engine.py" >&2
    exit 2
fi
# TensorRT 10 has to be told to keep the types of the file; TensorRT 11 always does, and may not know the flag.
typed=""
if "$trtexec" --help 2>&1 | grep -q -- "--stronglyTyped"; then typed="--stronglyTyped"; fi
"$trtexec" --onnx=model.onnx --saveEngine=device.engine.part $typed --skipInference \
    --minShapes=image:1x@ITEM@ --optShapes=image:1x@ITEM@ --maxShapes=image:@BATCH@x@ITEM@
mv device.engine.part device.engine
echo "device.engine is ready"
