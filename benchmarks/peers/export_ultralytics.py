"""Try to export a timm classifier with ultralytics and print the errors.

python benchmarks/peers/export_ultralytics.py STUDENT.pt --assets ASSETS --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from setting import make_student
from ultralytics import YOLO
from ultralytics.engine.exporter import Exporter


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("student", type=Path)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    state = torch.load(given.student, weights_only=True)
    student = make_student(given.assets, len(state["classifier.bias"]))
    student.load_state_dict(state)
    whole = given.out / "whole.pt"
    torch.save({"model": student}, whole)

    def of_weights() -> object:
        return YOLO(given.student, task="classify").export(format="onnx", imgsz=96)

    def of_whole_model() -> object:
        return YOLO(whole, task="classify").export(format="onnx", imgsz=96)

    def of_exporter() -> object:
        return Exporter(overrides={"format": "onnx", "imgsz": 96})(model=student)

    ways: tuple[Callable[[], object], ...] = (of_weights, of_whole_model, of_exporter)
    for way in ways:
        try:
            print(f"{way.__name__}: wrote {way()}")
        except Exception as error:
            print(f"{way.__name__}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")


if __name__ == "__main__":
    main()
