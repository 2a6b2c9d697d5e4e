"""One cell of a study: train a student, ask it about its test images, remember which it got right.

Run as a program (`python -m edgekd.studies.cell FOLDER CELL …`), it does one cell of a planned study in a process of
its own; `--jobs` starts it so.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError, Stopped
from edgekd.core.readers import parse_json
from edgekd.data.image_set import load_images
from edgekd.data.subsets import unseen_test
from edgekd.distill.classification.load import LoadedRun
from edgekd.evaluation.few_shot import can_zero_shot, new_vectors, student_scores
from edgekd.studies.descriptions import from_file
from edgekd.studies.numbers import ID, OOD, ORACLE
from edgekd.studies.oracle import oracle_of, watch
from edgekd.studies.plan import Cell, cell_config
from edgekd.studies.runs import asked, chosen_among, facts_of, trained
from edgekd.studies.shots import shots_cell
from edgekd.studies.store import Done, Outcome, Store


def run_cell(store: Store, cell: Cell, config: TrainConfig, *, keep: bool, oracle: bool) -> None:
    """Train, test and record a cell; a training that was killed goes on where it stopped.

    Args:
        config: the settings of its recipe, without what the cell adds.
        keep: keep the run folder under `runs/`.
        oracle: also look at the unseen images on the way; cells without shots alone.
    """
    folder = store.folder / "runs" / cell.key
    if cell.shots:
        outcomes, facts = shots_cell(store, cell, config)
    else:
        outcomes, facts = one_run(
            trained(cell_config(config, cell, folder), watch if oracle else None), oracle=oracle
        )
    store.add(Done(cell, outcomes, facts))
    if not keep:
        shutil.rmtree(folder)


def one_run(loaded: LoadedRun, *, oracle: bool) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """What a run answers on its own tests, and on its unseen classes if it can name them; its facts."""
    images, split = loaded.data()
    parts = {"val": split.val, ID: split.id_test, OOD: split.ood_test}
    outcomes = {name: asked(loaded, images, part) for name, part in parts.items() if len(part)}
    unseen = loaded.config.unseen_classes
    if unseen and can_zero_shot(loaded):
        whole = load_images(loaded.run.data)
        indices = unseen_test(whole, unseen)
        scores = student_scores(loaded, whole, indices, new_vectors(loaded, unseen))
        outcomes[OOD] = chosen_among(scores, whole, indices, unseen)
    facts = facts_of(loaded.run)
    if oracle and (found := oracle_of(loaded, outcomes[OOD])) is not None:
        outcomes[ORACLE] = found[0]
        facts |= found[1]
    return outcomes, facts


def main(folder: str, cell: str, keep: str, oracle: str) -> int:
    """One cell of the study in `folder`; the cell as JSON."""
    store = Store(Path(folder))
    one = Cell(**parse_json(cell))
    try:
        config = _settings(store, one.recipe)
        run_cell(
            store,
            one,
            from_file(config, store.folder),
            keep=keep == "keep",
            oracle=oracle == "oracle",
        )
    except (EdgekdError, Stopped) as error:
        print(f"error: {error.message} {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


def _settings(store: Store, recipe: str) -> TrainConfig:
    """The settings of a recipe as the study has written them down."""
    settings = store.settings()
    try:
        return TrainConfig.model_validate(
            {"recipe": recipe}
            | settings["recipes"][recipe]
            | {"unseen_classes": settings["unseen_classes"]}
        )
    except (KeyError, TypeError, ValueError) as error:
        raise EdgekdError(
            f"The study at {store.folder} is damaged.", "Start it anew in another folder."
        ) from error


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
