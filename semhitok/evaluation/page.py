"""An evaluation's report for people: rows of a table, and a page with images."""

from __future__ import annotations

import html as escapes
from typing import Any
from urllib.parse import quote

from semhitok.evaluation.metrics import METRICS, Metric

_SHOWN = 3  # best, median and worst images each
_STYLE = """body { font: 15px/1.4 sans-serif; margin: 2em; max-width: 70em }
td, th { text-align: left; padding: .1em 1.5em .1em 0; vertical-align: top }
img { image-rendering: pixelated; max-width: 24em }"""


def table_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Every figure's name and value, or why it is absent."""
    figures, absent = report["figures"], report["absent"]
    frechet = [name for name in figures if name.startswith("frechet[")]
    probes = [name for name in figures if name.startswith(("linear[", "knn["))]
    count, size = report["protocol"]["images"], report["protocol"]["size"]
    rows = [("images", f"{count} of {size} x {size}")]
    # Distances on other networks' features stand beside the rFID.
    for name in ["rfid", *frechet, *(name for name in METRICS if name != "rfid"), *probes]:
        metric = METRICS.get(name, Metric(name, None, heading=name, digits=4))
        if name in figures:
            rows.append((metric.heading, f"{figures[name]:.{metric.digits}f}"))
        elif name in absent:
            rows.append((metric.heading, f"absent: {' '.join(absent[name].split())}"))
    return rows


def html(report: dict[str, Any]) -> str:
    """A page without scripts, with relative links to the PNGs beside it."""
    subject = next(iter(report["subject"].values())) or "tokenizer"
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(subject)}</title>',
        f"<style>\n{_STYLE}\n</style></head><body>\n<h1>{_text(subject)}</h1>",
        _table(table_rows(report)),
        *(f"<p>{_text(warning)}</p>" for warning in report["warnings"]),
    ]
    for name in ("psnr", "lpips", "squeezenet"):
        if name in report["images"][0]:
            parts += _examples(report["images"], METRICS[name])
    protocol = {key: value for key, value in report["protocol"].items() if not isinstance(value, dict)}
    protocol |= report["protocol"].get("probes", {})
    parts += ["<h2>Protocol</h2>", _table([(key, str(value)) for key, value in protocol.items()])]
    return "\n".join([*parts, "</body></html>\n"])


def _examples(images: list[dict[str, Any]], metric: Metric) -> list[str]:
    """The best, median and worst images by one metric, with all their values."""
    ranked = sorted(images, key=lambda image: image[metric.name], reverse=not metric.lower_is_better)
    middle = max(0, (len(ranked) - _SHOWN) // 2)
    parts = []
    titled = {"Best": ranked[:_SHOWN], "Median": ranked[middle : middle + _SHOWN], "Worst": ranked[-_SHOWN:]}
    for title, shown in titled.items():
        parts.append(f"<h2>{title} by {metric.heading.removesuffix(' dB')}: original, reconstruction</h2>")
        for image in shown:
            file = quote(f"{image['name']}.png")
            parts.append(f'<p><img src="reference/{file}" alt="original"> <img src="reconstructions/{file}" alt="">')
            of_image = [(METRICS[name], value) for name, value in image.items() if name in METRICS]
            values = [f"{each.heading} {value:.{each.digits}f}" for each, value in of_image]
            parts.append(f"<br>{_text(image['name'])}: {', '.join(values)}</p>")
    return parts


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows]
    return "\n".join(["<table>", *lines, "</table>"])


def _text(value: object) -> str:
    return escapes.escape(str(value))
