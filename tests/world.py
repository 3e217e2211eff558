"""The smallest world in which every command has a meaning."""

from pathlib import Path
from types import SimpleNamespace

from processes import neon


def small_world(path: Path) -> SimpleNamespace:
    """Real digits, features, a base and two snapshots, made in the folder `path`; and words of commands for them."""
    from sklearn.datasets import load_digits

    from mini.features import save_digits_cnn, train_digits_cnn
    from mini.prepare import write_set
    from neon.data import ImageSet

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    for name, part in (("train", slice(128)), ("heldout", slice(1000, 1160))):
        write_set(path / name, pixels[part], digits.target[part])
    real = ImageSet(path / "train")
    cnn = train_digits_cnn(real.images(range(128)).expand(-1, 3, -1, -1), real.labels, epochs=2, dim=16)
    save_digits_cnn(cnn, path / "features.safetensors")

    edm, train = ("--family", "edm"), ("--data", path / "train")
    features = ("--features", f"digits:{path / 'features.safetensors'}")
    neon("reference", "--images", path / "heldout", *features, "--out", path / "ref.npz")
    recipe = ("--recipe", "digits_base", "--budget", 640, "--snapshot", 640, "--ramp", 64)
    neon("train", *edm, *train, "--network", "digits", *recipe, "--out", path / "base")
    recipe = ("--recipe", "digits", "--budget", 256, "--snapshot", 128, "--lr", 1e-3)
    neon("selftrain", *edm, *train, "--base", path / "base", *recipe, "--out", path / "selftrained")
    return SimpleNamespace(
        path=path,
        data=path / "train",
        ref=path / "ref.npz",
        base=path / "base" / "snapshot-000000640.safetensors",
        snapshots=[path / "selftrained" / f"snapshot-{images:09d}.safetensors" for images in (128, 256)],
        features=features,
        sampling=("--family", "edm", "--num_steps", 4),
        measuring=("--family", "edm", "--num_steps", 4, "--ref", path / "ref.npz", *features),
    )
