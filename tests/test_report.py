"""results/report.py: its numbers by hand and against scipy, and what it does with runs of all kinds."""

import json
import shutil
import subprocess
import sys
from math import sqrt
from types import SimpleNamespace

import pytest
import report
from conftest import ROOT
from scipy.stats import binomtest

import heft_finetuning as heft

SMALL = {"BASE_MODEL": "hub/SmolLM2-135M-Instruct", "DATASET": "data/reviews/", "BASE_VERSION": "b"}
SMALL |= {"TRAIN_DATA": "t", "VALIDATION_DATA": "v", "STAGE_1": "1", "STAGE_2": "2"}
CHOSEN = "SEED PUSH_TO_HUB PRIVATE_REPOS HF_USER HF_REPO_LORA HF_REPO_REFIT MERGED_DIR OUTPUT_DIR RESULTS_DIR"
NOT_DECIDING = {*CHOSEN.split(), "RESULTS_FILE", "STAGE_1", "STAGE_2"}


def answers(*counts):
    """answers(3, 2): three right, two wrong, and so on."""
    return [number % 2 == 0 for number, count in enumerate(counts) for _ in range(count)]


def write(folder, lora, reft, right, seed=42, name=None, truth="Yes", question="q", seconds=60.0, **changes):
    """Write a run as heft_finetuning.py does; changes in capitals are settings. Returns the result's path."""
    settings = {key: getattr(heft, key) for key in heft.SETTINGS} | SMALL | {"SMOKE": False, "FORMAT": 2}
    settings |= {"SEED": seed, "EPOCHS_LORA": lora, "EPOCHS_REFT": reft}
    settings |= {key: changes.pop(key) for key in list(changes) if key.isupper()}
    result = {"lora_epochs": lora, "reft_epochs": reft, "settings": settings, "device": "GPU", "versions": {}}
    result |= {"num_validation_samples": len(right), "correct_predictions": sum(right), "peak_memory_gb": 1.0}
    result["seconds"] = {"lora": seconds * lora, "reft": 1.0 * reft, "evaluation": 1.0}
    result["loss"] = {"lora": [1.0] * 2 * lora, "reft": [1.0] * 2 * reft}
    path = folder / f"{name or f'lora{lora}-reft{reft}-seed{seed}'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | changes))
    with path.with_suffix(".predictions.jsonl").open("w") as file:
        for ok in right:
            said = truth if ok else {"Yes": "No", "No": "Yes"}[truth]
            row = {"answer": truth, "prediction": said, "text": "\u2028\x85"}
            row |= {"question": question} if question else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def report_on(folder):
    """The page, and the details."""
    report.write_pages(folder)
    return (folder / "README.md").read_text(), (folder / "details.md").read_text()


def rows(page, title):
    """The cells of all tables of a section, by their first column."""
    text = page.split(f"## {title}\n")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: [cell.strip() for cell in row[1:]] for row in cells}


def methods(**seeds):
    """Methods from lists of right answers, one for each seed; LoRA_20 is LoRA 20, HEFT_3_3 is HEFT 3 + 3."""
    made = {}
    for name, all_seeds in seeds.items():
        label, runs = name.replace("3_3", "3 + 3").replace("_", " "), []
        for seed, right in enumerate(all_seeds):
            percent = 100 * sum(right) / len(right)
            runs.append(SimpleNamespace(seed=seed, right=right, percent=percent, questions="same"))
        mean = sum(run.percent for run in runs) / len(runs)
        seconds = {"LoRA 20": 1000, "LoRA 4": 200}.get(label, 180)
        made[label] = SimpleNamespace(runs=runs, mean=mean, seconds=seconds)
    return made


# Numbers


def test_wilson_by_hand_and_by_scipy():
    # 8 of 10: (0.8 + z2/20 -+ z sqrt(0.016 + z2/400)) / (1 + z2/10) with z2 = 3.8415
    assert report.wilson(8, 10) == pytest.approx((49.016, 94.332), abs=1e-3)
    scipys = binomtest(2785, 3270).proportion_ci(method="wilson")
    assert report.wilson(2785, 3270) == pytest.approx([100 * end for end in scipys])


@pytest.mark.parametrize("only_a, only_b, p", [(0, 0, 1), (6, 0, 2 / 64), (0, 5, 2 / 32), (8, 2, 112 / 1024)])
def test_mcnemar_by_hand(only_a, only_b, p):
    """Two-sided binomial test of the questions that changed: 2 (1 + 10 + 45) / 2**10 for 8 and 2."""
    a, b = answers(only_a, only_b, 20), answers(0, only_a, only_b + 20)
    found = report.compare(methods(A=[a], B=[b]), "A", "B")
    assert (found.only_a, found.only_b, found.seeds) == (only_a, only_b, 1)
    assert found.p == pytest.approx(p) and found.points == pytest.approx(100 * (only_a - only_b) / len(a))
    assert found.interval is None, "one seed has no spread"


def test_the_interval_over_seeds_by_hand():
    """Differences of 10, 20, 30 points: 20 -+ 4.303 * 10 / sqrt(3), t with two degrees of freedom."""
    pair = methods(A=[answers(6, 4), answers(7, 3), answers(8, 2), answers(9)], B=[answers(5, 5)] * 3)
    found = report.compare(pair, "A", "B")
    half = 4.302653 * 10 / sqrt(3)
    assert found.interval == pytest.approx((20 - half, 20 + half), abs=1e-3)
    assert (found.seeds, found.accuracies) == (3, pytest.approx([70, 50])), "the fourth seed is not paired"
    assert found.p == pytest.approx(2 / 2**6), "six of thirty answers changed, all one way"
    assert report.compare(methods(A=[answers(6, 4)] * 3, B=[answers(5, 5)] * 3), "A", "B").interval is None
    assert report.compare(pair, "A", "C") is None


def test_the_papers_totals(tmp_path):
    page = " ".join(report_on(tmp_path)[0].split())
    # sqrt(0.8505 * 0.1495 * 3270) = 20.4; 1.96 sqrt(2) times that is 56.5
    assert "standard error of 0.62 points (20 questions)" in page and "differ by 57 questions" in page
    assert "HEFT 3 + 3 is 4 questions above LoRA 20, its HEFT 20 + 20 is 14 above" in page
    assert {key: getattr(heft, key) for key in report.PAPER["settings"]} == report.PAPER["settings"]


# The statement: three seeds of ten questions
LEVEL = [answers(5, 5), answers(6, 4), answers(5, 5)]
AHEAD = [answers(6, 4), answers(8, 2), answers(8, 2)]  # than LEVEL by 10, 20, 30 points; 20 -+ 24.84
FAR = [answers(10), answers(9, 1), answers(10)]  # ahead of LEVEL by 50, 30, 50 points; 43.33 -+ 28.68


SAYS = [
    (AHEAD, LEVEL, FAR, " HEFT 3 + 3 (73.33 %) takes 18 % of the training time of LoRA 20 (53.33 %), LoRA 4"),
    (AHEAD, LEVEL, FAR, "4 (96.67 %) takes 20 %. In points (95 % intervals, seeds: 3): HEFT 3 + 3 minus"),
    (AHEAD, LEVEL, LEVEL, "minus LoRA 20 +20.00 (-4.84 to +44.84), LoRA 4 minus LoRA 20 +0.00 (none), HEFT"),
    (AHEAD, LEVEL, LEVEL, "HEFT 3 + 3 minus LoRA 4 +20.00 (-4.84 to +44.84). No difference is measurable."),
    (FAR, LEVEL, AHEAD, "+43.33 (+14.65 to +72.02), LoRA 4"),
    (FAR, LEVEL, AHEAD, "). Measurable: the first. The"),
    (LEVEL, FAR, AHEAD, "). Measurable: the first. The"),
    (FAR, LEVEL, LEVEL, "). Measurable: the first and the third. The"),
    (FAR, LEVEL[:1], [], "intervals, seeds: 1): HEFT 3 + 3 minus LoRA 20 +50.00 (none). No difference is"),
    (FAR, LEVEL[:2], LEVEL, "95 % intervals, seeds: 2 to 3)"),
    (FAR, LEVEL[:2], LEVEL, "HEFT 3 + 3 (95.00 %) takes 18 % of the training time of LoRA 20 (55.00 %)"),
    (FAR, [], LEVEL, "open whether HEFT 3 + 3 matches LoRA 20. HEFT 3 + 3 (96.67 %) takes 90 % of the train"),
    ([], [], [], "it is open whether HEFT 3 + 3 matches LoRA 20. The paper's model"),
]


@pytest.mark.parametrize("heft_3, lora_20, lora_4, says", SAYS)
def test_the_statement(heft_3, lora_20, lora_4, says):
    given = {"HEFT_3_3": heft_3, "LoRA_20": lora_20, "LoRA_4": lora_4}
    small = methods(**{name: seeds for name, seeds in given.items() if seeds})
    alone, paper = (report.statement(small, seven) for seven in ({}, methods(HEFT_3_3=FAR, LoRA_20=LEVEL)))
    assert says in alone and alone.endswith("The paper's model has not been run.")
    assert paper.startswith("With Llama-2-7b-chat on BoolQ, HEFT 3 + 3 (96.67 %) takes 18 %")
    assert "not been run" not in paper and "SmolLM2" not in paper
    assert len(alone.split()) <= 90


# Runs


def test_damaged_and_foreign_files_are_named_and_skipped(tmp_path, capsys):
    good = write(tmp_path, 3, 0, answers(1, 1)).read_text()
    for name, text, reason in (
        ("torn", good[:50], "is not a complete result (JSONDecodeError"),
        ("foreign", '{"a": 1}', "is not a complete result"),
        ("list", "[1, 2]", "is not a complete result"),
        ("old", good.replace('"FORMAT": 2', '"OTHER": 2'), "is not a complete result (KeyError: 'FORMAT')"),
        ("miscounted", good.replace('predictions": 1', 'predictions": 2'), "of which 1 of 2 are right"),
        ("alone", good, "has no predictions beside it"),
    ):
        path = write(tmp_path / "x", 3, 3, answers(1, 1), name=name)
        path.write_text(text)
        if name == "alone":
            path.with_suffix(".predictions.jsonl").unlink()
        page, _ = report_on(tmp_path)
        lines = page.split("## Skipped files")[1].splitlines()
        lines = [line for line in lines if f"`x/{name}.json`" in line]
        assert len(lines) == 1 and reason in lines[0] and str(tmp_path) not in page
        assert lines[0].removeprefix("- ") in capsys.readouterr().out
    assert rows(page, "Methods")["LoRA 3"][:2] == ["1", "50.00"]


DECIDING = [name for name in heft.SETTINGS if name not in NOT_DECIDING | {"EPOCHS_LORA", "EPOCHS_REFT"}]
DECIDING += ["FORMAT", "BASE_VERSION", "TRAIN_DATA", "VALIDATION_DATA"]


def pooled(folder, **changes):
    """Whether a run with these changes is put together with one of another seed."""
    write(folder, 3, 3, answers(8, 2))
    write(folder, 3, 3, answers(6, 4), 7, **changes)
    runs, skipped = report.read_runs(folder)
    assert len(runs) == 2 and not skipped
    return [len(method.runs) for method in report.methods_of(runs).values()] == [2]


@pytest.mark.parametrize("name", DECIDING)
def test_runs_that_differ_in_a_deciding_setting_are_not_pooled(tmp_path, name):
    assert not pooled(tmp_path, **{name: "another"})


@pytest.mark.parametrize("name", sorted(NOT_DECIDING - {"SEED"}))
def test_runs_that_differ_in_no_deciding_setting_are_pooled(tmp_path, name):
    assert pooled(tmp_path, **{name: "another"}, question=False)


def test_the_settings_of_an_absent_stage_and_folders_do_not_matter(tmp_path):
    write(tmp_path, 3, 0, answers(8, 2), REFT_LAYER=3)
    write(tmp_path, 3, 0, answers(6, 4), 7, BASE_MODEL="SmolLM2-135M-Instruct/", DATASET="other/reviews")
    row = rows(report_on(tmp_path)[0], "Methods")["LoRA 3"]
    # 80 and 60 %: mean 70, standard deviation sqrt(200); 180 s in both runs
    assert row == ["2", "70.00", "14.14", "60.00 (7), 80.00 (42)", "70.0 / 0.0", "180"]


def test_format_3_has_one_value_for_each_part_of_a_run(tmp_path):
    for seed, reft, tokens in ((1, 3, 512), (2, 3, 512), (3, 3, 1024), (1, 0, 512)):
        parts = {"lora": tokens, "evaluation": 512} | ({"reft": 512} if reft else {})
        changes = {key: dict.fromkeys(parts, 1.0) for key in ("device", "peak_memory_gb", "versions")}
        changes |= {"FORMAT": 3, "TOKENS_PER_MICROBATCH": 512, "tokens_per_microbatch": parts}
        write(tmp_path, 3, reft, answers(9, 1), seed, **changes)
    page, details = report_on(tmp_path)
    seeds = {label: row[0] for label, row in rows(page, "Methods").items()}
    assert (seeds["HEFT 3 + 3"], seeds["LoRA 3"], len(seeds)) == ("2", "1", 4)
    assert rows(details, report.REVIEWS)["HEFT 3 + 3, tokens_lora=1024"][0] == "1"


def test_a_repeated_run_counts_once(tmp_path):
    write(tmp_path, 3, 0, answers(8, 2), name="lora3-reft0")
    write(tmp_path, 3, 0, answers(6, 4), name="lora3-reft0-again")
    assert rows(report_on(tmp_path)[0], "Methods")["LoRA 3"][:2] == ["1", "80.00"]


def test_only_the_same_questions_are_compared(tmp_path):
    write(tmp_path, 3, 3, answers(9, 1), question=None)
    write(tmp_path, 3, 0, answers(3, 7))
    write(tmp_path, 0, 3, answers(3, 7), truth="No")
    write(tmp_path, 0, 0, answers(0, 10), MAX_TRAIN_SAMPLES=5, TRAIN_DATA="none")
    page, details = report_on(tmp_path)
    compared = rows(page, "Comparisons")
    first = "Does LoReFT improve on LoRA 3?"
    assert compared[first] == ["HEFT 3 + 3", "LoRA 3", "+60.00", "none", "1", "6", "0", "0.031"]
    assert list(compared)[2:] == [first] and "base model" not in rows(page, "Methods")
    assert rows(details, report.REVIEWS)["base model"][1] == "0.00"


def test_other_settings_go_to_the_details(tmp_path):
    for seed in (1, 2):
        write(tmp_path, 3, 3, answers(8, 2), seed)
    write(tmp_path, 3, 3, answers(2, 8), 1, name="layer", REFT_LAYER=5)
    page, details = report_on(tmp_path)
    assert rows(page, "Methods")["HEFT 3 + 3"][0] == "2" and "reft_layer" not in page
    assert rows(details, report.REVIEWS)["HEFT 3 + 3, reft_layer=5"][1] == "20.00"
    assert "| HEFT 3 + 3, reft_layer=5 | HEFT 3 + 3 | -60.00 | none | 1 | 0 | 6 | 0.031 |" in details


def test_any_two_runs_of_a_folder_are_compared(tmp_path):
    write(tmp_path, 5, 2, answers(9, 1), DATASET="mine")
    write(tmp_path, 1, 0, answers(6, 4), DATASET="mine")
    _, details = report_on(tmp_path)
    assert "| Do they differ? | HEFT 5 + 2 | LoRA 1 | +30.00 | none | 1 | 3 | 0 | 0.25 |" in details


def test_smoke_runs_are_kept_apart(tmp_path):
    write(tmp_path, 3, 3, answers(8, 2), SMOKE=True)
    write(tmp_path / "smoke", 3, 0, answers(6, 4))
    page, details = report_on(tmp_path)
    assert "80.00" not in page and "60.00" not in page
    smoke = rows(details, "smoke runs")
    assert {"60.00", "80.00"} <= {row[1] for row in smoke.values()}


def test_7b_is_the_papers_model_and_experiment_only(tmp_path):
    paper, right = {"BASE_MODEL": heft.BASE_MODEL, "DATASET": heft.DATASET}, answers(3000, 270)
    write(tmp_path, 20, 0, right)
    write(tmp_path, 0, 20, right, **paper | {"BASE_MODEL": "x/Llama-2-13b-chat-hf"})
    write(tmp_path, 20, 20, answers(290, 10), **paper)
    write(tmp_path, 3, 3, right, name="other", **paper, LORA_RANK=4)
    table = rows(report_on(tmp_path)[0], "Table 1")
    assert [table[label][1] for label in report.ROWS] == [""] * 4
    for seed, right in ((42, 2700), (7, 2750)):
        write(tmp_path, 3, 3, answers(right, 3270 - right), seed, seconds=1000, **paper)
    # 82.57 and 84.10 % of 3,270; 3003 s are 50 minutes
    write(tmp_path, 3, 0, answers(2700, 570), **paper)
    page, details = report_on(tmp_path)
    assert "| HEFT 3 + 3 | LoRA 3 | +0.00 | none | 1 | 0 | 0 | 1 |" in details.split("## Llama-2-7b")[1]
    table = rows(page, "Table 1")
    assert table["HEFT 3 + 3"][:2] == ["85.17 %, 1:23", "83.33 % (Yes 83 %), 0:50"]
    assert [table[label][1] for label in report.ROWS].count("") == 3


def test_table_1_says_what_is_missing(tmp_path):
    for seed in (1, 2, 3):
        write(tmp_path, 3, 3, answers(9, 1), seed, truth="No")
    write(tmp_path, 20, 0, answers(8, 2), 1)
    laptop = {label: cells[2] for label, cells in rows(report_on(tmp_path)[0], "Table 1").items()}
    assert laptop["HEFT 3 + 3"] == "90.00 % (Yes 10 %), 0:03"
    assert laptop["LoRA 20"] == "80.00 % (Yes 80 %), 0:20; seeds missing: 2"
    assert laptop["LoReFT 20"] == laptop["HEFT 20 + 20"] == "not run yet; seeds missing: 3"


def test_a_timing_run_gives_the_seconds_per_step(tmp_path):
    """60 s and 1 s for two steps each; it is no method. Runs of other data keep their own, of the fastest."""
    write(tmp_path, 3, 3, answers(8, 2), seconds=999)
    write(tmp_path / "timing", 1, 1, answers(2, 1))
    for seed, seconds in ((1, 999), (2, 500)):
        write(tmp_path, 3, 0, answers(8, 2), seed, seconds=seconds, DATASET="boolq")
    write(tmp_path, 3, 3, answers(8, 2), name="other", seconds=332, REFT_LAYER=5)
    page, details = report_on(tmp_path)
    assert rows(page, "Methods")["HEFT 3 + 3"][-1] == "183" and rows(page, "BoolQ")["LoRA 3"][-1] == "1500"
    assert "HEFT 1 + 1" not in page
    assert rows(details, report.REVIEWS)["HEFT 3 + 3, reft_layer=5"][-1] == "999", (
        "another layer, another pace"
    )


def test_trials_of_learning_rates_stand_apart(tmp_path):
    for rate, right in ((0.01, 7), (0.005, 9), (0.002, 8)):
        changes = {"DATASET": "set_aside", "LEARNING_RATE_REFT": rate}
        write(tmp_path / "tuning", 0, 3, answers(right, 10 - right), 5, str(rate), **changes)
    page, details = report_on(tmp_path)
    tried = "0.005: 90.00 (Yes 90 %); 0.002: 80.00 (Yes 80 %); 0.01: 70.00 (Yes 70 %)"
    trials = rows(page, "Learning rates")["LoReFT 3"]
    assert trials == ["SmolLM2-135M-Instruct on set_aside", "5", "10", tried]
    assert page.count("LoReFT 3 |") == 1 and "set_aside" not in details


def test_what_always_yes_scores_on_boolq(tmp_path):
    write(tmp_path, 3, 3, answers(7, 3), DATASET="boolq")
    page = report_on(tmp_path)[0]
    assert "Always answering Yes scores 100.00 %." in page
    assert rows(page, "BoolQ")["HEFT 3 + 3"][4] == "70.0 / 0.0"


def test_what_holds_for_the_stored_runs_only_is_not_said_of_others(tmp_path):
    write(tmp_path, 3, 3, answers(7, 3))
    others = report_on(tmp_path)[0]
    (tmp_path / "template.md").touch()
    own = report_on(tmp_path)[0]
    for text in ("rounded to 4 bits", "(640 to train on", "no method is shown", "# How to reproduce"):
        assert text in own and text not in others
    assert "<!--" not in own + others and "\n## BoolQ\n" in others


# The files


def test_the_figure_shows_the_runs(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(report, "mark", lambda axes, label, *numbers: shown.append((label, *numbers)))
    for seed, right in ((1, 8), (2, 6)):
        write(tmp_path, 3, 3, answers(right, 10 - right), seed)
        write(tmp_path, 4, 0, answers(right, 10 - right), seed)
    report.write_report(tmp_path)
    assert [label for label, *_ in shown[:4]] == list(report.ROWS) and shown[2][1:] == (83 / 60, 85.17)
    assert shown[4:] == [("LoRA 4", 4.0, 70.0, [80.0, 60.0]), ("HEFT 3 + 3", 183 / 60, 70.0, [80.0, 60.0])]


def test_help_is_the_docstring(tmp_path):
    shown = subprocess.run([sys.executable, report.__file__, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and report.__doc__.strip() in shown.stdout
    wrong = subprocess.run([sys.executable, report.__file__, "none"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "is not a folder" in wrong.stderr


def test_the_stored_page_follows_from_the_stored_runs_byte_for_byte(tmp_path):
    """Twice in a row. (With runs of one's own in results, the page is another.)"""
    command = ["git", "status", "--porcelain", "results"]
    state = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if state.returncode or state.stdout:
        pytest.skip("no clean checkout")
    shutil.copytree(ROOT / "results", tmp_path / "results")
    for file in (tmp_path / "results/smoke").glob("*.json*"):  # a user's own smoke runs, which git ignores
        file.unlink()
    for _ in range(2):
        report.write_report(tmp_path / "results")
        for name in ("README.md", "details.md", "figure1.png", "figure1.svg"):
            assert (tmp_path / "results" / name).read_bytes() == (ROOT / "results" / name).read_bytes(), name
