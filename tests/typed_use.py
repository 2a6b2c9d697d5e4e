"""What type checkers and editors see of the verbs: checked by mypy in CI, never run.

A line that must be refused carries an ignore; mypy complains about an ignore that is not needed.
"""

from __future__ import annotations

from pathlib import Path

import edgekd

run = edgekd.train("mobilenetv3", steps=3, out="runs/x", unseen_classes=["dog", "cat"])
edgekd.train(out=Path("runs/x"), bn="frozen", stages={"distill": {"lr": 2.0}}, config="run.toml")
edgekd.train(steps="three")  # type: ignore[arg-type]
edgekd.train(epoch=3)  # type: ignore[call-arg]
edgekd.train(bn="forzen")  # type: ignore[arg-type]
folder: Path | None = run.folder

artifacts = edgekd.export(run.folder, precision="int8", max_drop_id=1)
edgekd.export("runs/x", precision="int9")  # type: ignore[arg-type]
edgekd.verify(artifacts[-1].folder or "")
edgekd.verify()  # type: ignore[call-arg]
edgekd.add_class("artifact", "fire hydrant", images=["a.jpg", Path("b.jpg")])

edgekd.benchmark()
edgekd.benchmark("a", quick=True, batch_sizes=[1, 8], ood=["sketch=DIR"])
edgekd.benchmark("a", Path("b"), compare=True, batch_sizes="1,8")
edgekd.benchmark(["a", "b", "c"])
edgekd.benchmark(quik=True)  # type: ignore[call-overload]
edgekd.report("a", "b", out="comparison")

study = edgekd.study("erm,kd", seeds=1, fractions="0.1", lr=1e-3)
table: Path = study.folder

model = edgekd.load("runs/x", threads=1)
labels: list[str] = [one.label for one in model.predict(["a.jpg", Path("b.jpg")])]
edgekd.predict("runs/x", ["a.jpg"], top=3)
edgekd.predict("runs/x", "a.jpg", tops=3)  # type: ignore[call-arg]
edgekd.demo("runs/x", port=0).close()
