"""results/report.py: its numbers against statsmodels and by hand, and what it does with runs of all kinds."""

import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import report
from conftest import ROOT
from statsmodels.stats.contingency_tables import mcnemar

import heft_finetuning as heft


def write_run(folder, name, right, seed=42, minutes=10, settings=None, **changes):
    """A run of `right` answers (list of bool), as heft_finetuning.py writes it; the name says the epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    lora, reft = (int(part[4:]) for part in name.split("-")[:2])
    all_settings = {key: heft.PAPER_VALUES.get(key, "") for key in heft.SETTINGS}
    all_settings |= {"SEED": seed, "EPOCHS_LORA": lora, "EPOCHS_REFT": reft, "SMOKE": False, "FORMAT": 2}
    all_settings |= {"STAGE_1": f"weights of {name}", "STAGE_2": f"weights of {name}"}
    seconds = {"lora": 60.0 * minutes * bool(lora), "reft": 1.0 * bool(reft), "evaluation": 1.0}
    result = {"lora_epochs": lora, "reft_epochs": reft, "accuracy": "", "unknown_answers": 0}
    result |= {"num_validation_samples": len(right), "correct_predictions": sum(right)}
    result |= {"settings": all_settings | (settings or {}), "device": "a GPU", "peak_memory_gb": 1.0}
    result |= {"seconds": seconds | {"total": sum(seconds.values())}}
    result |= {"loss": {"lora": [2.0, 1.0] * bool(lora), "reft": [1.0, 0.5] * bool(reft)}}
    (folder / f"{name}.json").write_text(json.dumps(result | changes))
    lines = []
    for i, ok in enumerate(right):
        line = {"question": f"q{i}", "answer": "Yes", "prediction": "Yes" if ok else "No", "text": ""}
        lines.append(json.dumps(line) + "\n")
    (folder / f"{name}.predictions.jsonl").write_text("".join(lines))


SMALL = {
    "BASE_MODEL": "weights/Small-1B",
    "DATASET": "data/reviews/",
    "VALIDATION_DATA": "v",
    "BASE_VERSION": "b",
}


def write_small(folder, name, right, seed=42, **changes):
    """The same of another model on another dataset; settings in capitals, the rest as in write_run."""
    settings = SMALL | {key: changes.pop(key) for key in list(changes) if key.isupper()}
    write_run(folder, name, right, seed, settings=settings, **changes)


def answers(*counts):
    """answers(3, 2): three right, two wrong, and so on."""
    return [number % 2 == 0 for number, count in enumerate(counts) for _ in range(count)]


def report_on(folder):
    report.write_report(folder)
    return (folder / "README.md").read_text()


def run(name, right, questions=None):
    return {"name": name, "right": right, "questions": questions or list(range(len(right)))}


def test_interval_by_hand():
    # Wilson, 8 of 10: (0.8 + z2/20 -+ z sqrt(0.016 + z2/400)) / (1 + z2/10) with z2 = 3.8415
    assert report.interval(8, 10) == pytest.approx((49.016, 94.332), abs=1e-3)
    assert report.interval(0, 10) == pytest.approx((0, 27.753), abs=1e-3)
    assert report.interval(2785, 3270) == pytest.approx(heft.wilson(2785, 3270))


@pytest.mark.parametrize(
    "only_a, only_b, p",
    [
        (0, 0, 1.0),
        (6, 0, 2 / 64),
        (0, 6, 2 / 64),
        (5, 0, 2 / 32),
        (1, 1, 1.0),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
    ],
)
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
    error = math.sqrt(2 * share * (1 - share) * n)
    assert need / error >= 1.959963984540054 > (need - 1) / error


def test_no_runs(tmp_path):
    text = report_on(tmp_path)
    assert text.count("| lora") == 4 and "85.17 | 1:23" in text
    assert "Other runs" not in text and "Pairs" not in text and "Smoke" not in text
    assert (tmp_path / "figure1.png").stat().st_size > 10_000
    assert (tmp_path / "figure1.svg").read_text().lstrip().startswith("<?xml")


def test_the_rows_of_table_1_over_two_seeds_and_other_runs(tmp_path):
    n = 3270
    for i, name in enumerate(json.loads((ROOT / "results/paper.json").read_text())["table_1"]):
        write_run(tmp_path, name, [True] * (2700 + i) + [False] * (n - 2700 - i))
        write_run(tmp_path, f"{name}-seed7", [True] * (2710 + i) + [False] * (n - 2710 - i), seed=7)
    write_run(tmp_path, "lora3-reft3-reft_layer10", [True] * 5, minutes=30, settings={"REFT_LAYER": 10})
    write_run(tmp_path / "smoke", "lora3-reft3", [True] * 9 + [False])
    table_1, rest = report_on(tmp_path).split("## Other runs")
    assert "| lora3-reft3 | 3 | 3 | 2,702 of 3,270 | 82.63 | 81.29 to 83.89 |" in table_1
    assert "seed7" not in table_1
    assert "| lora3-reft3-reft_layer10 | 3 | 3 | 5 of 5 | 100.00 |" in rest
    assert "| lora3-reft3-seed7 |" in rest
    # 82.63 and 82.94: mean 82.78, standard deviation 0.216
    assert "| lora3-reft3 | 2 (7, 42) | 82.78 | 0.22 | 82.63 to 82.94 | 0 |" in rest
    assert rest.count("\n- `lora") == 28 and "8 pair(s) are on different questions" in rest
    pair = (
        "`lora20-reft0-seed7`: 10 of 3,270 questions apart (0 right in the first only, 10 in the second only)"
    )
    assert f"{pair}; p = 0.002; `lora20-reft0-seed7` is better." in rest
    real, smoke = rest.split("## Smoke runs")
    assert "| 9 of 10 | 90.00 |" in smoke and "9 of 10" not in real + table_1
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
        "torn": lambda text: text[:50],
        "foreign": lambda text: '{"a": 1}',
        "list": lambda text: "[1, 2]",
        "miscounted": lambda text: text.replace('"correct_predictions": 1', '"correct_predictions": 2'),
    }.items():
        write_run(tmp_path, "lora3-reft1", [True, False])
        (tmp_path / f"{name}.json").write_text(spoil((tmp_path / "lora3-reft1.json").read_text()))
        shutil.copy(tmp_path / "lora3-reft1.predictions.jsonl", tmp_path / f"{name}.predictions.jsonl")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    shutil.copy(tmp_path / "lora3-reft1.json", tmp_path / "alone.json")
    (tmp_path / "lora3-reft1.json").unlink()
    report.write_report(tmp_path)
    text, out = (tmp_path / "README.md").read_text(), capsys.readouterr().out
    skipped = text.split("## Skipped files")[1]
    for name, reason in {
        "torn": "is no complete JSON",
        "foreign": "is no result",
        "list": "is no result",
        "miscounted": "contradicts its predictions: 2 of 2 correct there, 1 of 2 here",
        "binary": "is no complete JSON",
        "alone": "lacks alone.predictions.jsonl",
        "lora3-reft1.predictions.jsonl": "has no result beside it",
    }.items():
        assert any(f"`{name}" in line and reason in line for line in skipped.splitlines()), name
        assert name in out
    assert "| lora3-reft0 | 3 | 0 | 1 of 2 | 50.00 |" in text


def test_what_the_script_writes_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(heft, "EPOCHS_REFT", 0)
    record = {"seconds": 5.0, "loss": [1.0, 0.5]}
    lora = SimpleNamespace(epochs=3, record=record, hub=None, settings={"WEIGHTS": "a hash"})
    reft = SimpleNamespace(epochs=0, record=None, hub=None, settings={})
    run = SimpleNamespace(file=tmp_path / "lora3-reft0.json", settings={"VALIDATION_DATA": "a hash"})
    settings = {key: getattr(heft, key) for key in heft.SETTINGS} | {"SMOKE": False}
    questions = [{"question": "is it", "answer": "Yes"}, {"question": "is it not", "answer": "No"}]
    heft.write_result(settings, run, lora, reft, questions, ["Yes", "Hm"], 1.0)
    read = report.read_run(run.file)
    assert read["right"] == [True, False] and read["training"] == 5.0 and read["percent"] == 50.0
    assert read["pair"] == report.PAPERS_PAIR and read["seed"] == 42


# Other models and datasets


def test_another_model_is_never_in_table_1(tmp_path):
    small = {"BASE_MODEL": "hub/Small-1B"}
    write_run(tmp_path, "lora3-reft3", answers(3000, 270), settings=small)
    write_run(tmp_path / "gpu", "lora20-reft0", answers(2900, 370))  # the paper's model, but not here
    table_1, rest = report_on(tmp_path).split("## Other runs")
    assert "| lora3-reft3 | 3 | 3 |  |" in table_1 and "| lora20-reft0 | 20 | 0 |  |" in table_1
    paper, section = rest.split("## Small-1B on boolq")
    assert "| gpu/lora20-reft0 | 20 | 0 | 2,900 of 3,270 |" in paper and "3,000" not in paper
    assert "| lora3-reft3 | 3 | 3 | 3,000 of 3,270 | 91.74 |" in section
    assert (tmp_path / "figure-boolq.png").exists() and (tmp_path / "figure-boolq.svg").exists()


def test_the_methods_of_a_section(tmp_path):
    folder = tmp_path / "small"
    write_small(folder, "lora0-reft0", answers(4, 6), unknown_answers=3)
    for seed, right, minutes in ((42, 8, 10), (1, 6, 12)):
        write_small(folder, f"lora3-reft0-seed{seed}", answers(right, 10 - right), seed, minutes=minutes)
        write_small(folder, f"lora0-reft3-seed{seed}", answers(5, 5), seed)
        write_small(folder, f"lora4-reft0-seed{seed}", answers(7, 3), seed, unknown_answers=1)
        write_small(folder, f"lora3-reft3-seed{seed}", answers(9, 1), seed)
    text = report_on(tmp_path)
    assert [line for line in text.splitlines() if line.startswith("## ")][-1] == "## Small-1B on reviews"
    rows = [
        line for line in text.split("| training s |")[1].split("\n\n")[0].splitlines() if "---" not in line
    ]
    assert rows[1].startswith("| base model | 1 | 40.00 |  | 40.00 (42) | 4 of 10 |")
    assert rows[1].endswith("| 3 | 0 |")
    # 80 and 60 %: mean 70, standard deviation sqrt(200); 14 of 20 by Wilson; 600 and 720 s
    wilson = "{:.2f} to {:.2f}".format(*heft.wilson(14, 20))
    assert (
        rows[2] == f"| LoRA 3 | 2 | 70.00 | 14.14 | 60.00 (1), 80.00 (42) | 14 of 20 | {wilson} | 0 | 660 |"
    )
    labels = [row.split(" | ")[0].removeprefix("| ") for row in rows[1:]]
    assert labels == ["base model", "LoRA 3", "LoRA 4", "LoReFT 3", "HEFT 3 + 3"]
    assert "| LoRA 4 | 2 | 70.00 | 0.00 | 70.00 (1), 70.00 (42) | 14 of 20 |" in rows[3]
    assert rows[3].endswith("| 2 | 600 |") and rows[5].endswith("| 0 | 601 |")
    assert "![accuracy, training time and losses](small/figure-reviews.png)" in text
    assert (folder / "figure-reviews.png").stat().st_size > 10_000
    assert "| lora3-reft0-seed1 | 3 | 0 | 6 of 10 |" in text.split("All runs:")[1]


def test_pooled_mcnemar_by_hand(tmp_path):
    """Three of three questions one way is p = 2 / 2**3; six of six over both seeds is 2 / 2**6."""
    for seed in (42, 1):
        write_small(tmp_path / "a", f"lora3-reft3-seed{seed}", answers(8, 2), seed)
        write_small(tmp_path / "a", f"lora3-reft0-seed{seed}", answers(5, 5), seed)
        # (5, 1) and (3, 1) make (8, 2): 2 (1 + 10 + 45) / 2**10
        other = answers(3, 5, 1, 1) if seed == 42 else answers(5, 3, 1, 1)
        write_small(tmp_path / "a", f"lora0-reft3-seed{seed}", other, seed)
    write_small(tmp_path / "a", "lora4-reft0-seed7", answers(10), seed=7)  # no HEFT run of this seed
    write_small(tmp_path / "a", "lora0-reft0", answers(2, 8))
    text = report_on(tmp_path)
    for seed in (1, 42):
        assert f"| LoRA 3 | {seed} | 10 | 3 | 0 | +30.00 | 0.25 | not distinguishable |" in text
        # The base model has one answer, whatever the seed.
        assert f"| base model | {seed} | 10 | 6 | 0 | +60.00 | 0.031 | HEFT 3 + 3 |" in text
    assert "| LoRA 3 | all | 20 | 6 | 0 | +30.00 | 0.031 | HEFT 3 + 3 |" in text
    assert "| LoReFT 3 | all | 20 | 8 | 2 | +30.00 | 0.11 | not distinguishable |" in text
    assert "| LoRA 4 | 7 " not in text and "p are optimistic" in text


@pytest.mark.parametrize(
    "changes, label",
    [
        ({"LEARNING_RATE_LORA": 0.001}, "learning_rate_lora=0.001"),
        ({"MAX_TRAIN_SAMPLES": 500, "TRAIN_DATA": "other"}, "max_train_samples=500"),
        ({"TRAIN_DATA": "other rows of the same file"}, "train_data=other rows"),
        ({"BASE_VERSION": "other"}, "base_version=other"),
        ({"VALIDATION_DATA": "other"}, "validation_data=other"),
        ({"MAX_EVAL_SAMPLES": 10}, "max_eval_samples=10"),
        ({"FORMAT": 3}, "format=3"),
    ],
)
def test_runs_of_other_settings_are_not_pooled(tmp_path, monkeypatch, changes, label):
    monkeypatch.setattr(report, "figure", lambda *_: None)  # the tables are the matter here
    for seed in (42, 1):
        write_small(tmp_path, f"lora3-reft3-seed{seed}", answers(9, 1), seed, TRAIN_DATA="rows")
    write_small(tmp_path, "lora3-reft0", answers(8, 2), TRAIN_DATA="rows")
    write_small(tmp_path, "lora3-reft0-other", answers(1, 9), seed=1, **({"TRAIN_DATA": "rows"} | changes))
    text = report_on(tmp_path)
    assert "| LoRA 3 | 1 | 80.00 |" in text and f"| LoRA 3, {label} | 1 | 10.00 |" in text
    # Whatever was learnt from is compared on the same questions, with the same base model.
    compared = f"| LoRA 3, {label} | 1 | 10 | 8 | 0 |" in text
    assert compared == (not {"VALIDATION_DATA", "BASE_VERSION"} & changes.keys())


def test_what_does_not_matter_does_not_split(tmp_path):
    write_small(
        tmp_path, "lora3-reft0", answers(8, 2), OUTPUT_DIR="a", REFT_LAYER=3, BASE_MODEL="x/Small-1B/"
    )
    write_small(tmp_path / "b", "lora3-reft0-seed1", answers(6, 4), seed=1, TOKENS_PER_MICROBATCH=1)
    assert "| LoRA 3 | 2 | 70.00 |" in report_on(tmp_path)


def test_a_repeated_run_counts_once(tmp_path):
    write_small(tmp_path, "lora3-reft0", answers(8, 2))
    write_small(tmp_path, "lora3-reft0-again", answers(6, 4))
    text = report_on(tmp_path)
    assert "| LoRA 3 | 1 | 80.00 |" in text and "1 run(s) repeat settings and seed" in text
    assert "| lora3-reft0-again | 3 | 0 | 6 of 10 |" in text


def test_sensitivity(tmp_path):
    for seed in (42, 1):
        write_small(tmp_path, f"lora3-reft3-seed{seed}", answers(8, 2), seed)
    write_small(tmp_path, "lora3-reft3-reft_layer5", answers(2, 8), REFT_LAYER=5)
    write_small(tmp_path, "lora3-reft3-reft_layer20", answers(9, 1), REFT_LAYER=20)
    write_small(tmp_path, "lora3-reft3-reft_rank1", answers(7, 3), REFT_RANK=1)
    write_small(tmp_path, "lora0-reft3", answers(6, 4))
    write_small(tmp_path, "lora0-reft3-reft_layer5", answers(5, 5), REFT_LAYER=5)
    methods, rest = report_on(tmp_path).split("HEFT 3 + 3 with another layer or rank")
    assert "p against layer 15, rank 4 |" in rest
    rows = [line.split(" | ") for line in rest.split("\n\n")[1].splitlines()[2:]]
    assert [(*row[:5], row[6].split(" ")[0]) for row in rows] == [
        ("| 5", "4", "42", "2 of 10", "20.00", "0.031"),
        ("| 15", "1", "42", "7 of 10", "70.00", "1"),
        ("| 15", "4", "42", "8 of 10", "80.00", ""),
        ("| 20", "4", "42", "9 of 10", "90.00", "1"),
    ]
    assert methods.count("\n| HEFT 3 + 3 |") == 1 and "| HEFT 3 + 3 | 2 | 80.00 |" in methods
    assert "| LoReFT 3 | 1 | 60.00 |" in methods and "| LoReFT 3, reft_layer=5 | 1 | 50.00 |" in methods


def test_about_is_told_word_for_word_and_once(tmp_path):
    about = "The weights are `x`, *Apache 2.0*.\n\n- data: y, CC-BY\n"
    for data in ("boolq", "reviews"):
        write_small(tmp_path / "small", f"lora3-reft0-{data}", answers(8, 2), DATASET=data)
    (tmp_path / "small/about.md").write_text(about)
    text = report_on(tmp_path)
    assert text.count(about) == 1 and f"## Small-1B on boolq\n\n{about}\n![" in text
    assert "## Small-1B on reviews\n\nWeights and data: see Small-1B on boolq, above." in text
    assert {path.name for path in tmp_path.glob("small/*.png")} == {"figure-boolq.png", "figure-reviews.png"}


def test_two_models_in_one_folder_have_their_own_figures(tmp_path):
    for model in ("A", "B"):
        write_small(tmp_path / "both", f"lora3-reft0-{model}", answers(8, 2), BASE_MODEL=model)
    text = report_on(tmp_path)
    for picture in ("both/figure-reviews.png", "both/figure-reviews-B.png"):
        assert f"]({picture})" in text and (tmp_path / picture).exists()


def test_an_older_format_is_read(tmp_path):
    write_small(tmp_path, "lora3-reft3", answers(9, 1))
    write_small(tmp_path, "lora3-reft3-old", answers(8, 2), seed=1)
    file = tmp_path / "lora3-reft3-old.json"
    result = json.loads(file.read_text())
    new = ("FORMAT", "MAX_TRAIN_SAMPLES", "MAX_EVAL_SAMPLES", "STAGE_1", "STAGE_2", "VALIDATION_DATA")
    result["settings"] = {key: value for key, value in result["settings"].items() if key not in new}
    result["seconds"]["merge"] = 0.5
    file.write_text(json.dumps(result))
    text = report_on(tmp_path)
    assert "Skipped" not in text
    assert "| HEFT 3 + 3 | 1 | 90.00 |" in text and "| HEFT 3 + 3, format=1 | 1 | 80.00 |" in text


def test_the_shipped_toy_is_pointed_to_and_left_alone(tmp_path):
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke/README.md").write_text("by hand\n")
    assert "](smoke/README.md)" in report_on(tmp_path).split("## Smoke runs")[1]
    write_small(tmp_path / "smoke", "lora3-reft3", answers(9, 1), SMOKE=True)
    before, smoke = report_on(tmp_path).split("## Smoke runs")
    assert "| lora3-reft3 | 3 | 3 | 9 of 10 |" in smoke and "Small-1B" not in before
    assert (tmp_path / "smoke/README.md").read_text() == "by hand\n"


def test_the_same_runs_give_the_same_bytes(tmp_path):
    write_small(tmp_path / "a", "lora3-reft3", answers(9, 1))
    contents = []
    for _ in range(2):
        report.write_report(tmp_path)
        files = [*tmp_path.rglob("*.md"), *tmp_path.rglob("*.png"), *tmp_path.rglob("*.svg")]
        contents.append({path: path.read_bytes() for path in files})
    assert contents[0] == contents[1] and len(contents[0]) == 5


def test_help_is_the_docstring(tmp_path):
    command = [sys.executable, report.__file__]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and report.__doc__.strip() in shown.stdout
    wrong = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True)
    assert wrong.returncode == 2 and "is no folder" in wrong.stderr
