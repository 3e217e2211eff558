"""A model card for the hub: what was merged from what, how good it is, under which licence; and its upload."""

import dataclasses
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from neon import NeonError
from neon.family import FAMILIES, get_family
from neon.fetch import LICENSE, NOT_STATED, TABLE, read_table
from neon.files import existing, read_object
from neon.measure.candidates import by_of
from neon.measure.compare import Difference
from neon.measure.evaluate import METRICS, title
from neon.measure.rows import Rows, need
from neon.weights.checkpoint import open_weights

ROLES = {"base": "base θ_r", "selftrained": "self-trained θ_s, w = −1", "neon": "this model"}
PAPER = "2510.03597"
TAGS = ("neon", "negative-extrapolation", "self-training", "merge", f"arxiv:{PAPER}")
UNCONDITIONAL, TEXT = "unconditional-image-generation", "text-to-image"  # the hub has no task for classes
GAIN = "FID of the base minus FID of this model, on the same seeds"
NON_COMMERCIAL = "-nc"  # in the hub's names of licences
# Names of licences that the hub knows and that public generators have; any other becomes `other` with its name.
LICENSES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "unlicense", "unknown"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0"),
    *("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "gpl-3.0", "lgpl-3.0", "agpl-3.0"),
}


@dataclasses.dataclass(frozen=True)
class Card:
    """What the metadata and the text are made of.

    rows: those of `neon final` by role, or none. record: what the merged checkpoint says of itself. license: a name of
    LICENSES, or any other text. base_model: of the hub, '' if the base is not there; base_source: where it is.
    """

    model: Path
    rows: Mapping[str, Mapping]
    record: Mapping[str, str]
    license: str
    base_model: str = ""
    base_source: str = ""
    dataset: str = ""
    name: str = ""

    @property
    def neon(self) -> Mapping:
        return self.rows.get("neon", {})

    @property
    def w(self) -> str:
        """As the checkpoint records it, else as it was measured."""
        return self.record.get("neon_w", f"{self.neon['w']:g}" if self.neon else "not recorded")

    @property
    def warnings(self) -> Iterator[str]:
        if self.license == "unknown":
            yield "the base states no licence, so nobody has said that a merge of it may be shared"
        if NON_COMMERCIAL in self.license:
            yield f"licence {self.license}, as of the base: not for commercial use"


def card_of(
    model: str | Path,
    final: str | Path | None = None,
    *,
    license: str | None = None,
    base_model: str | None = None,
    dataset: str = "",
    name: str = "",
) -> Card:
    """The card of a merged checkpoint or model folder. final: what `neon final` wrote.

    license, base_model: in place of what downloads.csv says of the base. Raises NeonError if the files do not belong
    together, if no licence is known, or if base_model is no name on the hub.
    """
    model = existing(model)
    record, rows = record_of(model), results_of(final) if final else {}
    if rows:
        _check_same(model, record, rows)
    elif "neon_w" not in record:
        raise NeonError(f"{model}: records no merge, and there are no rows of `neon final`: nothing to say about it")
    listed = _listed_base(record, rows)
    found = license or listed.get(LICENSE)
    if not found:
        raise NeonError("the licence of the base is not known: give --license (a merge inherits its base's)")
    source = listed.get("source", "")
    hub = source.startswith("hf://")
    base_model = base_model or ("/".join(source.removeprefix("hf://").split("/")[:2]).partition("@")[0] if hub else "")
    if base_model:
        check_repo(base_model)
    return Card(
        model,
        rows,
        record,
        "unknown" if found == NOT_STATED else found,
        base_model,
        "" if hub else source,
        dataset,
        name or model.stem,
    )


def record_of(model: Path) -> dict[str, str]:
    """What `neon merge` wrote into a checkpoint, or into the first file of weights in a folder that has it."""
    files = sorted(model.rglob("*.safetensors")) if model.is_dir() else [model]
    for file in files:
        with open_weights(file) as weights:
            found = {name: text for name, text in weights.metadata.items() if name.startswith("neon_")}
        if found:
            return found
    return {}


OF_A_CARD = ("w", "family", "fid", "n", "seeds", "features", "reference", "budget", "num_synthetic", "dtype", "device")


def results_of(path: str | Path) -> dict[str, Mapping]:
    """The rows of `neon final` by role. Raises NeonError if it holds others, or found no w > 0 better than the base."""
    found = Rows(existing(path), write=False).rows.values()
    rows = {row.get("role"): row for row in found}
    if set(rows) != set(ROLES):
        raise NeonError(f"{path}: not what `neon final` wrote, or not finished")
    if (by := by_of(rows["neon"])) != "merge":
        raise NeonError(f"{path}: rows --by {by}, so not of a merged checkpoint")
    need(found, OF_A_CARD, path)
    if not rows["neon"]["w"]:
        raise NeonError(f"{path}: no w > 0 was better than the base, so there is no Neon to publish")
    return rows


def _check_same(model: Path, record: Mapping[str, str], rows: Mapping[str, Mapping]) -> None:
    """Digests are compared for a single file: those of folders are of their parts."""
    facts = ("w",) if model.is_dir() else ("w", "base_sha256", "selftrained_sha256")
    for fact in facts:
        found = rows["neon"][fact]
        said = record.get(f"neon_{fact}", str(found))
        if said != str(found):
            raise NeonError(f"{model} was merged with {fact} {said}, the results are of {found}")


def _listed_base(record: Mapping[str, str], rows: Mapping[str, Mapping]) -> Mapping[str, str]:
    """The base's row in downloads.csv, by digest, else by its path or name; {} if there is none."""
    digest = record.get("neon_base_sha256") or rows.get("neon", {}).get("base_sha256")
    name = Path(rows.get("neon", {}).get("base", "")).name
    table = read_table() if Path(TABLE).exists() else []
    same = [row for row in table if row["sha256"] and row["sha256"] == digest]
    alike = [row for row in table if not row["sha256"] and Path(row["path"]).name == name]
    return next(iter([*same, *alike]), {})


def check_repo(name: str) -> None:
    """Raises NeonError unless it is OWNER/NAME as the hub has it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise NeonError(f"{name!r} is not a name on the hub: {' '.join(str(error).split())}") from None
    if "/" not in name:
        raise NeonError(f"{name!r} is not a name on the hub: write OWNER/NAME")


# ---------------------------------------------------------------- what the card says


def readme(card: Card, repo: str = "") -> str:
    """The whole README.md. repo: where it will be, for the lines that load it."""
    parts = [_title(card), _recipe(card), _results(card), _digests(card), _use(card, repo)]
    return f"---\n{metadata(card).to_yaml()}\n---\n\n" + "\n".join(part for part in parts if part)


def metadata(card: Card):
    """huggingface_hub.ModelCardData."""
    from huggingface_hub import ModelCardData

    known = card.license in LICENSES
    named = {} if known else {"license_name": card.license}
    base = {"base_model": card.base_model, "base_model_relation": _relation(card.model)} if card.base_model else {}
    library = {"library_name": "diffusers"} if _is_diffusers(card.model) else {}
    return ModelCardData(
        license=card.license if known else "other",
        pipeline_tag=_task(card.model),
        tags=[*TAGS, *(family for family in [card.neon.get("family")] if family in FAMILIES)],
        model_name=card.name,
        eval_results=_eval_results(card) or None,
        **named,
        **base,
        **library,
    )


def _relation(model: Path) -> str:
    """To the base: one of the hub's words."""
    return "adapter" if (model / "adapter_config.json").exists() else "merge"


def _is_diffusers(model: Path) -> bool:
    return (model / "model_index.json").exists()


def _task(model: Path) -> str:
    components = read_object(model / "model_index.json") if _is_diffusers(model) else {}
    return TEXT if any(name.startswith("text_encoder") for name in components) else UNCONDITIONAL


def _eval_results(card: Card) -> list:
    """FID with its interval, the other metrics, and how much lower FID is than the base's on the same seeds."""
    from huggingface_hub import EvalResult

    row = card.neon
    if not row:
        return []
    dataset = card.dataset or f"reference {row['reference'][:8]}"
    kind = dataset.lower().replace(" ", "-")
    how = {"n": row["n"], "features": row["features"], "reference_sha256": row["reference"]}

    def result(metric: str, name: str, value: float, se: float | None) -> EvalResult:
        interval = {"interval_95": [_rounded(end) for end in Difference(value, se).interval]} if se is not None else {}
        return EvalResult(
            task_type=_task(card.model),
            dataset_type=kind,
            dataset_name=dataset,
            metric_type=metric,
            metric_name=name,
            metric_value=_rounded(value),
            metric_args=how | interval,
        )

    found = [result(m, title(m, row["features"]), row[m], row.get(f"{m}_se")) for m in METRICS if m in row]
    if "gain_base" in row:
        found.append(result("fid_gain", GAIN, row["gain_base"], row["gain_base_se"]))
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _title(card: Card) -> str:
    base = f"[{card.base_model}](https://huggingface.co/{card.base_model})" if card.base_model else card.base_source
    base = base or Path(card.neon.get("base", "")).name or "its base"
    paper = f"[arXiv {PAPER}](https://arxiv.org/abs/{PAPER})"
    text = f"# {card.name}\n\nNeon (negative extrapolation from self-training, {paper}) of {base}.\n\n"
    return text + "".join(f"**Note:** {warning}.\n" for warning in card.warnings)


def _recipe(card: Card) -> str:
    lines = [f"θ_neon = θ_r − w (θ_s − θ_r) with w = {card.w}", *(_trained_and_sampled(card.neon) if card.neon else [])]
    return "## Recipe\n\n" + "".join(f"- {line}\n" for line in lines)


def _trained_and_sampled(row: Mapping) -> Iterator[str]:
    trained = f"fine-tuned on {row['budget']:,} images" if row["budget"] else "fine-tuned"
    own = f" of a set S of {row['num_synthetic']:,}" if row["num_synthetic"] else ""
    yield f"θ_s: the base, {trained}{own}"
    sampled = ", ".join(f"{name} {row[name]}" for name in _options(row))
    yield f"sampled with: {sampled or 'no options'}; {row['dtype']} on {row['device']}"


def _options(row: Mapping) -> list[str]:
    """The sampling options among what a row holds."""
    return [field.name for field in dataclasses.fields(get_family(row["family"]).Sampling)]


def _results(card: Card) -> str:
    """A table of the three models, with the sampling options that they do not share."""
    if not card.rows:
        return ""
    row = card.neon
    metrics = [m for m in METRICS if m in row]
    searched = [name for name in _options(row) if len({str(one[name]) for one in card.rows.values()}) > 1]

    def line(role: str) -> list[str]:
        found = card.rows[role]
        return [ROLES[role], f"{found['w']:g}", *(str(found[o]) for o in searched), *(_cell(found, m) for m in metrics)]

    head = ["model", "w", *searched, *(title(m, row["features"]) for m in metrics)]
    lines = [head, ["---"] * len(head), *map(line, ROLES)]
    seeds = row["seeds"] if isinstance(row["seeds"], str) else "as listed in the rows"
    said = f"{row['n']:,} images each, seeds {seeds}; features {row['features']}; ± is one standard error."
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return f"## Results\n\n{table}\n{said}\n{_gain(row)}"


def _gain(row: Mapping) -> str:
    if "gain_base" not in row:
        return ""
    low, high = Difference(row["gain_base"], row["gain_base_se"]).interval
    return f"{GAIN}: {row['gain_base']:.4g} (95 %: {low:.4g} to {high:.4g}).\n"


def _cell(row: Mapping, metric: str) -> str:
    value, se = row.get(metric, math.nan), row.get(f"{metric}_se")
    return f"{value:.4g}" + (f" ± {se:.2g}" if se is not None else "")


def _digests(card: Card) -> str:
    row = card.neon
    found = {
        f"{side}": card.record.get(f"neon_{side}_sha256") or row.get(f"{side}_sha256")
        for side in ("base", "selftrained")
    }
    found |= {"autoencoder": row.get("vae_sha256"), "reference": row.get("reference")}
    lines = [f"- {name}: `{digest}`\n" for name, digest in found.items() if digest]
    return "## sha256 of what it is made of\n\n" + "".join(lines) if lines else ""


def _use(card: Card, repo: str) -> str:
    name = repo or "OWNER/NAME"
    if _is_diffusers(card.model):
        load = f'pipeline = DiffusionPipeline.from_pretrained("{name}")'
        how = f"```python\nfrom diffusers import DiffusionPipeline\n\n{load}\n```\n"
    elif card.neon:
        family = Path(card.neon["family"]).name
        how = f"```bash\nneon generate --family {family} --model {card.model.name} --seeds 0-15 --out S\n```\n"
    else:
        return ""
    return f"## Use\n\n{how}"


# ---------------------------------------------------------------- where it goes


def files_of(model: Path) -> dict[str, Path]:
    """What is uploaded next to README.md: name on the hub → file. Hidden files stay at home."""
    if not model.is_dir():
        return {model.name: model}
    found = {file.relative_to(model): file for file in sorted(model.rglob("*")) if file.is_file()}
    return {
        name.as_posix(): file
        for name, file in found.items()
        if name.as_posix() != "README.md" and not any(part.startswith(".") for part in name.parts)
    }


def check_token() -> None:
    """Raises NeonError unless the user has a token for the hub."""
    from huggingface_hub import get_token

    if not get_token():
        raise NeonError("no token for the hub: set HF_TOKEN, or run `hf auth login`")


def push(card: Card, repo: str, private: bool = False) -> str:
    """Create the repository if it is not there, upload the model and its card; the address. Raises NeonError.

    Reads HF_ENDPOINT and HF_TOKEN.
    """
    from huggingface_hub import HfApi

    check_repo(repo)
    check_token()
    with tempfile.TemporaryDirectory() as folder:
        for name, file in files_of(card.model).items():
            link = Path(folder, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        Path(folder, "README.md").write_text(readme(card, repo))
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        try:
            api.create_repo(repo, private=private or None, exist_ok=True)
            found = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Neon, w = {card.w}")
        except Exception as error:  # the hub's and those of its HTTP library: many kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise NeonError(f"cannot upload to {repo} ({reason})") from None
    return str(found.commit_url).rpartition("/commit/")[0] or str(found)
