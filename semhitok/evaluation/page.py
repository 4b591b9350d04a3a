"""The report of an evaluation for readers: rows of a table, and a page with images."""

from __future__ import annotations

import html as escapes
from typing import Any
from urllib.parse import quote

_SHOWN = 3  # best, median and worst images each
_HEADINGS = {  # in the table's order; others, such as distances on other networks' features, come after rfid
    "rfid": ("rFID", ".4f"),
    "psnr": ("PSNR dB", ".3f"),
    "ssim": ("SSIM", ".4f"),
    "lpips": ("LPIPS", ".4f"),
    "gmsd": ("GMSD", ".4f"),
    "sliced_wasserstein": ("sliced Wasserstein", ".3f"),
    "bits_per_pixel": ("bits per pixel", ".4f"),
    "semantic_usage": ("semantic usage", ".4f"),
    "semantic_perplexity": ("semantic perplexity", ".1f"),
    "flat_usage": ("flat usage", ".4f"),
    "flat_perplexity": ("flat perplexity", ".1f"),
    "group_usage": ("group usage", ".4f"),
    "group_perplexity": ("group perplexity", ".2f"),
    "flat_ids_kept": ("flat ids kept", ".4f"),
    "semantic_ids_kept": ("semantic ids kept", ".4f"),
    "semantic_cosine": ("semantic cosine", ".4f"),
}
_STYLE = """body { font: 15px/1.4 sans-serif; margin: 2em; max-width: 70em }
td, th { text-align: left; padding: .1em 1.5em .1em 0; vertical-align: top }
img { image-rendering: pixelated; max-width: 24em }"""


def table_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Every figure's name and value, or why it is absent."""
    figures, absent = report["figures"], report["absent"]
    frechet = [name for name in figures if name.startswith("frechet[")]
    probes = [name for name in figures if name.startswith(("linear[", "knn["))]
    rows = [
        ("images", f"{report['protocol']['images']} of {report['protocol']['size']} x {report['protocol']['size']}")
    ]
    for name in ["rfid", *frechet, *list(_HEADINGS)[1:], *probes]:
        heading, form = _HEADINGS.get(name, (name, ".4f"))
        if name in figures:
            rows.append((heading, format(figures[name], form)))
        elif name in absent:
            rows.append((heading, f"absent: {' '.join(absent[name].split())}"))
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
    for key, better in (("psnr", max), ("lpips", min)):
        if key in report["images"][0]:
            parts += _examples(report["images"], key, reverse=better is max)
    protocol = {key: value for key, value in report["protocol"].items() if not isinstance(value, dict)}
    protocol |= report["protocol"].get("probes", {})
    parts += ["<h2>Protocol</h2>", _table([(key, str(value)) for key, value in protocol.items()])]
    return "\n".join([*parts, "</body></html>\n"])


def _examples(images: list[dict[str, Any]], key: str, reverse: bool) -> list[str]:
    ranked = sorted(images, key=lambda image: image[key], reverse=reverse)
    middle = max(0, (len(ranked) - _SHOWN) // 2)
    parts = []
    for title, shown in (
        ("Best", ranked[:_SHOWN]),
        ("Median", ranked[middle : middle + _SHOWN]),
        ("Worst", ranked[-_SHOWN:]),
    ):
        parts.append(f"<h2>{title} by {_HEADINGS[key][0].partition(' ')[0]}: original, reconstruction</h2>")
        for image in shown:
            file = quote(f"{image['name']}.png")
            parts.append(f'<p><img src="reference/{file}" alt="original"> <img src="reconstructions/{file}" alt="">')
            scores = [f"{_HEADINGS[k][0]} {format(v, _HEADINGS[k][1])}" for k, v in image.items() if k in _HEADINGS]
            parts.append(f"<br>{_text(image['name'])}: {', '.join(scores)}</p>")
    return parts


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows]
    return "\n".join(["<table>", *lines, "</table>"])


def _text(value: object) -> str:
    return escapes.escape(str(value))
