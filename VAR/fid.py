"""FID and IS of a VAR checkpoint, sampled and measured in memory. Alone or under torchrun, on GPUs or CPUs."""

import argparse

from neon import NeonError
from neon.cli import command_line
from neon.cli.calculate_fid import add_images, add_output, calculate_fid, image_seeds
from neon.cli.options import count
from VAR import family


def run(name: str) -> None:
    """The command line of the model whose preset has that name, which holds the defaults."""
    preset = family.presets[name]
    config = family.networks[preset.network]
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--var_ckpt", required=True, help=".pth, as released or nested, or .safetensors")
    add_images(p, preset.batch_size)
    p.add_argument("--img_size", type=count, default=config.image_side, help="checked against the model")
    p.add_argument("--depth", type=count, default=config.depth, help="blocks (default %(default)s)")
    add_output(p, family)
    p.set_defaults(**preset.sampling)
    args = p.parse_args()

    def describe(model: family.VAR) -> str:
        side = model.config.image_side
        if side != args.img_size:
            raise NeonError(f"{args.var_ckpt} makes images of {side} pixels, not {args.img_size}")
        return f"VAR d{args.depth}, {side} px, cfg {args.cfg:g}"

    seeds = image_seeds(args)
    command_line(
        lambda: calculate_fid(
            args, family, args.var_ckpt, args.fid_stats, seeds, args.batch_size, describe, depth=args.depth
        )
    )
