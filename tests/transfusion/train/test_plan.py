"""`transfusion plan`: its memory against steps that run here, its operations against torch's counter, its report."""
import dataclasses
import re
import shlex
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig

from transfusion.cli import main
from transfusion.model.config import TransfusionConfig
from transfusion.model.lora import TuneSettings, base_of, prepare
from transfusion.model.transfusion import Transfusion
from transfusion.recipes.digits import digits
from transfusion.recipes.paper import PAPER, paper
from transfusion.sequence import CONTEXT_ATTENTION, Context
from transfusion.train.activations import Activations, outline, storage, trace
from transfusion.train.average import Average
from transfusion.train.estimates import Sizes, memory, messages, shards, sizes, split_keys, work
from transfusion.train.frozen import narrow_frozen
from transfusion.train.gpus import GPUS
from transfusion.train.optimizer import build_optimizer
from transfusion.train.plan import PlanSettings, plan, report
from transfusion.train.plan_model import SHAPES, planned_config, planned_rows
from transfusion.train.processes import ParallelSettings
from transfusion.train.transfusion import OptimSettings, TrainConfig

ROWS = 4
DOCS = Path(__file__).parents[3] / "docs" / "scaling.md"
CASES = [  # backbone, image layers, what is trained, autocast
    ("decoder", "linear", "all", False), ("decoder", "linear", "all", True), ("adaln", "dit", "all", False),
    ("mixture_of_transformers", "dit", "all", True), ("decoder", "unet", "all", False),
    ("decoder", "dit", "lora", False), ("decoder", "dit", "lora", True), ("adaln", "dit", "images", False),
    ("mixture_of_transformers", "unet", "images", True)]
cases = pytest.mark.parametrize("backbone,image_layers,trained,autocast", CASES)


def small(backbone, image_layers, layers=4):
    text = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=layers,
                       num_attention_heads=4, num_key_value_heads=2)
    return TransfusionConfig(text_config=text, image_channels=4, image_size=(8, 8), boi_token_id=298, eoi_token_id=299,
                             backbone=backbone, image_layers=image_layers, unet_channels=(16, 32))


def rows_of(config, rows):
    return planned_rows(config, rows, 256, caption=10, text_share=0.3, text_tokens=40)


def test_layers_are_counted_whatever_the_decoder_calls_them():
    text = GPT2Config(vocab_size=300, n_embd=64, n_layer=3, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    model = Transfusion(TransfusionConfig(text_config=text, image_channels=4, image_size=(8, 8)))
    count, layer = sizes(model), model.backbone.decoder.transformer.h[1]
    assert count.layers == 3 and count.layer == sum(p.numel() for p in layer.parameters())


class InUse(TorchDispatchMode):
    """The most bytes of tensors made under it that were there at once."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and storage(x) not in self.sizes:
                self.sizes[storage(x)] = x.untyped_storage().nbytes()
                self.now += self.sizes[storage(x)]
                self.most = max(self.most, self.now)
                weakref.finalize(x.untyped_storage(), self.gone, storage(x))
        return result

    def gone(self, key):
        self.now -= self.sizes.pop(key, 0)


def saved_bytes(model, loss):
    """What autograd keeps of a forward pass that runs, each memory once and parameters not, by its hooks."""
    kept, own = {}, {storage(x) for x in [*model.parameters(), *model.buffers()]}

    def note(x):
        kept[storage(x)] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss()
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)


@cases
def test_memory_of_a_step_is_planned_within_5_percent(backbone, image_layers, trained, autocast):
    config, tune = small(backbone, image_layers), TuneSettings(start=Path("start"), trained=trained)
    narrow = autocast and trained != "all"
    found = trace(config, tune, rows_of(config, 1), rows_of(config, 2), dtype=torch.float32, autocast=autocast,
                  narrow=narrow)
    rows, optim = rows_of(config, ROWS), OptimSettings()
    model = prepare(Transfusion(config), tune).train()
    if narrow:
        narrow_frozen(base_of(model))
    made = outline(config, tune)
    if narrow:
        narrow_frozen(base_of(made))
    planned = memory(sizes(made), 1, found.activations(ROWS))
    optimizer, averaged = build_optimizer(model, optim), Average(model, optim.ema)
    times, seed = torch.full((rows.image_count,), 0.5), torch.tensor([1, 2])

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(rows, times, seed).loss

    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        model.zero_grad()
        averaged.update(model)
        return gradients

    assert saved_bytes(model, loss) == pytest.approx(planned.activations.everything + planned.activations.copies,
                                                     rel=0.05)
    assert step() == pytest.approx(planned.gradients, rel=0.05)
    weights = sum(p.nbytes for p in model.parameters())
    averages = sum(x.nbytes for x in averaged.tensors.values())
    moments = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    assert weights == planned.weights and moments == pytest.approx(planned.moments, rel=0.05)
    assert averages == planned.averages
    with InUse() as used:
        step()
    kept = weights + averages + moments
    assert kept + used.most == pytest.approx(planned.peak(planned.activations.everything), rel=0.05)


@pytest.mark.parametrize("backbone", ["adaln", "mixture_of_transformers"])
def test_full_checkpointing_keeps_what_is_planned(backbone):
    config, tune = small(backbone, "dit", layers=6), TuneSettings()
    found = trace(config, tune, rows_of(config, 1), rows_of(config, 2), dtype=torch.float32, autocast=False)
    planned = memory(sizes(outline(config, tune)), 1, found.activations(ROWS))
    rows, model = rows_of(config, ROWS), Transfusion(config).train()
    model.backbone.gradient_checkpointing = True
    times, seed = torch.full((rows.image_count,), 0.5), torch.tensor([1, 2])
    model(rows, times, seed).loss.backward()
    model.zero_grad()
    with InUse() as used:
        model(rows, times, seed).loss.backward()
    activations = planned.activations
    # gradients are made while layers are computed again, so that a part of them is in use with the most of the rest
    low = activations.full + activations.working
    assert 0.95 * low <= used.most <= 1.05 * (low + planned.gradients)
    assert activations.full < activations.selective < activations.everything


@pytest.fixture
def one_of_two():
    """This process is one of two that split rows; the other one is not there, and what it sends is anything."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("backbone,image_layers", [("decoder", "dit"), ("adaln", "linear"), ("decoder", "unet")])
def test_a_process_that_splits_rows_keeps_its_share_as_planned_within_5_percent(backbone, image_layers, one_of_two):
    config, tune = small(backbone, image_layers), TuneSettings()
    found = trace(config, tune, rows_of(config, 1), rows_of(config, 2), dtype=torch.float32, autocast=False)
    rows, model = rows_of(config, ROWS), Transfusion(config).train()
    times, seed, share = torch.full((rows.image_count,), 0.5), torch.tensor([1, 2]), model.share(rows, Context())
    kept = saved_bytes(model, lambda: model(share, times, seed))
    assert kept == pytest.approx(found.activations(ROWS / 2).everything, rel=0.05)


@pytest.mark.parametrize("by", CONTEXT_ATTENTION)
def test_keys_and_values_are_sent_as_planned(by, one_of_two, monkeypatch):
    sent = []
    monkeypatch.setattr(dist, "all_gather", lambda parts, x, group=None: sent.append(x.nbytes))
    monkeypatch.setattr(dist, "all_to_all_single", lambda out, x, *_, group=None: sent.append(
        x.nbytes / 2 if x.ndim == 5 else 0))  # patches have fewer dimensions, and are not counted
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda both: sent.append(both[0].tensor.nbytes) or [])
    config, tokens = small("adaln", "dit"), ROWS * 256
    rows, model = rows_of(config, ROWS), Transfusion(config).train()
    share = model.share(rows, Context(None, CONTEXT_ATTENTION[by]))
    with torch.autocast("cpu", torch.bfloat16):
        model(share, torch.full((rows.image_count,), 0.5), torch.tensor([1, 2])).loss.backward()
    assert sum(sent) == split_keys(config.text_config, by, 2, tokens, 1).sent
    assert split_keys(config.text_config, by, 1, tokens, 1) == (0, 0)


def test_gpus_that_split_rows_are_planned_as_groups():
    config = dataclasses.replace(paper("0.76B"), parallel=ParallelSettings(context=4))
    made, plain = (plan(config, PlanSettings(gpus=gpus, layout="shard")) for gpus in (32, 8))
    assert (made.groups, made.layouts[0].shared_by) == (8, 32) and made.seconds == plain.seconds / 4
    said = report(made)
    assert "64 rows on 4 GPUs, which split their tokens, at once" in said and "keys and values of split rows" in said
    assert {name: shards(name, 32, 8, 4) for name in ("replicate", "shard", "hybrid")} == {
        "replicate": 4, "shard": 32, "hybrid": 8}
    with pytest.raises(ValueError, match="plan: parallel.context is 4, gpus 6 and gpus_per_node 8; a divisor of gpus"):
        plan(config, PlanSettings(gpus=6))


@pytest.mark.parametrize("backbone,image_layers,trained,frozen", [
    *((*case[:3], None) for case in CASES), ("decoder", "unet", "all", ("image_head",)),
    ("adaln", "dit", "images", ("image_head", "modulation"))])
def test_operations_are_those_that_torch_counts(backbone, image_layers, trained, frozen):
    config, tune = small(backbone, image_layers), TuneSettings(start=Path("start"), trained=trained, frozen=frozen)
    rows = rows_of(config, 2)
    planned = work(outline(config, tune), outline(config, TuneSettings(frozen=frozen)), rows)
    model = prepare(Transfusion(config), tune).train()
    with FlopCounterMode(display=False, custom_mapping=formulas(int(rows.mask().area().sum()))) as counter:
        model(rows, torch.full((rows.image_count,), 0.5), torch.tensor([1, 2])).loss.backward()
    assert sum(part.step for part in planned.values()) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert planned["attention"].step == pytest.approx(sum(
        count for name, count in counter.get_flop_counts()["Global"].items() if "attention" in str(name)), rel=1e-6)


def formulas(area):
    """Operations of our operators, for FlopCounterMode; the attention's are those of visible pairs."""
    ops = torch.ops.tfkernels

    def raw(formula):
        formula._get_raw = True
        return formula

    return {
        ops.attention_forward: raw(lambda q, *_, out_val: 4 * q.shape[1] * q.shape[3] * area),
        ops.attention_backward: raw(lambda dout, dlse, q, *_, out_val: 8 * q.shape[1] * q.shape[3] * area),
        ops.linear_cross_entropy: raw(lambda hidden, weight, targets, rows, bias, row_weight, *wanted, out_val:
                                      2 * weight.numel() * len(targets) * (1 + sum(wanted[:2]))),
        ops.modulated_norm_diffusion_loss: raw(lambda hidden, places, scale, weight, *_, out_val:
                                               2 * weight.numel() * len(places)),
        ops.modulated_norm_diffusion_loss_backward: raw(lambda dloss, hidden, places, scale, weight, *_, out_val:
                                                        4 * weight.numel() * len(places)),
        ops.embed_patches: raw(lambda hidden, patches, weight, *_, out_val: 2 * weight.numel() * len(patches)),
        ops.embed_patches_backward: raw(lambda *_, out_val: 0)}


def test_a_preset_has_the_parameters_that_it_trains():
    made = plan(digits(), PlanSettings(gpus=1, image=(1, 8, 8)))
    model = Transfusion(planned_config(digits(), (1, 8, 8)))
    assert made.sizes.all == made.sizes.trained == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size,parameters", [("0.16B", 162.4e6), ("1.4B", 1364.3e6), ("7B", 6738.4e6)])
def test_the_papers_models_have_the_size_that_their_recipe_names(size, parameters):
    model = outline(planned_config(paper(size), (8, 32, 32)), TuneSettings())
    decoder = sum(p.numel() for p in model.backbone.decoder.parameters())
    assert size in PAPER and decoder == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_a_named_language_model_has_about_the_size_that_its_name_says(name):
    config = paper("7B")
    config = config.__class__(**{**vars(config), "tune": TuneSettings(start=Path(name))})
    decoder = outline(planned_config(config, (8, 32, 32)), TuneSettings()).backbone.decoder
    billions = float(re.search(r"([\d.]+)b$", name).group(1))
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(1e9 * billions, rel=0.1)


def test_layouts_send_what_their_formulas_say():
    count = Sizes(all=1000, trained=800, layer=100, layer_trained=80, layers=5)
    replicate, shard, hybrid = (messages(shards(name, 16, 8), count, 16, 8, 2, 900.0, 50.0)
                                for name in ("replicate", "shard", "hybrid"))
    assert replicate[:3] == (0, 0, 2 * 15 / 16 * 4 * 800)
    assert shard[:3] == (2 * 15 / 16 * 2 * 1000 * 2, 15 / 16 * 4 * 800 * 2, 0)
    assert hybrid[:3] == (2 * 7 / 8 * 2 * 1000 * 2, 7 / 8 * 4 * 800 * 2, 2 * 1 / 2 * 4 * 800 / 8)
    assert shard.seconds == pytest.approx((shard.gathered + shard.scattered) / 400)  # 8 cards of 50 < a link's 450
    assert hybrid.seconds == pytest.approx((hybrid.gathered + hybrid.scattered) / 450 + hybrid.reduced / 50)
    assert messages(1, count, 1, 8, 1, 900.0, 50.0) == (0, 0, 0, 0, 0)


def test_shards_divide_all_but_activations_and_two_layers():
    count = Sizes(all=1000, trained=800, layer=100, layer_trained=80, layers=5)
    found = memory(count, 8, Activations(70, 60, 50, 40, 30))
    assert found[:5] == (500, 400, 800, 400, 2 * 500 + 4 * 180)
    assert found.peak(70) == 500 + 800 + 400 + max(1720 + 70 + 30, 400)
    assert found.peak(70, accumulate=2) == 500 + 800 + 400 + 1720 + 70 + 30 + 400
    assert memory(count, 8, Activations(70, 60, 50, 40, 30), averaged=False) == found._replace(averages=0)


def test_what_does_not_fit_is_said_with_what_helps():
    config = paper("7B")
    said = report(plan(config, PlanSettings(gpus=8)))
    assert "- replicate: does not fit: what is kept of the model takes 101 GiB; share it among more GPUs" in said
    assert re.search(r"- shard: does not fit; --optim.accumulate \d+ .*makes it fit", said)
    wide = report(plan(config, PlanSettings(gpus=1024)))
    assert "512 GPUs have nothing to do" in wide and "- shard: fits as it is" in wide
    assert max(map(len, (said + "\n" + wide).splitlines())) <= 120


@pytest.mark.parametrize("args,message", [
    (["paper", "--gpu", "H1000"], "invalid choice|H100"),
    (["paper", "--gpus", "12"], "error: plan: gpus is 12 and gpus_per_node 8; whole nodes fit"),
    (["paper", "--mfu", "1.5"], "error: plan: mfu is 1.5; a number above 0 and at most 1 fits"),
    (["paper", "--optim.seq-len", "256"], "error: plan: optim.seq_len is 256, and a picture of 256 patches"),
    (["paper", "--tune.start", "vicuna-8b"], "where no config.json is; .*did you mean vicuna-7b"),
    (["papre"], "'papre' is no preset")])
def test_what_does_not_fit_ends_the_command_in_a_line(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *args])
    assert re.search(message, str(stop.value) + capsys.readouterr().err)


@pytest.mark.parametrize("written,message", [
    ("{}", "plan: tune.start is '.*', whose config.json has model_type None; a Transfusion or a language model"),
    ('{"model_type": "lama"}', "whose config.json has model_type 'lama'; "),
    ('{"model', "config.json is damaged")])
def test_a_start_of_no_known_kind_is_refused_by_name(written, message, tmp_path):
    (tmp_path / "config.json").write_text(written)
    with pytest.raises(SystemExit, match=message):
        main(["plan", "paper", "--tune.start", str(tmp_path)])


def test_no_data_set_is_opened_and_no_model_is_built(monkeypatch, capsys):
    monkeypatch.setattr("transfusion.data.dataset.DatasetSettings.open", lambda *_: pytest.fail("opened"))
    main(["plan", "paper", "--size", "7B", "--optim.seq-len", "4096"])
    assert "6,756,663,360" in capsys.readouterr().out


def test_every_gpu_names_its_source_and_dense_peaks():
    assert all(gpu.source and gpu.teraflops <= 2500 and gpu.link <= 2000 for gpu in GPUS.values())


def examples():
    """(command, output) of the blocks of docs/scaling.md that begin with `transfusion plan`."""
    blocks = re.findall(r"^```\n(transfusion plan .*?)^```$", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    return [(command, output) for command, _, output in (block.partition("\n\n") for block in blocks)]


@pytest.mark.parametrize("number", range(3))
def test_the_page_shows_what_the_command_prints(number, capsys):
    command, output = examples()[number]
    main(shlex.split(command)[1:])
    printed, shown = capsys.readouterr().out.split(), output.split()
    figure = re.compile(r"^[\d,.]+$")
    assert [figure.sub("0", word) for word in printed] == [figure.sub("0", word) for word in shown]
    for a, b in zip(printed, shown):  # other versions of torch keep a little more or less
        if figure.match(a.rstrip(",.")) and a != b:
            assert float(a.replace(",", "")) == pytest.approx(float(b.replace(",", "")), rel=0.05)


def test_positions_on_a_grid_are_planned_without_a_look_at_them(capsys):
    main(["plan", "emoji", "--optim.seq-len", "512"])
    assert "images: modulation" in capsys.readouterr().out


def test_clean_copies_of_pictures_are_planned(tmp_path):
    config = planned_config(TrainConfig(), (3, 32, 32))
    plain, clean = (planned_rows(config, 1, 2048, caption=8, text_share=0.0, text_tokens=64, clean=one)
                    for one in (False, True))
    patches = (32 // config.patch_size)**2
    assert plain.image_count == 2048 // (8 + 4 + patches)
    assert clean.image_count == 2 * (2048 // (8 + 4 + 2 * patches))
