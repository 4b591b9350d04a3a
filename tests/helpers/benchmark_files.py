"""Data of the public benchmarks, in their own layouts and very small."""

from __future__ import annotations

import json

from PIL import Image


def picture(path, colour=(200, 30, 30), kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 18), colour).save(path, kind)


def write_pope(folder):
    labels = {"random": ["yes", "yes", "no", "no"], "popular": ["yes", "no"], "adversarial": ["no", "no"]}
    for group, gold in labels.items():
        rows = [
            {"question_id": n + 1, "image": f"COCO_val2014_{n:012}.jpg", "text": "Is there a dog?", "label": label}
            for n, label in enumerate(gold)
        ]
        (folder / f"coco_pope_{group}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n in range(4):
        picture(folder / "val2014" / f"COCO_val2014_{n:012}.jpg", (n * 60, 0, 0))
