"""The page that shows one or two explorers, and its server, which only this machine can reach.

Each browser session has its own `gr.State`, a View for each explorer. The explorers are shared and do not change.
"""

from __future__ import annotations

import html
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from torch import Tensor

from semhitok.data.decode import max_pixels
from semhitok.data.formats import FORMATS
from semhitok.data.images import decode_image, to_uint8
from semhitok.explore.explorer import Explorer, Patch, View

HOST = "127.0.0.1"
_TITLE = "SemHiTok: what the ids mean"
_MAX_FILE = "64 MB"
_IMAGE_SIDE, _CROP_SIDE = 512, 144  # pixels to which images and crops are enlarged, approximately
_MAX_SHARING, _MAX_LEGEND = 24, 24
_CHOSEN = (255, 106, 0)  # colour of the frame around the sub-code that is shown
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

_SHOWN: dict[str, Any] = {"format": "png", "interactive": False, "buttons": []}  # of pictures without controls

Views = tuple[View, ...]


def build(explorers: Sequence[Explorer]) -> gr.Blocks:
    """The page: a column for every explorer, all showing the same image and the same place in it."""
    # Files of pictures are deleted after an hour.
    with gr.Blocks(title=_TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as blocks:
        _Page(explorers)
    return blocks


class _Page:
    """The components of the page, and how they respond to events.

    A handler of an event returns a value for each of `outputs`.
    """

    def __init__(self, explorers: Sequence[Explorer]) -> None:
        gr.Markdown(f"# {_TITLE}")
        views = gr.State(None)
        with gr.Row():
            drop = gr.File(label="Image", file_types=["image"], height=150, elem_id="drop")
            with gr.Column(scale=2):
                status = gr.HTML(_paragraph("No image yet."), elem_id="status")
                gr.HTML(
                    "<p>Click a patch in any of the pictures to see its ids (i, j). Click one of its sub-codes to swap "
                    f"it in and decode the image again. Accepted are {', '.join(FORMATS)} files of up to {_MAX_FILE} "
                    f"and {max_pixels():,} pixels.</p>"
                )
        with gr.Row():
            self.panels = [_Panel(explorer, number) for number, explorer in enumerate(explorers)]
        self.outputs = [views, *(part for panel in self.panels for part in panel.outputs)]
        # One event at a time, whatever the number of sessions, so that the load on the machine is bounded.
        options: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
        options |= {"api_visibility": "private", "show_progress": "minimal"}
        drop.upload(self.open_file, drop, [drop, status, *self.outputs], **options)
        for number, panel in enumerate(self.panels):
            for picture in panel.pictures:
                picture.select(self.handler(partial(self.choose, panel.side)), views, self.outputs, **options)
            panel.sub_codes.select(self.handler(partial(self.swap, number)), views, self.outputs, **options)
            panel.reset.click(self.handler(partial(self.reset, number)), views, self.outputs, **options)

    def show(self, views: Views) -> list[Any]:
        pairs = zip(self.panels, views, strict=True)
        return [views, *(value for panel, view in pairs for value in panel.values(view))]

    def unchanged(self) -> list[Any]:
        return [gr.skip() for _ in self.outputs]

    def open_file(self, file: str | None) -> list[Any]:
        """Values of the drop zone, which is emptied for the next image, of the status, and of `outputs`."""
        if file is None:
            return [None, gr.skip(), *self.unchanged()]
        path = Path(file)
        try:
            image = decode_image(path.read_bytes(), path.name)
        except (ValueError, OSError) as error:
            return [None, _paragraph(str(error), "error"), *self.unchanged()]
        finally:
            path.unlink(missing_ok=True)
        text = f"{path.name}, {image.shape[2]} x {image.shape[1]} pixels, cropped to the centre"
        return [None, _paragraph(text), *self.show(tuple(panel.explorer.open(image) for panel in self.panels))]

    def handler(self, change: Callable[[Views, Any], Views | None]) -> Callable[..., list[Any]]:
        """The handler of an event that changes the views, once there is an image; None leaves them as they are."""

        def handle(views: Views | None, event: gr.EventData) -> list[Any]:
            changed = None if views is None else change(views, event)
            return self.unchanged() if changed is None else self.show(changed)

        return handle

    def choose(self, side: int, views: Views, event: Any) -> Views:
        x, y = ((pixel + 0.5) / side for pixel in event.index)
        return tuple(panel.explorer.choose(view, x, y) for panel, view in zip(self.panels, views, strict=True))

    def swap(self, number: int, views: Views, event: Any) -> Views | None:
        view, explorer = views[number], self.panels[number].explorer
        sub = explorer.sub_codes(view).sub
        if event.index >= len(sub):  # a click on sub-codes that the page was about to replace
            return None
        return (*views[:number], explorer.swap(view, int(sub[event.index])), *views[number + 1 :])

    def reset(self, number: int, views: Views, event: Any) -> Views:
        return (*views[:number], self.panels[number].explorer.reset(views[number]), *views[number + 1 :])


def listen(port: int) -> socket.socket:
    """A socket that listens on this machine's loopback address. Port 0 takes any free one.

    Raises:
        ValueError: the port is out of range.
        OSError: the port is in use, or listening on it is not permitted.
    """
    try:
        return socket.create_server((HOST, port))
    except OverflowError:
        raise ValueError(f"--port: expected at most 65535, got {port}") from None
    except OSError as error:
        raise OSError(f"--port: cannot listen on {HOST}:{port}: {os.strerror(error.errno or 0)}") from None


def serve(explorers: Sequence[Explorer], listener: socket.socket) -> None:
    """Serve the page until the process is terminated.

    Raises:
        KeyboardInterrupt: on Ctrl-C.
    """
    page = build(explorers)
    # Until this is set, Gradio lets a request name any file as its upload; mounting a page does not set it.
    page.has_launched = True
    # FastAPI's own pages would load scripts from other hosts.
    outside = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # Keeps out other sites whose host name resolves to this address (DNS rebinding).
    outside.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    theme = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    unused: dict[str, Any] = {"footer_links": [], "run_history": False, "enable_monitoring": False}
    unused |= {"ssr_mode": False, "mcp_server": False}
    app = gr.mount_gradio_app(outside, page, path="/", theme=theme, css=_CSS, max_file_size=_MAX_FILE, **unused)
    # An open page keeps its connection; do not wait for it.
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


class _Panel:
    """The components that show one explorer's view."""

    def __init__(self, explorer: Explorer, number: int) -> None:
        self.explorer = explorer
        config = explorer.tokenizer.config
        self.scale = max(1, round(_IMAGE_SIDE / config.image_size))
        self.side = config.image_size * self.scale
        self.crop_scale = max(1, round(_CROP_SIDE / (3 * config.patch_size)))
        with gr.Column(elem_id=f"panel-{number}", min_width=480):
            gr.HTML(_heading(explorer))
            names = {"image": "Image", "map": "Semantic map", "reconstruction": "Reconstruction"}
            options = _SHOWN | {"min_width": 140, "elem_classes": "picture"}
            with gr.Row():
                self.pictures = [
                    gr.Image(label=label, alt_text=label, elem_id=f"{name}-{number}", **options)
                    for name, label in names.items()
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
        options: dict[str, Any] = {"columns": 8, "height": "auto", "object_fit": "contain", "allow_preview": False}
        return gr.Gallery(visible=False, elem_id=name, elem_classes="crops", **options, **_SHOWN)

    def values(self, view: View) -> Iterator[Any]:
        """The values of `outputs` for a view."""
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
        which += f" sub-codes of i = {patch.i}, decoded in the patch's place, and their squared distances to z_pix"
        return gr.Gallery(items, label=which, visible=True, selected_index=None)

    def _sharing(self, view: View, patch: Patch) -> gr.Gallery:
        album = self.explorer.album
        if album is None:
            return gr.Gallery(visible=False)
        crops, names, sub, num_patches, num_images = self.explorer.sharing(view, _MAX_SHARING)
        shown = zip(crops, names, sub.tolist(), strict=True)
        items = [(self._crop(crop), f"j = {j}\n{name}") for crop, name, j in shown]
        label = (
            f"Patches of the folder with i = {patch.i}: {num_patches} in {num_images} of {len(album.names)} images. "
            f"{len(items)} are shown, those with j = {patch.j} first"
        )
        return gr.Gallery(items, label=label, visible=True, selected_index=None)

    def _crop(self, crop: Tensor) -> np.ndarray:
        pixels = _pixels(crop, self.crop_scale)
        return _outlined(pixels, 1, 1, len(pixels) // 3)


def _pixels(image: Tensor, scale: int) -> np.ndarray:
    """[3, H, W] in [0, 1] -> uint8 [H * scale, W * scale, 3], each pixel repeated."""
    pixels = to_uint8(image).permute(1, 2, 0).numpy()
    return pixels.repeat(scale, 0).repeat(scale, 1)


def _outlined(pixels: np.ndarray, row: int, column: int, side: int) -> np.ndarray:
    """A copy with a line around a patch, black and white so that it is visible on any colour."""
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
    """The most frequent semantic codes of an image, and the chosen one, with their numbers of patches."""
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
