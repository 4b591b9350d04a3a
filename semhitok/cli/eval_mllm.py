"""Measure a unified model on a public benchmark whose data you have: pope, gqa, mme, seed, textvqa, mjhq or geneval.

DATA is the benchmark's own folder, or its file of questions; --images is the folder of its images, if that is not in
DATA under the benchmark's own name. Images are resized and cropped to the model's size; answers are greedy. Answers are
written to OUT/answers.jsonl, scores to OUT/scores.json, pictures to OUT/images. An interrupted run resumes with the
same command.

geneval draws the pictures that GenEval's own evaluator reads from OUT/images; mjhq measures the Fréchet distance to
MJHQ-30K, on Inception's features (the FID) or those of --features: a timm model, NAME=FILE, random:NAME, or
inception=FILE for the published weights in a file.

examples:
  semhitok eval-mllm pope POPE/ runs/mllm/checkpoint --tokenizer runs/256/checkpoint --images val2014/ --out eval/pope
  semhitok eval-mllm mjhq MJHQ-30K/ runs/mllm/checkpoint --tokenizer runs/256/checkpoint --guidance 4 --out eval/mjhq
"""

from __future__ import annotations

import argparse

from semhitok.cli import arguments, text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", metavar="BENCHMARK", help="the benchmark, by its name above")
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

    benchmark = benchmarks.find(args.benchmark)
    settings = {name: getattr(args, name) for name in ("images", "batch_size", "seed", "features")}
    settings["sampling"] = arguments.sampling(args)
    assistant = arguments.load_assistant(args, teacher=benchmark.reads_images)
    out, model = arguments.make_output_folder(args.out), benchmarks.fingerprint(args.model)
    scores = benchmarks.evaluate(args.benchmark, args.data, assistant, out, model=model, **settings)
    print(text.table([*((name, f"{value:.2f}") for name, value in scores.items()), ("files", args.out)]))
    return text.exit_code(int(scores.get(benchmarks.SKIPPED, 0)))
