"""results/report.py: its numbers against statsmodels and by hand, and what it does with runs of all kinds."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import report
from conftest import ROOT
from scipy.stats import binomtest
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


SMALL = {"BASE_MODEL": "weights/Small-1B", "DATASET": "data/reviews/"}
SMALL |= {"VALIDATION_DATA": "v", "BASE_VERSION": "b"}


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


def rows_of(text, start):
    """The cells of the first table after `start`."""
    lines = text.split(start, 1)[1].split("\n\n")[1].splitlines()
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_interval_by_hand():
    # Wilson, 8 of 10: (0.8 + z2/20 -+ z sqrt(0.016 + z2/400)) / (1 + z2/10) with z2 = 3.8415
    assert report.interval(8, 10) == pytest.approx((49.016, 94.332), abs=1e-3)
    assert report.interval(0, 10) == pytest.approx((0, 27.753), abs=1e-3)
    scipys = binomtest(2785, 3270).proportion_ci(method="wilson")  # which the script takes
    assert report.interval(2785, 3270) == pytest.approx([100 * end for end in scipys])


CHANGES = [(0, 0, 1.0), (6, 0, 2 / 64), (0, 6, 2 / 64), (5, 0, 2 / 32), (1, 1, 1.0)]


@pytest.mark.parametrize("only_a, only_b, p", [*CHANGES, (8, 2, 2 * (1 + 10 + 45) / 1024)])
def test_mcnemar_by_hand(only_a, only_b, p):
    """Two-sided binomial test of the questions that changed: 6 of 6 one way is p = 2 / 2**6."""
    a = {"ground": ["same"], "right": [True] * only_a + [False] * only_b + [True] * 20}
    b = {"ground": ["same"], "right": [False] * only_a + [True] * only_b + [True] * 20}
    assert report.discordant(a, b) == (only_a, only_b)
    assert report.p_value(only_a, only_b) == pytest.approx(p)
    assert p == pytest.approx(mcnemar([[20, only_a], [only_b, 0]], exact=True).pvalue)
    word, points, shown = report.verdict(only_a, only_b, len(a["right"]))
    assert word == ("not distinguishable from" if p > 0.05 else "better than" if only_a else "worse than")
    assert float(points) == pytest.approx(100 * (only_a - only_b) / len(a["right"]), abs=0.005)
    assert points[0] in "+-" and float(shown) == pytest.approx(p, rel=0.05)


def test_a_tiny_p_is_no_zero():
    assert report.verdict(3000, 0, 3000) == ("better than", "+100.00", "<0.0001")


def test_different_questions_are_no_pair():
    a, b = ({"ground": ground, "right": [True, False]} for ground in ([1, 2], [7, 8]))
    assert report.discordant(a, b) is None and report.discordant(a, a) == (0, 0)


def test_no_runs(tmp_path):
    text = report_on(tmp_path)
    assert text.count("| lora") == 4 and "85.17 | 1:23" in text
    assert "All runs" not in text and "Smoke" not in text
    # 1.96 sqrt(2 * 0.8505 * 0.1495 * 3270) = 56.52
    assert "must differ by about 57 answers (1.74 points)" in text
    assert (tmp_path / "figure1.png").stat().st_size > 10_000
    assert (tmp_path / "figure1.svg").read_text().lstrip().startswith("<?xml")


def test_the_rows_of_table_1_over_two_seeds_and_other_runs(tmp_path):
    n = 3270
    for i, name in enumerate(json.loads((ROOT / "results/paper.json").read_text())["table_1"]):
        write_run(tmp_path, name, [True] * (2700 + i) + [False] * (n - 2700 - i))
        write_run(tmp_path, f"{name}-seed7", [True] * (2710 + i) + [False] * (n - 2710 - i), seed=7)
    write_run(tmp_path, "lora3-reft3-reft_layer10", [True] * 5, minutes=30, settings={"REFT_LAYER": 10})
    write_run(tmp_path / "smoke", "lora3-reft3", [True] * 9 + [False])
    table_1, rest = report_on(tmp_path).split("## All runs of the paper's model")
    assert "| lora3-reft3 | 3 | 3 | 2,702 of 3,270 | 82.63 | 81.29 to 83.89 |" in table_1
    assert "seed7" not in table_1
    assert "| lora3-reft3-reft_layer10 | 3 | 3 | 5 of 5 | 100.00 |" in rest
    assert "| lora3-reft3-seed7 |" in rest
    # 82.63 and 82.94: mean 82.78, standard deviation 0.216
    assert "| HEFT 3 + 3 | 2 | 82.78 | 0.22 | 82.94 (7), 82.63 (42) | 5,414 of 6,540 |" in rest
    pairs = rows_of(rest, "whatever the layer.")
    assert len(pairs) == 6, "of the four methods; five questions are no pair of 3,270"
    last = "HEFT 20 + 20 | not distinguishable from | HEFT 3 + 3 | 2 | 0 | 6540 | +0.03 | 0.5".split(" | ")
    assert pairs[0] == [*last, "+0.03, 1 (7); +0.03, 1 (42)"]
    real, smoke = rest.split("## Smoke runs")
    assert "| 9 of 10 | 90.00 |" in smoke and "9 of 10" not in real + table_1
    assert "| lora3-reft3 | 7B | 82.63 | measured here |" in rest


def test_one_run_with_fewer_questions_is_no_row_of_table_1(tmp_path):
    write_run(tmp_path, "lora3-reft3", [True] * 300 + [False] * 2)
    table_1, rest = report_on(tmp_path).split("## All runs of the paper's model")
    assert "| lora3-reft3 | 3 | 3 |  |" in table_1 and "300 of 302" in rest


def test_a_smoke_run_among_the_real_ones_does_not_mix(tmp_path):
    write_run(tmp_path, "lora3-reft3", [True] * 3 + [False])
    file = tmp_path / "lora3-reft3.json"
    result = json.loads(file.read_text())
    result["settings"]["SMOKE"] = True
    file.write_text(json.dumps(result))
    before, smoke = report_on(tmp_path).split("## Smoke runs")
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
    text, out = report_on(tmp_path), capsys.readouterr().out
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
    lora = SimpleNamespace(epochs=3, record=record, hub=None, content="a hash", settings={})
    reft = SimpleNamespace(epochs=0, record=None, hub=None, content=None, settings={})
    run = SimpleNamespace(file=tmp_path / "lora3-reft0.json", settings={"VALIDATION_DATA": "a hash"})
    settings = {key: getattr(heft, key) for key in heft.SETTINGS} | {"SMOKE": False}
    questions = [{"question": "is it", "answer": "Yes"}, {"question": "is it\u2028not", "answer": "No"}]
    heft.write_result(settings, run, lora, reft, questions, ["Yes", "Hm\x85\u2028"], 1.0)
    read = report.read_run(run.file)
    assert read["right"] == [True, False] and read["training"] == 5.0 and read["percent"] == 50.0
    assert read["pair"] == report.PAPERS_PAIR and read["seed"] == 42


# Other models and datasets


def test_another_model_is_never_in_table_1(tmp_path):
    small = {"BASE_MODEL": "hub/Small-1B"}
    write_run(tmp_path, "lora3-reft3", answers(3000, 270), settings=small)
    write_run(tmp_path / "gpu", "lora20-reft0", answers(2900, 370))  # the paper's model, but not here
    table_1, rest = report_on(tmp_path).split("## All runs of the paper's model")
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
    rows = rows_of(text, "losses](small/figure-reviews.png)")
    assert [row[0] for row in rows] == ["base model", "LoRA 3", "LoRA 4", "LoReFT 3", "HEFT 3 + 3"]
    assert rows[0][1:6] == ["1", "40.00", "", "40.00 (any)", "4 of 10"] and rows[0][-2:] == ["3", "0"]
    # 80 and 60 %: mean 70, standard deviation sqrt(200); 14 of 20 by Wilson; 600 s is the faster
    wilson = "{:.2f} to {:.2f}".format(*report.interval(14, 20))
    assert rows[1][1:5] == ["2", "70.00", "14.14", "60.00 (1), 80.00 (42)"]
    assert rows[1][5:] == ["14 of 20", wilson, "0", "600"]
    assert rows[2][1:6] == ["2", "70.00", "0.00", "70.00 (1), 70.00 (42)", "14 of 20"]
    assert rows[2][-2:] == ["2", "600"] and rows[4][-2:] == ["0", "601"]
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
    pairs = {(row[0], row[2]): row for row in rows_of(text, "whatever the layer.")}
    # The base model has one answer, whatever the seed.
    for other, word, numbers, each in [
        ("LoRA 3", "better than", "6 0 20 +30.00 0.031", "+30.00, 0.25 (1); +30.00, 0.25 (42)"),
        ("LoReFT 3", "not distinguishable from", "8 2 20 +30.00 0.11", "+20.00, 0.62 (1); +40.00, 0.22 (42)"),
        ("base model", "better than", "12 0 20 +60.00 0.00049", "+60.00, 0.031 (1); +60.00, 0.031 (42)"),
    ]:
        assert pairs["HEFT 3 + 3", other] == ["HEFT 3 + 3", word, other, *numbers.split(), each]
    assert pairs["LoReFT 3", "LoRA 3"][3:7] == ["2", "2", "20", "+0.00"]
    assert ("HEFT 3 + 3", "LoRA 4") not in pairs and ("LoRA 4", "base model") in pairs
    assert "is optimistic" in text


@pytest.mark.parametrize(
    "changes, label",
    [
        ({"LEARNING_RATE_LORA": 0.001}, "lr_lora=0.001"),
        ({"MAX_TRAIN_SAMPLES": 500, "TRAIN_DATA": "other"}, "train=500"),
        ({"TRAIN_DATA": "other rows of the same file"}, "train_data=other rows"),
        ({"BASE_VERSION": "other"}, "base_version=other"),
        ({"VALIDATION_DATA": "other"}, "validation_data=other"),
        ({"MAX_EVAL_SAMPLES": 10}, "eval=10"),
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
    compared = f"| HEFT 3 + 3 | better than | LoRA 3, {label} | 8 | 0 | 10 |" in text
    assert compared == (not {"VALIDATION_DATA", "BASE_VERSION"} & changes.keys())


def test_what_does_not_matter_does_not_split(tmp_path):
    other = dict(OUTPUT_DIR="a", REFT_LAYER=3, BASE_MODEL="x/Small-1B/")
    write_small(tmp_path, "lora3-reft0", answers(8, 2), **other)
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
    methods, rest = report_on(tmp_path).split("HEFT with another layer or rank")
    assert [(row[0], row[1], row[4]) for row in rows_of(rest, " of stage 2:")] == [
        ("HEFT 3 + 3, reft_layer=5", "1", "20.00 (42)"),
        ("HEFT 3 + 3, reft_rank=1", "1", "70.00 (42)"),
        ("HEFT 3 + 3, reft_layer=20", "1", "90.00 (42)"),
    ]
    tested = {row[0]: row[1:] for row in rows_of(rest, "90.00 (42)")}
    assert tested["HEFT 3 + 3, reft_layer=5"][:4] == ["worse than", "HEFT 3 + 3", "0", "6"]
    assert tested["HEFT 3 + 3, reft_layer=5"][4:] == ["10", "-60.00", "0.031", "-60.00, 0.031 (42)"]
    assert tested["HEFT 3 + 3, reft_rank=1"][3:6] == ["1", "10", "-10.00"]
    assert len(tested) == 3
    assert methods.count("\n| HEFT 3 + 3 | 2 | 80.00 |") == 1
    assert "| LoReFT 3 | 1 | 60.00 |" in methods and "| LoReFT 3, reft_layer=5 | 1 | 50.00 |" in methods
    assert "reft_layer=20" not in methods


def test_about_is_told_word_for_word(tmp_path):
    head, rest = "The weights are `x`, *Apache 2.0*.", "Made so:\n\n    a command\n"
    for data in ("boolq", "reviews"):
        write_small(tmp_path / "small", f"lora3-reft0-{data}", answers(8, 2), DATASET=data)
    (tmp_path / "small/about.md").write_text(f"{head}\n\n{rest}")
    text = report_on(tmp_path)
    assert text.count(f"\n\n{head}\n\n![") == 2 and text.count("a command") == 1
    assert text.endswith(f"## How the runs in small were made\n\n{rest}")
    assert {path.name for path in tmp_path.glob("small/*.png")} == {"figure-boolq.png", "figure-reviews.png"}


def test_trials_of_learning_rates_stand_apart(tmp_path):
    folder = tmp_path / "small"
    write_small(folder, "lora3-reft3", answers(9, 1))
    for rate, right in ((0.01, 7), (0.002, 8), (0.005, 8)):
        rates = dict(DATASET="set_aside", LEARNING_RATE_REFT=rate)
        write_small(folder / "tuning", f"lora0-reft3-{rate}", answers(right, 10 - right), seed=5, **rates)
    write_small(folder / "tuning", "lora3-reft0", answers(1, 9), LEARNING_RATE_LORA=0.004)
    write_run(folder / "tuning", "lora20-reft0", answers(2900, 370))  # of the paper's model and data
    (folder / "about.md").write_text("Weights.")
    text = report_on(tmp_path)
    titles = (
        "Llama-2-7b-chat-hf on boolq: learning rates",
        "Small-1B on reviews",
        "Small-1B on reviews: learning rates",
    )
    titles += ("Small-1B on set_aside: learning rates",)
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")][3:] == list(titles)
    paper, *sections = re.split("\n## (?:Small|Llama).*\n", text)
    assert "| lora20-reft0 | 20 | 0 |  |" in paper and "2,900" not in paper and "2,900" in sections[0]
    assert "were chosen with seed 42 on reviews, seed 5 on set_aside;" in sections[1]
    assert "LoRA 3 |" not in sections[1] and "LoReFT" not in sections[1] and "1 run" not in sections[1]
    assert [row[:3] + row[4:5] + row[6:] for row in rows_of(sections[3], "Weights.")] == [
        ["LoReFT 3", "0.002", "5", "80.00", "yes"],
        ["LoReFT 3", "0.005", "5", "80.00", "yes"],
        ["LoReFT 3", "0.01", "5", "70.00"],
    ]
    assert "![" not in sections[3] and "McNemar" not in sections[3] and "All runs" not in sections[3]
    assert {path.name for path in tmp_path.rglob("*.png")} == {"figure1.png", "figure-reviews.png"}


def in_words(folder):
    """The sentences that a section begins with."""
    text = report_on(folder).split("## Small-1B on reviews\n\n")[1].split("\n\n")[0]
    return re.split(r"(?<=\.) (?=[A-Z])", text)


HEFT, LORA, LOREFT = "lora3-reft3", "lora3-reft0", "lora0-reft3"


@pytest.mark.parametrize(
    "heft, lora, reft, told",
    [
        (
            9,
            3,
            8,
            "better than LoRA 3 (+60.00 points, seeds ahead: 2 of 2, p 0.00049) and not distinguishable",
        ),
        (
            9,
            8,
            3,
            "not distinguishable from LoRA 3 (+10.00 points, seeds ahead: 2 of 2, p 0.5) and better than",
        ),
        (
            3,
            9,
            3,
            "worse than LoRA 3 (-60.00 points, seeds ahead: 0 of 2, p 0.00049) and not distinguishable",
        ),
        (5, 5, 9, "not distinguishable from LoRA 3 (+0.00 points, seeds ahead: 0 of 2, p 1) and worse than"),
    ],
)
def test_the_answer_in_words(tmp_path, heft, lora, reft, told):
    for seed in (42, 1):
        for name, right in ((HEFT, heft), (LORA, lora), (LOREFT, reft)):
            write_small(tmp_path, f"{name}-seed{seed}", answers(right, 10 - right), seed)
    write_small(tmp_path, "lora0-reft0", answers(0, 10), unknown_answers=10)
    first, accuracy, time, p, seeds, limits = in_words(tmp_path)
    assert (
        first.startswith(f"On the answers of these models, HEFT 3 + 3 is {told}")
        and f"LoReFT 3 ({10 * (heft - reft):+.2f} points" in first
    )
    assert accuracy.startswith("Accuracy on 10 questions: base model 0.00 % (neither Yes nor No: 10), LoRA 3")
    assert f"HEFT 3 + 3 {10 * heft}.00 % ({10 * heft}.00 to {10 * heft}.00 over 2 seeds); " in accuracy
    assert accuracy.endswith("always Yes would score 100.00 %.")
    assert time.endswith("HEFT 3 + 3 took 601 s; LoRA alone was not trained for as long.")
    assert "at least 0.05" in p and "optimistic" in seeds
    assert limits == "Small-1B on reviews says nothing about Llama-2-7b-chat-hf on boolq."


def test_equal_time_takes_the_fastest_seeds_and_the_lora_nearest_in_time(tmp_path):
    for seed, slow in ((42, 1), (1, 3)):
        write_small(tmp_path, f"{HEFT}-seed{seed}", answers(9, 1), seed, minutes=10 * slow)
        for epochs, right in ((3, 6), (4, 2), (5, 8)):
            name = f"lora{epochs}-reft0-seed{seed}"
            write_small(tmp_path, name, answers(right, 10 - right), seed, minutes=3 * epochs / slow)
    (time,) = (sentence for sentence in in_words(tmp_path) if "time" in sentence)
    # 3, 4 and 5 minutes, at most: 3 epochs are HEFT's own stage 1, whatever they took
    assert (
        "HEFT 3 + 3 took 601 s and LoRA 5 300 s: HEFT 3 + 3 is not distinguishable from LoRA 5 (+10" in time
    )


def test_the_seed_as_the_unit_by_hand(tmp_path):
    """Differences of 0.1, 0.2, 0.3: t = 0.2 / (0.1 / sqrt(3)) = 3.464, 2 degrees of freedom, p = 0.0742."""
    for seed, right in ((1, 6), (2, 7), (3, 8)):
        write_small(tmp_path, f"{HEFT}-seed{seed}", answers(right, 10 - right), seed)
        write_small(tmp_path, f"{LORA}-seed{seed}", answers(5, 5), seed)
    assert "over the seeds: p 0.074 against LoRA 3." in in_words(tmp_path)[1]


def test_a_timing_run_tells_the_seconds_of_a_step(tmp_path):
    """Of 5 s and 0.25 s here; it is no run of a method. Runs of other data keep their own seconds."""
    write_small(tmp_path / "x", "lora3-reft3", answers(8, 2))
    write_small(
        tmp_path / "x/timing",
        "lora1-reft1",
        answers(2, 1),
        minutes=1 / 6,
        loss={"lora": [1, 1], "reft": [1] * 4},
    )
    write_small(tmp_path / "x", "lora3-reft0", answers(8, 2), DATASET="data/others")
    runs, skipped = report.read_runs(tmp_path)
    assert [(run["pair"][1], run["training"]) for run in runs] == [("others", 600), ("reviews", 10.5)]
    assert not skipped and "LoRA 1" not in report_on(tmp_path)


def test_words_without_heft_or_a_second_seed(tmp_path):
    write_small(tmp_path, LORA, answers(6, 4))
    assert in_words(tmp_path)[0].startswith("Accuracy on 10 questions: LoRA 3 60.00 %; always Yes")
    write_small(tmp_path, HEFT, answers(9, 1), seed=1)
    write_small(tmp_path, "lora4-reft0", answers(9, 1))  # no seed in common
    told = in_words(tmp_path)
    assert told[0].startswith("Accuracy") and told[1].endswith("LoRA alone was not trained for as long.")
    assert "With one seed, the spread between seeds is not known." in told and "optimistic" not in " ".join(
        told
    )


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


def test_the_shipped_report_follows_from_the_shipped_runs(tmp_path):
    """And the README repeats its answer word for word. (With runs of one's own, the report is another.)"""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    if git(["git", "status", "--porcelain", "results"]).stdout or not (ROOT / ".git").exists():
        pytest.skip("no clean checkout")
    for name in git(["git", "ls-files", "results"]).stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shipped = (ROOT / "results/README.md").read_text()
    assert report_on(tmp_path / "results") == shipped
    (answer,) = re.findall(r"^On the answers of these models, .*$", (ROOT / "README.md").read_text(), re.M)
    assert f"## SmolLM2-135M-Instruct on reviews\n\n{answer}\n" in shipped
