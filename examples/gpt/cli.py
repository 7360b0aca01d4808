"""The command line: flags, their defaults, and the settings of a run to resume."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt.config import ATTENTION, DTYPES, PRESETS, REMAT, Config, Options, Preset
from gpt.data import STANDARD_LIBRARY, START, Corpus, load
from gpt.rundir import stored_config

# Flags with the names of Config's fields. None stands for: as in the resumed run, or
# as the preset has it.
NUMBERS = {
    "layers": (int, "transformer blocks"),
    "width": (int, "features of the residual stream"),
    "heads": (int, "attention heads"),
    "vocab": (int, "rows of the embedding; bytes need 256"),
    "length": (int, "tokens of a sequence"),
    "batch": (int, "sequences of a step"),
    "steps": (int, "optimizer steps of the whole run"),
    "learning_rate": (float, "AdamW's, at its peak"),
    "warmup": (int, "steps of linear warm-up; default: a twentieth of the steps"),
    "weight_decay": (float, "AdamW's, of matrices; default: 0.1"),
    "clip": (float, "greatest norm of the gradient; default: 1.0"),
    "eval_every": (int, "steps between validations; default: a tenth of the steps"),
    "eval_batches": (int, "batches of a validation; default: 8"),
    "seed": (int, "of parameters and data order; default: 0"),
}


def parse(
    description: str | None, arguments: Sequence[str] | None
) -> argparse.Namespace:
    presets = "\n".join(
        f"  {name}: {p.note}\n"
        f"    {p.layers} layers, width {p.width}, {p.heads} heads, "
        f"vocabulary {p.vocab},\n"
        f"    length {p.length}, batch {p.batch}, {p.steps} steps, "
        f"learning rate {p.learning_rate:g}"
        for name, p in PRESETS.items()
    )
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"presets:\n{presets}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    group = parser.add_argument_group("the run")
    group.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gpt"),
        metavar="DIR",
        help="where all its files go; default: %(default)s",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in DIR, or begin where there is none; "
        "settings of the run need not be repeated",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="delete the run in DIR first"
    )
    group.add_argument(
        "--checkpoint-every",
        type=int,
        default=100,
        metavar="N",
        help="steps between checkpoints: what a killed run can lose; "
        "default: %(default)s",
    )

    group = parser.add_argument_group(
        "model, data and training (kept in DIR; a resumed run cannot change them)"
    )
    group.add_argument("--preset", choices=PRESETS, help="default: tiny; see below")
    group.add_argument(
        "--data",
        metavar="PATH",
        help="a text file, or a directory with some; default: the sources of Python's "
        "standard library",
    )
    for name, (kind, text) in NUMBERS.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(
            flag, type=kind, metavar="N" if kind is int else "X", help=text
        )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the computation; parameters are float32; default: bfloat16 on a GPU, "
        "else float32",
    )
    group.add_argument(
        "--attention",
        choices=ATTENTION,
        help="; ".join(f"{name}: {text}" for name, text in ATTENTION.items()),
    )

    group = parser.add_argument_group("devices, and memory against time")
    group.add_argument(
        "--mesh",
        default="",
        metavar="AXES",
        help="several devices, as in data=2,fsdp=2,tensor=2,seq=2, any of these in any "
        "order: data and fsdp split the batch; parameters and optimizer state are split "
        "over fsdp by width, over tensor by heads, MLP and vocabulary; seq splits each "
        "sequence; a CPU counts as any number; default: one device",
    )
    group.add_argument(
        "--hosts",
        default="",
        metavar="ADDRESS,COUNT,INDEX",
        help="several processes, as in host0:1234,2,0 on host0 and host0:1234,2,1 on the "
        "other, the rest of the command the same on both; --mesh counts all devices, "
        "and DIR is one that all can write to; default: one process",
    )
    group.add_argument(
        "--remat",
        choices=REMAT,
        help="activations in the backward pass; "
        + "; ".join(f"{name}: {text}" for name, text in REMAT.items())
        + "; default: the preset's",
    )
    group.add_argument(
        "--scan",
        action=argparse.BooleanOptionalAction,
        help="loop over the layers, which compiles sooner, or unroll them, which runs "
        "faster; default: the preset's",
    )

    group = parser.add_argument_group("the sample of generated text at the end")
    group.add_argument(
        "--prompt", default="def ", metavar="TEXT", help="default: %(default)r"
    )
    group.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="bytes to generate, 0 for none; default: what the sequence length holds "
        "after the prompt, at most 400",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        metavar="X",
        help="0 takes the likeliest byte each time; default: %(default)s",
    )
    return parser.parse_args(arguments)


def settle(
    args: argparse.Namespace, default_dtype: str
) -> tuple[Config, Options, Corpus]:
    """Fills what the flags leave open, from the run to resume or else the preset."""
    stored = stored_config(args.out) if args.resume else None
    known: dict[str, Any] = stored or {}

    def pick(name: str, default: Any) -> Any:
        given = getattr(args, name)
        return known.get(name, default) if given is None else given

    if args.data is not None:
        args.data = str(Path(args.data).resolve())
    preset_name = pick("preset", "tiny")
    preset = PRESETS[preset_name]
    of_preset = {f.name for f in dataclasses.fields(Preset)} & NUMBERS.keys()
    settings = {name: pick(name, getattr(preset, name)) for name in of_preset}
    steps = settings["steps"]
    settings |= {
        "preset": preset_name,
        "warmup": pick("warmup", steps // 20),
        "weight_decay": pick("weight_decay", 0.1),
        "clip": pick("clip", 1.0),
        "eval_every": pick("eval_every", max(1, steps // 10)),
        "eval_batches": pick("eval_batches", 8),
        "seed": pick("seed", 0),
        "dtype": pick("dtype", default_dtype),
        "attention": pick("attention", "flash2"),
        "data": pick("data", STANDARD_LIBRARY),
    }
    room = max(0, settings["length"] - len(START + args.prompt.encode()))
    options = Options(
        out=args.out,
        checkpoint_every=args.checkpoint_every,
        resume=args.resume,
        overwrite=args.overwrite,
        mesh=args.mesh,
        remat=preset.remat if args.remat is None else args.remat,
        scan=preset.scan if args.scan is None else args.scan,
        prompt=args.prompt,
        sample=min(400, room) if args.sample is None else args.sample,
        temperature=args.temperature,
    )
    Config(**settings, data_sha256="")  # refuses bad settings before reading the data
    corpus = load(settings["data"], settings["length"])
    return Config(**settings, data_sha256=corpus.sha256), options, corpus
