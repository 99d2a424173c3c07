"""The attention benchmark: batches, FLOPs, references and tables, and what it measures without a GPU."""
import json

import pytest
import torch

from benchmarks import attention as attention_benchmark
from benchmarks import attention_peers
from benchmarks import mask as mask_benchmark
from benchmarks.attention_peers import contender, sdpa_dense
from benchmarks.batches import dense_definition, packed_batch
from benchmarks.harness import Contender, LeftOut, Result, measure
from benchmarks.report import Report
from tests.conftest import DEVICE
from tfkernels import TransfusionMask, attention_reference
from tfkernels.attention.triton import backward, forward

SMALL = attention_benchmark.Case(512, 16, 4, 2, 64)


def test_packed_batches_hold_whole_images_and_the_definition_is_their_mask():
    batch = packed_batch(1500, 64, seed=3)
    assert batch.documents.shape == (1, 1500) and batch.documents.max() > 0 and len(batch.spans[0]) > 3
    assert all(
        stop - start == 64 and batch.documents[0, start] == batch.documents[0, stop - 1]
        for start, stop in batch.spans[0]
    )
    mask = attention_benchmark.mask_builder(batch)()
    assert torch.equal(mask.dense(), dense_definition(batch)) and torch.equal(
        mask.dense()[:, :, 100:200], dense_definition(batch, 100, 200)
    )
    assert (
        torch.equal(dense_definition(packed_batch(1500, 64, seed=3)), dense_definition(batch)) and batch.hidden is None
    )
    noised = packed_batch(1500, 64, seed=3, hidden=True)
    mask = attention_benchmark.mask_builder(noised)()
    assert (
        noised.hidden == [noised.spans[0][::2]]
        and torch.equal(mask.dense(), dense_definition(noised))
        and mask.area() < dense_definition(batch).sum()
    )


def test_flops_count_visible_pairs_one_by_one():
    mask = TransfusionMask.from_spans([[(2, 5)]], 7, documents=torch.tensor([[0, 0, 0, 0, 0, 1, 1]]))
    visible = mask.dense()[0, 0].tolist()
    heads, dim, operations = 3, 4, 0
    for _ in range(heads):
        for i in range(7):
            for j in range(7):
                operations += (2 * dim + 2 * dim) * visible[i][
                    j
                ]  # q . k and p * v: a multiplication and an addition per number
    assert mask.area().item() == 21 and attention_benchmark.flops(21, heads, dim) == {
        "forward": operations,
        "backward": 2.5 * operations,
    }


def test_tiles_visited_and_needed_count_as_by_hand():
    batch = packed_batch(300, 32, seed=1)
    mask, seen = attention_benchmark.mask_builder(batch)(), dense_definition(batch)[0, 0]
    rows = [seen[start : start + 64].any(0).nonzero() for start in range(0, 300, 64)]
    visited = sum(-(-(keys.max() - keys.min() + 1).item() // 32) for keys in rows)
    counts = mask_benchmark.tile_counts(mask, lambda a, b: dense_definition(batch, a, b), 64, 32)
    assert counts == {
        "visited": visited,
        "minimum": sum(-(-len(keys) // 32) for keys in rows),
        "area_in_tiles": seen.sum().item() / (64 * 32),
    }
    noised = packed_batch(300, 32, seed=1, hidden=True)
    mask, tiles = (
        attention_benchmark.mask_builder(noised)(),
        torch.nn.functional.pad(dense_definition(noised)[0, 0], (0, 20, 0, 20)),
    )
    needed = tiles.unflatten(1, (10, 32)).unflatten(0, (5, 64)).any(1).any(-1)
    assert (
        mask_benchmark.tile_counts(mask, lambda a, b: dense_definition(noised, a, b), 64, 32)["visited"] == needed.sum()
    )
    with pytest.raises(AssertionError, match="the mask is wrong in rows 0"):
        mask_benchmark.tile_counts(TransfusionMask.causal(300), lambda a, b: ~dense_definition(batch, a, b), 64, 32)


@pytest.mark.parametrize("hidden", [False, True])
def test_the_benchmarks_reference_equals_the_specification(hidden, monkeypatch):
    monkeypatch.setattr(attention_benchmark, "REFERENCE_BYTES", 2**19)  # several blocks of rows
    batch = packed_batch(SMALL.seq_len, SMALL.image_tokens, device=DEVICE, hidden=hidden)
    inputs = attention_benchmark.random_inputs(SMALL, DEVICE, torch.float32)
    mask = attention_benchmark.mask_builder(batch)()
    args = [x.detach().double().requires_grad_() for x in inputs[:3]]
    out = attention_reference(*args, mask).out
    expected = out.detach(), *torch.autograd.grad(out, args, inputs[3].double())
    for found, wanted in zip(attention_benchmark.reference(inputs, mask, torch.float64), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_the_accuracy_check_passes_right_contenders_and_stops_wrong_ones():
    batch, inputs = (
        packed_batch(SMALL.seq_len, SMALL.image_tokens, device=DEVICE),
        attention_benchmark.random_inputs(SMALL, DEVICE, torch.float32),
    )
    make_mask = attention_benchmark.mask_builder(batch)
    check = attention_benchmark.checker(inputs, make_mask())(4.0)

    def leaky(q, k, v, mask):
        return attention_reference(q, k, v, TransfusionMask.causal(SMALL.seq_len, device=DEVICE)).out

    chosen = [
        attention_benchmark.our_contender(make_mask, inputs, check),
        sdpa_dense(batch, inputs, check),
        contender("leaky", inputs, check, leaky),
    ]
    ours, dense, wrong = measure(chosen, device="cpu", seconds=0, warmup=1)
    assert set(ours.milliseconds) == set(dense.milliseconds) == {"build", "forward", "backward"}, (ours, dense)
    assert not wrong.checked and wrong.milliseconds == {} and wrong.error.startswith("AssertionError: out: max error")


def test_the_quick_cases_come_first_and_the_grid_is_whole():
    everything, quick = attention_benchmark.cases(), attention_benchmark.cases(quick=True)
    assert len(everything) == len(set(everything)) == 82 and everything[: len(quick)] == quick and len(quick) == 10


def test_the_table_and_plot_take_results_and_errors(tmp_path):
    report = Report("attention", {}, {"device": "a device"})
    case = attention_benchmark.Case(1024, 64, 16, 16, 256)._asdict()
    times = {
        phase: {"p20": 1.0, "p50": 2.0, "p80": 3.0, "repetitions": 5} for phase in ("build", "forward", "backward")
    }
    report.record(case, Result("tfkernels", True, times, 2**20), sum_ms=6.0, tflops={"forward": 5.0, "backward": 4.0})
    report.record(case, Result("xformers, dense bias", left_out="not installed"), sum_ms=None, tflops=None)
    timing = {"build": "host-bound", "forward": "queued", "backward": "queued"}
    tflops = {"forward": 5.0, "backward": 4.0}
    report.record(case, Result("FlexAttention", True, times, 2**20, timing=timing), sum_ms=6.0, tflops=tflops)
    ours, theirs, bound = attention_benchmark.table(report.rows).splitlines()
    assert bound.endswith("MiB, host-bound: build") and "host-bound" not in ours
    assert "sum    6.000 ms" in ours and "5/   4 TFLOP/s" in ours and "1 MiB" in ours and "not installed" in theirs
    pytest.importorskip("matplotlib")
    attention_benchmark.plot(report, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"attention_d64.png", "attention_d128.png"}


def test_without_a_gpu_masks_are_built_and_tiles_counted_into_a_file_of_the_commit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mask_benchmark, "LENGTHS", (600, 700))
    monkeypatch.setattr(attention_benchmark, "cpu_cases", mask_benchmark.cases)
    assert attention_benchmark.main(["--cpu", "--quick", "--commit", "0123456789abc", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "attention-cpu-0123456789.json").read_text())
    assert report["benchmark"] == "attention" and report["settings"]["quick"]
    assert report["environment"]["device"].startswith("CPU") and not report["notes"]
    rows = {(row["seq_len"], row["contender"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 2 * (4 + 2)
    for seq_len in (600, 700):
        ours = rows[seq_len, "tfkernels, from tensors"]
        assert ours["checked"] and ours["milliseconds"]["build"]["p50"] > 0 and ours["bytes"] == 16 * seq_len
        assert rows[seq_len, "create_block_mask"]["checked"]
        for name in ("tiles, packed", "tiles, packed, every other image hidden"):
            counts = rows[seq_len, name]["tiles"]["128x128"]
            assert counts["visited"] >= counts["minimum"] >= counts["area_in_tiles"] > 0
    assert "bytes, largest tensor" in capsys.readouterr().out


def test_on_a_cpu_attention_runs_beside_its_peers_on_documents_of_one_length(capsys, monkeypatch):
    def uncompiled(name, inputs, check, build):
        raise LeftOut("compiling takes a minute")

    monkeypatch.setattr(attention_peers, "flex_contender", uncompiled)
    report = Report("attention", {}, {"device": "CPU"})
    attention_benchmark.run_case(attention_benchmark.Case(1024, 32, 4, 2, 256), report, 0.0, "cpu")
    rows = {row["contender"]: row for row in report.rows}
    ours, dense = rows["tfkernels"], rows["SDPA, dense mask"]
    assert ours["checked"] and dense["checked"] and ours["area"] == dense["area"]
    assert ours["area"] == 2 * (512 * 513 // 2 + 256 * 255 // 2)  # causal pairs, and those above in an image
    assert set(ours["milliseconds"]) == {"build", "forward", "backward"}
    assert rows["FlexAttention, create_block_mask"]["left_out"] == "compiling takes a minute"
    ceiling, = (row for row in report.rows if row["mask"] == "another")
    assert ceiling["checked"] and ceiling["area"] == 1024 * 512
    assert ceiling["tflops"]["forward"] == pytest.approx(
        4 * 1024 * 512 * 4 * 32 / ceiling["milliseconds"]["forward"]["p50"] / 1e9)
    assert "TFLOP/s" in capsys.readouterr().out


def test_the_uncut_contender_is_ours_without_parts():
    found = []

    def run(state):
        found.append((backward.head_splits(1, 4, 132), forward.key_splits(1, 132, 4096, 512)))

    ours = Contender("tfkernels", {"forward": run}, lambda state: None)
    for one in (attention_benchmark.uncut_contender(ours), ours):
        one.phases["forward"]({})
    assert found == [(1, 1), (4, 8)]
