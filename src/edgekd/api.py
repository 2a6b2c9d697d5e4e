"""The Python interface: one function per command, with the options of its configuration as parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.configs.benchmark import BenchmarkConfig, EvaluateConfig, ReportConfig
from edgekd.configs.data import DataCheckConfig
from edgekd.configs.export import AddClassConfig, ClassConfig, ExportConfig, VerifyConfig
from edgekd.configs.models import DemoConfig, FetchConfig, PredictConfig, PullConfig, PushConfig
from edgekd.configs.study import StudyConfig
from edgekd.configs.train import MissingConfig, TrainConfig
from edgekd.configs.verbs import verb, verb_of_paths
from edgekd.core.errors import EdgekdError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgekd.benchmark.results.schema import Report
    from edgekd.core.manifest import Artifact, Run
    from edgekd.distill.classification.estimate import Estimate
    from edgekd.evaluation.data_check import DataCheck
    from edgekd.inference.demo import Demo
    from edgekd.inference.model import Model, Prediction
    from edgekd.studies.study import Study


@verb(TrainConfig)
def train(config: TrainConfig) -> Run:
    """Distil a student and write its run folder.

    Returns:
        The finished run, as recorded in `run.json`.
    """
    if config.plan:
        raise EdgekdError("edgekd.train takes no plan.", "Use edgekd.api.plan_training.")
    from edgekd.distill.train import train

    return train(config)


@verb(TrainConfig)
def plan_training(config: TrainConfig) -> Estimate:
    """Estimate a training with the same options, using trial steps to measure the time on this machine.

    Returns:
        Images, steps, epochs, teacher passes, bytes on disk and seconds; `lines()` returns them as text.
    """
    from edgekd.distill.classification.estimate import plan_run

    return plan_run(config)


@verb(FetchConfig)
def fetch(config: FetchConfig) -> list[Path]:
    """Download a teacher and pretrained students into a folder for offline use with `edgekd.train(weights_dir=…)`.

    Returns:
        The written paths: the teacher's open_clip model folder, and a safetensors file for each student.
    """
    from edgekd.distill.models.fetch import fetch

    return fetch(config)


@verb(MissingConfig)
def missing_embeddings(config: MissingConfig) -> list[str]:
    """List the images that are missing from a file of precomputed embeddings.

    Returns:
        Names of images, as needed in the file's `image_ids`.
    """
    from edgekd.data.image_set import load_images
    from edgekd.data.unlabelled import load_unlabelled
    from edgekd.distill.models.teachers import EmbeddingsTeacher, load_teacher

    box = load_teacher(config.teacher)
    if not isinstance(box, EmbeddingsTeacher):
        raise EdgekdError(
            f"{config.teacher} is not a file of embeddings.",
            "Give a file: embeddings:FILE.npz.",
        )
    sets = [load_images(config.data)] if config.data is not None else []
    sets += [load_unlabelled(source) for source in config.unlabelled]
    return [name for images in sets for name in images.ids if name not in box.vectors]


@verb(ExportConfig)
def export(config: ExportConfig) -> list[Artifact]:
    """Export a run's student into `<run>/artifacts/<target>-<precision>/`.

    For ONNX Runtime, INT8 and FP16 are made from the FP32 file, which is exported too if it does not exist yet.

    With the target `auto`, the student is exported in fp32, fp16 and int8 for every available runtime, and measured.

    Returns:
        The written artifacts, the requested precision last. With `auto`, the measured ones, the recommended one last.

    Raises:
        GateFailed: the file differs too much from the torch student, or loses more than the limits allow; it is kept
            as `<name>.failed`. With `auto`: no file meets the budget.
    """
    from edgekd.benchmark.report.recommend import check_recommendation
    from edgekd.export.run import export_run

    if not config.auto:
        return export_run(config)
    chosen = choose(config)
    check_recommendation(chosen.report)
    return chosen.artifacts


@dataclass(frozen=True)
class Chosen:
    """The result of the target `auto`."""

    report: Report
    artifacts: list[Artifact]
    """The measured artifacts, the recommended one last."""
    left_out: list[tuple[str, str]]
    """Name of a target or file, and the reason why it was not measured."""


def choose(config: ExportConfig) -> Chosen:
    """Export and measure every file that the device could run; see `export` with the target `auto`."""
    from edgekd.benchmark.gates import parse_gates
    from edgekd.benchmark.report.recommend import recommend
    from edgekd.core.manifest import read_artifact
    from edgekd.evaluation.auto_target import make_candidates

    parse_gates(config.budget)  # a mistake in it should not cost an export
    folders, left_out = make_candidates(config)
    report = _measure(
        BenchmarkConfig(
            paths=tuple(folders),
            data=config.data,
            gates=config.budget,
            quick=True,
            device=() if config.device is None else (config.device,),
        )
    )
    best = recommend(report)
    assert best is not None
    artifacts = [read_artifact(folder, check_hashes=False) for folder in folders]
    name = best.file.subject.partition("@")[0]  # of a device: NAME@DEVICE
    artifacts.sort(key=lambda artifact: artifact.name == name)
    return Chosen(report, artifacts, left_out)


@verb(VerifyConfig)
def verify(config: VerifyConfig) -> list[dict[str, Any]]:
    """Repeat an artifact's parity check, step by step: torch student → fp32 ONNX → artifact.

    Returns:
        One mapping per step: link, n, top1_agreement, max_error_relative, cosine, kl, passed, reason if it failed.
    """
    from edgekd.artifacts.verify import verify_artifact

    return verify_artifact(config.artifact, config.data)


@verb(AddClassConfig)
def add_class(config: AddClassConfig) -> Artifact:
    """Add a class to an artifact exported with `head="embedding"`, without changing the logits of the other classes.

    Without `images` and `text_vector`, the teacher embeds the class name with the run's prompts.

    Returns:
        The changed artifact.
    """
    from edgekd.artifacts.classes import add

    return add(config)


@verb(ClassConfig)
def remove_class(config: ClassConfig) -> Artifact:
    """Remove a class that was added by `add_class`; return the changed artifact."""
    from edgekd.artifacts.classes import remove

    return remove(config.artifact, config.name)


@verb_of_paths(BenchmarkConfig)
def benchmark(config: BenchmarkConfig) -> Report:
    """Measure latency and accuracy, in and out of domain, of runs and artifacts.

    Returns:
        The report, as in `report.json`. For a device `bundle:DIR` use `edgekd.api.make_bundle`.
    """
    if config.bundle:
        raise EdgekdError("edgekd.benchmark cannot write a bundle.", "Use edgekd.api.make_bundle.")
    return _measure(config)


@verb_of_paths(BenchmarkConfig)
def make_bundle(config: BenchmarkConfig) -> str:
    """Write a folder (`device="bundle:DIR"`) with which a machine without a connection can measure the artifacts.

    Returns:
        The command to run in the folder on that machine. Pass its result to `benchmark(…, result=FILE)`.
    """
    if not config.bundle:
        raise EdgekdError("No folder is given for the bundle.", 'Use device="bundle:DIR".')
    from edgekd.benchmark.device import bundle
    from edgekd.evaluation.gather import gather
    from edgekd.targets.profiles import follow_profile

    config = follow_profile(config, {"threads"}, cautions=True)
    found = gather(config)
    return bundle(found.subjects, found.suites, Path(str(config.bundle)), config)


def _measure(config: BenchmarkConfig) -> Report:
    from edgekd.benchmark.benchmark import run_benchmark
    from edgekd.benchmark.device import from_result, on_devices
    from edgekd.benchmark.gates import parse_gates
    from edgekd.core.folders import REPORT, free_name, publishing
    from edgekd.distill.loggers import attach_to_run
    from edgekd.evaluation.gather import gather
    from edgekd.evaluation.subjects import artifact_facts
    from edgekd.targets.profiles import follow_profile

    config = follow_profile(config, {"threads"}, cautions=True)
    gates = parse_gates(config.gates)
    found = gather(config)
    subjects, suites = found.subjects, found.suites
    if config.grid and all(subject.folder is None for subject in subjects):
        raise EdgekdError(
            "There is no exported file whose throughput could be measured.",
            "Make one: edgekd export.",
        )
    home = found.home / "benchmark"
    folder = config.out or (home if config.overwrite else free_name(home))
    with publishing(folder, REPORT, overwrite=config.overwrite) as scratch:
        if config.result is not None:
            subjects, quick = from_result(subjects, suites, config.result)
            config = config.model_copy(update={"quick": quick})
        elif config.device:
            subjects = on_devices(subjects, suites, config.device, config, keep=config.keep)
        made = run_benchmark(
            subjects,
            suites,
            scratch,
            config,
            context={"runs": found.contexts, "artifacts": artifact_facts(subjects)},
            gates=gates,
            compared=found.compared,
            examples=config.examples,
        )
    pages = [folder / name for name in ("report.html", "report.json", "MODEL_CARD.md")]
    attach_to_run(found.home, folder.name, "report", pages)
    return made.model_copy(update={"folder": folder})


@verb_of_paths(ReportConfig)
def report(config: ReportConfig) -> Path:
    """Compare finished reports on one page, without new measurements.

    Returns:
        The page, `<out>/comparison.html`.
    """
    from edgekd.benchmark.report.comparison import write_comparison
    from edgekd.core.manifest import newest_run

    places = list(config.paths) or [newest_run()]
    return write_comparison(places, config.out, overwrite=config.overwrite)


@verb(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Measure the accuracy of a teacher's zero-shot classifier, and of a run's student, per part and domain.

    A student with a text head can be evaluated on classes that it was not trained on, with the teacher's text vectors
    of their names.

    Returns:
        One mapping per subject, part and domain: subject, domain, part, n, top1 (0–1), macro (0–1). `part` is the role
        of the images in the run: `train`, `val`, `unlabelled`, `test` (held-out images of training domains), `adapted`
        (domains seen without labels), `unseen` (other domains or classes), `unused`, or None without a run. With
        `agreement`, the accuracies are replaced by top1_agreement (0–1, with the teacher's zero-shot classifier),
        m_vlalign, and for embeddings m_rel, recall, m_neigh (0–1), angle (degrees) and distance (squared, of unit
        vectors, 0–4). With `probe` the subjects are `linear` and `knn`, with `shots` `zero-shot` and `retrieval`.
    """
    from edgekd.evaluation.evaluate import evaluate_rows

    return evaluate_rows(config)


def load(path: str | Path, *, threads: int | None = None) -> Model:
    """Load a run's student or an exported file for predictions: `edgekd.load(path).predict(images)`.

    Args:
        path: run folder, or artifact folder (which needs no torch).
        threads: threads of the exported file's runtime; None is the runtime's choice.

    Raises:
        EdgekdError: the folder is neither a run nor an artifact, is damaged, or its runtime is not installed.
    """
    from edgekd.inference.model import load

    return load(path, threads=threads)


@verb(DataCheckConfig)
def check_data(config: DataCheckConfig) -> DataCheck:
    """Find unreadable images, duplicates and class imbalance in a data set, without changing it.

    With a teacher, near-duplicates and probable label errors are found too.

    Returns:
        The findings; `page` is the HTML page with thumbnails.
    """
    from edgekd.evaluation.data_check import check_data

    return check_data(config)


@verb(PredictConfig)
def predict(config: PredictConfig) -> Iterator[Prediction]:
    """Classify images, folders of images, a video or a camera, with the preprocessing of the evaluation.

    Returns:
        An iterator over the predictions. Images that cannot be read are skipped, with one warning at the end.
    """
    from edgekd.inference.predict import run_predict

    return run_predict(config)


@verb(DemoConfig)
def demo(config: DemoConfig) -> Demo:
    """Open a local web page that classifies a picture with a run's models side by side.

    Returns:
        The server, with `url`, `serve()` (runs until interrupted) and `close()`.
    """
    from edgekd.inference.demo import open_demo

    return open_demo(config.model, config.port)


@verb(PushConfig)
def push(config: PushConfig) -> str:
    """Upload a run or an artifact to the Hugging Face Hub in the formats of timm and transformers; return its URL."""
    from edgekd.artifacts.hub import push

    return push(config)


@verb(PullConfig)
def pull(config: PullConfig) -> Path:
    """Download a model uploaded by `push` into a new folder and check it. Nothing in it is executed.

    Returns:
        The folder; its `artifacts/` holds folders for `edgekd.load`.
    """
    from edgekd.artifacts.hub import pull

    return pull(config)


@verb(StudyConfig)
def study(config: StudyConfig) -> Study:
    """Compare recipes over seeds and unseen domains. A study that stopped in the same folder is resumed.

    Returns:
        The tables, as in `table.md`, `table.csv` and `table.png`, and the cells that failed.
    """
    from edgekd.studies.plan import make_plan
    from edgekd.studies.study import run_study

    plan = make_plan(config)
    return run_study(plan, config.folder, jobs=config.jobs, keep=config.keep, part=config.share)
