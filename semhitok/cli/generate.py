"""Draw pictures from captions with a unified model.

Each picture is saved as OUT/NUMBER-CAPTION-SEED.png, with its caption, seed and settings in the metadata; all pictures
of a caption are also saved together, as OUT/NUMBER-CAPTION-grid.png. Picture n of a caption has the seed SEED + n. The
same caption, seed and settings give the same picture, whatever else is in the batch. Captions that are too long for the
model are skipped, named and counted; the exit code is then 3.

examples:
  semhitok generate runs/mllm/checkpoint --tokenizer runs/tiny/checkpoint "a small red ring at top left" --out drawn
  semhitok generate runs/mllm/checkpoint --tokenizer runs/tiny/checkpoint --prompts captions.txt --count 9 --out drawn
"""

from __future__ import annotations

import argparse
from pathlib import Path

from semhitok._files import read_text
from semhitok._messages import message, printable, progress
from semhitok.cli import arguments, text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_assistant_arguments(parser)
    add = parser.add_argument
    captions = add("captions", nargs="+", default=[], metavar="CAPTION", help="what to draw")
    captions.required = False  # --prompts may have them; argparse would match "*" to nothing in front of an option
    add("--prompts", metavar="FILE", help="text file of captions, one a line; adds to CAPTION")
    add("--out", required=True, metavar="FOLDER", help="folder to save the pictures in")
    add("--count", type=arguments.positive, default=4, metavar="N", help="pictures per caption (default: 4)")
    arguments.add_batch_argument(parser, "pictures")
    arguments.add_drawing_arguments(parser)


def run(args: argparse.Namespace) -> int:
    prompts = read_text(Path(args.prompts)).splitlines() if args.prompts else []
    captions = args.captions + [line.strip() for line in prompts if line.strip()]
    if not captions:
        raise ValueError("CAPTION: expected at least one, here or in --prompts, got none")

    from semhitok.data.images import save_png
    from semhitok.data.skipped import Skipped
    from semhitok.mllm.assistant import Job, draw_files, file_stem, grid

    sampling = arguments.sampling(args)
    assistant = arguments.load_assistant(args, teacher=False)
    out = arguments.make_output_folder(args.out)
    stems, jobs, left_out = [], [], Skipped()
    for number, caption in enumerate(captions):
        try:
            assistant.caption_ids(caption)
        except ValueError as error:
            left_out(message(error))
            continue
        stem = file_stem(caption, number)
        stems.append(stem)
        jobs += [Job(out / f"{stem}-{seed}.png", caption, seed) for seed in range(args.seed, args.seed + args.count)]
    drawn, skipped = len(stems), len(captions) - len(stems)
    pictures = []
    with progress(None, "generate", len(jobs)) as bar:
        for _, picture in draw_files(assistant, jobs, args.batch_size, sampling=sampling):
            pictures.append(picture)
            bar.update()
            if len(pictures) == args.count:
                save_png(grid(pictures), out / f"{stems.pop(0)}-grid.png")
                pictures.clear()
    result = f"{out}: {text.count(len(jobs), 'picture')} of {text.count(drawn, 'caption')}"
    print(printable(f"{result}, {skipped} skipped" if skipped else result))
    return text.exit_code(skipped)
