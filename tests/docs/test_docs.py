"""The documentation: it builds without a warning, and its blocks of code do what they say, as do those of the README.

A block is treated by its language, and every block must have one:

    python      run, the blocks of a page in order, as one program
    bash        every command is checked, and run if it is one of semhitok's
    console     the same; what a command prints has to have the labels shown below it, whatever the numbers
    yaml        loaded as a configuration, and stored under its name for what follows
    json        a record a line, with keys that training reads
    text        what was printed, or a drawing: no commands
    bibtex      braces closed

A comment in the line above may say more: `<!-- not run: REASON -->`, for what needs GPUs, data or minutes: commands are
checked, that is parsed by the real parser, with presets, settings, extras, make targets and scripts' options looked up.
`<!-- file: NAME -->` names the file that a yaml block is. Pages run where the small files of `docs_world` are.
"""

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

from docs_blocks import ROOT, blocks, go_through
from docs_world import write_docs_world

from semhitok import ops

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_docs_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(world, tmp_path, monkeypatch):
    """The current folder: a copy of the world, in which no network is, so that weights to be fetched are absent."""

    def nowhere(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # 240 axes take seconds; test_analyze draws them.
    monkeypatch.setattr("semhitok.evaluation.plots.patches_of_codes", lambda *_, **__: None)
    monkeypatch.chdir(shutil.copytree(world, tmp_path / "pages"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_code_blocks(page, folder):
    go_through(page.read_text(), page.name)


RIGHT = """
```python
import semhitok
found = 1
```

```python
assert found == 1
```

<!-- not run: minutes -->
```bash
pip install -e ".[train]"    # an extra
semhitok train semhitok-256 'shards/{000..003}.tar' --held-out val/ \\
    --out runs/a --set pixel.batch_size=512
accelerate launch -m semhitok train semhitok-256 photos/ --out runs/a
python -m benchmarks.tradeoff.run --quick
make demo
```

```console
$ semhitok reconstruct demo_output/checkpoint demo_output/photographs/unseen --out pictures
image   PSNR dB    SSIM
unseen-0.png     10.00   0.100
mean      10.00   0.100
pictures: 1 image at 0.688 bits per pixel
```

<!-- file: my.yaml -->
```yaml
model: {adaptive: true}
```

```json
{"caption": "a dog", "images": ["dog.jpg"]}
```

```text
semhitok    0.1.0
```
"""
WRONG = [
    ("assert found == 1", "assert found == 2", "AssertionError"),
    ("assert found == 1", "found.nothing", "no attribute 'nothing'"),
    ("--held-out", "--held-in", "not parsed"),
    ("train semhitok-256 'sh", "train semhitok-257 'sh", "preset: expected one of semhitok-256"),
    (
        "launch -m semhitok train semhitok-256",
        "launch -m semhitok train semhitok-257",
        "preset: expected one of semhitok-256",
    ),
    ("pixel.batch_size", "pixel.batchsize", "no such setting 'pixel.batchsize'"),
    (".[train]", ".[training]", "training"),
    ("--quick", "--quicker", "expected its options, got {'--quicker'}"),
    ("tradeoff.run", "tradeoff.walk", "no such script"),
    ("make demo", "make demos", "expected one of"),
    ("make demo", "pytest tests/nothing", "tests/nothing: no such file"),
    ("make demo", "cmake demo", "a command that this test knows, got 'cmake'"),
    ("reconstruct demo_output", "reconstruct output", "error: output/checkpoint"),
    ("PSNR dB    SSIM", "PSNR dB", "printed"),
    ("mean ", "median ", "printed"),
    ("adaptive: true", "adapted: true", "unknown key 'adapted'"),
    ("adaptive: true", "adaptive: [true", "not YAML"),
    ("<!-- file: my.yaml -->\n", "", "expected <!-- file"),
    ("not run: minutes", "not run", "expected `not run: REASON`"),
    ('"caption"', '"captions"', "expected keys that training reads"),
    ("```text", "```", "expected one of python"),
    ("```text", "```shell", "expected one of python"),
    ("semhitok    0.1.0", "semhitok info", "expected no command, got 'semhitok i'"),
]


@pytest.mark.parametrize(("right", "wrong", "words"), [("", "", None), *WRONG])
def test_a_wrong_block_fails(folder, right, wrong, words):
    assert right in RIGHT
    text = RIGHT.replace(right, wrong, 1)
    if words is None:
        go_through(text, "page")
        return
    with pytest.raises(AssertionError) as error:
        go_through(text, "page")
    assert re.match(r"page:\d+: ", str(error.value)) and words in str(error.value)


def test_open_blocks_are_found():
    for text in ("```python\nx = 1\n", "- item\n\n  ```python\n  x = 1\n  ```\n"):
        with pytest.raises(AssertionError, match="one is indented or open"):
            blocks(text, "page")


def test_measured_tables_are_those_that_were_measured():
    results = ROOT / "benchmarks/results/cpu-zen4"
    table, exactness = (results / "table.txt").read_text().strip(), (results / "exactness.txt").read_text()
    kernels = (ROOT / "docs/kernels.md").read_text()
    assert table in kernels and exactness.splitlines()[-1] in kernels
    for folder in ("tradeoff", "photographs"):
        trained = (ROOT / "benchmarks/results" / folder / "table.txt").read_text()
        assert trained in (ROOT / "docs/tradeoff.md").read_text()


def test_the_figures_of_the_readme_are_those_that_were_measured():
    results, readme = ROOT / "benchmarks/results/cpu-zen4", (ROOT / "README.md").read_text()
    row = re.search(r"^ *4096 +16384 +32 .*$", (results / "table.txt").read_text(), re.M)[0]
    times, _, ratios, rest = row.split(" | ", 1)[1].split(" | ")
    cpu, (_, torch, _, _, _, faiss, _), wrong = times.split()[1], ratios.split(), rest.split()[1]
    assert f"| semhitok | {cpu} ms | {wrong} wrong ids |" in readme
    assert f"| FAISS | {faiss} times as long |" in readme
    assert (
        f"| {torch} times as long | builds" in readme and f"## The search: {float(torch):.0f} times as fast" in readme
    )
    last = (results / "exactness.txt").read_text().splitlines()[-1]
    assert last.startswith("10000") and set(re.findall(r" (\d+)(?:,|$)", last.partition(": ")[2])) == {"0"}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    # As `make docs` does it.
    (recipe,) = re.findall(r"\$\(BIN\)/(mkdocs .*)$", (ROOT / "Makefile").read_text(), re.M)
    command = [sys.executable, "-m", *recipe.split(), "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = (result.stdout + result.stderr).splitlines()
    assert result.returncode == 0 and all(line.startswith("INFO ") for line in lines), "\n".join(lines)
    pages = {path.stem: path.read_text() for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in PAGES if path.parent.name == "docs"} <= set(pages)
    assert all(f'id="semhitok.ops.{name}"' in pages["ops"] for name in ops.__all__)
    # Nothing is fetched by who reads them.
    loaded = r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//"
    assert not [name for name, page in pages.items() if re.search(loaded, page)]
