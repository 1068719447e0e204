"""`interp factors`: Kronecker factors of a model, collected into a folder that analyses of its curvature take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from interp.cli.run import loading
from interp.errors import InputError
from interp.inputs import Session, checked_prompts
from interp.request import check_writable

ROW = 512
"""Tokens of a row of running text, unless the model takes fewer."""


def factors(args: argparse.Namespace) -> int:
    """`interp factors`."""
    if sum(given is not None for given in (args.prompts, args.task, args.text)) != 1:
        raise InputError("factors needs one of --prompts FILE, --task TASK and --text FILE")
    written = args.prompts or args.task
    if written is not None:
        checked_prompts(written)
    elif not Path(args.text).is_file():
        raise InputError(f"there is no file {args.text}")
    layers = None if args.layers is None else [_layer(word) for word in args.layers.split(",")]
    modules = None if args.modules is None else [word.strip() for word in args.modules.split(",")]
    check_writable(Path(args.out))

    from interp.models.kfac import kfac_factors

    session = Session(loading(args))
    model = session.model(args.model, args.adapter)
    prompts: Any = _rows(model, Path(args.text), args.n) if written is None else session.prompts(written, model, args.n, args.prompts_seed)
    prompts = getattr(prompts, "clean", prompts)
    found = kfac_factors(model, prompts, args.out, modules=modules, layers=layers, labels=args.labels, seed=args.seed, groups=args.groups)
    print(f"A and G of {len(found.sites)} matrices of {model.name} over {found.n} positions, {args.labels} labels\nsaved: {found.path}")
    return 0


def _layer(word: str) -> int:
    if not word.strip().isdecimal():
        raise InputError(f"--layers takes layers as 3,4,5, not {word!r}")
    return int(word)


def _rows(model: Any, file: Path, n: int | None) -> list[list[int]]:
    """Running text in rows of equal length, without special tokens; what is left over at the end makes a shorter one."""
    try:
        ids = model.tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no text in UTF-8") from error
    length = min(ROW, model.shape.n_ctx)
    rows = [ids[at : at + length] for at in range(0, len(ids), length)]
    if not rows:
        raise InputError(f"{file} has no tokens")
    return rows[:n]
