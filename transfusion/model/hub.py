"""A model and the Hugging Face Hub: its card (README.md), its way up and its way down.

A card is YAML that the Hub's search reads (https://huggingface.co/docs/hub/model-cards) and then text: what the model
is, how it is called, what it was trained with and what it draws. What a run left beside the checkpoint that the model
was loaded from is told: its settings (resume/run.json), its pictures (samples.png, contact_sheet.png, samples/).
"""
import glob
import json
import re
import shutil
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

from transfusion.command import saved_run
from transfusion.files import CHECKSUMS, WEIGHTS, write_text
from transfusion.settings import check, flat, nearest

CARD = "README.md"
SHEETS, PICTURES, SHOWN = ("contact_sheet.png", "samples.png"), (".png", ".jpg", ".jpeg", ".webp"), 8
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""files that a checkpoint may hold: no pickled weights, no code"""
HIDDEN = [".*", "*/.*"]
"""files that no checkpoint needs: what a kill left of a save is finished before it is uploaded"""
DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only")
UPLOAD = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "max_shard_size")


@dataclass(frozen=True)
class CardSettings:
    """What a card says that neither the model nor its run knows."""

    license: str | None = None
    """the Hub's name of a licence, such as "apache-2.0" """
    base_model: str | None = None
    """the Hub's name of the language model that the decoder began as"""
    datasets: tuple[str, ...] | None = None
    """the Hub's names of the data sets it was trained on"""
    language: tuple[str, ...] | None = None
    """codes of the languages it reads and writes, such as "en" """
    tags: tuple[str, ...] | None = None
    """further words that it is found by"""
    description: str = ""
    """text that stands below the title"""
    name: str | None = None
    """what the examples load the model by; None: the repository or the directory"""
    prompt: str = "a cat"
    """what the examples draw"""
    samples: Path | None = None
    """a picture, or a folder of pictures such as `transfusion sample --prompts` fills; None: those of the run"""

    @classmethod
    def of(cls, op: str, options: dict) -> "CardSettings":
        """Make one of keyword arguments, checked."""
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                raise ValueError(f"{op}: {name} is no option; {', '.join(names)} fit{nearest(name, names)}")
        made = cls(**options)
        made = replace(made, samples=None if made.samples is None else Path(made.samples))
        check(op, made)
        if made.samples is not None and not made.samples.exists():
            raise ValueError(f"{op}: samples is {str(made.samples)!r}, which is not there; a picture or a folder of "
                             "pictures fits")
        return made


def is_repository(path) -> bool:
    """Whether a model's name means the Hub: a str like "owner/name" that is no directory here."""
    return isinstance(path, str) and REPOSITORY.fullmatch(path) is not None and not Path(path).exists()


def download(repo_id: str, options: dict) -> Path:
    """Return a directory with a checkpoint of the Hub, out of the Hub's cache or fetched; of `options` take ours.

    Raises:
        ValueError: there is no such checkpoint, or the Hub cannot be reached.
    """
    taken = {name: options.pop(name) for name in DOWNLOAD if name in options}
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=list(FILES), ignore_patterns=HIDDEN,
                                                      **taken))
    except (HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(f"Transfusion.from_pretrained: path is {repo_id!r}, which is no directory here and cannot be "
                         f"loaded from the Hub ({' '.join(str(error).split())[:200]}); a directory written by "
                         "save_pretrained or `transfusion train`, or a model's name on the Hub, fits") from error


def push(model, repo_id: str, *, commit_message: str | None = None, commit_description: str | None = None,
         private: bool | None = None, token: bool | str | None = None, revision: str | None = None,
         create_pr: bool = False, max_shard_size: int | str = "50GB", state_dict: dict | None = None,
         variant: str | None = None, **card) -> str:
    """Upload a model's checkpoint and card to a repository of the Hub; see `Transfusion.push_to_hub`.

    What an older checkpoint there had, and this one has not, goes: a loader would take it for a part of this one. A
    variant stands beside what there is, whose checksums stay.
    """
    settings = CardSettings.of("Transfusion.push_to_hub", card)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size, variant=variant)
        repo_id = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        own = source(model)
        if not card and own is not None and _has_card(own):
            _copy_card(own, folder)
        elif card or not huggingface_hub.file_exists(repo_id, CARD, revision=revision, token=token):
            write_card(model, folder, repo_id, settings)
        if revision is not None and not revision.startswith("refs/pr"):
            huggingface_hub.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        there = huggingface_hub.list_repo_files(repo_id, revision=revision, token=token)
        older = [] if variant else [glob.escape(name) for name in there if _is_of_a_checkpoint(name)]
        return huggingface_hub.upload_folder(
            repo_id=repo_id, folder_path=folder, delete_patterns=older, ignore_patterns=CHECKSUMS if variant else None,
            commit_message=commit_message or "Upload a Transfusion model", commit_description=commit_description,
            token=token, revision=revision, create_pr=create_pr)


def _is_of_a_checkpoint(name: str) -> bool:
    """Whether a file of a repository is what a checkpoint's loader looks for."""
    path = PurePosixPath(name)
    return any(len(path.parts) == len(PurePosixPath(pattern).parts) and path.match(pattern)
               for pattern in (*WEIGHTS, CHECKSUMS))


def write_card(model, folder: Path, name: str, settings: CardSettings) -> Path:
    """Write a model's card into a folder, with its pictures; return its path. `name` is what the model is loaded by."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    places = [_placed(path.resolve(), folder) for path in _pictures(model, settings)]
    write_text(folder / CARD, card_text(model, settings.name or name, settings, places))
    return folder / CARD


def card_text(model, name: str, settings: CardSettings, pictures: list[str]) -> str:
    """The card of a model that is loaded by `name`; `pictures` are paths beside it."""
    data = huggingface_hub.ModelCardData(
        library_name="transfusion", pipeline_tag="any-to-any", license=settings.license,
        base_model=settings.base_model, datasets=_list(settings.datasets), language=_list(settings.language),
        tags=["transfusion", "text-to-image", "image-to-text", *(settings.tags or ())])
    title = name.rsplit("/", 1)[-1]
    about = [f"# {title}", settings.description, _about(model),
             "\n".join(f"![drawn by {title}]({path})" for path in pictures), _use(name, settings.prompt),
             _training(model)]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in about if part) + "\n"


def source(model) -> Path | None:
    """The directory that a model was loaded from, None where it was not."""
    path = Path(model.name_or_path) if model.name_or_path else None
    return path if path is not None and path.is_dir() else None


def _list(given: tuple[str, ...] | None) -> list[str] | None:
    return None if given is None else list(given)


def _about(model) -> str:
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    size = "x".join(map(str, (config.image_channels, *config.image_size)))
    what = "pixels" if model.vae is None else "latents of its autoencoder (vae/)"
    return (f"A Transfusion model (arXiv:2408.11039) of {parameters:,} parameters: one "
            f"{type(model.backbone.decoder).__name__} predicts the next token of text and denoises images. It draws "
            f"images of {size} {what} (channels, height, width) unless told otherwise; its objective is "
            f"{config.objective}, its backbone {config.backbone}.")


def _use(name: str, prompt: str) -> str:
    name, prompt = (json.dumps(text, ensure_ascii=False) for text in (name, prompt))
    return f"""## Use

`pip install tfkernels` brings the package `transfusion`.

```python
from transfusion.integrations.diffusers import TransfusionPipeline

pipe = TransfusionPipeline.from_pretrained({name})
pipe({prompt}, num_inference_steps=50, guidance_scale=3.0).images[0].save("drawn.png")
```

```python
from transfusion import Text, Transfusion

model = Transfusion.from_pretrained({name}).eval()
image, = model.draw([{prompt}], steps=50, guidance=3.0)
print(model.caption([image]), model.generate([Text({prompt})], max_images=1))
```

After `import transfusion` it is also what `transformers.AutoModel.from_pretrained({name})` returns, and
`transformers.pipeline("any-to-any", model={name}, pipeline_class=TransfusionAnyToAnyPipeline)` takes chats and
pictures with the class from `transfusion.integrations.transformers`."""


def _training(model) -> str:
    """What the run beside the checkpoint says; names of files are left out, which mean nothing elsewhere."""
    own = source(model)
    run = None if own is None else saved_run(own)
    if run is None:
        return ""
    kept = {section: run.get("config", {}).get(section, {}) for section in ("data", "optim")}
    said = {key: value for key, value in flat(kept).items()
            if value not in (None, [], "") and "/" not in str(value)}
    lines = "\n".join(f"| `{key}` | {value} |" for key, value in said.items())
    return (f"## Training\n\n{run['step']:,} steps of `transfusion train` with\n\n"
            f"| setting | value |\n|---|---|\n{lines}")


def _pictures(model, settings: CardSettings) -> list[Path]:
    """The pictures that a card shows: the settings' own, or those of the model's run; a sheet alone where one is."""
    given, own = settings.samples, source(model)
    if given is not None and given.is_file():
        return [given]
    home = given or own
    if home is None:
        return []
    sheets = [home / name for name in SHEETS if (home / name).is_file()]
    folders = (given, given / "pictures") if given is not None else (own / "samples",)  # a run has others beside it
    found = (sorted(p for p in folder.glob("*") if p.suffix.lower() in PICTURES) for folder in folders)
    return sheets[:1] or next(filter(None, found), [])[-SHOWN:]


def _placed(picture: Path, folder: Path) -> str:
    """The path of a picture as seen from a folder, where it is copied to unless it lies there."""
    if folder in picture.parents:
        return picture.relative_to(folder).as_posix()
    place = folder / "pictures" / picture.name
    place.parent.mkdir(exist_ok=True)
    shutil.copyfile(picture, place)
    return place.relative_to(folder).as_posix()


def _has_card(own: Path) -> bool:
    """Whether a card stands beside the checkpoint; the empty form that peft writes beside an adapter is none."""
    return (own / CARD).is_file() and "library_name: peft" not in (own / CARD).read_text(encoding="utf-8")


def _copy_card(own: Path, folder: Path) -> None:
    """Copy a card that stands beside the checkpoint, and the pictures of that directory that it shows."""
    text = (own / CARD).read_text(encoding="utf-8")
    write_text(folder / CARD, text)
    for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text):
        path = own / name
        if path.is_file() and own.resolve() in path.resolve().parents:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
