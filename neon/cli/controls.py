"""`neon control`: two checkpoints in, one out."""

import sys
from pathlib import Path

from neon import NeonError
from neon.control import Steps, random_steps
from neon.family import get_family
from neon.files import same_file, sha256
from neon.measure.rows import budget_of
from neon.merge import check_same_names
from neon.weights.checkpoint import check_same_key, metadata_like, open_weights, write_safetensors
from neon.weights.summary import MergeSummary, buffer_rules


def run_control(args) -> None:
    family = get_family(args.family) if args.family else None
    _check_out(args)
    with open_weights(args.base) as base, open_weights(args.selftrained) as selftrained:
        check_same_key(base, selftrained, "write the one you mean as a file of its own: neon convert --key")
        check_same_names(base, selftrained)
        summary, steps = MergeSummary(buffer_rules(base, family, args.buffers)), Steps()
        tensors = random_steps(base, selftrained, args.seed, summary.is_buffer, summary.observe, steps)
        specs = {name: base.spec(name) for name in base}
        write_safetensors(args.out, specs, tensors, _metadata(args, base, selftrained))
        print(f"base           {base.origin}", f"self-trained   {selftrained.origin}", *summary.lines(), sep="\n")
    print(f"random step    norm {steps.random:.6g}; of θ_s − θ_r {steps.drift:.6g}; cosine of both {steps.cosine:.3g}")
    print(f"seed {args.seed}  written to {args.out}")
    for warning in summary.warnings():
        print("warning:", warning, file=sys.stderr)
    if budget_of(args.out) != budget_of(str(args.selftrained)):
        name = args.selftrained.name
        print(f"warning: tables read B off the name: with another one than {name} it is not θ_s's", file=sys.stderr)


def _check_out(args) -> None:
    """Raises NeonError if --out cannot be written."""
    if Path(args.out).suffix != ".safetensors":
        raise NeonError(f"{args.out}: what `neon control` writes is a .safetensors file")
    for side in ("base", "selftrained"):
        if same_file(args.out, getattr(args, side)):
            raise NeonError(f"{args.out}: --out is the file of --{side}; choose another")
    if Path(args.out).exists() and not args.replace:
        raise NeonError(f"{args.out} exists; choose another --out, or replace it with --replace")


def _metadata(args, base, selftrained) -> dict[str, str]:
    """What load needs, |S| of θ_s for tables, and what this file is."""
    size = {name: text for name, text in selftrained.metadata.items() if name == "data_images"}
    record = {
        "neon_control": "random direction, in every tensor as long as the self-trained model's",
        "neon_seed": str(args.seed),
        "neon_base_sha256": sha256(args.base),
        "neon_selftrained_sha256": sha256(args.selftrained),
    }
    return metadata_like(base, metadata_like(selftrained, size | record))
