#!/bin/bash
# Make one environment for each program under DIR:   bash benchmarks/peers/environments.sh DIR
# Each takes about 6 GB of disk, most of it torch.
set -e
shared="timm==1.0.31 open_clip_torch==3.3.0 torch==2.14.1 torchvision==0.29.1 onnxruntime==1.32.0"
make() {
  python3.11 -m venv "$1/$2"
  "$1/$2/bin/pip" install -q $shared "${@:3}"
}
python3.11 -m venv "$1/edgekd"
"$1/edgekd/bin/pip" install -q -c constraints/tested.txt .
make "$1" timm
make "$1" torchdistill torchdistill==1.1.5
make "$1" lightly lightly-train==0.18.0
make "$1" olive olive-ai==0.13.0 requests  # imported, not declared
make "$1" timmx "timmx[onnx]==0.10.1"
make "$1" ultralytics ultralytics==8.4.190 onnx
