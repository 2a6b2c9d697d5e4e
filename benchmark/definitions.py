"""How each number of a report is made, as the page and the model card print it; docs/report.md says more."""

from __future__ import annotations

from edgekd.benchmark.rows import Report
from edgekd.benchmark.table import NONE, mark

ACCURACY: tuple[tuple[str, str], ...] = (
    ("ID, OOD", "Top-1: the share of images whose largest logit is the label's. ID are held-out images of the training "
     "domains; each OOD suite is a domain (or a folder) that training never saw, all of its images. Intervals in "
     "brackets and whiskers are Wilson's 95 %."),
    ("OOD avg, OOD worst", "Unweighted mean and minimum over the OOD suites."),
    ("gap", "ID minus OOD avg, in points."),
    ("retention", "OOD avg divided by the zero-shot OOD avg of the same run's teacher."),
    ("macro, worst class", "Unweighted mean of the recalls of the classes that have images; the lowest recall."),
    ("ECE", "Expected calibration error of the logits as they are returned: 15 equally wide bins of the largest "
     "softmax probability, closed on the right, Σ n_b/N · |accuracy − confidence| (Guo et al. 2017). Adaptive ECE: 15 "
     "bins of equally many images (Nixon et al. 2019). The OOD value is the unweighted mean over the suites."),
    ("temperature, scaled", "The divisor of the logits with the smallest negative log-likelihood on ID validation "
     "images, and the calibration after it. OOD images never take part in the fit."),
    ("in other words", "The same images with other prompt templates, or with class names added that no image has. "
     "Loss: top-1 in the run's own words minus top-1 then. Classes that are part of weights or file: n/a."),
    ("unknown classes", "Images that show none of the model's classes, told from the in-domain test images by one "
     "score per image: the largest softmax probability or the largest logit, of the logits as they are returned, "
     "without temperature (which would reorder the former and not the latter). AUROC: probability that a known image "
     "scores higher than an unknown one, ties one half; 50 % is chance. FPR95: share of unknown images that pass the "
     "highest threshold which at least 95 % of the known ones pass. AUPR: average precision; out: unknown images are "
     "positive, as in the paper of ImageNet-O (Hendrycks et al. 2021), chance is their share of all images; in: known "
     "ones are. Loss: AUROC of the torch student minus that of the file. Intervals: bootstrap, 2,000 draws of known "
     "and of unknown images, the same for both models. Confidence: mean largest softmax probability; on unknown images "
     "every answer is wrong."),
    ("NLL, Brier", "Mean negative log-likelihood of the label in nats; mean of Σ_c (p_c − y_c)², 0 to 2."),
    ("export cost", "Accuracy of the torch student minus that of the artifact on the same images; positive is a loss. "
     "Interval: paired bootstrap, 10,000 draws of images within each suite. p: exact two-sided McNemar test."),
    ("agreement", "Share of images on which artifact and torch student name the same class, right or wrong."),
)  # fmt: skip

LATENCY: tuple[tuple[str, str], ...] = (
    ("inside the clock", "One call of the model with one RGB uint8 image that lies ready in memory, until its logits "
     "are in memory; normalisation is in the graph, or, ahead of a file with float input, in numpy. Single stream, "
     "batch 1, real images in rotation."),
    ("outside the clock", "Reading, decoding and resizing; their median is in the column read + resize."),
    ("end to end", "One clock around decoding, resizing and the model, from an encoded image in memory, in a process "
     "of its own, whose peak memory is reported."),
    ("p50, p90", "Nearest rank over all samples of all processes: always a real sample, none is left out. Intervals: "
     "bootstrap, 1,000 draws of blocks of consecutive samples (and of processes first, where there are several), "
     "because neighbouring latencies resemble each other."),
    ("p99", "Only from 270,336 samples on, the number MLPerf asks for to state it at 99 % confidence."),
    ("mean, CV", "Mean, and population standard deviation divided by it."),
    ("first, load", "First call in a fresh process; opening the file. Medians over processes."),
    ("throughput", "Images per second of whole batches, one after the other; each batch size and thread count in a "
     "fresh process; warm-up as for latency, then 10 s (quick: 2 s). Interval: bootstrap of blocks."),
    ("energy", "From the sensor that was declared, read between blocks, never inside the clock: counters by their "
     "difference, power by the trapezoidal rule over both ends of each block. All of what the sensor covers is in it, "
     "idle power too; above idle: less the power at rest, taken before any model was loaded, times the same time. "
     "Without a declared sensor: n/a."),
    ("peak MB", "Largest resident memory of a process that held this file alone, interpreter and libraries included, "
     "in 10⁶ bytes; none where one process measured several files in turns."),
    ("placement", "Which provider ran each node, as the runtime tells of one answer (ONNX Runtime's profile, "
     "OpenVINO's runtime model). A file of which any part ran elsewhere than asked gets no report."),
    ("parameters, MACs", "Of a file: counted in its own ONNX graph for one image. Elements of weights and biases, "
     "whatever they are stored in; multiply-accumulates of convolutions and matrix products, nothing else. Of torch "
     "models: their parameters (of a teacher, its image tower's) and torch's own counter. n/a: the file holds another "
     "kind of graph, or this torch version counts known layers wrongly."),
    ("MB", "Size of the artifact's files without its manifest, in 10⁶ bytes."),
)  # fmt: skip


def latency_rule(report: Report) -> str:
    """The protocol of this report's exported files, with its numbers."""
    rule = report.protocol["latency"]
    threads = {row.threads for row in report.latency if not mark(row)}
    said = ", ".join(
        "as the runtime chooses" if count is None else str(count)
        for count in sorted(threads, key=str)
    )
    several = rule["processes"] > 1
    where = (
        f"each of {rule['processes']} fresh processes"
        if several
        else "one fresh process, the artifacts in turns"
    )
    return (
        f"Latency: single stream, batch 1, warm-up of at least {rule['warmup_runs']} runs and {rule['warmup_s']:g} s, "
        f"then at least {rule['runs']} runs and {rule['seconds']:g} s in {where}, no sample left out; inside the "
        f"clock: the model on a uint8 image in memory; threads: {said or NONE}."
    )


def shown(value: object) -> str:
    """A fact of a run or a machine as text, lists cut after three."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        more = f" and {len(value) - 3} more" if len(value) > 3 else ""
        return ("; ".join(str(item) for item in value[:3]) + more) or "none"
    return NONE if value is None else str(value)
