"""Measure a unified model on a public benchmark whose data you have: pope, gqa, mme, seed, textvqa, mjhq or geneval.

DATA is the benchmark's own folder, or its file of questions; --images names the folder of its images where it is not in
DATA under the benchmark's own name. Answers are greedy; they are in OUT/answers.jsonl, scores in OUT/scores.json,
pictures in OUT/images. Interrupted, the same command goes on. Images are resized and cropped to the model's size.

geneval draws the pictures that GenEval's own evaluator reads from OUT/images; mjhq measures the Fréchet distance to
MJHQ-30K, on Inception's features (the FID) or those of --features: a timm model, NAME=FILE, random:NAME, or
inception=FILE for the published weights in a file.

examples:
  semhitok eval-mllm pope POPE/ runs/mllm/checkpoint --tokenizer runs/256/checkpoint --images val2014/ --out eval/pope
  semhitok eval-mllm mjhq MJHQ-30K/ runs/mllm/checkpoint --tokenizer runs/256/checkpoint --guidance 4 --out eval/mjhq
"""

from __future__ import annotations

import argparse
from typing import Any

from semhitok.cli import arguments, text

_QUESTIONS, _PICTURES = ("pope", "gqa", "mme", "seed", "textvqa"), ("mjhq", "geneval")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "benchmark", choices=_QUESTIONS + _PICTURES, metavar="BENCHMARK", help=", ".join(_QUESTIONS + _PICTURES)
    )
    parser.add_argument("data", metavar="DATA", help="folder of the benchmark, or its file of questions or captions")
    arguments.add_assistant_arguments(parser)
    parser.add_argument("--out", required=True, metavar="OUT", help="folder for this run's answers and scores")
    parser.add_argument("--images", metavar="FOLDER", help="the benchmark's images")
    arguments.add_batch_argument(parser, "questions or pictures")
    drawing = parser.add_argument_group("mjhq and geneval")
    drawing.add_argument("--features", default="inception", metavar="NAME", help="of mjhq (default: %(default)s)")
    arguments.add_drawing_arguments(drawing)


def run(args: argparse.Namespace) -> int:
    from semhitok.mllm import benchmarks

    assistant = arguments.load_assistant(args, teacher=args.benchmark not in _PICTURES)
    out = arguments.make_output_folder(args.out)
    model, drawing = benchmarks.fingerprint(args.model), arguments.drawing_options(args) | {"seed": args.seed}
    options: dict[str, Any] = {"model": model, "batch_size": args.batch_size}
    if args.benchmark == "geneval":
        scores = benchmarks.geneval(args.data, assistant, out, **options, **drawing)
    elif args.benchmark == "mjhq":
        options |= {"images": args.images, "features": args.features}
        scores = benchmarks.mjhq(args.data, assistant, out, **options, **drawing)
    else:
        scores = benchmarks.evaluate(args.benchmark, args.data, assistant, out, **options, images=args.images)
    print(text.table([*((name, f"{value:.2f}") for name, value in scores.items()), ("files", args.out)]))
    return text.DONE
