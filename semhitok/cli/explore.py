"""Show what ids mean, patch by patch, on a local page: an image, its semantic map and its reconstruction.

Click a patch to see its ids (i, j), the sub-codes of i decoded in its place, and the patches of a folder that share i.
Click a sub-code to swap it in. --compare shows two checkpoints side by side. The page can be reached from this machine
only and needs no network. Ctrl-C ends it.

examples:
  semhitok explore demo_output/checkpoint --images demo_output/photographs
  semhitok explore demo_output/checkpoint --compare runs/adaptive/checkpoint
"""

from __future__ import annotations

import argparse
import os
import tempfile

from semhitok.cli import arguments, text

_MAX_IMAGES = 1000  # of the folder; they are held in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, images = parser.add_argument, f"images to search for patches that share a code (the first {_MAX_IMAGES})"
    add("checkpoint", metavar="CHECKPOINT", help="folder of a saved tokenizer, or its name on a hub")
    add("--compare", metavar="CHECKPOINT", help="another tokenizer, to show beside the first")
    add("--images", metavar="FOLDER", help=images)
    arguments.add_device_argument(parser)
    add("--port", type=arguments.natural, default=7860, metavar="N", help="0 for any free one (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from semhitok._optional import require
    from semhitok.data.image_reader import ImageReader
    from semhitok.explore.explorer import Explorer

    with tempfile.TemporaryDirectory(prefix="semhitok-explore-") as folder:
        # For uploads and shown pictures, deleted at exit. Gradio reads the name when it is imported.
        os.environ["GRADIO_TEMP_DIR"] = folder
        require("gradio", "explore")
        from semhitok.explore import page

        with page.listen(args.port) as listener:
            paths = arguments.find_images([args.images], "explore")[0][:_MAX_IMAGES] if args.images else []
            checkpoints = [args.checkpoint, *([args.compare] if args.compare else [])]
            explorers = [Explorer(arguments.load_tokenizer(name, args.device), name) for name in checkpoints]
            for explorer in explorers if paths else ():
                reader = ImageReader(paths, explorer.tokenizer.config.image_size, 16, "explore")
                explorer.collect(reader)
                reader.check_any_read()
            host, port = listener.getsockname()
            print(f"http://{host}:{port}/ (Ctrl-C ends it)", flush=True)  # early requests wait until the page is built
            page.serve(explorers, listener)
    return text.DONE
