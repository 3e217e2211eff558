"""What runs: the `neon` commands of every stage, made from settings.py, as a user would type them in mini/.

    python -m mini.plan --out runs/plan    # runs/plan/generate/demo.sh, …: one command a line

The stages of dvc.yaml depend on these files: a stage runs again where its commands have changed, and only there.
fashion/ has settings of its own; a module with the same names as settings.py is called a scale here.
"""

import argparse
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import yaml

from mini import settings
from mini.settings import Base, Chain, Setting
from neon.files import atomic
from neon.sampling import parse_seeds


class Job(NamedTuple):
    """A command, and the setting ("" for a base) and seed that it is for."""

    setting: str
    seed: int
    command: list[str]


def neon(command: str, **options: object) -> list[str]:
    """The words of `neon COMMAND --name value …`."""
    return words(f"neon {command}", **options)


def words(command: str, **options: object) -> list[str]:
    return [*command.split(), *(word for name, value in options.items() for word in flag(name, value))]


def flag(name: str, value: object) -> list[str]:
    """(0, 1.5) becomes --name 0,1.5; ["a", "b"] becomes --name a b; {"cfg": (0, 1.5)} becomes --name cfg=0,1.5; True
    becomes --name."""
    if value is True:
        return [f"--{name}"]
    if isinstance(value, dict):
        return [word for key, values in value.items() for word in flag(name, f"{key}={commas(values)}")]
    if isinstance(value, list):
        return [f"--{name}", *value]
    text = commas(value) if isinstance(value, tuple) else str(value)
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


def commas(values: tuple[float, ...] | str) -> str:
    return values if isinstance(values, str) else ",".join(map(str, values))


def train(scale: ModuleType, base: Base, seed: int, out: str, **options: object) -> list[str]:
    return neon(
        "train",
        family=base.family,
        network=scale.NETWORK,
        recipe=f"{scale.NETWORK}_base",
        data=scale.TRAINING,
        **base.options,
        **options,
        seed=seed,
        out=out,
    )


@dataclass(frozen=True)
class Run:
    """One seed of one setting of a chain: where its files are, and the commands of each stage, if it has any there."""

    chain_name: str
    chain: Chain
    name: str  # of the setting
    setting: Setting
    seed: int
    scale: ModuleType = settings

    def folder(self, kind: str) -> str:
        return self.chain.folder.format(chain=self.chain_name, kind=kind)

    def path(self, kind: str, name: str | int = "") -> str:
        """The folder of this seed's files of a kind: S, selftrain, base."""
        return f"{self.folder(kind)}/{name or self.name}/{self.seed}"

    def rows(self, stage: str) -> str:
        return f"{self.folder('rows')}/{stage}/{self.name}/{self.seed}.jsonl"

    def model(self) -> str:
        return self.path("base") if self.setting.digits else f"runs/base/{self.chain.base}/{self.seed}"

    def data(self) -> str:
        """What the fine-tune reads."""
        other = self.setting.S or self.setting.of
        return self.setting.data or (self.others("S", other) if other else self.path("S"))

    def others(self, kind: str, place: str) -> str:
        """The same of CHAIN/SETTING."""
        return self.of(place).path(kind)

    def of(self, place: str) -> "Run":
        """The same seed of CHAIN/SETTING."""
        chain, _, setting = place.partition("/")
        known = self.scale.ALL[chain]
        return Run(chain, known, setting, known.settings[setting], self.seed, self.scale)

    def fine_tunes(self) -> list[str]:
        """What the search reads: folders with snapshots, or one snapshot."""
        if self.setting.older:
            return [snapshot(self.model(), self.setting.older)]
        shared = self.setting.of and not self.setting.random
        whole = self.others("selftrain", self.setting.of) if shared else self.path("selftrain")
        if self.setting.snapshot:
            whole = snapshot(whole, self.setting.snapshot)
        return [*(self.path("selftrain", size) for size in self.setting.parts), whole]

    def base(self) -> Iterator[list[str]]:
        if self.setting.digits:
            base = self.scale.BASES[self.chain.base]
            yield train(
                self.scale, base, self.seed, self.path("base"), **self.chain.options, max_images=self.setting.digits
            )

    def generate(self) -> Iterator[list[str]]:
        one = self.setting
        if not (one.data or one.S or one.of or one.older):
            yield neon(
                "generate",
                **self.shared(),
                model=self.model(),
                **self.setting.sampling,
                **self.setting.synthetic,
                seeds=self.chain.images.synthetic,
                batch_size=self.scale.BATCH,
                out=self.path("S"),
            )

    def selftrain(self) -> Iterator[list[str]]:
        for size in self.setting.parts:
            yield self.fine_tune(self.path("selftrain", size), max_images=size)
        if self.setting.random:
            yield self.random_direction()
        elif self.setting.ddo:
            yield self.ddo()
        elif not (self.setting.of or self.setting.older):
            yield self.fine_tune(self.path("selftrain"))

    def fine_tune(self, out: str, **options: object) -> list[str]:
        return neon(
            "selftrain",
            **self.shared(),
            base=self.model(),
            **{"recipe": self.scale.NETWORK, **self.setting.training},
            data=self.data(),
            **options,
            seed=self.seed,
            out=out,
        )

    def random_direction(self) -> list[str]:
        (out,) = self.fine_tunes()
        true = snapshot(self.others("selftrain", self.setting.of), self.setting.snapshot)
        return neon("control", base=self.model(), selftrained=true, seed=self.seed, out=out)

    def ddo(self) -> list[str]:
        made = {"real": self.scale.TRAINING, "fake": self.data(), "seed": self.seed, "out": self.path("selftrain")}
        return words("python -m mini.ddo", **self.shared(), base=self.model(), **made)

    def diagnose(self) -> Iterator[list[str]]:
        """Of the reported settings that have an S and a fine-tune of their own."""
        if self.chain_name in self.scale.DIAGNOSED and not (self.setting.data or self.setting.S or self.setting.of):
            yield neon(
                "diagnose",
                **self.shared(),
                base=self.model(),
                recipe=self.setting.training.get("recipe", self.scale.NETWORK),
                real=self.scale.HELDOUT,
                synthetic=self.data(),
                selftrained=self.fine_tunes(),
                seed=self.seed,
                out=self.diagnosis(),
            )

    def diagnosis(self) -> str:
        return f"{self.path('diagnose')}.json"

    def search(self) -> Iterator[list[str]]:
        w, grid, seeds = self.setting.w, self.setting.grid, self.chain.images.search
        where = {"method": self.setting.method, "w": w, "grid": grid}
        if self.setting.method == "surface":  # `first`: as many images for every seed, so that means compare
            ranges = {name: f"{values[0]}:{values[-1]}" for name, values in grid.items()}
            where |= {"w": f"0:{w[-1]}", "grid": ranges, "first": len(parse_seeds(seeds))}
        out, tunes = self.rows("search"), self.fine_tunes()
        yield self.measured("search", out, seeds, self.scale.TRAINING, self.setting.second, selftrained=tunes, **where)

    def final(self) -> Iterator[list[str]]:
        if self.chain.images.final:
            yield self.final_of(self.rows("search"), self.rows("final"), self.setting.second)
        if self.setting.second:  # chosen with one, judged with the other
            first = self.of(self.setting.of).rows("search")
            yield self.final_of(first, self.rows("final-second"), True, other_features=True)
            yield self.final_of(self.rows("search"), self.rows("final-first"), False, other_features=True)

    def final_of(self, search: str, out: str, second: bool, **options: object) -> list[str]:
        return self.measured(
            "final", out, self.chain.images.final, self.scale.HELDOUT, second, search=search, **options
        )

    def measured(self, command: str, out: str, seeds: str, against: str, second: bool, **points: object) -> list[str]:
        """`neon search` or `neon final` at some points; against: the real images to measure against.

        second: with the second features, not the first.
        """
        return neon(
            command,
            **self.shared(),
            base=self.model(),
            **({"by": self.setting.by} if self.setting.by != "merge" else {}),
            **points,
            **self.setting.sampling,
            seeds=seeds,
            batch_size=self.scale.BATCH,
            ref=f"runs/{'second' if second else 'ref'}/{Path(against).stem}.npz",
            features=self.scale.FEATURES[second],
            metrics=self.chain.metrics if command == "search" else self.chain.reported,
            out=out,
        )

    def shared(self) -> Mapping[str, object]:
        """Options of every command of the chain."""
        return {"family": self.scale.BASES[self.chain.base].family, **self.chain.options}


STAGES = ("base", "generate", "selftrain", "diagnose", "search", "final")  # the methods of Run that give commands


def runs(name: str, chain: Chain, scale: ModuleType = settings) -> list[Run]:
    """Setting by setting, seed by seed."""
    found = chain.settings.items()
    return [Run(name, chain, key, setting, seed, scale) for key, setting in found for seed in chain.seeds]


def plan(scale: ModuleType = settings) -> dict[tuple[str, str], list[Job]]:
    """The jobs of each stage of each chain, such as ("generate", "demo"), and ("base", of BASES)."""
    jobs = {
        ("base", name): [
            Job("", seed, train(scale, base, seed, f"runs/base/{name}/{seed}", **older(base))) for seed in base.seeds
        ]
        for name, base in scale.BASES.items()
    }
    for name, chain in scale.ALL.items():
        for stage in STAGES:
            made = [
                Job(run.name, run.seed, command)
                for run in runs(name, chain, scale)
                for command in getattr(run, stage)()
            ]
            if made:
                jobs[stage, name] = made
    return jobs


def snapshot(folder: str, images: int) -> str:
    """The file of the model after so many images."""
    return f"{folder}/snapshot-{images:09d}.safetensors"


def older(base: Base) -> dict[str, int]:
    """The option that also keeps earlier snapshots."""
    return {"snapshot": base.older} if base.older else {}


def titles(chains: Mapping[str, Chain]) -> dict[str, str]:
    """Setting → title, in the order of the chains."""
    return {name: setting.title for chain in chains.values() for name, setting in chain.settings.items()}


def lines(jobs: list[Job]) -> str:
    """One command a line, as the shell reads it."""
    return "".join(f"{shlex.join(job.command)}\n" for job in jobs)


def write(out: Path, scale: ModuleType = settings) -> None:
    """The commands as <stage>/<chain>.sh; for each name of TITLED <name>.yaml with one entry, `titles`."""
    with atomic(out) as folder:
        for (stage, name), jobs in plan(scale).items():
            path = folder / stage / f"{name}.sh"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(lines(jobs))
        for name, chains in scale.TITLED.items():
            text = yaml.safe_dump({"titles": titles(chains)}, sort_keys=False, allow_unicode=True)
            (folder / f"{name}.yaml").write_text(text)


def main(scale: ModuleType = settings) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    write(parser.parse_args().out, scale)


if __name__ == "__main__":
    main()
