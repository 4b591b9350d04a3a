"""The explorer against its tokenizer; then the page in a real browser, and what it refuses.

The browser is Debian's Chromium. Its screenshots stay in explore_screenshots/, or the folder $SEMHITOK_SCREENSHOTS.
"""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_tokenizers import adaptive_tokenizer, small_config

from semhitok.data.images import crop_around, decode_image, resize_crop, save_png
from semhitok.evaluation.metrics import psnr
from semhitok.evaluation.plots import code_colors
from semhitok.explore import explorer as module
from semhitok.explore.explorer import Explorer
from semhitok.tokenizer import SemHiTok

ROOT = Path(__file__).parents[2]
SCREENSHOTS = Path(os.environ.get("SEMHITOK_SCREENSHOTS") or ROOT / "explore_screenshots")
CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip
# Every address that the server asks for or connects to, a line each: loaded by Python before anything else.
WATCH = """
import os, sys

def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.connect", "socket.sendto", "socket.bind"):
        with open(os.environ["WATCHED"], "a") as log:
            print(event, repr(arguments[0] if event == "socket.getaddrinfo" else arguments[1]), file=log)

sys.addaudithook(watch)
"""


def plain_tokenizer():
    torch.manual_seed(1)
    return SemHiTok(small_config(image_size=48)).eval()


def photo(seed=0, height=60, width=90):
    """Smooth, so that patches differ from each other more than within."""
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]


@pytest.fixture(scope="module", params=["equal sizes", "adaptive sizes"])
def explorer(request):
    return Explorer(plain_tokenizer() if request.param == "equal sizes" else adaptive_tokenizer(), "a checkpoint")


def centres(explorer):
    """Of all patches, as shares of the image's width and height."""
    grid = explorer.tokenizer.config.grid_size
    return [((column + 0.5) / grid, (row + 0.5) / grid) for row in range(grid) for column in range(grid)]


def widest(explorer, view):
    """The centre of a patch with as many sub-codes as any has, that is not at the top."""
    inner = [(x, y) for x, y in centres(explorer) if y > 1 / explorer.tokenizer.config.grid_size]
    return max(inner, key=lambda centre: explorer.patch(explorer.choose(view, *centre)).size)


@pytest.fixture
def view(explorer):
    view = explorer.open(photo())
    return explorer.choose(view, *widest(explorer, view))


def test_a_view_has_the_tokenizers_ids(explorer):
    view = explorer.open(photo())
    tokenizer, quantizer = explorer.tokenizer, explorer.tokenizer.quantizer
    image = resize_crop(photo(), tokenizer.config.image_size)
    assert torch.equal(view.image, image)
    assert torch.equal(view.encoded, tokenizer.encode(image[None])[0]) and torch.equal(view.codes, view.encoded)
    assert torch.equal(quantizer(view.z_sem, view.z_pix).codes, view.codes)
    decoded, decibels = explorer.decode(view)
    assert torch.equal(decoded, tokenizer.reconstruct(image[None])[0])
    assert decibels == float(psnr(decoded[None], image[None]))


def test_the_map_has_one_colour_a_semantic_code(explorer, view):
    p = explorer.tokenizer.config.patch_size
    semantic = explorer.vocabulary.split(view.codes)[0]
    drawn = explorer.semantic_map(view)
    assert drawn.shape == view.image.shape and drawn.min() >= 0 and drawn.max() <= 1
    patches = drawn.unfold(1, p, p).unfold(2, p, p)
    assert torch.equal(patches, patches[..., :1, :1].expand_as(patches))
    assert torch.equal(patches[..., 0, 0], explorer.colors[semantic].permute(2, 0, 1))
    assert len(patches[..., 0, 0].flatten(1).unique(dim=1).T) == len(semantic.unique()) > 1
    counts = explorer.semantic_counts(view)
    assert [count for _, count in counts] == sorted((count for _, count in counts), reverse=True)
    assert dict(counts) == {i: int((semantic == i).sum()) for i in semantic.unique().tolist()}


def test_near_codes_have_near_colours():
    angles = torch.linspace(0, 3, 20)
    colors = code_colors(torch.stack([angles.cos(), angles.sin(), 0 * angles, 0 * angles], 1))
    assert colors.shape == (20, 3) and colors.min() >= 0 and colors.max() <= 1
    steps = (colors.diff(dim=0)).norm(dim=1)
    assert steps.max() < 0.3 and (colors[0] - colors[-1]).norm() > 0.9
    assert code_colors(torch.randn(9, 2)).shape == (9, 3)


def test_the_chosen_patch(explorer):
    view, grid = explorer.open(photo()), explorer.tokenizer.config.grid_size
    for x, y, place in ((0, 0, (0, 0)), (1, 1, (grid - 1, grid - 1)), (0.99 / grid, 1.01 / grid, (1, 0))):
        chosen = explorer.choose(view, x, y)
        assert chosen.place == place
        patch = explorer.patch(chosen)
        assert patch.flat == view.codes[place] and explorer.vocabulary.flat(patch.i, patch.j) == patch.flat
        assert patch.encoded_j == patch.j and patch.size == explorer.tokenizer.quantizer.sizes[patch.i]
        similar = explorer.tokenizer.quantizer.semantic.codebook @ view.z_sem[place]
        assert similar.argmax() == patch.i and similar.max().item() == pytest.approx(patch.cosine, abs=1e-6)
        sub, distances = explorer.sub_codes(chosen)
        assert sub.tolist() == list(range(patch.size)) and int(distances.argmin()) == patch.j


def test_alternatives_and_swaps(explorer, view):
    tokenizer, p = explorer.tokenizer, explorer.tokenizer.config.patch_size
    patch, (row, column) = explorer.patch(view), view.place
    assert patch.size > 1
    crops = explorer.alternatives(view)
    assert crops.shape == (patch.size, 3, 3 * p, 3 * p)
    before, _ = explorer.decode(view)
    for j in range(patch.size):
        swapped = explorer.swap(view, j)
        assert swapped.num_swapped == (j != patch.j) and view.num_swapped == 0
        assert explorer.patch(swapped)[:3] == (patch.i, j, patch.j)
        decoded, _ = explorer.decode(swapped)
        assert torch.equal(decoded, before) == (j == patch.j)
        q = tokenizer.features(swapped.codes[None])
        _, distances = explorer.sub_codes(view)
        assert distances[j] == (view.z_pix[row, column] - q.pixel[0, row, column]).square().sum()
        torch.testing.assert_close(crops[j], crop_around(decoded[None], row, column, p, margin=p)[0])
        assert torch.equal(explorer.reset(swapped).codes, view.encoded)
    elsewhere = explorer.choose(swapped, 0, 0)
    assert explorer.alternatives(elsewhere).shape[0] == explorer.patch(elsewhere).size
    other = explorer.swap(elsewhere, explorer.patch(elsewhere).size - 1)
    assert other.num_swapped == int((other.codes != other.encoded).sum()) and explorer.reset(other).num_swapped == 0


def test_of_a_large_sub_codebook_the_nearest_are_shown(explorer, view, monkeypatch):
    monkeypatch.setattr(module, "MAX_SUB_CODES", 2)
    monkeypatch.setattr(module, "DECODED_AT_ONCE", 1)
    full = (view.z_pix[view.place] - sub_codebook(explorer, view)).square().sum(-1)
    sub, distances = explorer.sub_codes(view)
    assert sub.tolist() == sorted(full.argsort()[:2].tolist()) and torch.equal(distances, full[sub])
    assert len(explorer.alternatives(view)) == 2


def sub_codebook(explorer, view):
    flat, (i, _) = explorer.tokenizer.quantizer.pix_codebook.flatten(0, -2), explorer.patch(view)[:2]
    return flat[[explorer.vocabulary.split(h)[0] == i for h in range(len(flat))]]


def test_what_is_refused(explorer, view):
    size = explorer.patch(view).size
    for j in (-1, size):
        with pytest.raises(ValueError, match=rf"j: expected a sub-code in \[0, {size}\), got {j}"):
            explorer.swap(view, j)
    with pytest.raises(ValueError, match="view: expected one with a chosen patch"):
        explorer.patch(explorer.open(photo()))
    with pytest.raises(ValueError, match="album: expected images"):
        explorer.sharing(view, 5)


def test_patches_that_share_a_semantic_code(explorer, view):
    size, p = explorer.tokenizer.config.image_size, explorer.tokenizer.config.patch_size
    images = torch.stack([resize_crop(photo(seed), size) for seed in range(7)])
    paths = [Path(f"somewhere/{seed}.png") for seed in range(7)]
    explorer.collect(iter([(paths[:4], images[:4]), (paths[4:], images[4:])]))
    try:
        codes = torch.cat([explorer.tokenizer.encode(part) for part in (images[:4], images[4:])])
        semantic, sub = explorer.vocabulary.split(codes)
        patch = explorer.patch(view)
        found = explorer.sharing(view, 1000)
        assert found.num_patches == int((semantic == patch.i).sum()) == len(found.names) > 1
        assert found.num_images == sum(bool((image == patch.i).any()) for image in semantic)
        same = [j == patch.j for j in found.sub.tolist()]
        assert same == sorted(same, reverse=True) and sum(same) >= 1
        # Each crop is one of the patches, and each patch one of the crops.
        expected = {}
        for n, y, x in (semantic == patch.i).nonzero().tolist():
            crop = crop_around(images[n : n + 1].mul(255).round() / 255, y, x, p, margin=p)
            expected[crop.numpy().tobytes(), f"{n}.png", int(sub[n, y, x])] = True
        got = [(crop.numpy().tobytes(), *rest) for crop, *rest in zip(*found[:2], found.sub.tolist(), strict=True)]
        assert set(got) == set(expected)
        few = explorer.sharing(view, 2)
        assert few.names == found.names[:2] and torch.equal(few.crops, found.crops[:2])
        assert few.num_patches == found.num_patches
        absent = next(i for i in range(12) if not (semantic == i).any())
        codes = torch.full_like(view.codes, explorer.vocabulary.flat(absent, 0))
        none = explorer.sharing(module.replace(view, codes=codes), 5)
        assert none.crops.shape == (0, 3, 3 * p, 3 * p) and none.names == [] and none.num_patches == 0
    finally:
        explorer.album = None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two checkpoints that differ in image size and in how sub-codes are given, and a folder of images."""
    folder = tmp_path_factory.mktemp("explore")
    plain_tokenizer().save_pretrained(folder / "plain")
    adaptive_tokenizer().save_pretrained(folder / "adaptive")
    (folder / "images").mkdir()
    for seed in range(6):
        save_png(photo(seed), folder / "images" / f"photo {seed}.png")
    (folder / "images" / "broken.png").write_text("hello")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray((photo(9).permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(folder / "turned.jpg", exif=turned)
    (folder / "notes.txt").write_text("hello")
    (folder / "notes.png").write_text("hello")
    Image.new("1", (20000, 20000)).save(folder / "huge.png", compress_level=1)
    return folder


def test_command_line_refuses(run, files, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # so that it is put back

    def refused(*arguments):
        code, out, err = run("explore", *arguments, "--port", "0")
        assert (code, out, len(err)) == (2, "", 1)
        return err[0].removeprefix("semhitok explore: error: ")

    plain = files / "plain"
    assert refused(files / "images").startswith(f"{files}/images/config.json: no such file; is")
    assert refused(plain, "--compare", files / "images").startswith(f"{files}/images/config.json: no such file; is")
    assert refused(plain, "--compare", files / "none").startswith(f"{files}/none/config.json: no such file")
    assert refused(plain, "--images", files / "none") == f"{files}/none: no such file or folder"
    assert refused(plain, "--device", "abacus") == "device: expected one torch can use here, got 'abacus'"
    assert run("explore", plain, "--images", files / "notes.png", "--port", 0)[2] == [
        f"semhitok explore: skipped: {files}/notes.png: not an image of a known format, but text",
        "semhitok explore: error: none of 1 image could be read",
    ]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        expected = f"semhitok explore: error: --port: cannot listen on 127.0.0.1:{port}: Address already in use"
        assert run("explore", plain, "--port", port) == (2, "", [expected])
    assert run("explore", plain, "--port", 70000)[2][0].endswith("--port: expected at most 65535, got 70000")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert refused(plain) == 'gradio is not installed: pip install "semhitok[explore]"'


@pytest.fixture(scope="module")
def server(files):
    """The command, which runs until the tests below end it: process, address of its page, and files it leaves."""
    pytest.importorskip("gradio")
    watch = files / "watch"
    watch.mkdir()
    (watch / "sitecustomize.py").write_text(WATCH)
    (files / "temporary").mkdir()
    path = os.pathsep.join([str(watch), str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "semhitok",
            "explore",
            "plain",
            "--compare",
            "adaptive",
            "--images",
            "images",
            "--port",
            "0",
        ],
        cwd=files,
        env={**os.environ, "PYTHONPATH": path, "WATCHED": str(watch / "log"), "TMPDIR": str(files / "temporary")},
        stdout=subprocess.PIPE,
        stderr=(files / "stderr").open("w"),
        text=True,
        # A shell's background job ignores the signal, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        line = process.stdout.readline()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)\n", line), (files / "stderr").read_text()
        yield process, line.split()[0]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("SEMHITOK_NEEDS_CHROMIUM"):
            pytest.fail("SEMHITOK_NEEDS_CHROMIUM is set, but there is no chromium")
        pytest.skip("no chromium (on Debian: apt install chromium)")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Page:
    """A tab of its own session, and what it asked the network for."""

    def __init__(self, browser, server):
        self.tab = browser.new_context(viewport={"width": 1500, "height": 1000}).new_page()
        self.tab.set_default_timeout(60_000)
        self.requests = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(server[1])
        self.tab.wait_for_selector("#drop input[type=file]", state="attached")

    def text(self, name):
        return self.tab.locator(name).inner_text()

    def drop(self, file):
        self.tab.set_input_files("#drop input[type=file]", file)

    def wait(self, name, words):
        """Until the element says so."""
        self.tab.locator(name).filter(has_text=words).wait_for()

    def picture(self, name):
        """What the browser shows, as pixels [H, W, 3]."""
        source = self.tab.locator(f"{name} img").get_attribute("src")
        response = self.tab.request.get(source)
        assert response.ok
        return np.array(Image.open(io.BytesIO(response.body())).convert("RGB"))

    def shows(self, name, image, inside=np.s_[:, :]):
        """Wait until a picture is `image` [3, H, W], enlarged; or a part of it is."""
        for _ in range(200):
            pixels = self.picture(name)
            if abs(pixels.astype(int) - enlarged(image, len(pixels)))[inside].max() <= 1:
                return pixels
            self.tab.wait_for_timeout(50)
        raise AssertionError(f"{name} does not show what it should")

    def click(self, name, x, y):
        box = self.tab.locator(f"{name} img").bounding_box()
        self.tab.mouse.click(box["x"] + box["width"] * x, box["y"] + box["height"] * y)

    def shot(self, name):
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.tab.mouse.move(0, 0)
        self.tab.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


@pytest.fixture
def page(browser, server):
    page = Page(browser, server)
    yield page
    page.tab.context.close()


def enlarged(image, side):
    pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
    return pixels.repeat(side // len(pixels), 0).repeat(side // len(pixels), 1)


def test_the_page_in_a_browser(page, files):
    explorers = [Explorer(SemHiTok.from_pretrained(files / name), name) for name in ("plain", "adaptive")]
    page.shot("1-empty")
    page.drop(files / "images" / "photo 0.png")
    page.wait("#status", "photo 0.png, 90 x 60 pixels")
    page.wait("#figures-1", "PSNR")
    image = decode_image((files / "images" / "photo 0.png").read_bytes(), "")
    views = [explorer.open(image) for explorer in explorers]
    for number, (explorer, view) in enumerate(zip(explorers, views, strict=True)):
        drawn = {"image": view.image, "map": explorer.semantic_map(view), "reconstruction": explorer.decode(view)[0]}
        for name, expected in drawn.items():
            page.shows(f"#{name}-{number}", expected)
        counts = explorer.semantic_counts(view)
        legend = page.text(f"#legend-{number}")
        assert all(f"{i} ({count})" in legend for i, count in counts)
        assert f"{len(counts)} of 12 semantic codes occur" in page.text(f"#figures-{number}")
        assert page.tab.locator(f"#sub-codes-{number}").count() == 0
    page.shot("2-opened")

    # A click on the map of one chooses the place in both, whatever their sizes.
    place = widest(explorers[1], views[1])
    page.click("#map-0", *place)
    views = [explorer.choose(view, *place) for explorer, view in zip(explorers, views, strict=True)]
    patches = [explorer.patch(view) for explorer, view in zip(explorers, views, strict=True)]
    for number, (explorer, view, patch) in enumerate(zip(explorers, views, patches, strict=True)):
        row, column = view.place
        page.wait(
            f"#patch-{number}", f"row {row}, column {column}: i = {patch.i}, j = {patch.j}, flat id {patch.flat}."
        )
        tiles = page.tab.locator(f"#sub-codes-{number} .caption-label")
        tiles.nth(patch.size - 1).wait_for()
        distances = explorer.sub_codes(view).distances.tolist()
        texts = tiles.all_inner_texts()
        assert [text.split("\n")[:2] for text in texts] == [
            [f"j = {j}", f"d² = {d:.3g}"] for j, d in enumerate(distances)
        ]
        assert [j for j, text in enumerate(texts) if "shown" in text] == [patch.j]
        assert page.tab.locator(f"#sharing-{number} img").count() > 0
        assert "of 6 images" in page.text(f"#sharing-{number}")
        side = page.picture(f"#map-{number}").shape[0] // explorer.tokenizer.config.grid_size
        top, left = row * side, column * side
        inside = np.s_[top : top + side, left : left + side]
        decoded, _ = explorer.decode(view)
        for name, expected in (
            ("image", view.image),
            ("map", explorer.semantic_map(view)),
            ("reconstruction", decoded),
        ):
            pixels = page.shows(f"#{name}-{number}", expected, inside)
            assert (pixels[top - 1, left : left + side] == 255).all(), "no line above the patch"
    page.shot("3-clicked")

    # A swap changes the picture of one tokenizer alone, and a reset takes it back.
    corner = np.s_[-64:, :64]  # far from the lines around the patch
    before = [explorer.decode(view)[0] for explorer, view in zip(explorers, views, strict=True)]
    other = max(j for j in range(patches[1].size) if j != patches[1].j)
    page.tab.locator("#sub-codes-1 img").nth(other).click()
    page.wait("#figures-1", "1 of 16 patches swapped")
    page.wait("#patch-1", f"i = {patches[1].i}, j = {other} (encoded as j = {patches[1].j})")
    swapped, decibels = explorers[1].decode(explorers[1].swap(views[1], other))
    assert f"PSNR {decibels:.2f} dB" in page.text("#figures-1")
    page.shows("#reconstruction-1", swapped, corner)
    page.shows("#reconstruction-0", before[0], corner)
    assert abs(swapped - before[1])[:, -4:, :4].max() > 2 / 255  # so it can tell
    page.tab.locator("#sub-codes-1 .caption-label").nth(other).filter(has_text="shown").wait_for()
    page.shot("4-swapped")
    page.tab.locator("#reset-1").click()
    page.wait("#figures-1", "0 of 16 patches swapped")
    page.shows("#reconstruction-1", before[1], corner)

    # The drop zone takes the next image; it is turned as it says.
    page.drop(files / "turned.jpg")
    page.wait("#status", "turned.jpg, 60 x 90 pixels")
    page.wait("#figures-0", "0 of 36 patches swapped")
    upright = resize_crop(photo(9).rot90(-1, (1, 2)), 48)
    shown = page.picture("#image-0")
    assert abs(shown.astype(int) - enlarged(upright, len(shown))).mean() < 8  # it is a JPEG
    assert all(url.startswith((page.tab.url, "blob:", "data:")) for url in page.requests), page.requests
    assert len(page.requests) > 10


def test_the_page_refuses_what_is_no_image(page, server, files):
    peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server[0].pid}/status").read_text())[1])  # noqa: E731
    page.drop(files / "notes.png")
    page.wait("#status", "notes.png: not an image of a known format, but text")
    page.shot("5-text-as-png")
    before = peak()
    page.drop(files / "huge.png")
    page.wait("#status", f"huge.png: cannot read image: expected at most {2**27} pixels, got 20000 x 20000")
    assert peak() - before < 100 * 1024  # KiB; its pixels are 400 MB at least
    page.shot("6-huge")
    page.drop(files / "notes.txt")
    page.tab.get_by_text("Invalid file type: notes.txt. Only image allowed.").wait_for()
    page.shot("7-text")
    # It goes on after that.
    page.drop(files / "images" / "photo 1.png")
    page.wait("#status", "photo 1.png, 90 x 60 pixels")


def test_sessions_do_not_see_each_other(browser, server, files):
    one, two = Page(browser, server), Page(browser, server)
    for page, name in ((one, "photo 2.png"), (two, "photo 3.png")):
        page.drop(files / "images" / name)
        page.wait("#status", name)
        page.wait("#figures-0", "PSNR")
    one.click("#image-0", 0.1, 0.1)
    one.wait("#patch-0", "row 0, column 0")
    two.click("#image-0", 0.9, 0.9)
    two.wait("#patch-0", "row 5, column 5")
    assert "row 0, column 0" in one.text("#patch-0")
    image = resize_crop(decode_image((files / "images" / "photo 3.png").read_bytes(), ""), 48)
    two.shows("#image-0", image, np.s_[:64, :64])
    for page in (one, two):
        page.tab.context.close()


def status(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def request_to_open(url, path):
    """What the page would ask after an upload, but of any path: the answer."""
    body = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}], "fn_index": 0, "session_hash": "abc"}
    headers = {"Content-Type": "application/json"}
    post = urllib.request.Request(f"{url}gradio_api/queue/join", json.dumps(body).encode(), headers)
    urllib.request.urlopen(post, timeout=20).close()
    with urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash=abc", timeout=20) as lines:
        messages = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.strip()]
    return next(message for message in messages if message["msg"] == "process_completed")


def test_the_server_keeps_to_this_machine(server, files):
    _, url = server
    port = int(url.split(":")[2].rstrip("/"))
    assert status(url) == 200
    assert status(url, Host="example.org") == 400
    for file in ("/etc/hostname", files / "images" / "photo 0.png", files / "plain" / "config.json", "../notes.txt"):
        assert status(f"{url}gradio_api/file={urllib.request.quote(str(file))}") in (403, 404)
    assert status(f"{url}docs") == 404
    # Nor does a made up request get it to read a file that was not uploaded.
    for file in (files / "images" / "photo 0.png", "/etc/hostname.png"):
        answer = request_to_open(url, str(file))
        assert not answer["success"] and "data" not in answer["output"], answer
    assert (files / "images" / "photo 0.png").exists()
    # No other address has it.
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=2)
    config = json.load(urllib.request.urlopen(f"{url}config", timeout=20))
    assert not config["analytics_enabled"]
    log = (files / "watch" / "log").read_text()
    assert log.startswith("socket.bind ('127.0.0.1', 0)\n")
    outside = [line for line in log.splitlines() if not re.search(r"'(127\.0\.0\.1|localhost)'|^socket.bind '/", line)]
    assert outside == []


def test_ctrl_c_ends_the_server(server, files):
    process, _ = server
    before = (files / "stderr").read_text()
    skipped = "semhitok explore: skipped: images/broken.png: not an image of a known format, but text\n"
    assert before.startswith(2 * skipped)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert (files / "stderr").read_text() == before + "semhitok explore: interrupted\n"
    assert os.listdir(files / "temporary") == []
