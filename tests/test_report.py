"""results/report.py: its numbers by hand, its sentences on made-up results of every kind, its pages."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from math import sqrt

import numpy as np
import pytest
import report
from conftest import ROOT
from scipy.stats import t

# What a made-up result says it was made with
SETTINGS = {
    "MAX_TRAIN_SAMPLES": 0,
    "MAX_EVAL_SAMPLES": 0,
    "DTYPE": "bfloat16",
    "LORA_RANK": 8,
    "LORA_ALPHA": 32,
}
SETTINGS |= {"LORA_DROPOUT": 0.05, "LORA_TARGETS": "", "LEARNING_RATE_LORA": 0.004, "REFT_LAYER": 15}
SETTINGS |= {"REFT_RANK": 4, "LEARNING_RATE_REFT": 0.005, "EXAMPLES_PER_STEP": 32, "MAX_LENGTH": 2048}
SETTINGS |= {"MAX_NEW_TOKENS": 5, "TOKENS_PER_MICROBATCH": 512}
MODEL = {"BASE_MODEL": "hub/SmolLM2-135M-Instruct", "DATASET": "data/reviews/"}
PAPER = {"BASE_MODEL": "meta-llama/Llama-2-7b-chat-hf", "DATASET": "google/boolq"}
PAPER |= {"LEARNING_RATE_LORA": 2e-4, "LEARNING_RATE_REFT": 2e-4}
OTHER = {"PUSH_TO_HUB": False, "OUTPUT_DIR": "output", "RESULTS_DIR": "results", "SMOKE": False}
OLD = {
    "FORMAT": 2,
    "BASE_VERSION": "b",
    "TRAIN_DATA": "t",
    "VALIDATION_DATA": "v",
    "STAGE_1": "1",
    "STAGE_2": "2",
}
NEW = {"CODE_OF_STAGES": "c1", "CODE_OF_EVALUATION": "c2", "BASE_MODEL_FILES": "b", "TRAIN_DATA": "t"}
NEW |= {"VALIDATION_DATA": "v"}


def answers(*counts):
    """answers(3, 2): three right, two wrong, and so on."""
    right = []
    for number, count in enumerate(counts):
        right += [number % 2 == 0] * count
    return right


def write(folder, lora, reft, right, seed=42, name=None, new=False, truth="Yes", question="q", **changes):
    """Write a run as heft_finetuning.py does, of the newer or an older edition. Changes in capitals are what
    decides it. Returns the result's path."""
    capitals = {key: changes.pop(key) for key in list(changes) if key.isupper()}
    deciding = SETTINGS | {"SEED": seed, "EPOCHS_LORA": lora, "EPOCHS_REFT": reft}
    seconds = changes.pop("seconds", 60.0)
    result = {"lora_epochs": lora, "reft_epochs": reft, "num_validation_samples": len(right)}
    result |= {"correct_predictions": sum(right), "accuracy": f"{100 * sum(right) / len(right):.2f}%"}
    result["seconds"] = {"lora": seconds * lora, "reft": 1.0 * reft, "evaluation": 1.0}
    result["loss"] = {"lora": [1.0] * 2 * lora, "reft": [1.0] * 2 * reft}
    if new:
        made_with = deciding | NEW | capitals | {"weights": {"lora": f"w{seed}", "reft": None}}
        for key in MODEL:
            made_with.pop(key, None)
        result["settings"] = deciding | MODEL | OTHER | capitals | {"TAG": capitals.get("TAG", "")}
        result |= {"made_with": made_with, "device": {"lora": "GPU"}, "peak_memory_gb": {"lora": 1.0}}
        result |= {"versions": {"lora": {"torch": "2"}}, "tokens_per_microbatch": {"lora": 512}}
    else:
        result["settings"] = deciding | MODEL | OTHER | OLD | capitals
        result |= {"device": "GPU", "peak_memory_gb": 1.0, "versions": {"torch": "1"}}
    path = folder / f"{name or f'lora{lora}-reft{reft}-seed{seed}'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | {"commit": "c", "script_sha256": "s"} | changes))
    with path.with_suffix(".predictions.jsonl").open("w") as file:
        for ok in right:
            said = truth if ok else {"Yes": "No", "No": "Yes"}[truth]
            row = {"answer": truth, "prediction": said, "text": "\u2028\x85"}
            row |= {"question": question} if question else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def rows(page, title):
    """The rows of all tables of a section as lists, by their first cell."""
    text = page.split(f"## {title}\n")[1].split("\n## ")[0]
    found = {}
    for line in text.splitlines():
        if line.startswith("| "):
            first, *cells = line.strip("| ").split(" | ")
            found.setdefault(first, [cell.strip() for cell in cells])
    return found


def folder_page(folder):
    """What report.py prints of a folder, without the title."""
    return report.sections_text(*report.read_folder(folder))


def run(*arguments, cwd=ROOT):
    """report.py as a user types it."""
    command = [sys.executable, str(ROOT / "results/report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture(autouse=True)
def no_figure(request, monkeypatch):
    """Drawing takes seconds: only the tests of the figure draw it."""
    if "figure" not in request.node.name and "published_page" not in request.node.name:
        monkeypatch.setattr(report, "figure_1", lambda *rows: None)


# Statistics


@pytest.mark.parametrize("only_a, only_b, p", [(0, 0, 1), (6, 0, 2 / 64), (0, 5, 2 / 32), (8, 2, 112 / 1024)])
def test_mcnemar_by_hand(only_a, only_b, p):
    """Two-sided binomial test of the questions that changed: 2 (1 + 10 + 45) / 2**10 for 8 and 2."""
    assert report.mcnemar(only_a, only_b) == pytest.approx(p)


def test_wilson_by_hand():
    # 8 of 10: (0.8 + z2/20 -+ z sqrt(0.016 + z2/400)) / (1 + z2/10) with z2 = 3.8415
    assert report.wilson(8, 10) == pytest.approx((49.016, 94.332), abs=1e-3)


def test_the_interval_of_one_seed_is_bonett_and_prices():
    """b = (20 + 1) / 102 and c = (8 + 1) / 102: b - c -+ z sqrt((b + c - (b - c)^2) / 102)."""
    differences = np.array([[1] * 20 + [-1] * 8 + [0] * 72])
    b, c, n = 21 / 102, 9 / 102, 102
    half = 1.959964 * sqrt((b + c - (b - c) ** 2) / n)
    assert report.crossed_interval(differences, [1, -1]) == pytest.approx(
        (100 * (b - c - half), 100 * (b - c + half))
    )


def test_the_interval_of_several_seeds_by_hand():
    """Two seeds, two questions and none made up: values 1 1 / 0 0. The means of the seeds are 1 and 0: t with
    one degree of freedom, 12.7062, times sqrt(0.5 / 2) is 6.3531. The questions have no variance."""
    assert report.crossed_interval(np.array([[1.0, 1], [0, 0]]), []) == pytest.approx(
        (-585.31, 685.31), abs=0.01
    )


def test_equal_differences_have_an_interval():
    differences = np.array([[1] * 6 + [0] * 94] * 3)
    low, high = report.crossed_interval(differences, [1, -1])
    # No more than one seed: (7 - 1) / 102 -+ z sqrt((8/102 - (6/102)^2) / 102)
    half = 1.959964 * sqrt((8 / 102 - (6 / 102) ** 2) / 102)
    assert (low, high) == pytest.approx((100 * (6 / 102 - half), 100 * (6 / 102 + half)))
    low, high = report.crossed_interval(np.zeros((3, 100)), [1, -1])
    assert low < 0 < high, "no difference at all"


@pytest.mark.parametrize("seeds, spread", [(1, 0.0), (3, 0.02), (12, 0.02)])
def test_the_interval_covers(seeds, spread):
    """Made-up experiments: seeds differ by `spread`, and each question favours one of the methods."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(400):
        favour = rng.normal(0, 0.05, 500)
        chance = 0.05 + np.clip(rng.normal(0, spread, (seeds, 1)) + favour, -0.05, 0.05)
        draws = rng.random((seeds, 500))
        differences = (draws < chance).astype(float) - (draws > 0.95)
        low, high = report.crossed_interval(differences, [1, -1])
        inside += low <= 0 <= high
    assert inside >= 0.93 * 400


def test_the_papers_differences():
    # sqrt(0.8517 * 0.1483 / 3270 + 0.8505 * 0.1495 / 3270) = 0.880 points
    assert report.papers_difference("HEFT 3 + 3", "LoRA 20") == pytest.approx((0.12, -1.606, 1.846), abs=0.01)
    assert report.papers_difference("HEFT 3 + 3", "LoRA 4") is None


def test_a_stored_comparison_by_other_means():
    """HEFT 3 + 3 minus LoReFT 20 on the published page, from the predictions alone."""
    folder, editions = ROOT / "results/smollm2", {}
    for file in folder.glob("*on_reviews*.json"):
        result = json.loads(file.read_text())
        settings = result["settings"]
        method = result["lora_epochs"], result["reft_epochs"]
        if (settings["REFT_LAYER"], settings["REFT_RANK"]) == (15, 4) and method in ((3, 3), (0, 20)):
            right = []
            for line in file.with_suffix(".predictions.jsonl").read_text().splitlines():
                row = json.loads(line)
                right.append(int(row["answer"] == row["prediction"]))
            edition = "pooled" if (folder / "pool.json").exists() else settings.get("FORMAT", "newer")
            editions.setdefault(edition, {}).setdefault(settings["SEED"], {})[method] = np.array(right)
    differences = []
    for seeds in editions.values():
        differences.append([found[3, 3] - found[0, 20] for found in seeds.values() if len(found) == 2])
    difference = np.array(max(differences, key=len))
    page = (ROOT / "results/README.md").read_text()
    cells = rows(page, "SmolLM2-135M-Instruct on review snippets")
    cells = cells["Is HEFT 3 + 3 better than LoReFT 20?"]
    assert cells[2] == f"{100 * difference.mean():+.2f}"
    assert cells[5:8] == [str(len(difference)), str((difference == 1).sum()), str((difference == -1).sum())]

    n, q = difference.shape[0], difference.shape[1] + 2  # two made-up questions
    padded = np.hstack([difference, np.ones((n, 1)), -np.ones((n, 1))])
    residual = padded - padded.mean(1)[:, None] - padded.mean(0)[None] + padded.mean()
    noise = (residual**2).sum() / ((n - 1) * (q - 1)) / (n * q)
    of_seeds = t.ppf(0.975, n - 1) ** 2 * padded.mean(1).var(ddof=1) / n
    of_questions = 1.959964**2 * (padded.mean(0).var() / q)
    half = sqrt(max(of_questions, of_seeds + of_questions - 1.959964**2 * noise))
    low, high = 100 * (padded.mean() - half), 100 * (padded.mean() + half)
    assert cells[3] == f"{low:+.2f} to {high:+.2f}"


# Sentences, on made-up results


def published(tmp_path):
    """The page of the runs in tmp_path/smollm2 and tmp_path/llama2."""
    report.publish(tmp_path)
    return (tmp_path / "README.md").read_text()


def finding(tmp_path):
    """The first paragraph. Signs such as + and % are no words."""
    text = published(tmp_path).split("\n\n")[1]
    assert len(re.findall(r"\S*\w\S*", text)) <= 90
    return text


def small(folder, lora, reft, accuracies, **changes):
    """Runs of the small model with these accuracies in percent, of 1,000 questions."""
    for seed, accuracy in enumerate(accuracies):
        write(folder / "smollm2", lora, reft, answers(10 * accuracy, 1000 - 10 * accuracy), seed, **changes)


def seven(folder, lora, reft, accuracy, seed=42, **changes):
    correct = round(32.7 * accuracy)
    write(folder / "llama2", lora, reft, answers(correct, 3270 - correct), seed, new=True, **PAPER | changes)


MODEL_OF_PAPER = "The paper's model (Llama-2-7b-chat, BoolQ) has"


def test_one_seed_far_apart(tmp_path):
    small(tmp_path, 3, 3, [90])
    small(tmp_path, 4, 0, [81])
    small(tmp_path, 20, 0, [81])
    small(tmp_path, 0, 20, [99])
    text = finding(tmp_path)
    assert text.startswith(f"{MODEL_OF_PAPER} not been run. Instead: SmolLM2-135M on film-review snippets, ")
    for part in (
        "snippets, 1 seed, learning rates 20× (LoRA), 25× (LoReFT) the paper's. HEFT 3 + 3 (epochs)",
        "below LoReFT 20 (-9.00 points, exact McNemar p < 0.0001; paper +1.81). It is",
        "It is better than LoRA 4, a similar-time control (+9.00, p < 0.0001)",
        "). It exceeds LoRA 20 (+9.00, p < 0.0001; paper +0.12). LoRA 4 falls",
        "LoRA 4 falls below LoReFT 20 (-18.00, p < 0.0001). One seed compares",
        "One seed compares runs, not methods.",
    ):
        assert part in text


def test_one_seed_equal(tmp_path):
    small(tmp_path, 3, 3, [90])
    small(tmp_path, 4, 0, [90])
    text = finding(tmp_path)
    assert "HEFT 3 + 3 (epochs) is not shown to differ from LoRA 4, a similar" in text
    assert "(+0.00 points, exact McNemar p = 1)." in text
    assert "LoRA 20" not in text and "LoReFT 20" not in text and "interval" not in text


def test_one_seed_where_the_interval_and_the_exact_test_disagree(tmp_path):
    """Of 1,000 questions 12 and 3 changed: p = 0.035; of 11 and 3, p = 0.057. Both intervals are above 0."""
    write(tmp_path / "smollm2", 3, 3, answers(511, 489))
    for only_heft, words in (
        (12, "exceeds LoRA 20"),
        (11, "is not shown to exceed LoRA 20"),
    ):
        right = answers(511 - only_heft, 489 + only_heft)
        right[600:603] = [True] * 3
        write(tmp_path / "smollm2", 20, 0, right)
        runs = report.methods_of(report.read_folder(tmp_path / "smollm2")[0])
        assert report.compare(runs["HEFT 3 + 3"], runs["LoRA 20"]).low > 0
        assert f"HEFT 3 + 3 (epochs) {words} (+0." in finding(tmp_path)


def test_three_seeds_with_equal_differences(tmp_path):
    small(tmp_path, 3, 3, [90, 88, 92])
    small(tmp_path, 4, 0, [81, 79, 83])
    text = finding(tmp_path)
    found = re.search(r"is better than LoRA 4, .*? \(\+9.00 points, 95 % interval \+(\S+) to \+(\S+)\)", text)
    assert float(found[1]) < 8 and float(found[2]) > 10
    assert "snippets, 3 seeds, learning " in text


def test_three_equal_seeds(tmp_path):
    for lora, reft in ((3, 3), (4, 0), (20, 0), (0, 20)):
        small(tmp_path, lora, reft, [90, 88, 92])
    text = finding(tmp_path)
    assert text.count(" is not shown to ") == 4 and text.count("+0.00") == 4
    assert text.count("interval") == 1 and "McNemar" not in text


def test_three_seeds_that_disagree(tmp_path):
    small(tmp_path, 3, 3, [90, 80, 90])
    small(tmp_path, 20, 0, [80, 82, 80])
    assert "HEFT 3 + 3 (epochs) is not shown to exceed LoRA 20 (+6.00 points, 95 % interval -" in finding(
        tmp_path
    )


def test_twelve_seeds_and_three(tmp_path):
    small(tmp_path, 3, 3, [90] * 6 + [91] * 6)
    small(tmp_path, 4, 0, [91] * 6 + [92] * 6)
    small(tmp_path, 0, 20, [80] * 3)
    text = finding(tmp_path)
    assert "snippets, 3 to 12 seeds, learning " in text
    assert "HEFT 3 + 3 (epochs) exceeds LoReFT 20 (+10.00 points, 95 % interval +" in text
    assert "It is worse than LoRA 4, a similar-time control (-1.00, -" in text
    small(tmp_path, 20, 0, [88])
    assert "It exceeds LoRA 20 (+2.00 points, exact McNemar p < 0.0001; paper" in finding(tmp_path)


def test_heft_of_the_papers_model_alone(tmp_path):
    seven(tmp_path, 3, 3, 85)
    small(tmp_path, 3, 3, [90])
    small(tmp_path, 20, 0, [90])
    text = finding(tmp_path)
    words = "been run, but HEFT 3 + 3 cannot be compared yet. Instead: SmolLM2-135M on film-review"
    assert text.startswith(f"{MODEL_OF_PAPER} {words}")
    page = published(tmp_path)
    assert rows(page, "Llama-2-7b-chat on BoolQ")["HEFT 3 + 3"][2].startswith("85.02 (")
    assert (
        "| HEFT 3 + 3 | 85.17 | 1:23 | 85.02 (83.8 to 86.2) | 1 | 0:03 | 90.00 (88.0 to 91.7) | 1 | 0.00"
        in page
    )


def test_two_rows_of_the_papers_model(tmp_path):
    seven(tmp_path, 3, 3, 85)
    seven(tmp_path, 20, 0, 86)
    words = "been run: 1 seed. HEFT 3 + 3 (epochs) falls below LoRA 20"
    numbers = "(-0.98 points, exact McNemar p < 0.0001; paper +0.12)"
    assert finding(tmp_path) == f"{MODEL_OF_PAPER} {words} {numbers}. One seed compares runs, not methods."


def test_all_rows_of_the_papers_model_with_lora_4(tmp_path):
    for lora, reft, accuracy in ((3, 3, 85), (20, 0, 85), (0, 20, 83), (20, 20, 86), (4, 0, 84)):
        seven(tmp_path, lora, reft, accuracy)
    small(tmp_path, 3, 3, [90])
    small(tmp_path, 4, 0, [90])
    text = finding(tmp_path)
    assert "has been run: 1 seed. HEFT 3 + 3 (epochs) exceeds LoReFT 20 (+2.02" in text
    assert "It is better than LoRA 4, a similar" in text and "SmolLM2" not in text
    assert "It is not shown to exceed LoRA 20 (+0.00, p = 1; paper +0.12)." in text
    assert "| LoRA 4 | not in the paper | 1:22, computed | 84.01 (" in published(tmp_path)


def test_the_papers_model_with_other_settings_is_not_the_papers_experiment(tmp_path):
    seven(tmp_path, 3, 3, 85, LORA_RANK=4)
    seven(tmp_path, 20, 0, 85, TAG="clip01")
    write(tmp_path / "llama2", 20, 20, answers(290, 10), new=True, **PAPER)
    assert finding(tmp_path) == f"{MODEL_OF_PAPER} been run, but HEFT 3 + 3 cannot be compared yet."
    assert "lora_rank=4" in (tmp_path / "details.md").read_text()


def test_the_papers_model_on_other_questions_has_not_run_the_papers_experiment(tmp_path):
    for lora in (3, 20):
        write(tmp_path / "llama2", lora, 3, answers(290, 10), new=True, **PAPER)
        seven(tmp_path, lora, 3, 85, DATASET="my_data", name=f"mine{lora}")
    assert finding(tmp_path) == f"{MODEL_OF_PAPER} not been run."


def test_heft_with_one_seed_and_the_others_with_three(tmp_path):
    small(tmp_path, 3, 3, [90])
    small(tmp_path, 4, 0, [90, 91, 92])
    small(tmp_path, 0, 20, [80, 81, 82])
    text = finding(tmp_path)
    assert "snippets, 1 to 3 seeds, learning " in text
    assert ", a similar-time control (+0.00, p = 1)." in text
    assert re.search(
        r"LoRA 4 exceeds LoReFT 20 \(\+10.00 points, 95 % interval \+\S+ to \+\S+\)\. One seed", text
    )


def test_lora_20_with_a_rate_of_its_own(tmp_path):
    for rate, accuracy in ((0.001, 80), (0.0005, 70), (0.004, 60)):
        trial = {"DATASET": "reviews_tuning", "LEARNING_RATE_LORA": rate, "name": f"tuning/{rate}"}
        small(tmp_path, 20, 0, [accuracy], new=True, **trial)
    small(tmp_path, 20, 0, [85])
    small(tmp_path, 3, 3, [90])
    assert "| LoRA 20 | 85.05 | 6:52 | 85.00" in published(tmp_path)
    small(tmp_path, 20, 0, [95], new=True, LEARNING_RATE_LORA=0.001, name="own")
    page = published(tmp_path)
    assert "| LoRA 20 | 85.05 | 6:52 | 95.00" in page
    assert "rates 20× (LoRA), 5× (LoRA 20), 25× (LoReFT) the paper's." in page
    assert "below LoRA 20 (-5.00* points, exact McNemar p < 0.0001; pap" in page
    assert "*Unequal code." in page
    trials = page.split("## Learning rates")[1]
    assert re.findall(r"(0\.\d+) \| 1 \| (\d\d)", trials) == [
        ("0.001", "80"),
        ("0.0005", "70"),
        ("0.004", "60"),
    ]
    assert "| Does LoReFT improve on LoRA 20? |" not in page
    small(tmp_path, 20, 20, [90])
    with_both_rates = published(tmp_path)  # at another rate it would be the rates that are compared
    assert "| Does LoReFT improve on LoRA 20? | HEFT 20 + 20 | LoRA 20 | +5.00 |" in with_both_rates
    assert "| Does HEFT 3 + 3 exceed LoRA 20? | HEFT 3 + 3 | LoRA 20, edition" in with_both_rates
    for file in tmp_path.glob("**/lora20-reft0*"):
        if file.parent.name == "smollm2" and "own" not in file.name:
            file.unlink()
    assert "| Does LoReFT improve on LoRA 20? |" not in published(tmp_path)
    found = rows(page, "SmolLM2-135M-Instruct on review snippets")
    assert found["LoRA 20"][2][:5] == "85.00" and "LoRA 20, edition=newer, learning_rate_lora=0.001" in found


def test_a_rate_of_its_own_counts_in_another_precision_too(tmp_path):
    trial = {"DATASET": "reviews_tuning", "LEARNING_RATE_LORA": 0.001, "DTYPE": "float32"}
    small(tmp_path, 20, 0, [80], new=True, **trial, name="tuning/own")
    small(tmp_path, 3, 3, [90], new=True)
    small(tmp_path, 20, 0, [85], new=True)
    small(tmp_path, 20, 0, [88], new=True, LEARNING_RATE_LORA=0.001, DTYPE="float32", name="own")
    page = published(tmp_path)
    assert "| LoRA 20 | 85.05 | 6:52 | 88.00" in page and "exceeds LoRA 20 (+2.00*" in page
    assert "20× (LoRA), 5× (LoRA 20), 25×" in page and "*Unequal precision." in page
    small(tmp_path, 4, 0, [91], new=True, LORA_RANK=4)
    assert "| LoRA 4 | not in the paper" in page and "control" not in finding(tmp_path)


def test_editions_are_pooled_on_request_only(tmp_path):
    small(tmp_path, 3, 3, [90])
    small(tmp_path, 3, 0, [90])
    write(tmp_path / "smollm2", 3, 3, answers(920, 80), 7, new=True)
    section = "SmolLM2-135M-Instruct on review snippets"
    found = rows(published(tmp_path), section)
    assert (found["HEFT 3 + 3"][1], found["HEFT 3 + 3, edition=newer"][1]) == ("1", "1")
    small(tmp_path, 3, 3, [89], new=True, name="repeated/x")
    (tmp_path / "smollm2/pool.json").write_text('{"why": "All predictions are equal."}')
    page = published(tmp_path)
    assert rows(page, section)["HEFT 3 + 3"][1] == "2" and "All predictions are equal." in page


# Folders


def test_a_folder_is_printed_and_nothing_else(tmp_path):
    write(tmp_path, 5, 2, answers(9, 1), new=True, DATASET="mine")
    write(tmp_path / "below", 1, 0, answers(6, 4), new=True, DATASET="mine")
    shown = run(tmp_path)
    assert shown.returncode == 0 and not shown.stderr
    page = shown.stdout
    assert page.startswith(
        f"# Results in {tmp_path}\n\n## SmolLM2-135M-Instruct on mine\n\n| method | learning rates | seeds |"
    )
    found = rows(page, "SmolLM2-135M-Instruct on mine")
    assert found["LoRA 1"][2] == "60.00 (31.3 to 83.2)" and "computed" not in page
    assert (
        "| HEFT 5 + 2 | LoRA 1 | +30.00 | -8.67 to +58.67 | 1 | 3 | 0 | 0.25 | not shown to differ |" in page
    )
    for text in ("paper", "Skipped", "? %", "Not run", "Llama"):
        assert text not in page
    assert len(list(tmp_path.glob("*"))) == 3, "nothing is written"


def test_an_empty_folder(tmp_path):
    assert run(tmp_path).stdout == f"# Results in {tmp_path}\n\nNo results.\n"


def test_no_page_of_others_is_overwritten(tmp_path):
    write(tmp_path, 3, 0, answers(6, 4))
    page = tmp_path / "report.md"
    for _ in range(2):  # its own it writes again
        assert run(tmp_path, "--write").returncode == 0
        assert page.read_text().startswith(report.MARKER)
    page.write_text("mine\n")
    refused = run(tmp_path, "--write")
    assert (refused.returncode, page.read_text()) == (2, "mine\n")
    assert refused.stderr.startswith("report.py: error: ") and refused.stderr.count("\n") == 1
    (tmp_path / "README.md").write_text("mine\n")
    with pytest.raises(ValueError, match="not written by this program"):
        report.publish(tmp_path)


def test_a_reader_who_leaves(tmp_path):
    write(tmp_path, 3, 0, answers(6, 4))
    read, end = os.pipe()
    os.close(read)
    command = [sys.executable, report.__file__, str(tmp_path)]
    done = subprocess.run(command, stdout=end, stderr=subprocess.PIPE, text=True)
    os.close(end)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def test_damaged_and_foreign_files_are_named_and_skipped(tmp_path):
    good = write(tmp_path, 3, 0, answers(1, 1)).read_text()
    write(tmp_path / ".hidden", 3, 3, answers(1, 1)).write_text("{")
    for name, text, reason in (
        ("torn", good[:50], "is not a complete result (JSONDecodeError"),
        ("foreign", '{"a": 1}', "is not a complete result"),
        ("list", "[1, 2]", "is not a complete result"),
        ("old", good.replace('"SEED": 42', '"OTHER": 2'), "is not a complete result (KeyError: 'SEED')"),
        ("miscounted", good.replace('predictions": 1', 'predictions": 2'), "1 of 2 predictions are right"),
        ("alone", good, "does not exist"),
    ):
        path = write(tmp_path / "x", 3, 3, answers(1, 1), name=name)
        path.write_text(text)
        if name == "alone":
            path.with_suffix(".predictions.jsonl").unlink()
        page = folder_page(tmp_path)
        (line,) = [line for line in page.splitlines() if line.startswith(f"- x/{name}.")]
        assert reason in line and str(tmp_path) not in line
    assert rows(page, "SmolLM2-135M-Instruct on reviews")["LoRA 3"][1] == "1" and "hidden" not in page


def labels(folder):
    runs, skipped = report.read_folder(folder)
    assert not skipped
    return list(runs.groupby("method").seed.nunique().items())


DECIDING = [(name, False) for name in SETTINGS | OLD if name not in ("STAGE_1", "STAGE_2")]
DECIDING += [(name, True) for name in SETTINGS | NEW if name != "TOKENS_PER_MICROBATCH"]


@pytest.mark.parametrize("name, new", DECIDING)
def test_runs_that_differ_in_what_decides_are_not_pooled(tmp_path, name, new):
    write(tmp_path, 3, 3, answers(8, 2), new=new)
    write(tmp_path, 3, 3, answers(6, 4), 7, new=new, **{name: "another"})
    assert len(labels(tmp_path)) == 2


def test_runs_that_differ_in_seed_weights_and_folders_are_pooled(tmp_path):
    write(tmp_path, 3, 3, answers(8, 2), new=True)
    write(tmp_path, 3, 3, answers(6, 4), 7, new=True)
    assert labels(tmp_path) == [("HEFT 3 + 3", 2)]
    write(tmp_path, 3, 0, answers(8, 2), 1, DATASET="a/reviews")
    write(tmp_path, 3, 0, answers(6, 4), 7, OUTPUT_DIR="o", STAGE_1="x", REFT_LAYER=3)
    assert labels(tmp_path)[1] == ("LoRA 3, edition=older", 2)


def test_tags_and_settings_are_in_the_label(tmp_path):
    write(tmp_path, 3, 3, answers(8, 2), 1, new=True)
    write(tmp_path, 3, 3, answers(8, 2), 2, new=True)
    write(tmp_path, 3, 3, answers(8, 2), 1, new=True, TAG="clip01", CODE_OF_STAGES="0123456789", name="tag")
    write(tmp_path, 3, 3, answers(8, 2), 1, new=True, name="other", other_code="stages made by other code")
    write(tmp_path, 3, 3, answers(8, 2), 1, new=True, name="layer", REFT_LAYER=5)
    found = dict(labels(tmp_path))
    assert found["HEFT 3 + 3"] == 2 and found["HEFT 3 + 3, reft_layer=5"] == 1
    assert found["HEFT 3 + 3, code_of_stages=0123456789, tag=clip01"] == 1
    assert found["HEFT 3 + 3, other_code=stages made by other code"] == 1


def test_which_methods_of_a_folder_are_compared(tmp_path):
    write(tmp_path, 3, 3, answers(9, 1))
    write(tmp_path, 4, 0, answers(8, 2), LEARNING_RATE_LORA=0.1)
    assert "| HEFT 3 + 3 | LoRA 4, learning_rate_lora=0.1 | +10.00 |" in folder_page(tmp_path)
    for epochs in (1, 2, 3, 5, 6):
        write(tmp_path, epochs, 0, answers(6, 4))
    write(tmp_path, 1, 0, answers(5, 5), name="x", LEARNING_RATE_LORA=0.1)
    page = folder_page(tmp_path)
    assert (
        "| LoRA 2 | LoRA 1 |" in page
        and "| LoRA 4, learning_rate_lora=0.1 | LoRA 1, learning_rate_lora" in page
    )
    pairs = re.findall(r"^\| (.*?) \| (.*?) \| [+-]", page, re.M)
    assert {"LoRA 1", "LoRA 1, learning_rate_lora=0.1"} in map(set, pairs)
    assert len([pair for pair in pairs if "0.1" in "".join(pair)]) == 2


def test_a_second_run_of_a_seed_is_shown(tmp_path):
    write(tmp_path, 3, 0, answers(8, 2), name="a")
    write(tmp_path, 3, 0, answers(6, 4), name="b")
    row = rows(folder_page(tmp_path), "SmolLM2-135M-Instruct on reviews")["LoRA 3"]
    assert row[1] == "1" and row[3] == "80.00 (42), 60.00 (42, run 2, not counted)"


def test_only_the_same_questions_are_compared(tmp_path):
    write(tmp_path, 3, 3, answers(9, 1))
    write(tmp_path, 3, 0, answers(3, 7))
    write(tmp_path, 0, 3, answers(3, 7), truth="No")
    write(tmp_path, 20, 0, answers(3, 7), VALIDATION_DATA="another")
    page = folder_page(tmp_path)
    assert "| HEFT 3 + 3 | LoRA 3 | +60.00 |" in page and page.count("+60.00") == 1


def test_runs_in_special_folders_are_kept_apart(tmp_path):
    for folder in ("smollm2", "smoke", "a/repeated", "a"):
        write(tmp_path / folder, 3, 0, answers(6, 4))
    runs, _ = report.read_folder(tmp_path)
    model = "SmolLM2-135M-Instruct on reviews"
    assert set(runs.section) == {model, f"{model} (smollm2)", f"{model} (smoke)", f"{model} (repeated)"}


def test_a_timing_run_gives_the_computed_times(tmp_path):
    """60 s and 1 s for two steps each. Other layers have another pace, another precision has not."""
    write(tmp_path, 3, 3, answers(8, 2), seconds=999)
    write(tmp_path / "timing", 1, 1, answers(2, 1))
    write(tmp_path, 3, 3, answers(8, 2), name="other", seconds=332, REFT_LAYER=5)
    write(tmp_path, 3, 3, answers(8, 2), name="precise", seconds=332, DTYPE="float32")
    found = rows(folder_page(tmp_path), "SmolLM2-135M-Instruct on reviews")
    assert found["HEFT 3 + 3"][-2:] == ["3.0", "50"] and found["HEFT 3 + 3, reft_layer=5"][-2:] == ["", "17"]
    assert found["HEFT 3 + 3, dtype=float32"][-2:] == ["3.0", "17"]


def test_a_timing_run_of_one_stage_hides_none_of_both(tmp_path):
    """The run of LoRA alone gives no time of LoReFT."""
    write(tmp_path, 3, 3, answers(8, 2))
    write(tmp_path, 3, 0, answers(8, 2))
    write(tmp_path / "timing", 1, 0, answers(2, 1))
    section = "SmolLM2-135M-Instruct on reviews"
    found = rows(folder_page(tmp_path), section)
    assert (found["HEFT 3 + 3"][-2], found["LoRA 3"][-2]) == ("", "3.0")
    write(tmp_path / "timing", 1, 1, answers(2, 1))
    found = rows(folder_page(tmp_path), section)
    assert (found["HEFT 3 + 3"][-2], found["LoRA 3"][-2]) == ("3.0", "3.0")


@pytest.mark.parametrize("scanned", ["", "smollm2"])
def test_pooling_holds_wherever_the_scan_begins(tmp_path, scanned):
    write(tmp_path / "smollm2", 3, 3, answers(8, 2), 7)
    write(tmp_path / "smollm2", 3, 3, answers(8, 2), 42, new=True)
    (tmp_path / "smollm2/pool.json").write_text('{"why": "All predictions are equal."}')
    runs, _ = report.read_folder(tmp_path / scanned)
    assert set(runs.method) == {"HEFT 3 + 3"}


# Two files


def test_two_results(tmp_path):
    a = write(tmp_path, 3, 3, answers(95, 5), new=True)
    b = write(tmp_path, 4, 0, answers(80, 20), 7, new=True, commit="d", CODE_OF_STAGES="other")
    shown = run(a, b)
    assert shown.returncode == 0 and not shown.stderr
    for text in (
        "HEFT 3 + 3, seed 42",
        "accuracy 95.00 % (95 % interval 88.82 to 97.85), 95 correct",
        "A minus B: +15.00 points (95 % interval +7.",
        "), exact McNemar test p < 0.0001\n",
        "only A correct: 15, only B correct: 0, equal predictions: 85\n",
        "settings that differ: epochs HEFT 3 + 3 and LoRA 4, seed 42 and 7\n",
        "code, model files and data that differ: CODE_OF_STAGES\n",
    ):
        assert text in shown.stdout
    assert shown.stdout.endswith("\nA is better than B.\n")


def test_what_two_results_say_of_code_and_tags(tmp_path):
    a = write(tmp_path, 3, 3, answers(8, 2), new=True)
    for changes, says in (
        ({}, "settings that differ: none\ncode, model files and data that differ: none\nA is not shown"),
        ({"TAG": "clip01"}, "settings that differ: TAG none and clip01\n"),
        ({"other_code": "accepted"}, "code, model files and data that differ: OTHER_CODE\n"),
        ({"new": False}, "code, model files and data that differ: EDITION\n"),
    ):
        b = write(tmp_path, 3, 3, answers(8, 2), name="b", **{"new": True} | changes)
        assert says in report.compare_files([a, b])


def test_two_results_that_cannot_be_compared(tmp_path):
    a = write(tmp_path, 3, 3, answers(8, 2))
    shorter = write(tmp_path, 3, 3, answers(8, 1), name="shorter")
    others = write(tmp_path, 3, 3, answers(8, 2), name="others", VALIDATION_DATA="another")
    alone = write(tmp_path, 3, 3, answers(8, 2), name="alone")
    alone.with_suffix(".predictions.jsonl").unlink()
    foreign = tmp_path / "foreign.json"
    foreign.write_text("[]")
    for given, reason in (
        ([a, shorter], "the questions are not the same"),
        ([a, others], "the questions are not the same"),
        ([a, alone], "alone.predictions.jsonl does not exist"),
        ([a, foreign], "foreign.json is not a complete result"),
        ([a, tmp_path / "none.json"], "none.json does not exist"),
        ([a], "give two results that exist, or one folder"),
        ([a, a, a], "give two results that exist, or one folder"),
        ([tmp_path, "--publish"], "--publish goes alone"),
    ):
        refused = run(*given)
        assert refused.returncode == 2 and not refused.stdout
        assert refused.stderr.startswith("report.py: error: ") and reason in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_help_is_the_docstring():
    shown = run("--help")
    assert shown.returncode == 0 and report.__doc__.strip() in shown.stdout


# The published page


def test_the_papers_totals():
    """The page's text on them, in template.md, by the numbers of Table 1."""
    page = " ".join((ROOT / "results/template.md").read_text().split())
    short, long, lora = (report.PAPER_ROWS[kind] for kind in ("HEFT 3 + 3", "HEFT 20 + 20", "LoRA 20"))
    error = sqrt(lora["correct"] * (1 - lora["correct"] / 3270))
    assert f"standard error of {100 * error / 3270:.2f} points ({error:.0f} questions)" in page
    assert f"differ by {1.959964 * sqrt(2) * error:.0f} questions" in page
    above = short["correct"] - lora["correct"], long["correct"] - lora["correct"]
    assert above == (4, 14) and f"McNemar p is {2 * 0.5**4}" in page
    assert "HEFT 3 + 3 is {} questions above LoRA 20, and HEFT 20 + 20 is {} above".format(*above) in page
    assert f"20 epochs of LoRA take {lora['minutes']} minutes, so 4 epochs would take 1:22" in page
    assert (lora["minutes"] / 5, short["minutes"]) == (82.4, 83) and "HEFT 3 + 3 takes 1:23" in page


def test_what_template_md_says_of_the_stored_runs():
    page = " ".join((ROOT / "results/template.md").read_text().split())
    runs, _ = report.read_folder(ROOT / "results/smollm2")
    every = runs[(runs.section == report.SMALL_MODEL) & runs.usual & (runs.kind != "base model")]
    rows = report.methods_of(every)
    yes = rows["LoRA 3"].answers.iloc[0].count("Yes") / 10
    assert f"the same 1,000 questions, of which {yes:.1f} % have the answer Yes" in page

    as_run, computed = rows["LoRA 20"].seconds / 60, rows["LoRA 20"].computed_seconds.iloc[0]
    text = f"LoRA 20 took {as_run.min():.0f} to {as_run.max():.0f} minutes with 4e-3"
    assert f"{text}, the computed time is {computed / 60:.0f}." in page
    longer = rows["LoRA 4"].computed_seconds.iloc[0] / rows["HEFT 3 + 3"].computed_seconds.iloc[0]
    assert f"LoRA 4 takes {100 * (longer - 1):.0f} % longer than HEFT 3 + 3 here" in page
    both = [rows[kind].computed_seconds.iloc[0] / 60 for kind in ("LoRA 4", "HEFT 3 + 3")]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "({:.1f} against {:.1f} minutes)".format(*both) in readme

    own_share = rows["LoReFT 20"].computed_seconds.iloc[0] / rows["LoRA 20"].computed_seconds.iloc[0]
    papers_share = report.PAPER_ROWS["LoReFT 20"]["minutes"] / report.PAPER_ROWS["LoRA 20"]["minutes"]
    assert f"LoReFT takes {100 * papers_share:.0f} % of one of LoRA, here {100 * own_share:.0f} %" in page

    assert "Those of LoRA are 20 times the paper's, those of LoReFT 25 times." in page
    own_rate = every[every.rates == "0.001"]
    assert {*every.rates} - {"0.001"} == {"0.004", "0.005", "0.004 and 0.005"} and len(own_rate) == 3
    assert {*own_rate.kind} == {"LoRA 20"} and {*own_rate.seed} == {7, 42, 100}
    assert {*own_rate.lora_steps} == {400} and {run["DTYPE"] for run in own_rate.settings} == {"float32"}
    text = f"three seeds with 1e-3 average {own_rate.accuracy.mean():.2f} %, with a loss of"
    text += f" {np.mean([run['loss']['lora'][-20:] for run in own_rate.result]):.1f} in the last epoch"
    assert f"{text}; with 4e-3 they average {rows['LoRA 20'].accuracy.mean():.2f} %" in page
    found = report.compare(own_rate, rows["LoRA 20"])
    assert f"The difference is {found.points:+.2f} points ({found.low:+.2f} to {found.high:+.2f})" in page
    found = report.compare(rows["HEFT 3 + 3"], rows["LoRA 20"])
    assert f"minus that one is {found.points:+.2f} ({found.low:+.2f} to {found.high:+.2f})" in page
    hours = own_rate.seconds / 3600
    assert f"it took {hours.min():.1f} to {hours.max():.1f} hours" in page
    assert f"LoRA 20 in float32 another {hours.sum():.0f} hours" in page
    trials = runs[runs.section.str.endswith("(tuning)")]
    short = trials[trials.kind != "LoRA 20"]
    assert set(short.lora_steps + short.reft_steps) == {30} and "in 30 steps on 320 rows" in page
    own = {run.rates: f"{run.accuracy:.2f} %" for run in trials[trials.kind == "LoRA 20"].itertuples()}
    best = f"{trials[trials.kind == 'LoRA 3'].accuracy.max():.2f} %"
    text = "5e-4 scores {} of 400 questions, 1e-3 {} and 2e-3 {} (LoRA 3 at its best rate: {})"
    assert text.format(own["0.0005"], own["0.001"], own["0.002"], best) in page and len(own) == 3
    correct = trials[trials.kind == "LoRA 20"].correct
    assert f"differ by at most {correct.max() - correct.min()} questions" in page
    for run in trials[trials.kind == "LoRA 20"].itertuples():
        assert (run.lora_steps, run.result["versions"]["lora"]["torch"]) == (200, "2.10.0+cu128")
        assert run.settings["DTYPE"] == "float32"
    assert {*every.lora_steps, *every.reft_steps} == {0, 60, 80, 400} and "for 60, 80 and 400 steps" in page
    last = []
    for kind in ("LoRA 20", "LoRA 3"):
        losses = [run["loss"]["lora"][-20:] for run in rows[kind].result]
        last.append(f"{np.mean(losses):.1f}")
    assert "averages {} in the last epoch, that of LoRA 3 {}:".format(*last) in page

    older = every[every.rates != "0.001"].result
    memory = [run["peak_memory_gb"] for run in older] + [
        max(run["peak_memory_gb"].values()) for run in own_rate.result
    ]
    assert f"up to {max(memory):.1f} GB" in page
    assert {run["versions"]["torch"] for run in older} == {"2.13.0+cpu"} and "torch 2.13.0+cpu" in page
    assert {run["versions"]["lora"]["torch"] for run in own_rate.result} == {"2.10.0+cu128"}
    (stored,) = rows["LoRA 3"][rows["LoRA 3"].seed == 42].itertuples()
    (repeated,) = runs[runs.section.str.endswith("(repeated)")].itertuples()
    equal = (np.array(stored.predictions) == np.array(repeated.predictions)).sum()
    text = (
        f"is {repeated.accuracy:.2f} % instead of {stored.accuracy:.2f} %, and {equal} of 1,000 predictions"
    )
    assert text in page

    boolq = runs[(runs.model == "SmolLM2-135M-Instruct on boolq") & (runs.questions == 300)].set_index("kind")
    scores = [f"{boolq.accuracy[kind]:.2f} %" for kind in ("LoRA 3", "LoReFT 3", "HEFT 3 + 3")]
    assert "LoRA 3 scores {}, LoReFT 3 {} and HEFT 3 + 3 {}".format(*scores) in page
    always = np.array(boolq.answers["LoRA 3"]) == "Yes"
    assert f"Always answering Yes scores {100 * always.mean():.2f} %" in page
    for right in boolq.right:
        ahead, behind = (right & ~always).sum(), (~right & always).sum()
        assert ahead <= behind or report.mcnemar(ahead, behind) > 0.05


def test_sections_without_data_are_left_out(tmp_path):
    page = published(tmp_path)
    for heading in ("Llama-2-7b-chat on BoolQ", "Learning rates", "SmolLM2-135M-Instruct on review snippets"):
        assert f"## {heading}\n" not in page
    assert "{{" not in page and "memorized" not in page
    assert finding(tmp_path) == f"{MODEL_OF_PAPER} not been run."


def test_the_figure_shows_the_runs(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    small(tmp_path, 3, 3, [80, 60])
    small(tmp_path, 4, 0, [80, 60])
    write(tmp_path / "smollm2/timing", 1, 1, answers(2, 1))
    seven(tmp_path, 3, 3, 85)
    published(tmp_path)
    shown = []
    for axes in figures[0].axes[:3]:
        marks = [line.get_xydata()[0].tolist() for line in axes.lines if len(line.get_xdata()) == 1]
        shown.append([[round(number, 2) for number in mark] for mark in marks])
    assert shown[0] == [[83, 85.17], [139, 83.36], [412, 85.05], [551, 85.47]]
    assert shown[1:] == [[[3.05, 85.02]], [[3.05, 70], [4, 70]]]
    figures[0].clear()


def test_the_published_page_follows_from_the_stored_runs_byte_for_byte(tmp_path):
    """Twice in a row, and whatever runs of their own a user has in results."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    write(tmp_path / "results", 3, 3, answers(8, 2))
    for _ in range(2):
        report.publish(tmp_path / "results")
        for name in ("README.md", "details.md", "figure1.png", "figure1.svg"):
            assert (tmp_path / "results" / name).read_bytes() == (ROOT / "results" / name).read_bytes(), name
