"""results/report.py: its numbers against statsmodels and by hand, and what it does with runs of all kinds."""

import json
import math
import shutil

import pytest
from conftest import ROOT
from statsmodels.stats.contingency_tables import mcnemar

import heft_finetuning as heft
import report


def write_run(folder, name, right, n=None, seed=42, minutes=10, layer=15, **changes):
    """A run of `right` answers (list of bool), as heft_finetuning.py writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    lora, reft = (int(part[4:]) for part in name.split("-")[:2])
    settings = {key: heft.PAPER_VALUES.get(key, "") for key in heft.SETTINGS} | {"SEED": seed, "EPOCHS_LORA": lora, "EPOCHS_REFT": reft, "REFT_LAYER": layer}
    result = {"lora_epochs": lora, "reft_epochs": reft, "num_validation_samples": len(right), "correct_predictions": sum(right), "accuracy": "",
              "unknown_answers": 0, "settings": settings, "device": "a GPU", "peak_memory_gb": 1.0,
              "seconds": {"lora": 60.0 * minutes, "merge": 0.0, "reft": 1.0, "evaluation": 1.0, "total": 60.0 * minutes + 2},
              "loss": {"lora": [2.0, 1.0] * bool(lora), "reft": [1.0, 0.5] * bool(reft)}} | changes
    (folder / f"{name}.json").write_text(json.dumps(result))
    rows = [{"question": f"q{i}", "answer": "Yes", "prediction": "Yes" if ok else "No", "text": ""} for i, ok in enumerate(right)]
    (folder / f"{name}.predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(name, right, questions=None):
    return {"name": name, "right": right, "questions": questions or list(range(len(right)))}


def test_interval_by_hand():
    # Wilson, 8 of 10: (0.8 + z2/20 -+ z sqrt(0.016 + z2/400)) / (1 + z2/10) with z2 = 3.8415
    assert report.interval(8, 10) == pytest.approx((49.016, 94.332), abs=1e-3)
    assert report.interval(0, 10) == pytest.approx((0, 27.753), abs=1e-3)
    assert report.interval(2785, 3270) == pytest.approx(heft.wilson(2785, 3270))


@pytest.mark.parametrize("only_a, only_b, p", [(0, 0, 1.0), (6, 0, 2 / 64), (0, 6, 2 / 64), (5, 0, 2 / 32), (1, 1, 1.0), (8, 2, 2 * (1 + 10 + 45) / 1024)])
def test_mcnemar_by_hand(only_a, only_b, p):
    """Two-sided binomial test of the questions that changed: 6 of 6 one way is p = 2 / 2**6."""
    a = run("a", [True] * only_a + [False] * only_b + [True] * 20)
    b = run("b", [False] * only_a + [True] * only_b + [True] * 20)
    found = report.compare(a, b)
    assert (found["only_a"], found["only_b"]) == (only_a, only_b) and found["p"] == pytest.approx(p)
    assert found["p"] == pytest.approx(mcnemar([[20, only_a], [only_b, 0]], exact=True).pvalue)
    assert f"{abs(only_a - only_b)} of {only_a + only_b + 20} questions apart" in found["text"]
    winner = "`a` is better" if only_a > only_b else "`b` is better"
    assert (winner in found["text"]) == (p < 0.05) and ("not distinguishable" in found["text"]) == (p >= 0.05)


def test_different_questions_are_no_pair():
    assert report.compare(run("a", [True, False]), run("b", [True, False], questions=[7, 8])) is None
    assert report.compare(run("a", [True]), run("b", [True, False])) is None


def test_smallest_difference():
    n, share = 3270, 0.85
    need = report.smallest_difference(n, share)
    z = lambda d: d / math.sqrt(2 * share * (1 - share) * n)
    assert z(need) >= 1.959963984540054 > z(need - 1)


def test_no_runs(tmp_path):
    report.write_report(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("| lora") == 4 and "85.17 | 1:23" in text and "Other runs" not in text and "Pairs" not in text
    assert (tmp_path / "figure1.png").stat().st_size > 10_000 and (tmp_path / "figure1.svg").read_text().lstrip().startswith("<?xml")


def test_the_rows_of_table_1_over_two_seeds_and_other_runs(tmp_path):
    n = 3270
    for i, name in enumerate(json.loads((ROOT / "results/paper.json").read_text())["table_1"]):
        write_run(tmp_path, name, [True] * (2700 + i) + [False] * (n - 2700 - i))
        write_run(tmp_path, f"{name}-seed7", [True] * (2710 + i) + [False] * (n - 2710 - i), seed=7)
    write_run(tmp_path, "lora3-reft3-reft_layer10", [True] * 5, minutes=30, layer=10)
    write_run(tmp_path / "smoke", "lora3-reft3", [True] * 9 + [False])
    report.write_report(tmp_path)
    text = (tmp_path / "README.md").read_text()
    table_1, rest = text.split("## Other runs")
    assert "| lora3-reft3 | 3 | 3 | 2,702 of 3,270 | 82.63 | 81.29 to 83.89 |" in table_1 and "seed7" not in table_1
    assert "| lora3-reft3-reft_layer10 | 3 | 3 | 5 of 5 | 100.00 |" in rest and "| lora3-reft3-seed7 |" in rest
    # 82.63 and 82.94: mean 82.78, standard deviation 0.216
    assert "| lora3-reft3 | 2 (7, 42) | 82.78 | 0.22 | 82.63 to 82.94 | 0 |" in rest
    assert rest.count("\n- `lora") == 28 and "8 pair(s) are on different questions" in rest
    assert "`lora20-reft0-seed7`: 10 of 3,270 questions apart (0 right in the first only, 10 in the second only); p = 0.002; `lora20-reft0-seed7` is better." in rest
    smoke = rest.split("## Smoke runs")[1]
    assert "| 9 of 10 | 90.00 |" in smoke and "9 of 10" not in rest.split("## Smoke runs")[0] + table_1
    assert "| lora3-reft3 | 7B | 82.63 | measured here |" in rest


def test_one_run_with_fewer_questions_is_no_row_of_table_1(tmp_path):
    write_run(tmp_path, "lora3-reft3", [True] * 300 + [False] * 2)
    report.write_report(tmp_path)
    table_1, rest = (tmp_path / "README.md").read_text().split("## Other runs")
    assert "| lora3-reft3 | 3 | 3 |  |" in table_1 and "300 of 302" in rest


def test_a_smoke_run_among_the_real_ones_does_not_mix(tmp_path):
    write_run(tmp_path, "lora3-reft3", [True] * 3 + [False])
    file = tmp_path / "lora3-reft3.json"
    result = json.loads(file.read_text())
    result["settings"]["SMOKE"] = True
    file.write_text(json.dumps(result))
    report.write_report(tmp_path)
    before, smoke = (tmp_path / "README.md").read_text().split("## Smoke runs")
    assert "3 of 4" in smoke and "3 of 4" not in before


def test_damaged_and_foreign_files_are_named_and_skipped(tmp_path, capsys):
    write_run(tmp_path, "lora3-reft0", [True, False])
    for name, spoil in {
            "torn": lambda text: text[:50], "foreign": lambda text: '{"a": 1}', "list": lambda text: "[1, 2]",
            "miscounted": lambda text: text.replace('"correct_predictions": 1', '"correct_predictions": 2')}.items():
        write_run(tmp_path, "lora3-reft1", [True, False])
        (tmp_path / f"{name}.json").write_text(spoil((tmp_path / "lora3-reft1.json").read_text()))
        shutil.copy(tmp_path / "lora3-reft1.predictions.jsonl", tmp_path / f"{name}.predictions.jsonl")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    shutil.copy(tmp_path / "lora3-reft1.json", tmp_path / "alone.json")
    (tmp_path / "lora3-reft1.json").unlink()
    report.write_report(tmp_path)
    text, out = (tmp_path / "README.md").read_text(), capsys.readouterr().out
    skipped = text.split("## Skipped files")[1]
    for name, reason in {"torn": "is no complete JSON", "foreign": "is no result", "list": "is no result", "miscounted": "contradicts its predictions: 2 of 2 correct there, 1 of 2 here",
                         "binary": "is no complete JSON", "alone": "lacks alone.predictions.jsonl", "lora3-reft1.predictions.jsonl": "has no result beside it"}.items():
        assert any(f"`{name}" in line and reason in line for line in skipped.splitlines()), name
        assert name in out
    assert "| lora3-reft0 | 3 | 0 | 1 of 2 | 50.00 |" in text


def test_the_scripts_last_screen_is_a_row_too():
    result = {"lora_epochs": 3, "reft_epochs": 3, "num_validation_samples": 3270, "correct_predictions": 2785, "accuracy": "85.17%",
              "confidence_interval_95": heft.wilson(2785, 3270), "unknown_answers": 1, "seconds": {"total": 4980.0}}
    assert heft.table_row("lora3-reft3", result, "85.17 %") == "| lora3-reft3 | 3 | 3 | 2785 of 3270 | 85.17% | 83.91 to 86.35 | 1 | 1:23 | 85.17 % |"
