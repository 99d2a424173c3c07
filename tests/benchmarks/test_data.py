"""The benchmark of data: every number is there and its checks are green."""
import json

from benchmarks import data


def test_a_quick_run_measures_plans_sources_lengths_and_loading(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "STEP_SECONDS", 0.01)
    assert data.main(["--out", str(tmp_path), "--quick"]) == 0
    found = json.loads((tmp_path / "data.json").read_text())
    assert all(plan["fill"] > 0.95 and plan["slowest_over_mean"] < plan["before_balancing"] for plan in found["plan"])
    assert found["llava"]["rows"] == 6650 and found["llava"]["open_seconds"] > 0
    assert found["lengths"]["rows_per_cpu_second"] > 0 and 0 <= found["loader"]["share_waited"] <= 1
    assert found["loader"]["pictures_per_cpu_second"] > 0 and "tokens_per_cpu_second" in capsys.readouterr().out
