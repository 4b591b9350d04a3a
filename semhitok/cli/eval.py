"""Evaluate a tokenizer, or the reconstructions of any other, on images under a fixed protocol.

Reported are rFID, PSNR, SSIM, LPIPS and more, the use of the codes, the ids kept by a round trip and, with labels, how
well the features predict them. References and reconstructions are stored as PNG in OUT, with evaluation.json and a
page, index.html. A figure whose weights are not available is left out, and the table says why. An unreadable image is
an error.

--labels takes a .csv of rows "name,label", a .json object, or the word "folders": an image's first folder is its label.
--features names a network for another Fréchet distance: a timm model, NAME=FILE for weights from a file, random:NAME
for random weights, or inception=FILE for rFID with the published weights from a file.

examples:
  semhitok eval runs/256/checkpoint val/ --out eval/256
  semhitok eval runs/256/checkpoint val/ --out eval/256 --labels folders --features vit_small_patch14_dinov2.lvd142m
  semhitok eval --reconstructions theirs/ val/ --out eval/theirs
  accelerate launch -m semhitok eval runs/256/checkpoint val/ --out eval/256
"""

from __future__ import annotations

import argparse
import sys

from semhitok._messages import printable
from semhitok.cli import arguments, text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "semhitok eval [-h] CHECKPOINT IMAGES... --out OUT [options]\n"
        "       semhitok eval [-h] --reconstructions FOLDER IMAGES... --out OUT [options]"
    )
    sources = "folder of a saved tokenizer, or its name on a hub (not with --reconstructions), then images and folders"
    parser.add_argument("sources", nargs="+", metavar="CHECKPOINT IMAGES", help=sources)
    parser.add_argument("--out", required=True, metavar="OUT", help="folder for the results")
    theirs = "evaluate these instead of a tokenizer: one lossless image for each original, of the same name"
    parser.add_argument("--reconstructions", metavar="FOLDER", help=theirs)
    parser.add_argument("--labels", metavar="LABELS", help="labels to probe the features for: folders, .csv or .json")
    parser.add_argument("--features", metavar="NAME", help="network for another Fréchet distance")
    arguments.add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    if args.reconstructions is None and len(args.sources) < 2:
        raise ValueError("IMAGES: expected after CHECKPOINT, got none")
    if args.reconstructions is not None and args.labels is not None:
        raise ValueError("--labels: expected a tokenizer, whose features are probed, got --reconstructions")

    from semhitok import distributed
    from semhitok.evaluation.page import table_rows
    from semhitok.evaluation.protocol import evaluate_reconstructions, evaluate_tokenizer

    device = distributed.join(arguments.find_device(args.device))
    out, theirs, features = args.out, args.reconstructions, args.features
    if theirs is None:
        checkpoint, *sources = args.sources
        tokenizer = arguments.load_tokenizer(checkpoint, str(device))
        report = evaluate_tokenizer(tokenizer, sources, out, labels=args.labels, features=features, name=checkpoint)
    else:
        report = evaluate_reconstructions(theirs, args.sources, out, features=features, device=device)
    if distributed.rank() == 0:
        for warning in report["warnings"]:
            print(printable(f"semhitok eval: warning: {warning}"), file=sys.stderr)
        print(text.table([*table_rows(report), ("page", f"{out}/index.html")]))
    return text.exit_code(len(report["skipped"]) + report["unreadable"])
