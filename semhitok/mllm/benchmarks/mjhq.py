"""MJHQ-30K: the Fréchet distance of pictures drawn from its captions to its own pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from semhitok._messages import progress
from semhitok.data.images import read_resized, to_uint8
from semhitok.data.skipped import Skipped
from semhitok.evaluation.fixed_batches import exact, rows_in_order
from semhitok.evaluation.frechet import FeatureStatistics, feature_network, frechet_distance
from semhitok.mllm.assistant import Job
from semhitok.mllm.benchmarks.files import check_any_exists, data_files, field, image_folder, read_items
from semhitok.mllm.benchmarks.questions import Scores
from semhitok.mllm.benchmarks.run import SKIPPED, Run


def draw(run: Run) -> Scores:
    """Draw the captions, caption n with seed + n, and measure the distance.

    DATA/meta_data.json is {id: {"category", "prompt"}}; mjhq30k_imgs/CATEGORY/ID.jpg are the reference pictures, which
    are resized to the size of those drawn. Figures of models of another size are not comparable.
    """
    folder = image_folder(run.data, run.images, "mjhq30k_imgs")
    path, *_ = data_files(run.data, "meta_data.json")
    jobs, references, skipped = [], [], Skipped()
    for n, (id_, row) in enumerate(read_items(path, skipped)):
        with skipped.errors(f"{path}: {id_:.80}"):
            category, caption = (field(row, key) for key in ("category", "prompt"))
            for key, value in (("id", id_), ("category", category)):
                if not re.fullmatch(r"[\w\- ]{1,60}", value):
                    raise ValueError(f"{key}: expected at most 60 letters and digits, got {value!r:.80}")
            run.assistant.caption_ids(caption)
            jobs.append(Job(run.out / "images" / category / f"{id_}.png", caption, run.seed + n))
            references.append(folder / category / f"{id_}.jpg")
    check_any_exists(references)
    # Loaded before the pictures are drawn, so that an error is raised early.
    label, network = feature_network(run.features, run.assistant.model.device)
    run.draw(jobs)
    size = run.assistant.image_size
    reference = _statistics(references, size, network, "reference", skipped)
    ours = _statistics([job.path for job in jobs], size, network, "drawn", skipped)
    scores: Scores = {
        "fid" if label == "rfid" else label: frechet_distance(reference, ours),
        "pictures": float(len(jobs)),
    }
    if skipped:
        scores[SKIPPED] = float(len(skipped))
    run.write_scores(scores)
    return scores


def _statistics(
    paths: Sequence[Path], size: int, network: Callable[[Tensor], Tensor], label: str, skipped: Skipped
) -> FeatureStatistics:
    statistics = FeatureStatistics()

    def images() -> Iterator[Tensor]:
        for path in progress(paths, label):
            image = None
            with skipped.errors():
                image = to_uint8(read_resized(path, size))[None]
            if image is not None:
                yield image

    with exact():
        for rows in rows_in_order(images(), lambda group: {"features": network(group)}):
            statistics.update(rows["features"])
    return statistics
