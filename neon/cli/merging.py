"""`neon merge` and `neon extract-lora`: files, folders and adapters in, the same out."""

import json
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from neon import NeonError
from neon.extrapolate import Strength, merge_groups, strengths
from neon.family import get_family
from neon.files import same_file, sha256
from neon.lock import writing
from neon.merge import check_same_names
from neon.weights.adapters import (
    Adapted,
    Layer,
    check_form,
    extract,
    is_adapter,
    is_swapped,
    part_of,
    placed,
    read_adapter,
    scaled,
    write_adapter,
)
from neon.weights.checkpoint import Weights, check_same_key, open_weights
from neon.weights.folders import Model, check_free, check_same_kind, find_model, left_out, located, write_model
from neon.weights.match import matched
from neon.weights.summary import MergeSummary, buffer_rules

SIDES = ("base", "selftrained")
TWO = "; factors are not merged, for the product of two merges is not the merge of two products"


def run_merge(args) -> None:
    family = get_family(args.family) if args.family else None
    model, adapted = _sides(args)
    targets = _targets(args, model)
    with ExitStack() as files:
        for out in () if args.dry_run else targets:
            files.enter_context(writing(out))
        base = files.enter_context(open_weights(model.weights, args.key))
        if args.adapter:
            return _write_again(args, model, base, targets)
        if adapted:
            layers, _, said = _layers(args.selftrained, base)
            selftrained = Adapted(base, layers)
            digest = partial(sha256, args.selftrained)
        else:
            selftrained, said, digest = _selftrained(args, model, base, files)
        record = {} if args.dry_run else {"neon_base_sha256": model.sha256, "neon_selftrained_sha256": digest()}
        summary = MergeSummary(buffer_rules(base, family, args.buffers))
        for i, (out, w) in enumerate(targets.items()):
            watched = {"observe": summary.observe} if i == 0 else {}  # what it counts does not depend on w
            merged = merge_groups(base, selftrained, _strength(args, w), summary.is_buffer, **watched)
            merged = merged if i else summary.watch(merged)
            if args.dry_run:
                deque(merged, maxlen=0)
            else:
                write_model(out, model, base, merged, _said_w(args, w) | record)
    print(f"base           {base.origin}")
    print(*said, *summary.lines(), sep="\n")
    if left := [file.name for file in left_out(model)]:
        print(f"not copied     {', '.join(left)}: weights of the base in other files")
    _say_written(args, targets)
    for warning in summary.warnings():
        print("warning:", warning, file=sys.stderr)


def _sides(args) -> tuple[Model, bool]:
    """The base, and whether θ_s is an adapter. Raises NeonError for what cannot be merged."""
    args.base, args.selftrained = located(args.base), located(args.selftrained)
    adapted = is_adapter(args.selftrained)
    if is_adapter(args.base):
        what = "adapters on both sides" if adapted else f"{args.base} is an adapter"
        raise NeonError(f"{what}: --base is the model that was trained with the adapter{TWO if adapted else ''}")
    if getattr(args, "adapter", None) and not adapted:
        raise NeonError(f"--adapter: {args.selftrained} is none; `neon extract-lora` makes one")
    return find_model(args.base, args.component), adapted


def _targets(args, model: Model) -> dict[str, float]:
    """Where each w is written: {w} in --out stands for it. Raises NeonError if it cannot be written there."""
    targets = {args.out.replace("{w}", f"{w:g}"): w for w in args.w}
    if len(targets) < len(args.w):
        raise NeonError(f"{len(args.w)} values of w need as many files: write {{w}} in --out, as in 'neon-{{w}}.pth'")
    for out in targets:
        for side in SIDES:
            if same_file(out, getattr(args, side)):
                raise NeonError(f"{out}: --out is the file of --{side}; choose another")
        if args.adapter:
            check_form(out, args.adapter)
        elif model.folder:
            check_free(out, model)
    return targets


def _strength(args, w: float) -> Strength:
    return dict(args.weights) | {"": w} if args.weights else w


def _said_w(args, w: float) -> dict[str, str]:
    groups = {"neon_weights": json.dumps(dict(args.weights))} if args.weights else {}
    return {"neon_w": repr(w)} | groups


def _say_written(args, targets: Mapping[str, float]) -> None:
    for out, w in targets.items():
        print(f"w {w:g}  {'not written, would be' if args.dry_run else 'written to'} {out}")


def _selftrained(args, model: Model, base: Weights, files: ExitStack):
    """θ_s by the base's names, lines about it, and what computes its digest."""
    other = find_model(args.selftrained, args.component or model.component or None)
    check_same_kind(model, other)
    weights = files.enter_context(open_weights(other.weights, getattr(args, "selftrained_key", None)))
    if not (getattr(args, "key", None) and getattr(args, "selftrained_key", None)):
        check_same_key(base, weights, "say with both --key and --selftrained_key which to merge")
    selftrained, said = matched(base, weights)
    return selftrained, [f"self-trained   {weights.origin}", *said], lambda: other.sha256


def _layers(path: Path, base: Weights) -> tuple[dict[str, Layer], str, list[str]]:
    """An adapter's layers by the base's names, what it says it was trained on, and a line about it."""
    adapter = read_adapter(path)
    ranks = sorted({layer.rank for layer in adapter.layers.values()})
    trained = f", trained on {adapter.trained_on}" if adapter.trained_on else ""
    line = f"self-trained   {path} (adapter, {len(adapter.layers)} layers, rank {'/'.join(map(str, ranks))}{trained})"
    return placed(adapter, base, base.path), adapter.trained_on, [line]


def _write_again(args, model: Model, base: Weights, targets: Mapping[str, float]) -> None:
    """The adapter with −w (θ_s − θ_r) in place of θ_s − θ_r."""
    layers, trained_on, said = _layers(args.selftrained, base)
    part = part_of(args.component or model.component, model.kind) if args.adapter != "peft" else ""
    record = {} if args.dry_run else {"neon_selftrained_sha256": sha256(args.selftrained)}
    for out, w in targets.items():
        each = strengths(layers, _strength(args, w))
        negated = {name: scaled({name: layer}, -each[name])[name] for name, layer in layers.items()}
        if not args.dry_run:
            write_adapter(out, negated, args.adapter, part, _said_w(args, w) | record, trained_on or str(args.base))
    print(f"base           {base.origin}")
    print(*said, sep="\n")
    _say_written(args, targets)


@torch.no_grad()
def run_extract_lora(args) -> None:
    model, adapted = _sides(args)
    if adapted:
        raise NeonError(f"{args.selftrained}: an adapter already")
    check_form(args.out, args.form)
    part = part_of(args.component or model.component, model.kind) if args.form != "peft" else ""
    with ExitStack() as files:
        files.enter_context(writing(args.out))
        base = files.enter_context(open_weights(model.weights))
        selftrained, said, digest = _selftrained(args, model, base, files)
        check_same_names(base, selftrained)
        layers, energy = extract(base, selftrained, args.rank, is_swapped(model.kind))
        if not layers:
            raise NeonError(f"{args.selftrained}: no matrix or convolution differs from the base's")
        record = {"neon_base_sha256": model.sha256, "neon_selftrained_sha256": digest()}
        if args.w is not None:
            layers, record = scaled(layers, -args.w), record | {"neon_w": repr(args.w)}
        write_adapter(args.out, layers, args.form, part, record, str(args.base))
    print(f"base           {base.origin}")
    print(*said, f"{len(layers)} layers of rank {args.rank} at most", *energy.lines(), sep="\n")
    print(f"written to {args.out}")
