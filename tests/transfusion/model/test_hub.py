"""The way to the Hub and back, with the Hub's functions replaced: what is uploaded, what the card says, what is loaded.
"""
import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image as Picture
from transformers import AutoConfig, AutoModel

from tests.transfusion.conftest import tiny_model
from tests.transfusion.model.test_vae import autoencoder
from transfusion import Transfusion, TransfusionConfig
from transfusion.files import checksums
from transfusion.model.vae import VAE

RUN = {"step": 1300, "config": {"data": {"name": "digits", "latents": None, "folder": "/home/me/private",
                                         "more": ["private/a.json"]},
                                "optim": {"lr": 0.002, "times": "uniform"}}}


class FakeHub:
    """Repositories in a folder, reached by the functions of huggingface_hub that this project calls."""

    def __init__(self, root):
        self.root, self.calls = root, []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", repo_id, options))

    def list_repo_files(self, repo_id, **_):
        paths = (path for path in (self.root / repo_id).rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.root / repo_id)) for path in paths)

    def file_exists(self, repo_id, name, **_):
        return (self.root / repo_id / name).is_file()

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.calls.append(("upload_folder", repo_id, options))
        given = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()}
        for path in (path for path in (self.root / repo_id).rglob("*") if path.is_file()):
            name = str(path.relative_to(self.root / repo_id))
            if name not in given and any(fnmatch(name, one) for one in options.get("delete_patterns") or ()):
                path.unlink()
        left_out = shutil.ignore_patterns(options["ignore_patterns"]) if options.get("ignore_patterns") else None
        shutil.copytree(folder_path, self.root / repo_id, ignore=left_out, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(self, repo_id, **options):
        self.calls.append(("snapshot_download", repo_id, options))
        if not (self.root / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("there is no such repository")
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    for name in ("create_repo", "create_branch", "file_exists", "list_repo_files", "upload_folder",
                 "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
    return fake


@pytest.fixture
def run(tmp_path):
    """A checkpoint with what training leaves beside it, in the directory runs/digits."""
    where = tmp_path / "runs" / "digits"
    tiny_model().save_pretrained(where)
    (where / "resume").mkdir()
    (where / "resume" / "run.json").write_text(json.dumps(RUN))
    for name in ("samples.png", "loss.png"):
        Picture.new("RGB", (8, 8)).save(where / name)
    return where


def card_in(folder):
    """The card of a folder, its YAML parsed by the Hub's own reader, after a check that its pictures are there."""
    card = ModelCard.load(folder / "README.md")
    for line in card.text.splitlines():
        if line.startswith("!["):
            assert (folder / line.split("](")[1].rstrip(")")).is_file()
    return card


def test_a_pushed_model_comes_back_equal_with_a_card_that_the_hubs_search_reads(hub, run):
    model = Transfusion.from_pretrained(run)
    url = model.push_to_hub("me/digits", private=True, token="t", license="mit", base_model="meta/llama",
                            datasets=["mnist"], tags=["digits"], prompt="a handwritten seven")
    assert url == "https://hub/me/digits/commit/1"
    assert [call[:2] for call in hub.calls] == [("create_repo", "me/digits"), ("upload_folder", "me/digits")]
    assert hub.calls[0][2] == {"private": True, "token": "t", "exist_ok": True}
    card = card_in(hub.root / "me/digits")
    assert card.data.to_dict() == {
        "base_model": "meta/llama", "datasets": ["mnist"], "library_name": "transfusion", "license": "mit",
        "pipeline_tag": "any-to-any", "tags": ["transfusion", "text-to-image", "image-to-text", "digits"]}
    assert 'Transfusion.from_pretrained("me/digits")' in card.text and '"a handwritten seven"' in card.text
    assert "1,300 steps" in card.text and "| `optim.lr` | 0.002 |" in card.text and "private" not in card.text
    assert "![drawn by digits](pictures/samples.png)" in card.text and "loss.png" not in card.text
    again, drawn = Transfusion.from_pretrained("me/digits", token="t"), []
    name, repo, options = hub.calls[-1]
    assert (name, repo, options["token"]) == ("snapshot_download", "me/digits", "t")
    assert not any(fnmatch("pytorch_model.bin", pattern) or fnmatch("a.py", pattern)
                   for pattern in options["allow_patterns"])
    assert all(any(fnmatch(path, pattern) for pattern in options["ignore_patterns"]) for path in (
        ".saved/journal.json", "vae/.saved/journal.json", ".env.json"))
    for one in (model, again):
        drawn.append(one.eval().draw(["a handwritten seven"], steps=2)[0].latent)
    assert torch.equal(*drawn)


def test_the_code_of_a_card_runs_and_draws(run, monkeypatch):
    path = Transfusion.from_pretrained(run).save_card(run, prompt='a "handwritten" seven', name="runs/digits")
    monkeypatch.chdir(run.parent.parent)
    blocks = re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    with Picture.open("drawn.png") as picture:
        assert picture.size == (8, 8)


def test_auto_classes_load_a_directory_after_the_import_of_transfusion(run):
    config, model = AutoConfig.from_pretrained(run), AutoModel.from_pretrained(run).eval()
    assert type(config) is TransfusionConfig and type(model) is Transfusion
    ours = Transfusion.from_pretrained(run).eval()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), model.state_dict().values()))
    assert torch.equal(ours.draw(["a"], steps=2)[0].latent, model.draw(["a"], steps=2)[0].latent)
    assert ours.generate("a handwritten", max_new_tokens=4) == model.generate("a handwritten", max_new_tokens=4)


def test_a_card_that_someone_edited_is_uploaded_as_it_is_with_its_pictures(hub, run):
    model = Transfusion.from_pretrained(run)
    path = model.save_card(run, license="mit", name="me/digits")
    assert card_in(run).data.license == "mit" and "](samples.png)" in path.read_text()
    path.write_text(path.read_text() + "My own words.\n")
    model.push_to_hub("me/digits")
    assert "My own words." in card_in(hub.root / "me/digits").text
    model.push_to_hub("me/digits", license="apache-2.0")
    assert card_in(hub.root / "me/digits").data.license == "apache-2.0"


def test_a_card_that_stands_on_the_hub_stays_until_one_is_asked_for(hub):
    (hub.root / "me/digits").mkdir(parents=True)
    (hub.root / "me/digits" / "README.md").write_text("# written there\n")
    model = tiny_model()
    model.push_to_hub("me/digits", revision="new", commit_message="more")
    assert (hub.root / "me/digits" / "README.md").read_text() == "# written there\n"
    assert ("create_branch", "me/digits", {"branch": "new", "token": None, "exist_ok": True}) in hub.calls
    assert hub.calls[-1][2]["commit_message"] == "more" and hub.calls[-1][2]["revision"] == "new"
    model.push_to_hub("me/digits", license="mit")
    assert card_in(hub.root / "me/digits").data.license == "mit"


def test_a_folder_of_pictures_is_shown_and_the_autoencoder_travels(hub, tmp_path):
    model = tiny_model()
    model.vae = VAE(autoencoder(latent_channels=4))
    (tmp_path / "drawn" / "pictures").mkdir(parents=True)
    for number in range(12):
        Picture.new("L", (8, 8)).save(tmp_path / "drawn" / "pictures" / f"{number:02}.png")
    model.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="me/vae", samples=tmp_path / "drawn")
    assert card_in(hub.root / "me/vae").text.count("](pictures/") == 8 and (hub.root / "me/vae/vae").is_dir()
    Picture.new("L", (8, 8)).save(tmp_path / "drawn" / "contact_sheet.png")
    model.save_card(tmp_path / "here", samples=tmp_path / "drawn")
    assert "latents of its autoencoder" in card_in(tmp_path / "here").text
    assert card_in(tmp_path / "here").text.count("![") == 1


@pytest.mark.parametrize("options, says", [
    ({"licence": "mit"}, "licence is no option; .*did you mean license"),
    ({"samples": "nowhere"}, "samples is 'nowhere', which is not there"), ({"prompt": 3}, "prompt is 3; a str fits"),
])
def test_an_option_that_does_not_fit_is_refused_before_anything_is_uploaded(hub, options, says):
    with pytest.raises(ValueError, match=f"Transfusion.push_to_hub: {says}"):
        tiny_model().push_to_hub("me/digits", **options)
    assert hub.calls == []


def test_weights_of_an_older_push_go(hub):
    older, newer = tiny_model(), tiny_model()
    with torch.no_grad():
        newer.image_head.linear.weight.add_(1)
    older.push_to_hub("me/x")
    own = [hub.root / "me/x" / name for name in ("notes.txt", "models/mine.safetensors", "old/model.safetensors")]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    newer.push_to_hub("me/x", max_shard_size="20KB")
    found = Transfusion.from_pretrained("me/x")
    assert torch.equal(found.image_head.linear.weight, newer.image_head.linear.weight)
    assert not (hub.root / "me/x/model.safetensors").exists() and all(path.exists() for path in own)
    sums = checksums(hub.root / "me/x")
    newer.save_pretrained(hub.root / "here", variant="half", push_to_hub=True, repo_id="me/x")
    assert checksums(hub.root / "me/x") == sums != {}
    assert (hub.root / "me/x/model.half.safetensors").exists()
    assert torch.equal(Transfusion.from_pretrained("me/x").image_head.linear.weight, newer.image_head.linear.weight)


def test_what_is_saved_is_what_is_pushed(hub, tmp_path):
    model = tiny_model()
    other = {name: x + 1 for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path / "here", state_dict=other, push_to_hub=True, repo_id="me/x", max_shard_size="20KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "here").glob("*.safetensors")}
    assert len(files) > 1
    assert files == {path.name: path.read_bytes() for path in (hub.root / "me/x").glob("*.safetensors")}


def test_a_repository_that_is_not_there_is_named_and_a_path_never_means_the_hub(hub, tmp_path):
    with pytest.raises(ValueError, match="path is 'me/nothing', which is no directory here and cannot be loaded"):
        Transfusion.from_pretrained("me/nothing")
    for path in (tmp_path / "me/nothing", str(tmp_path / "me/nothing"), "nothing", "../nothing", "./nothing"):
        with pytest.raises(ValueError, match="holds no config.json"):
            Transfusion.from_pretrained(path)
    assert len(hub.calls) == 1


def test_no_code_of_a_checkpoints_tokenizer_is_run_or_asked_about(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    theirs = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["owner/repo--module.Theirs", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | theirs))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        Transfusion.from_pretrained(tmp_path)
