"""The library's front door; the command line says the same words. Functions here only wire rooms together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError
from edgekd.folders import ARTIFACT, REPORT, free_name, publishing
from edgekd.manifest import Artifact, Input, Precision, Run, read_artifact

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.benchmark.measure.throughput import Grid
    from edgekd.benchmark.rows import Report
    from edgekd.data import ImageSet
    from edgekd.distill.load import LoadedRun
    from edgekd.export.calibrators import Calibrator
    from edgekd.export.graph import Deployable
    from edgekd.export.mixed import Yardstick
    from edgekd.split import Split
    from edgekd.studies.study import Study

PARITY_IMAGES = 256
YARDSTICK_IMAGES = 256
"""Of each kind, that measure what INT8 costs: one image is 0.4 points."""


def train(
    student: str | None = None,
    *,
    config: str | Path | None = None,
    settings: Iterable[str] = (),
    **options: Any,
) -> Run:
    """Distil a student and write its run folder.

    Args:
        student: friendly or timm name.
        config: TOML file with any of the settings of `edgekd.config.TrainConfig`.
        settings: `a.b=c` strings, as `--set` takes them; they win over everything else.
        **options: any field of `TrainConfig` by its name.

    Returns:
        The finished run; `run.json` in its folder says the same.
    """
    from edgekd.config import load_config
    from edgekd.distill.train import train as run_training

    return run_training(
        load_config(
            {"student": student, **options},
            file=Path(config) if config else None,
            settings=settings,
        )
    )


def missing_embeddings(
    teacher: str, *, data: str | None = None, unlabelled: Sequence[str] = ()
) -> list[str]:
    """List the images that a file of precomputed embeddings lacks.

    Args:
        teacher: `embeddings:FILE.npz`.
        data: labelled images as for `train`. unlabelled: sources as for `train`.

    Returns:
        Names of images, as the file's `image_ids` must have them.
    """
    from edgekd.data import load_images
    from edgekd.distill.teacher import EmbeddingsTeacher, load_teacher
    from edgekd.unlabelled import load_unlabelled

    box = load_teacher(teacher)
    if not isinstance(box, EmbeddingsTeacher):
        raise EdgekdError(
            f"{teacher} embeds any image, so none is missing.", "Name a file: embeddings:FILE.npz."
        )
    sets = [load_images(data)] if data is not None else []
    sets += [load_unlabelled(source) for source in unlabelled]
    return [name for images in sets for name in images.ids if name not in box.vectors]


def export(
    run: str | Path | None = None,
    *,
    target: str = "onnxruntime",
    precision: Precision = "fp32",
    data: str | None = None,
    calibration_images: int = 300,
    calibrator: Calibrator | None = None,
    max_drop_id: float | None = None,
    max_drop_ood: float | None = None,
    search_seconds: float = 300,
    min_agreement: float | None = None,
    head: str = "classes",
    input: Input = "uint8",
    overwrite: bool = False,
    options: Mapping[str, Any] | None = None,
) -> list[Artifact]:
    """Export a run's student into `<run>/artifacts/<target>-<precision>/`.

    For ONNX Runtime, INT8 and FP16 are made from the FP32 file, which is exported with them when it is not there yet.

    Args:
        run: run folder; None takes the newest under `runs/`.
        target: see `edgekd list targets`.
        precision: one of the target's: `fp32`, `fp16`, `int8`; for Core ML also `w8a8`, `pal4` and `pal6`.
        data: where the run's images lie now, if they have moved.
        calibration_images: training images that INT8 ranges are measured on.
        calibrator: how INT8 ranges are chosen: `minmax`, `percentile`, `entropy` or `mse`; ONNX Runtime and TensorRT.
            None takes the target's own default.
        max_drop_id: points of top-1 that INT8 may lose on validation images of the training domains, against FP32;
            the layers that cost the most stay in float until it loses no more. ONNX Runtime, OpenVINO and TensorRT.
        max_drop_ood: the same on corrupted validation images, a stand-in for unseen domains made without them.
        search_seconds: with a largest drop, time for finding the layers to keep; what was reached is said.
        min_agreement: percent of the images on which the file must predict the torch student's class, instead of the
            precision's own threshold; not for fp32 and fp16.
        head: what the file ends in: `classes`, their logits, or `embedding`, the image's unit vector in the teacher's
            space, with the class vectors beside it, in `<target>-<precision>-embedding/`; see `add_class`.
        input: what the file takes: `uint8`, RGB pixels `[B, H, W, 3]`, or `float`, float32 `[B, 3, H, W]` that is
            normalised already, in `<target>-<precision>-float-input/`. Sessions and benchmarks give pixels to both.
        overwrite: replace artifacts of the same name.
        options: the target's own switches, such as `compute_capability` for TensorRT and `deployment_target` for
            Core ML.

    Returns:
        The artifacts written, the wanted precision last.

    Raises:
        GateFailed: the file differs too much from the torch student, or costs more than the drops allow; it is kept
            beside the others as `<name>.failed`.
    """
    from edgekd.targets.registry import (
        DEFAULT_TARGET,
        artifact_name,
        check_calibrator,
        check_input,
        get_target,
    )

    if head not in ("classes", "embedding"):
        raise EdgekdError(f'There is no head "{head}".', "Give --head classes or --head embedding.")
    embedding = head == "embedding"
    known = get_target(target)
    if precision not in known.precisions:
        raise EdgekdError(
            f"{target} takes no {precision}.", f"It takes: {', '.join(known.precisions)}."
        )
    check_calibrator(known, precision, calibrator)
    check_input(known, input)
    gated = max_drop_id is not None or max_drop_ood is not None
    from edgekd.distill.load import load_run
    from edgekd.distill.plan import newest_run
    from edgekd.embedding import check_embeds, embedding_with_bank
    from edgekd.export.export import SEARCHED, export_model
    from edgekd.export.parity import MIN_AGREEMENT

    if gated and (precision != "int8" or target not in SEARCHED):
        raise EdgekdError(
            f"A largest drop can be set for INT8 on {', '.join(SEARCHED)} only.",
            f"Add --int8, with --target {' or '.join(SEARCHED)}.",
        )
    least = None if min_agreement is None else min_agreement / 100
    agreeing = MIN_AGREEMENT[precision] if least is None else least
    loaded = load_run(Path(run) if run else newest_run())
    folder = loaded.folder / "artifacts"
    base = folder / artifact_name(DEFAULT_TARGET, "fp32", embedding=embedding)
    beside = folder / artifact_name(DEFAULT_TARGET, "fp32", embedding=embedding, input=input)
    for place in {base, beside}:
        if (
            place.exists()
            and read_artifact(place).source.get("student_sha256") != loaded.run.student_sha256
        ):
            raise EdgekdError(
                f"{place} was exported from another student.", f"Remove {folder} and export again."
            )
    wanted: list[Precision] = (
        ["fp32"]
        if precision == "fp32" or (target == DEFAULT_TARGET and not beside.exists())
        else []
    )
    wanted += [precision] if precision != "fp32" else []
    folders = {
        name: folder / artifact_name(target, name, embedding=embedding, input=input)
        for name in wanted
    }
    for place in folders.values():
        ARTIFACT.refuse(place, overwrite=overwrite)
    if embedding:
        check_embeds(loaded)
    images, split = loaded.data(data)
    calibration = _spread(split.train, calibration_images, images)
    shown, shown_keys = parity_images(loaded, data)
    model, bank = embedding_with_bank(loaded, data) if embedding else (deployable(loaded), None)
    limits = (max_drop_id, max_drop_ood)
    yardstick = _yardstick(loaded, data, limits, search_seconds, agreeing) if gated else None
    artifacts = []
    for name in wanted:
        artifact = export_model(
            model,
            folders[name],
            name=folders[name].name,
            target=target,
            precision=name,
            classes=loaded.run.classes,
            preprocess=loaded.run.preprocess,
            calibration=_pixels(loaded, images, calibration) if name in known.calibrated else None,
            calibration_ids=[images.ids[i] for i in calibration]
            if name in known.calibrated
            else (),
            parity_images=shown,
            parity_keys=shown_keys,
            source=_source(loaded, images, split),
            overwrite=overwrite,
            options=options or {},
            yardstick=yardstick if name == "int8" else None,
            calibrator=calibrator if name == precision else None,
            min_agreement=least if name == precision else None,
            fp32_path=base / "model.onnx" if base.exists() and folders[name] != base else None,
            bank=bank,
            input=input,
        )
        artifacts.append(artifact.model_copy(update={"folder": folders[name]}))
    return artifacts


def verify(artifact: str | Path, *, data: str | None = None) -> list[dict[str, Any]]:
    """Repeat an artifact's parity check, link by link: torch student → fp32 ONNX → artifact.

    Args:
        artifact: artifact folder, in its run or copied anywhere.
        data: where the images lie; needed far from the run.

    Returns:
        One mapping per link: link, n, top1_agreement, max_error_relative, cosine, kl, passed, reason where it broke.
    """
    from edgekd.evaluation.verify import verify_artifact

    return verify_artifact(Path(artifact), data)


def add_class(
    artifact: str | Path,
    name: str,
    *,
    images: Sequence[str | Path] = (),
    text_vector: str | Path | None = None,
    teacher: str | None = None,
    descriptions: str | None = None,
) -> Artifact:
    """Add a class to an artifact that was exported with `head="embedding"`; the other classes' logits stay as they are.

    Args:
        artifact: artifact folder.
        name: of the class.
        images: images of it, and folders of images: the class is the mean of their embeddings, by the artifact itself.
        text_vector: `.npy` file of the teacher's text vectors of it, float `[D]` or `[prompts, D]`.
        teacher: where the run's teacher lies now. Without `images` and `text_vector` it is asked for the class's name
            with the run's prompts; None takes the run's own spec.
        descriptions: sentences behind the prompts, as `TrainConfig.descriptions`; give some where the run had some.

    Returns:
        The artifact as it is now.
    """
    from edgekd.classes import add

    return add(
        Path(artifact),
        name,
        images=[Path(image) for image in images],
        text_vector=Path(text_vector) if text_vector is not None else None,
        teacher=teacher,
        descriptions=descriptions,
    )


def remove_class(artifact: str | Path, name: str) -> Artifact:
    """Take out a class that `add_class` added; returns the artifact as it is now."""
    from edgekd.classes import remove

    return remove(Path(artifact), name)


def benchmark(
    *paths: str | Path,
    data: str | None = None,
    ood: Sequence[str] = (),
    unknown: Sequence[str] = (),
    test: Sequence[str] = (),
    suites: Sequence[str] = (),
    texture_shape: str | None = None,
    vocabulary: Sequence[str] = (),
    corruption_images: int | None = None,
    gates: Sequence[str] = (),
    config: str | Path | None = None,
    compare: bool = False,
    quick: bool = False,
    threads: int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    examples: bool = True,
    device: Iterable[str] = (),
    keep: bool = False,
    result: str | Path | None = None,
    energy: str | None = None,
    batch_sizes: str | Sequence[int] = (),
    thread_counts: str | Sequence[int] = (),
) -> Report:
    """Measure latency and accuracy, in domain and out of it, of runs and artifacts.

    Args:
        *paths: run folders (their teacher, torch student and every artifact) or artifact folders; none takes the
            newest run.
        data: other images to measure on, or where the run's own images lie now.
        ood: further unseen images, `NAME=DIR` each, every domain of them a suite; or `wilds:NAME=DIR`. Domains that
            trained become `seen:` suites, and images that trained are left out.
        test: further in-domain test images, `NAME=DIR` each, a suite `test:NAME`.
        unknown: folders of images that show no class of the model, `NAME=DIR` each: how well its confidence tells them
            from the in-domain test images.
        suites: suites that are made from the in-domain test images: `corruptions`.
        texture_shape: folder of cue-conflict images.
        vocabulary: other words to ask the same images in, `NAME=FILE` each: a line with `{}` is a prompt template in
            place of the run's, every other line a class name to add.
        corruption_images: images in each cell of the corruptions; None takes 200.
        gates: what every artifact must fulfil, such as `ood_avg_drop<=1.5`; the report says whether it does.
        config: TOML file with a `[gates]` table, besides `gates`.
        compare: set the two artifacts named beside each other.
        quick: a short latency measurement, marked as such everywhere.
        threads: threads of the artifact's runtime; None leaves it to the runtime.
        out: report folder; None takes `<run>/benchmark`, or `benchmark-2` and so on beside earlier reports.
        overwrite: replace an earlier report in `out`, or in `<run>/benchmark`.
        examples: show small copies of misclassified images in report.html.
        device: where to run the artifacts instead of in this process: `local`, `ssh://[USER@]HOST[:PORT]`,
            `adb:SERIAL`; each gets its own rows. For `bundle:DIR` there is `make_bundle`.
        keep: leave agent, artifacts and images on the device for the next time.
        result: file that a device wrote for a bundle; its rows enter the report. The run, data and threads must be
            those of the bundle.
        energy: sensor whose energy is reported per image: `rapl`, `nvml`, `ina` or `battery`, where the artifacts run.
        batch_sizes: images in a call, such as `1,8,32`, at which to take images per second where the artifacts run.
        thread_counts: threads of the runtime, likewise; every batch size is combined with each. None of both takes no
            throughput.

    Returns:
        The report, as `report.json` has it.
    """
    from edgekd.benchmark.benchmark import run_benchmark
    from edgekd.benchmark.device import from_result, on_devices
    from edgekd.benchmark.gates import gates_of_table, parse_gates
    from edgekd.config import gates_of_file
    from edgekd.distill.plan import newest_run
    from edgekd.evaluation.gather import gather
    from edgekd.evaluation.subjects import artifact_facts, compared_of

    wanted = parse_gates([*(gates_of_table(gates_of_file(Path(config))) if config else ()), *gates])
    grid = _grid(batch_sizes, thread_counts, threads)
    places, specs = [Path(p) for p in paths] or [newest_run()], list(device)
    found = gather(
        places, data=data, ood=ood, unknown=unknown, test=test, suites=suites, texture_shape=texture_shape,
        corruption_images=corruption_images, vocabulary=vocabulary, elsewhere=bool(specs) or result is not None,
    )  # fmt: skip
    subjects = found.subjects
    if grid and result is not None:
        raise EdgekdError(
            "A result has the throughput that its bundle asked for.",
            "Leave --batch-sizes and --thread-counts out.",
        )
    if grid and all(subject.folder is None for subject in subjects):
        raise EdgekdError(
            "There is no exported file to take the throughput of.", "Make one: edgekd export."
        )
    if (compare and (specs or result is not None)) or (specs and result is not None):
        raise EdgekdError(
            "--compare, --device and --import do not go together.", "Give one of them."
        )
    home = found.home / "benchmark"
    folder = Path(out) if out else home if overwrite else free_name(home)
    with publishing(folder, REPORT, overwrite=overwrite) as scratch:
        if result is not None:
            subjects, quick = from_result(subjects, found.suites, Path(result))
        elif specs:
            subjects = on_devices(
                subjects,
                found.suites,
                specs,
                quick=quick,
                threads=threads,
                keep=keep,
                energy=energy,
                grid=grid,
            )
        made = run_benchmark(
            subjects,
            found.suites,
            scratch,
            quick=quick,
            threads=threads,
            context={"runs": found.contexts, "artifacts": artifact_facts(subjects)},
            gates=wanted,
            compared=compared_of(found.subjects, places) if compare else None,
            examples=examples,
            energy=energy,
            grid=grid,
        )
    return made.model_copy(update={"folder": folder})


def report(*paths: str | Path, out: str | Path = "comparison", overwrite: bool = False) -> Path:
    """Set finished reports beside each other on one page, from what they kept; nothing is measured again.

    Args:
        *paths: report folders, or run folders, whose newest report is taken; none takes the newest run.
        out: folder for comparison.html and comparison.md.
        overwrite: replace an earlier comparison in `out`.

    Returns:
        The page, `<out>/comparison.html`.
    """
    from edgekd.benchmark.comparison import write_comparison
    from edgekd.distill.plan import newest_run

    return write_comparison(
        [Path(path) for path in paths] or [newest_run()], Path(out), overwrite=overwrite
    )


def make_bundle(
    *paths: str | Path,
    folder: str | Path,
    data: str | None = None,
    ood: Sequence[str] = (),
    unknown: Sequence[str] = (),
    test: Sequence[str] = (),
    texture_shape: str | None = None,
    quick: bool = False,
    threads: int | None = None,
    energy: str | None = None,
    batch_sizes: str | Sequence[int] = (),
    thread_counts: str | Sequence[int] = (),
) -> str:
    """Write a folder with which a machine that nobody can reach measures the artifacts.

    Args:
        *paths: as for `benchmark`, and so are `data`, `ood`, `unknown`, `test`, `texture_shape`, `quick`, `threads`,
            `energy`, `batch_sizes` and `thread_counts`.
        folder: new folder.

    Returns:
        The line to run inside the folder, there. Its result goes to `benchmark(…, result=FILE)`.
    """
    from edgekd.benchmark.device import bundle
    from edgekd.distill.plan import newest_run
    from edgekd.evaluation.gather import gather

    grid = _grid(batch_sizes, thread_counts, threads)
    places = [Path(p) for p in paths] or [newest_run()]
    found = gather(
        places,
        data=data,
        ood=ood,
        unknown=unknown,
        test=test,
        texture_shape=texture_shape,
        elsewhere=True,
    )
    return bundle(
        found.subjects,
        found.suites,
        Path(folder),
        quick=quick,
        threads=threads,
        energy=energy,
        grid=grid,
    )


def evaluate(
    run: str | Path | None = None,
    *,
    data: str | None = None,
    teacher: str | None = None,
    prompts: str | None = None,
    descriptions: str | None = None,
    agreement: bool = False,
    probe: bool = False,
    shots: int | None = None,
    keys: str = "student",
) -> list[dict[str, Any]]:
    """Accuracy per part and domain of a teacher's zero-shot classifier, and of a run's student if one is named.

    A student that embeds can be asked about classes it was not trained on: its text head then takes the teacher's
    vectors of their names.

    Args:
        run: run folder; None evaluates the teacher alone.
        data: any images `load_images` takes; None takes the run's data, or `toy`.
        teacher: teacher spec; None takes the run's teacher, or `toy`.
        prompts: template set; None takes the run's text vectors, and for classes that it does not know its templates
            and descriptions; without a run `photo`.
        descriptions: sentences about each class, as `TrainConfig.descriptions`, in place of the run's.
        agreement: instead, how alike the run's teacher, student and artifacts are on its test images.
        probe: instead, classifiers fitted on the student's frozen features of its training images.
        shots: instead, the classes that the run left out, or those of `data`, from so many images of each: by their
            texts alone (`zero-shot`) and with these images cached (`retrieval`), tested on the others.
        keys: with `shots`, whose embeddings of them are cached: the `student`'s, as a device can, or the `teacher`'s of
            ten views of each, as published.

    Returns:
        One mapping per subject, part and domain: subject, domain, part, n, top1 (0–1), macro (0–1). `part` is what the
        images are to the run: `train`, `val`, `unlabelled`, `test` (held out of domains that trained), `adapted` (of
        domains seen without labels), `unseen` (other domains or classes), `unused`; None without a run. With
        `agreement` in place of
        the accuracies top1_agreement (0–1, with the teacher's zero-shot classifier), m_vlalign, and for embeddings
        m_rel, recall, m_neigh (0–1), angle (degrees) and distance (squared, of unit vectors, 0–4). With
        `probe` the subjects are `linear` and `knn`.
    """
    from edgekd.benchmark.evaluate.accuracy import columns_among
    from edgekd.data import load_images
    from edgekd.distill.load import load_run
    from edgekd.distill.predict import predict_all, student_predict, teacher_predict
    from edgekd.distill.teacher import ClipTeacher, load_teacher
    from edgekd.evaluation.gather import parts_of
    from edgekd.evaluation.teacher_agreement import (
        Parts,
        accuracy_rows,
        agreement_rows,
        image_bank,
        probe_rows,
    )

    if keys != "student" and shots is None:
        raise EdgekdError(
            "Keys are those of a few images, and none are shown.",
            "Say how many of each class: --shots 4.",
        )
    if agreement or probe or shots is not None:
        if (
            (agreement + probe + (shots is not None) > 1)
            or prompts
            or descriptions
            or (probe and data)
            or (teacher and not agreement)
        ):
            raise EdgekdError(
                "Agreement and shots take the run's own texts, a probe its images too.",
                "Ask for one of them, without the rest.",
            )
        from edgekd.distill.plan import newest_run

        chosen = load_run(Path(run) if run else newest_run())
        if shots is not None:
            from edgekd.evaluation.few_shot import few_rows

            return few_rows(chosen, data, shots, keys)
        return agreement_rows(chosen, data, teacher) if agreement else probe_rows(chosen)
    if run is None and teacher is None and data not in (None, "toy"):
        raise EdgekdError(
            f"No teacher was named for {data}, and the built-in one knows the toy images alone.",
            "Name one: --teacher local-dir:FOLDER or NAME:TAG; --teacher toy insists on the built-in one.",
        )
    loaded = load_run(Path(run)) if run else None
    images = loaded.images() if loaded and not data else load_images(data or "toy")
    spec = teacher or (loaded.run.teacher if loaded else "toy")
    import numpy as np

    everything = np.arange(len(images))
    parts: Parts = parts_of(loaded, images, data) if loaded else [(None, everything)]
    rows: list[dict[str, Any]] = []
    bank = None
    if spec != "none":
        model = load_teacher(spec)
        bank = image_bank(loaded, model, images, prompts, descriptions)
        if isinstance(model, ClipTeacher):
            scores = predict_all(teacher_predict(model, bank), images, everything, model.preprocess)
        else:
            scores = model.lookup(images.ids).numpy() @ bank.vectors.numpy().T
        rows += accuracy_rows("teacher", scores, images, everything, parts)
    if loaded:
        vectors, columns = loaded.vectors, list(range(len(images.classes)))
        unknown = not set(images.classes) <= set(loaded.run.classes)
        space = bank if bank is not None and bank.teacher_id == loaded.run.teacher_id else None
        if unknown and space is not None and loaded.student.embeds and loaded.student.head is None:
            # In the space the student learned, which may be the teacher's less its common part.
            vectors = dataclasses.replace(
                space, text_centre=loaded.bank.text_centre if loaded.bank else None
            ).head
        else:
            columns = columns_among(loaded.run.classes, images.classes, "the student").tolist()
        scores = predict_all(
            student_predict(loaded.student, vectors), images, everything, loaded.run.preprocess
        )
        rows += accuracy_rows("student", scores[:, columns], images, everything, parts)
    return rows


def study(
    recipes: str | Sequence[str] = ("erm", "kd", "vl2v-adip"),
    *,
    protocol: str = "lodo",
    seeds: int = 3,
    test_domains: str | Sequence[str] = (),
    unseen_classes: str | Sequence[str] = (),
    fractions: str | Sequence[float] = (),
    shots: str | Sequence[float] = (),
    baseline: str | None = None,
    oracle: bool = False,
    jobs: int = 1,
    keep: bool = False,
    out: str | Path | None = None,
    config: str | Path | None = None,
    settings: Iterable[str] = (),
    recipe_settings: Iterable[str] = (),
    **options: Any,
) -> Study:
    """Compare recipes over seeds and unseen domains; go on where an earlier call in the same folder stopped.

    Args:
        recipes: their names, also as one string with commas.
        protocol: `lodo`, leave one domain out; `class-disjoint`, zero-shot on classes that never train; `k-shot`, a few
            images of such classes, by retrieval and by fine-tuning; `low-shot`, parts of the training labels.
        seeds: how many, from 0.
        test_domains: which domains are left out in turn; none takes all, and for `low-shot` the last.
        unseen_classes: of `class-disjoint` and `k-shot`, names or a percentage such as `30%`; none takes half
            of them.
        fractions: of `low-shot`, parts of the labels from 0 to 1; none takes 0.01, 0.1 and 1.
        shots: of `k-shot`, images of each unseen class; none takes 1, 4 and 16.
        baseline: recipe that the others are compared with; None takes `erm`, or else the first.
        oracle: of `lodo` and `low-shot`, also the best accuracy on the unseen images on the way, chosen by looking at
            them; no other number changes.
        jobs: cells side by side, in processes of their own that share the cores, with a GPU each where there are some.
        keep: keep the run folders of finished cells.
        out: the study's folder; None takes `studies/PROTOCOL-DATA`.
        config: TOML file with settings of `edgekd.config.TrainConfig`, for every recipe.
        settings: `a.b=c` strings, for every recipe; they win over everything but `recipe_settings`.
        recipe_settings: `RECIPE:a.b=c` strings, for one recipe.
        **options: any field of `TrainConfig` by its name.

    Returns:
        The tables, as `table.md`, `table.csv` and `table.png` have them, and the cells that failed.
    """
    from edgekd.studies.plan import make_plan, study_folder
    from edgekd.studies.study import run_study

    def names(given: str | Sequence[str]) -> list[str]:
        return [
            name.strip()
            for name in (given.split(",") if isinstance(given, str) else given)
            if name.strip()
        ]

    if jobs < 1:
        raise EdgekdError(f"{jobs} jobs run nothing.", "Give --jobs 1 or more.")
    folder = Path(out) if out else study_folder(protocol, options.get("data"))
    plan = make_plan(
        names(recipes),
        protocol=protocol,
        seeds=seeds,
        test_domains=names(test_domains),
        unseen_classes=names(unseen_classes)
        or (["50%"] if protocol in ("class-disjoint", "k-shot") else []),
        fractions=_numbers(fractions),
        shots=_numbers(shots),
        baseline=baseline,
        out=folder,
        options=options,
        file=Path(config) if config else None,
        settings=settings,
        recipe_settings=recipe_settings,
        oracle=oracle,
    )
    return run_study(plan, folder, jobs=jobs, keep=keep)


def _numbers(given: str | Sequence[float]) -> list[float]:
    try:
        return [float(number) for number in (given.split(",") if isinstance(given, str) else given)]
    except ValueError as error:
        raise EdgekdError(
            f'"{given}" is not a list of numbers.', "Write them with commas: 0.01,0.1,1."
        ) from error


def _grid(
    batch_sizes: str | Sequence[int], thread_counts: str | Sequence[int], threads: int | None
) -> Grid | None:
    from edgekd.benchmark.measure.throughput import Grid

    if not batch_sizes and not thread_counts:
        return None
    return Grid(_counts(batch_sizes) or (1,), _counts(thread_counts) or (threads,))


def _counts(given: str | Sequence[int]) -> tuple[int, ...]:
    try:
        found = dict.fromkeys(
            int(number) for number in (given.split(",") if isinstance(given, str) else given)
        )
    except ValueError as error:
        raise EdgekdError(
            f'"{given}" is not a list of whole numbers.', "Write them with commas: 1,8,32."
        ) from error
    if any(number < 1 for number in found):
        raise EdgekdError(
            f'"{given}" has a number below 1.', "Batch sizes and thread counts start at 1."
        )
    return tuple(found)


def int8_speed(artifact: Artifact) -> str | None:
    """Say how fast an INT8 artifact that runs here is beside the FP32 one next to it: one image, one thread.

    Returns:
        A predicate with its interval, or why no claim is made (`benchmark.speed.in_words`); None without an FP32
        artifact of the same target, else ONNX Runtime's, and for formats whose runtime may be elsewhere.
    """
    if (
        artifact.folder is None
        or artifact.precision != "int8"
        or artifact.format not in ("onnx", "openvino")
    ):
        return None
    from edgekd.targets.registry import DEFAULT_TARGET

    own = artifact.name.replace("int8", "fp32")
    usual = own.replace(artifact.target, DEFAULT_TARGET)
    places = (artifact.folder.with_name(own), artifact.folder.with_name(usual))
    beside = next((place for place in places if (place / "artifact.json").is_file()), None)
    if beside is None:
        return None
    import numpy as np

    from edgekd.benchmark.measure.speed import in_words, speed_of, timed_in_turns
    from edgekd.targets.session import open_session

    size = artifact.preprocess.size
    images = np.random.default_rng(0).integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    models = {
        folder.name: open_session(folder, threads=1, spinning=False).run
        for folder in (artifact.folder, beside)
    }
    found = timed_in_turns(models, images)
    return in_words(speed_of(artifact.folder.name, beside.name, found), beside.name)


def _yardstick(
    loaded: LoadedRun,
    data: str | None,
    drops: tuple[float | None, ...],
    seconds: float,
    agreement: float,
) -> Yardstick:
    """Validation images of the training domains, and the same corrupted: every corruption in turn, severity 3."""
    import math

    import numpy as np
    from PIL import Image

    from edgekd.benchmark.evaluate.corruptions import NAMES, SIZE, corrupt
    from edgekd.export.mixed import Yardstick

    images, split = loaded.data(data)
    chosen = _spread(split.val, YARDSTICK_IMAGES, images)
    if len(chosen) == 0:
        raise EdgekdError(
            "The run has no validation images to measure the drop on.",
            "Leave out --max-drop-id, -ood.",
        )
    pixels = _pixels(loaded, images, chosen)

    def corrupted(number: int) -> NDArray[np.uint8]:
        image = Image.fromarray(pixels[number])
        wide = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        spoilt = corrupt(wide, NAMES[number % len(NAMES)], 3, images.keys[chosen[number]])
        return np.asarray(Image.fromarray(spoilt).resize(image.size, Image.Resampling.BICUBIC))

    proxy = np.stack([corrupted(number) for number in range(len(pixels))])
    limit_id, limit_ood = (math.inf if drop is None else drop for drop in drops)
    labels = images.labels[chosen]
    return Yardstick(
        pixels, labels, proxy, limit_id, limit_ood, search_seconds=seconds, min_agreement=agreement
    )


def deployable(loaded: LoadedRun) -> Deployable:
    """The graph that a run's student is exported as."""
    from edgekd.export.graph import Deployable

    return Deployable(loaded.student.body, _head(loaded), loaded.run.preprocess).eval()


def parity_images(loaded: LoadedRun, data: str | None) -> tuple[NDArray[np.uint8], list[str]]:
    """Images of validation and test, none of them for calibration, uint8 `[M, H, W, 3]`, and their content keys."""
    import numpy as np

    images, split = loaded.data(data)
    held_out = np.sort(np.concatenate([split.val, split.id_test, split.ood_test]))
    chosen = _spread(held_out, PARITY_IMAGES, images)
    return _pixels(loaded, images, chosen), [images.keys[index] for index in chosen]


def _spread(indices: NDArray[np.int64], count: int, images: ImageSet) -> NDArray[np.int64]:
    """`count` of the indices, the same share of every domain as far as there are enough, in a fixed order."""
    import numpy as np

    rng = np.random.Generator(np.random.Philox(0))
    queues = [
        rng.permutation(indices[images.domain_of[indices] == d]).tolist()
        for d in range(len(images.domains))
    ]
    chosen: list[int] = []
    while any(queues) and len(chosen) < count:
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop())
    return np.array(sorted(chosen), dtype=np.int64)


def _pixels(loaded: LoadedRun, images: ImageSet, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
    import numpy as np

    from edgekd.distill.predict import pixel_batches

    return np.concatenate(list(pixel_batches(images, indices, loaded.run.preprocess)))


def _head(loaded: LoadedRun) -> Any:
    """The student's last layers as one linear layer with calibrated scores."""
    from edgekd.export.graph import fold_head

    scale = float(loaded.student.scale)
    if loaded.vectors is not None:
        return fold_head(loaded.student.projector, loaded.vectors, scale)
    import torch

    assert loaded.student.head is not None
    return fold_head(loaded.student.head, torch.eye(len(loaded.run.classes)), scale)


def _source(loaded: LoadedRun, images: ImageSet, split: Split) -> dict[str, Any]:
    """Where an artifact comes from, and enough of the split to name its test images rightly far from the run."""

    run = loaded.run
    return {
        "run": run.name,
        "student": run.student,
        "recipe": run.recipe,
        "teacher": run.teacher,
        "split_hash": run.split_hash,
        "split_seed": split.seed,
        "test_domain": run.test_domain,
        "train_domains": sorted(
            {images.domains[d] for d in images.domain_of[split.train].tolist()}
        ),
        "unlabelled_domains": list(split.unlabelled_domains),
        "student_sha256": run.student_sha256,
    }
