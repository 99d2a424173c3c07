"""The sampling benchmark: all ways give the same images and texts, wrong ones are refused, a step's cost is right."""
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import sample
from benchmarks.harness import Contender
from benchmarks.report import Report
from benchmarks.sample import (
    GENERATE,
    OURS,
    UNCACHED,
    Case,
    build,
    cases,
    draw_contenders,
    draw_uncached,
    prompts,
    step_cost,
    word_tokenizer,
    write_contenders,
)
from tests.benchmarks.measuring import measured_once, rows_of
from tfkernels import patchify
from transfusion.sequence import Text, encode

DRAW, WRITE = Case("draw", "tiny", 3, 24, 3), Case("write", "tiny", 3, 24, 8)


def once(contenders):
    return measured_once(contenders)


def test_every_contender_is_right():
    for result in once(draw_contenders(DRAW, "cpu", torch.float32)[0]):
        assert result.error is None and result.checked and result.milliseconds.keys() == {"one step", "draw"}
    for result in once(write_contenders(WRITE, "cpu", torch.float32)[0]):
        assert result.error is None and result.checked and result.milliseconds.keys() == {"write"}


def test_a_draw_under_other_guidance_and_another_text_are_refused(monkeypatch):
    (ours, uncached), model = draw_contenders(DRAW, "cpu", torch.float32)
    draw = model.draw
    monkeypatch.setattr(model, "draw", lambda texts, **options: draw(texts, **{**options, "guidance": 4.9}))
    wrong, right = once([ours, uncached])
    assert wrong.name == OURS and wrong.error.startswith("AssertionError: images") and right.error is None
    (ours, generate), model = write_contenders(WRITE, "cpu", torch.float32)
    write = model.generate_batch

    def another(prompts, **options):
        return write([[Text(prompt[0].text + " w9")] for prompt in prompts], **options)

    monkeypatch.setattr(model, "generate_batch", another)
    wrong, right = once([ours, generate])
    assert wrong.error.startswith("AssertionError: ") and right.name == GENERATE and right.error is None


def test_a_text_that_ends_early_is_refused():
    ours = write_contenders(WRITE, "cpu", torch.float32)[0][0]
    short = Contender("short", {"write": lambda state: state.update(texts=["w5 w6"] * 3)}, ours.check)
    result, = once([short])
    assert result.error == "AssertionError: a text ended early"


def test_prompts_have_as_many_tokens_as_they_are_said_to():
    model = build(DRAW, "cpu", torch.float32)
    texts = prompts(DRAW, model.config.boi_token_id)
    assert len(set(texts)) == 3
    for text in texts:
        tokens = encode([Text(text)], model.tokenizer, model.config, end=False).tokens
        special = {0, 1, 2, model.config.boi_token_id, model.config.eoi_token_id}
        assert len(tokens) + 1 == DRAW.prompt and not set(tokens[1:]) & special
    tokenizer = word_tokenizer(300)
    assert tokenizer.decode(tokenizer.encode("w5 w299 w12")) == "w5 w299 w12"


def test_a_step_costs_what_its_matrix_products_count():
    model = build(DRAW, "cpu", torch.float32)
    text, count = model.config.text_config, 64
    layer = model.backbone.decoder.get_decoder().layers[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = torch.zeros(1, count, text.hidden_size)
        for matrix in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj):
            matrix(x)
        layer.mlp(x)
        for seen in (24 + 64, 2 + 64):  # keys before the image's own, of the text and of none
            q, k = (torch.zeros(text.num_attention_heads, n, text.head_dim) for n in (count, seen))
            (q @ k.mT) @ k
    matrices = 2 * 64 * (4 * 64 * 64 + 3 * 64 * 128)
    assert counter.get_total_flops() == matrices + 4 * 2 * 32 * 64 * (24 + 2 + 128)
    cost = step_cost(model, DRAW)
    # two contexts of each of three prompts
    assert cost["operations"] == text.num_hidden_layers * 3 * (counter.get_total_flops() + matrices)
    assert cost["bytes"] == 4 * 2 * ((4 * 64 * 64 + 3 * 64 * 128) + 2 * 2 * 32 * 3 * (24 + 2 + 128))


def test_the_whole_sequence_without_a_cache_needs_its_guidance():
    model = build(DRAW, "cpu", torch.float32)
    texts = prompts(DRAW, model.config.boi_token_id)[:1]
    guided, other = draw_uncached(model, texts, 2)[0].latent, draw_uncached(model, ["w7 w8"], 2)[0].latent
    assert guided.shape == (8, 16, 16) and patchify(guided[None], 2).shape == (64, 32)
    assert not torch.allclose(guided, other, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transfusion_pytorch_draws_one_image_for_each_prompt(dtype):
    pytest.importorskip("transfusion_pytorch", reason="transfusion-pytorch is not installed")
    result, = once([sample.peer_contender(DRAW, "cpu", dtype)])
    assert result.error is None and result.checked


def test_transfusion_pytorchs_products_are_in_the_dtype_asked_for():
    pytest.importorskip("transfusion_pytorch", reason="transfusion-pytorch is not installed")
    found, dtypes = sample.peer_contender(DRAW, "cpu", torch.bfloat16), set()

    class Products(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.nn.functional.linear:
                dtypes.add(out.dtype)
            return out

    with Products():
        found.phases["one step"]({})
    assert dtypes == {torch.bfloat16}


def test_a_missing_peer_is_left_out_and_all_times_are_those_a_user_waits_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "transfusion_pytorch", None)
    report = Report("sample", {}, {"device": "cpu"})
    sample.run_case(Case("draw", "tiny", 1, 24, 2), report, "cpu", 0.0)
    rows = {row["contender"]: row for row in report.rows}
    assert (
        rows[sample.PEER]["left_out"].startswith("not installed: ")
        and rows[sample.PEER]["error"] is None
        and not rows[sample.PEER]["milliseconds"]
    )
    assert rows[OURS]["timing"] == {"one step": "wall", "draw": "wall"} and rows[OURS]["interleaved"]
    assert all(
        c.wall
        for case, make in ((DRAW, draw_contenders), (WRITE, write_contenders))
        for c in make(case, "cpu", torch.float32)[0]
    )


def test_the_quick_grid_is_the_beginning_of_the_whole():
    quick, whole = cases(True), cases(False)
    assert whole[: len(quick)] == quick and len(set(whole)) == len(whole) > len(quick) > 0


def test_the_command_writes_a_complete_file(tmp_path, capsys):
    assert sample.main(["--cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = {
        (row["task"], row["contender"]): row for row in rows_of(tmp_path, "sample")
    }
    for key in (("draw", OURS), ("draw", UNCACHED), ("write", OURS), ("write", GENERATE)):
        assert rows[key]["checked"] and rows[key]["per_second"] > 0
    assert rows["draw", OURS]["step_ms"] > 0 and OURS in capsys.readouterr().out
