"""The page on an Explorer or two, and its server, which is for this machine alone.

What a browser session looks at is in its own `gr.State`, a View for each explorer; the explorers are shared and do not
change.
"""

from __future__ import annotations

import html
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from torch import Tensor

from semhitok.data.images import FORMATS, MAX_PIXELS, decode_image
from semhitok.explore.explorer import Explorer, Patch, View

HOST = "127.0.0.1"
_TITLE = "SemHiTok: what the ids mean"
_MAX_FILE = "64 MB"
_IMAGE_SIDE, _CROP_SIDE = 512, 144  # pixels that images and crops are enlarged to, about
_MAX_SHARING, _MAX_LEGEND = 24, 24
_CHOSEN = (255, 106, 0)  # frame of the sub-code that is shown now
_CSS = """
.gradio-container { max-width: none !important }
.html-container { padding: 0 !important }
.picture img { image-rendering: pixelated; cursor: crosshair }
.crops img { image-rendering: pixelated }
.picture label, .crops label { position: static !important; border: none !important; box-shadow: none !important }
.crops .grid-wrap { min-height: 0 !important; max-height: none !important; padding-top: 0 }
.crops .grid-container { padding-top: 0 !important;
    grid-template-columns: repeat(auto-fill, minmax(8em, 1fr)) !important }
.crops .thumbnail-item { aspect-ratio: auto !important; height: auto !important }
.crops .caption-label { position: static; max-width: none; border: none; text-align: center; opacity: 1 !important;
    white-space: pre }
.legend { display: flex; flex-wrap: wrap; gap: .2em .8em; font-size: .85em }
.legend span { display: inline-flex; align-items: center; gap: .35em; padding: 0 .25em; border-radius: .3em }
.legend i { width: 1em; height: 1em; border: 1px solid #0006; border-radius: .2em }
.legend .chosen { outline: 2px solid rgb(255 106 0) }
.error { color: #b91c1c; font-weight: 600 }
.dark .error { color: #fca5a5 }
"""

Views = tuple[View, ...]


def build(explorers: Sequence[Explorer]) -> gr.Blocks:
    """The page: a column for every explorer, all of them of the same image and the same place in it."""
    # Pictures that were shown are deleted after an hour.
    with gr.Blocks(title=_TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {_TITLE}")
        views = gr.State(None)
        with gr.Row():
            drop = gr.File(label="Image", file_types=["image"], height=150, elem_id="drop")
            with gr.Column(scale=2):
                status = gr.HTML(_paragraph("No image yet."), elem_id="status")
                gr.HTML(
                    "<p>Click a patch in any of the pictures to see its ids (i, j). Click one of its sub-codes to swap "
                    f"it in: the reconstruction is decoded again. Images are read as {', '.join(FORMATS)}, up to "
                    f"{_MAX_FILE} and {MAX_PIXELS:,} pixels.</p>",
                )
        with gr.Row():
            panels = [_Panel(explorer, number) for number, explorer in enumerate(explorers)]
        outputs = [views, *(part for panel in panels for part in panel.outputs)]

        def show(current: Views) -> list[Any]:
            pairs = zip(panels, current, strict=True)
            return [current, *(value for panel, view in pairs for value in panel.values(view))]

        def unchanged() -> list[Any]:
            return [gr.skip() for _ in outputs]

        def open_file(file: str | None) -> list[Any]:
            if file is None:
                return [None, gr.skip(), *unchanged()]
            path = Path(file)
            try:
                image = decode_image(path.read_bytes(), path.name)
            except (ValueError, OSError) as error:
                return [None, _paragraph(str(error), "error"), *unchanged()]
            finally:
                path.unlink(missing_ok=True)
            text = f"{path.name}, {image.shape[2]} x {image.shape[1]} pixels, cropped to the centre"
            return [None, _paragraph(text), *show(tuple(explorer.open(image) for explorer in explorers))]

        # One event at a time, whatever the number of sessions: what they ask of the machine is bounded.
        options: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "api_visibility": "private",
            "show_progress": "minimal",
        }
        # The drop zone is emptied again, and so ready for the next image.
        drop.upload(open_file, drop, [drop, status, *outputs], **options)

        def connect(panel: _Panel, number: int) -> None:
            def choose(current: Views | None, event: gr.SelectData) -> list[Any]:
                if current is None:
                    return unchanged()
                x, y = ((pixel + 0.5) / panel.side for pixel in event.index)
                pairs = zip(explorers, current, strict=True)
                return show(tuple(explorer.choose(view, x, y) for explorer, view in pairs))

            def swap(current: Views | None, event: gr.SelectData) -> list[Any]:
                if current is None:
                    return unchanged()
                sub = panel.explorer.sub_codes(current[number]).sub
                if event.index >= len(sub):  # a click on what the page was about to change
                    return unchanged()
                view = panel.explorer.swap(current[number], int(sub[event.index]))
                return show((*current[:number], view, *current[number + 1 :]))

            def reset(current: Views | None) -> list[Any]:
                if current is None:
                    return unchanged()
                view = panel.explorer.reset(current[number])
                return show((*current[:number], view, *current[number + 1 :]))

            for picture in panel.pictures:
                picture.select(choose, views, outputs, **options)
            panel.sub_codes.select(swap, views, outputs, **options)
            panel.reset.click(reset, views, outputs, **options)

        for number, panel in enumerate(panels):
            connect(panel, number)
    return page


def listen(port: int) -> socket.socket:
    """A listening socket of this machine's own address; on any free port for 0.

    Raises:
        ValueError: no such port.
        OSError: another process has it, or it needs rights.
    """
    try:
        return socket.create_server((HOST, port))
    except OverflowError:
        raise ValueError(f"--port: expected at most 65535, got {port}") from None
    except OSError as error:
        raise OSError(f"--port: cannot listen on {HOST}:{port}: {os.strerror(error.errno or 0)}") from None


def serve(explorers: Sequence[Explorer], listener: socket.socket) -> None:
    """Serve the page until the process is told to end.

    Raises:
        KeyboardInterrupt: by Ctrl-C.
    """
    page = build(explorers)
    # A mounted page does not say so itself, and until it does, Gradio lets a request name any file as its upload.
    page.has_launched = True
    outside = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # those pages would load scripts from outside
    # Another site's page must not get in under a name of its own that leads to this address.
    outside.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    app = gr.mount_gradio_app(
        outside,
        page,
        path="/",
        theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        css=_CSS,
        max_file_size=_MAX_FILE,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
    )
    # An open page keeps a connection, which is not waited for.
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


class _Panel:
    """The components that show an explorer's view."""

    def __init__(self, explorer: Explorer, number: int) -> None:
        self.explorer = explorer
        config = explorer.tokenizer.config
        self.scale = max(1, round(_IMAGE_SIDE / config.image_size))
        self.side = config.image_size * self.scale
        self.crop_scale = max(1, round(_CROP_SIDE / (3 * config.patch_size)))
        with gr.Column(elem_id=f"panel-{number}", min_width=480):
            gr.HTML(_heading(explorer))
            with gr.Row():
                self.pictures = [
                    gr.Image(
                        label=label,
                        alt_text=label,
                        format="png",
                        interactive=False,
                        buttons=[],
                        min_width=140,
                        elem_classes="picture",
                        elem_id=f"{label.split()[-1].lower()}-{number}",
                    )
                    for label in ("Image", "Semantic map", "Reconstruction")
                ]
            with gr.Row():
                self.figures = gr.HTML(elem_id=f"figures-{number}")
                self.reset = gr.Button(
                    "Reset sub-codes", size="sm", interactive=False, scale=0, min_width=160, elem_id=f"reset-{number}"
                )
            self.legend = gr.HTML(elem_id=f"legend-{number}")
            self.patch = gr.HTML(elem_id=f"patch-{number}")
            self.sub_codes = self._gallery(f"sub-codes-{number}")
            self.sharing = self._gallery(f"sharing-{number}")
        rest = [self.figures, self.reset, self.legend, self.patch, self.sub_codes, self.sharing]
        self.outputs = [*self.pictures, *rest]

    @staticmethod
    def _gallery(name: str) -> gr.Gallery:
        return gr.Gallery(
            format="png",
            columns=8,
            height="auto",
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
            visible=False,
            elem_id=name,
            elem_classes="crops",
        )

    def values(self, view: View) -> Iterator[Any]:
        """What `outputs` are to show."""
        explorer = self.explorer
        p = explorer.tokenizer.config.patch_size
        decoded, psnr = explorer.decode(view)
        for image in (view.image, explorer.semantic_map(view), decoded):
            pixels = _pixels(image, self.scale)
            yield pixels if view.place is None else _outlined(pixels, *view.place, p * self.scale)
        counts, patches = explorer.semantic_counts(view), view.codes.numel()
        yield _paragraph(
            f"PSNR {psnr:.2f} dB. {len(counts)} of {explorer.vocabulary.num_codes} semantic codes occur. "
            f"{view.num_swapped} of {patches} patches swapped."
        )
        yield gr.Button(interactive=view.num_swapped > 0)
        if view.place is None:
            yield from (_legend(counts, explorer.colors), "", gr.Gallery(visible=False), gr.Gallery(visible=False))
        else:
            patch = explorer.patch(view)
            yield _legend(counts, explorer.colors, patch.i)
            yield _ids(patch, *view.place)
            yield self._sub_codes(view, patch)
            yield self._sharing(view, patch)

    def _sub_codes(self, view: View, patch: Patch) -> gr.Gallery:
        sub, distances = self.explorer.sub_codes(view)
        items = []
        for j, distance, crop in zip(sub.tolist(), distances.tolist(), self.explorer.alternatives(view), strict=True):
            pixels = self._crop(crop)
            if j == patch.j:
                pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:] = [_CHOSEN] * 4
            marks = ["shown"] * (j == patch.j) + ["nearest"] * (j == patch.encoded_j)
            items.append((pixels, f"j = {j}\nd² = {distance:.3g}\n{', '.join(marks)}"))
        which = f"The {patch.size}" if len(items) == patch.size else f"The nearest {len(items)} of {patch.size}"
        label = (
            f"{which} sub-codes of i = {patch.i}, decoded in the patch's place, and their squared distances to z_pix"
        )
        return gr.Gallery(items, label=label, visible=True, selected_index=None)

    def _sharing(self, view: View, patch: Patch) -> gr.Gallery:
        album = self.explorer.album
        if album is None:
            return gr.Gallery(visible=False)
        crops, names, sub, num_patches, num_images = self.explorer.sharing(view, _MAX_SHARING)
        items = [
            (self._crop(crop), f"j = {j}\n{name}") for crop, name, j in zip(crops, names, sub.tolist(), strict=True)
        ]
        label = (
            f"Patches of the folder with i = {patch.i}: {num_patches} in {num_images} of {len(album.names)} images, "
            f"{len(items)} of them here, those with j = {patch.j} first"
        )
        return gr.Gallery(items, label=label, visible=True, selected_index=None)

    def _crop(self, crop: Tensor) -> np.ndarray:
        pixels = _pixels(crop, self.crop_scale)
        return _outlined(pixels, 1, 1, len(pixels) // 3)


def _pixels(image: Tensor, scale: int) -> np.ndarray:
    """[3, H, W] in [0, 1] -> uint8 [H * scale, W * scale, 3], every pixel a square."""
    pixels = image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels.repeat(scale, 0).repeat(scale, 1)


def _outlined(pixels: np.ndarray, row: int, column: int, side: int) -> np.ndarray:
    """With a line around a patch, black and white to be seen on anything; the patch itself stays as it is."""
    drawn, top, left = pixels.copy(), row * side, column * side
    line = max(1, len(pixels) // 150)
    for width, value in ((2 * line, 0), (line, 255)):
        drawn[max(0, top - width) : top + side + width, max(0, left - width) : left + side + width] = value
    patch = slice(top, top + side), slice(left, left + side)
    drawn[patch] = pixels[patch]
    return drawn


def _heading(explorer: Explorer) -> str:
    config, vocabulary = explorer.tokenizer.config, explorer.vocabulary
    size, grid = f"{config.image_size} x {config.image_size}", f"{config.grid_size} x {config.grid_size}"
    mean = " on average" if vocabulary.offsets else ""
    text = (
        f"{size} pixels, {grid} patches; {vocabulary.num_codes:,} semantic codes, {vocabulary.num_sub_codes} sub-codes "
        f"each{mean}; codebooks {explorer.tokenizer.codebook_hash[:12]}"
    )
    return f"<h2>{html.escape(explorer.name)}</h2>{_paragraph(text)}"


def _ids(patch: Patch, row: int, column: int) -> str:
    swapped = "" if patch.j == patch.encoded_j else f" (encoded as j = {patch.encoded_j})"
    return (
        f"<p>Patch in row {row}, column {column}: <b>i = {patch.i}, j = {patch.j}</b>{swapped}, flat id {patch.flat}. "
        f"Cosine of z_sem to code i: {patch.cosine:.3f}.</p>"
    )


def _legend(counts: Sequence[tuple[int, int]], colors: Tensor, chosen: int | None = None) -> str:
    """The most frequent semantic codes of an image and the chosen one, each with its number of patches."""
    shown = [*counts[:_MAX_LEGEND], *(pair for pair in counts[_MAX_LEGEND:] if pair[0] == chosen)]
    items = []
    for i, count in shown:
        color = " ".join(str(round(255 * value)) for value in colors[i].tolist())
        mark = ' class="chosen"' if i == chosen else ""
        items.append(f'<span{mark}><i style="background: rgb({color})"></i>{i} ({count})</span>')
    if len(counts) > len(shown):
        items.append(f"<span>and {len(counts) - len(shown)} more</span>")
    return f'<div class="legend">Semantic codes (patches), near codes in near colours: {"".join(items)}</div>'


def _paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{html.escape(text)}</p>'
