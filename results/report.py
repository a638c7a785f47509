"""Compare results of heft_finetuning.py. Each result needs its .predictions.jsonl beside it.

    report.py A.json B.json    compare two runs on the same questions
    report.py FOLDER           print the methods, comparisons and skipped files of FOLDER and below
    report.py FOLDER --write   write that to FOLDER/report.md
    report.py                  print that for the folder of this file
    report.py --publish        rewrite the published README.md, details.md and figure 1 beside this file

Runs that differ only in the seed are one method. Some folders have a meaning:

    smollm2, llama2   beside this file: the published runs. --publish reads only these
    timing            runs on an idle machine: their seconds per step, times the steps, are the computed times
                      of runs with the same model, data, layers and ranks
    tuning            trials of learning rates
    repeated          runs with the settings and seed of a stored one, to see whether the answers are the same

Runs of different code, model files or data are never one method, unless their folder has a file pool.json
that says why: {"why": "one sentence"}. The text of the published page is in template.md, the paper's numbers
are in paper.json.
"""

import argparse
import json
import os
import re
import sys
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm, t

HERE = Path(__file__).resolve().parent
PAPER = json.loads((HERE / "paper.json").read_text())
PAPER_QUESTIONS = PAPER["num_validation_samples"]
MARKER = "<!-- Written by results/report.py, which overwrites this file. -->"
# Model and data, without their folders
PAPER_MODEL = "Llama-2-7b-chat-hf on boolq"
SMALL_MODEL = "SmolLM2-135M-Instruct on reviews"
SMALL_BOOLQ = "SmolLM2-135M-Instruct on boolq"
PUBLISHED = ["smollm2", "llama2"]

# ---------------------------------------------------------------------------------------------
# 1. Reading runs: a DataFrame with a row for each result

# Settings of older results that do not change the answers. (Of model and data, the hashes count.)
NOT_DECIDING = """PUSH_TO_HUB PRIVATE_REPOS HF_USER HF_REPO_LORA HF_REPO_REFIT MERGED_DIR OUTPUT_DIR
    RESULTS_DIR RESULTS_FILE SMOKE STAGE_1 STAGE_2""".split()
# What the code, the model's files and the data were. Everything else that decides a result is a setting.
EDITION = """FORMAT BASE_VERSION CODE_OF_STAGES CODE_OF_EVALUATION BASE_MODEL_FILES TRAIN_DATA VALIDATION_DATA
    OTHER_CODE""".split()
COLUMNS = "file section folders base kind method odd settings model seed run_number accuracy".split()
RATES = ["LEARNING_RATE_LORA", "LEARNING_RATE_REFT"]


def kind_of(lora_epochs, reft_epochs):
    """The name of what is trained for these epochs, such as HEFT 3 + 3."""
    if lora_epochs and reft_epochs:
        return f"HEFT {lora_epochs} + {reft_epochs}"
    if lora_epochs:
        return f"LoRA {lora_epochs}"
    return f"LoReFT {reft_epochs}" if reft_epochs else "base model"


PAPER_ROWS = {kind_of(row["lora_epochs"], row["reft_epochs"]): row for row in PAPER["table_1"].values()}


def deciding_values(result):
    """What decides the result, but for the seed: (settings, edition), without those of an absent stage."""
    if "made_with" in result:
        values = dict(result["made_with"])
        required = ["CODE_OF_EVALUATION", "BASE_MODEL_FILES", "VALIDATION_DATA"]
    else:  # an older edition
        values = {name: value for name, value in result["settings"].items() if name not in NOT_DECIDING}
        required = ["FORMAT", "BASE_VERSION", "VALIDATION_DATA"]
    for name in required:
        values[name]  # a KeyError names what is missing
    values["OTHER_CODE"] = result.get("other_code") or ""
    values.setdefault("TAG", "")

    if "TOKENS_PER_MICROBATCH" in result["settings"]:
        for part in ("lora", "reft", "evaluation"):
            tokens = result.get("tokens_per_microbatch", {})
            values[f"TOKENS_{part.upper()}"] = tokens.get(part, result["settings"]["TOKENS_PER_MICROBATCH"])

    left_out = ["SEED", "EPOCHS", "weights", "BASE_MODEL", "DATASET", "TOKENS_PER_MICROBATCH"]
    if not result["lora_epochs"]:
        left_out.append("LORA")
    if not result["reft_epochs"]:
        left_out.append("REFT")
    if not (result["lora_epochs"] or result["reft_epochs"]):
        left_out += ["TRAIN", "CODE_OF_STAGES", "EXAMPLES_PER_STEP"]
    settings, edition = {}, {}
    for name in sorted(values):
        if name == "BASE_MODEL_FILES" or not any(word in name for word in left_out):
            (edition if name in EDITION else settings)[name] = values[name]
    return settings, edition


def known_settings(settings):
    """Those that every edition of the script has."""
    known = [*PAPER["settings"], "TOKENS_LORA", "TOKENS_REFT", "TOKENS_EVALUATION", "TAG"]
    return {name: value for name, value in settings.items() if name in known}


def read_result(path):
    """A result and its predictions as a dictionary: a row of the DataFrame. Times in seconds."""
    result = json.loads(path.read_text())
    correct, questions = result["correct_predictions"], result["num_validation_samples"]
    settings, edition = deciding_values(result)
    rows = []
    with path.with_suffix(".predictions.jsonl").open() as file:
        for line in file:
            rows.append(json.loads(line))
    answers = [row["answer"] for row in rows]
    predictions = [row["prediction"] for row in rows]
    right = np.array(answers) == np.array(predictions)
    if (right.sum(), len(rows)) != (correct, questions):
        raise ValueError(f"it contradicts its predictions, of which {right.sum()} of {len(rows)} are right")

    older = "FORMAT" in edition
    model_and_data = [Path(result["settings"][name]).name for name in ("BASE_MODEL", "DATASET")]
    run = {
        "result": result,
        "settings": settings,
        "edition": edition,
        "made_by": edition,
        "right": right,
        "answers": answers,
    }
    run["kind"] = kind_of(result["lora_epochs"], result["reft_epochs"])
    run["lora_epochs"], run["reft_epochs"] = result["lora_epochs"], result["reft_epochs"]
    run["seed"] = int(result["settings"]["SEED"])
    run["base"], run["model"] = model_and_data[0], " on ".join(model_and_data)
    run["smoke"] = bool(result["settings"].get("SMOKE"))
    run["questions"] = questions
    run["accuracy"] = 100 * correct / questions
    run["predictions"] = predictions
    run["older"], run["validation_data"] = older, edition["VALIDATION_DATA"]
    run["asked"] = [row.get("question") for row in rows]
    for stage in ("lora", "reft"):
        run[f"{stage}_seconds"] = result["seconds"][stage]
        run[f"{stage}_steps"] = len(result["loss"][stage] or [])
    run["seconds"] = run["lora_seconds"] + run["reft_seconds"]
    return run


def read_run(path):
    """read_result, but everything that is wrong with the file is a ValueError that says so."""
    try:
        return read_result(path)
    except FileNotFoundError as error:
        missing = "it does not exist" if error.filename == str(path) else "it has no predictions beside it"
        raise ValueError(missing) from None
    except (LookupError, TypeError, AttributeError, ArithmeticError, json.JSONDecodeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"it is not a complete result ({reason})") from None


def read_folder(folder):
    """(all runs in `folder` and below as a DataFrame, the skipped files as sentences)."""
    runs, skipped = [], []
    for path in sorted(folder.rglob("*.json"), key=lambda path: path.with_suffix("")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)  # such as .venv
        if hidden or name.name in ("paper.json", "pool.json"):
            continue
        try:
            run = read_run(path)
        except (ValueError, OSError) as error:
            skipped.append(f"`{name}`: {error}")
            continue
        run["file"] = str(name)
        if (folder / "pool.json").exists():
            run["settings"], run["edition"] = known_settings(run["settings"]), {}
        run["folders"] = name.parent.parts
        run["smoke"] = run["smoke"] or "smoke" in name.parent.parts
        run["section"] = run["model"]
        if folder.resolve() == HERE and name.parts[0] in PUBLISHED:
            run["section"] = f"{name.parts[0]}: {run['model']}"
        run["section"] += " (smoke)" if run["smoke"] else ""
        for special in ("timing", "tuning", "repeated"):
            if special in run["folders"]:
                run["section"] += f" ({special})"
        runs.append(run)
    if not runs:
        return pd.DataFrame(columns=COLUMNS), skipped
    runs = pd.DataFrame(runs)
    runs["computed_seconds"] = [computed_seconds(run, runs) for _, run in runs.iterrows()]
    return name_methods(runs), skipped


def computed_seconds(run, runs):
    """Steps times the seconds per step of the timing run with the same model and layers, else NaN."""
    found = np.nan
    for _, timing in runs[runs.model == run.model].iterrows():
        if "timing" not in timing.folders:
            continue
        pace = [name for name in run.settings if name.startswith(("LORA_", "REFT_", "TOKENS_"))]
        if all(run.settings[name] == timing.settings.get(name) for name in pace):
            found = 0.0
            for stage in ("lora", "reft"):
                if run[f"{stage}_steps"]:
                    per_step = timing[f"{stage}_seconds"] / timing[f"{stage}_steps"]
                    found += run[f"{stage}_steps"] * per_step
    return found


def name_methods(runs):
    """Add `method`, a label for the runs that differ only in the seed, `odd`, the names in which it differs
    from the usual settings (of HEFT with the most seeds), and `run_number`: 2 for a second run of a seed."""
    runs = runs.assign(method="", odd=None, trained=runs.reft_epochs > 0)
    runs["heft"] = runs.kind.str.startswith("HEFT")
    keys = []
    for _, run in runs.iterrows():
        key = json.dumps([run.kind, run.settings, run.edition, run.answers], sort_keys=True)
        keys.append(sha256(key.encode()).hexdigest())
    runs["key"] = keys
    runs["seeds"] = runs.groupby(["section", "key"]).seed.transform("nunique")
    for _, section in runs.groupby("section"):
        methods = section.sort_values(["heft", "seeds"], ascending=False, kind="stable")
        methods = methods.drop_duplicates("key")
        usual = {"older": methods.older.iloc[0]}
        for _, method in methods.iterrows():
            usual = method.settings | method.edition | usual
        taken = []
        for _, method in methods.iterrows():
            label, odd = method_label(method, usual)
            taken.append(label)
            label += f" ({taken.count(label)})" if taken.count(label) > 1 else ""
            for member in section.index[section.key == method.key]:
                runs.at[member, "method"], runs.at[member, "odd"] = label, odd
    runs["run_number"] = runs.groupby(["section", "key", "seed"]).cumcount() + 1
    return runs.sort_values(["trained", "lora_epochs", "reft_epochs"], kind="stable")


def method_label(run, usual):
    """(label of a run's method, names of the settings that are not the usual ones)."""
    words, odd = [run.kind], set()
    other_edition = bool(run.edition) and run.older != usual["older"]
    if other_edition:
        words.append("older edition" if run.older else "newer edition")
    for name, value in (run.settings | run.edition).items():
        other_hash = other_edition and name in ("TRAIN_DATA", "VALIDATION_DATA")
        if value != usual[name] and not other_hash:
            odd.add(name)
            if name in EDITION:
                value = str(value)[:8]  # hashes are long
            words.append(f"{name.lower()}={value}")
    return ", ".join(words), odd


# ---------------------------------------------------------------------------------------------
# 2. Statistics: all in points, which are percent of the questions


def wilson(correct, questions):
    """95 % interval (Wilson) of the accuracy of one run, in percent."""
    interval = binomtest(int(correct), int(questions)).proportion_ci(method="wilson")
    return 100 * interval.low, 100 * interval.high


def crossed_interval(values, added):
    """95 % interval in points for the mean of `values`, an array of seeds x questions.

    It holds for other seeds and other questions: the half widths of a t interval over the seeds and of a
    normal interval over the questions are added in quadrature (Howe 1974), less the noise that is in both. In
    simulations with 1,000 questions it covers the true mean in 95 to 99 % of the cases with 2 to 5 seeds and
    94 to 98 % with 12. (A percentile bootstrap is too narrow with three seeds.)

    `added` are made-up questions that keep the interval from vanishing. With 1 and -1, and one seed, it is
    Bonett and Price's (2012) for paired proportions, which leaves out the variation between seeds.
    """
    seeds = len(values)
    values = np.hstack([values, np.tile(added, (seeds, 1))])
    mean, questions = values.mean(), values.shape[1]
    question_means = values.mean(axis=0)
    z = norm.ppf(0.975)
    half = z**2 * question_means.var() / questions
    if seeds > 1:
        seed_means = values.mean(axis=1)
        noise = values - seed_means[:, None] - question_means + mean
        noise = (noise**2).sum() / (seeds - 1) / (questions - 1) / values.size
        from_seeds = t.ppf(0.975, seeds - 1) ** 2 * seed_means.var(ddof=1) / seeds
        half = max(half, from_seeds + half - z**2 * noise)
    return 100 * (mean - half**0.5), 100 * (mean + half**0.5)


def accuracy_interval(runs):
    """95 % interval of a method's accuracy in percent, over seeds (if there are several) and questions."""
    if len(runs) == 1:
        return wilson(runs.right.iloc[0].sum(), runs.questions.iloc[0])
    low, high = crossed_interval(np.stack(list(runs.right)).astype(float), [0, 0, 1, 1])
    return max(low, 0.0), min(high, 100.0)


def mcnemar(only_a, only_b):
    """p of the exact McNemar test: how often so many of the changed answers go one way by chance."""
    changed = int(only_a + only_b)
    return binomtest(int(only_a), changed).pvalue if changed else 1.0


def why_not_comparable(a, b):
    """Why the questions of two runs are not the same, or ""."""
    if a.questions != b.questions:
        return f"one has {a.questions} questions, the other {b.questions}"
    asked = [(x, y) for x, y in zip(a.asked, b.asked) if x is not None and y is not None]
    if a.answers != b.answers or any(x != y for x, y in asked):
        return "the questions are not the same"
    if a.older == b.older and a.validation_data != b.validation_data:  # else the hashes are of two kinds
        return "the validation data are not the same"
    return ""


def same_code(a, b):
    """Whether two runs were made by the same edition: code, model files and data."""
    return a.older == b.older and not differing_names(a.made_by, b.made_by)


def differing_names(a, b):
    """The names that both dictionaries have, with other values."""
    return [name for name in a if name in b and a[name] != b[name]]


def compare(first, second):
    """Two methods (DataFrames of runs), seed by seed on the same questions; None if they share no seed.

    points: first minus second. low, high: its 95 % interval. p: exact McNemar test, for one seed only.
    conclusion: better, worse or "": of one seed by p < 0.05, of several by whether the interval has 0.
    """
    differences, pairs = [], []
    for seed in sorted(set(first.seed) & set(second.seed)):
        a = first[first.seed == seed].iloc[0]
        b = second[second.seed == seed].iloc[0]
        if not why_not_comparable(a, b):
            differences.append(a.right.astype(int) - b.right.astype(int))
            pairs.append((a, b))
    if not pairs:
        return None
    differences = np.stack(differences)
    found = SimpleNamespace(seeds=len(pairs), points=100 * differences.mean(), p=None, conclusion="")
    found.only_a, found.only_b = (differences > 0).sum(), (differences < 0).sum()
    found.low, found.high = crossed_interval(differences, [1, -1])
    shown = found.low > 0 or found.high < 0
    if found.seeds == 1:
        found.p = mcnemar(found.only_a, found.only_b)
        shown = found.p < 0.05
    if shown:
        found.conclusion = "better" if found.points > 0 else "worse"
    found.same_code = all(same_code(a, b) for a, b in pairs)
    return found


def papers_difference(a, b):
    """(points, low, high) of two rows of the paper's Table 1, or None. The paper gives only totals, so the
    interval takes the errors of both rows as independent."""
    if a not in PAPER_ROWS or b not in PAPER_ROWS:
        return None
    shares = np.array([PAPER_ROWS[a]["correct"], PAPER_ROWS[b]["correct"]]) / PAPER_QUESTIONS
    half = norm.ppf(0.975) * np.sqrt((shares * (1 - shares)).sum() / PAPER_QUESTIONS)
    points = PAPER_ROWS[a]["accuracy"] - PAPER_ROWS[b]["accuracy"]
    return points, points - 100 * half, points + 100 * half


# ---------------------------------------------------------------------------------------------
# 3. Tables and sentences

HEADLINE = ["LoReFT 20", "LoRA 4", "LoRA 20", "HEFT 3 + 3", "HEFT 20 + 20"]
QUESTIONS = [  # of the page, by the methods compared
    ("HEFT 3 + 3", "LoReFT 20", "Is HEFT better than LoReFT of about the same time?"),
    ("LoRA 4", "LoReFT 20", "Is LoRA 4 better than LoReFT of about the same time?"),
    ("HEFT 3 + 3", "LoRA 4", "Is HEFT better than LoRA of about the same time?"),
    ("HEFT 3 + 3", "LoRA 20", "Does HEFT 3 + 3 exceed LoRA 20?"),
    ("LoRA 4", "LoRA 20", "Does LoRA 4 exceed LoRA 20?"),
    ("HEFT 20 + 20", "LoRA 20", "Does LoReFT improve on LoRA 20?"),
    ("HEFT 3 + 3", "LoRA 3", "Does LoReFT improve on LoRA 3?"),
    ("HEFT 3 + 3", "LoReFT 3", "Does LoRA first improve on LoReFT 3?"),
]


def markdown(rows):
    """A table from dictionaries with the same keys, without the columns that are empty; "" without rows."""
    if not rows:
        return ""
    table = pd.DataFrame(rows).fillna("").astype(str)
    table = table.loc[:, (table != "").any()]
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def p_text(p):
    return "< 0.0001" if p < 1e-4 else f"= {p:.2g}"


def minutes(seconds):
    """Seconds as minutes, "" if unknown."""
    if np.isnan(seconds):
        return ""
    return f"{seconds / 60:.0f}" if seconds >= 600 or seconds == 0 else f"{seconds / 60:.1f}"


def range_text(seconds):
    """The shortest and the longest of several times, in minutes."""
    shortest, longest = minutes(seconds.min()), minutes(seconds.max())
    return shortest if shortest == longest else f"{shortest} to {longest}"


def clock(seconds):
    """Seconds as h:mm."""
    return f"{round(seconds / 60) // 60}:{round(seconds / 60) % 60:02d}"


def evidence(found, seeds=True, also=""):
    """Points with an interval, or with the exact test of one seed."""
    if found.seeds == 1:
        text = f"one seed, exact test p {p_text(found.p)}"
    else:
        text = f"{found.low:+.2f} to {found.high:+.2f}"
        text += f", {found.seeds} seeds" if seeds else ""
    text += "" if found.same_code else ", by different code"
    return f"{found.points:+.2f} ({text}{also})"


def verdict(a, b, found, seeds=True):
    """One sentence on how method a compares with b."""
    if found.conclusion:
        return f"{a} is {found.conclusion} than {b}: {evidence(found, seeds)}."
    return f"No difference between {a} and {b} is shown: {evidence(found, seeds)}."


def claim(a, b, found, seeds):
    """One sentence on what becomes of the paper's claim that a exceeds b."""
    points, _, _ = papers_difference(a, b)
    words = {
        "better": f"exceeds {b}, as in the paper",
        "worse": f"falls below {b}, unlike in the paper",
        "": f"is not shown to exceed {b}",
    }
    return f"{a} {words[found.conclusion]}: {evidence(found, seeds, f'; paper {points:+.2f}')}."


def summary(rows, model):
    """What the rows of one model say about the paper's claims, in sentences; "" without a comparison."""
    found = {}
    for a, b, _ in QUESTIONS[:4]:
        if a in rows and b in rows and (difference := compare_rows(rows[a], rows[b])):
            found[a, b] = difference
    if not found:
        return ""
    usual = pd.Series([difference.seeds for difference in found.values()]).mode().max()
    unit = f"points, 95 % intervals, {usual} seeds" if usual > 1 else "points"
    sentences = []
    for (a, b), difference in found.items():
        say_seeds = difference.seeds != usual
        if (a, b) == ("LoRA 4", "LoReFT 20"):
            sentences.append(f"LoRA 4 minus LoReFT 20 is {evidence(difference, say_seeds)}.")
        elif b == "LoRA 4":
            sentences.append(verdict(a, b, difference, say_seeds))
        else:
            sentences.append(claim(a, b, difference, say_seeds))
    ratios = rate_ratios(rows)
    rates = f", at {ratios} times the paper's learning rates" if ratios else ""
    return f"With {model}{rates} ({unit}): {' '.join(sentences)}"


def finding(small, large, any_large):
    """The first paragraph of the page. `any_large`: whether the paper's model was run, with any settings."""
    paragraphs = []
    if large:
        nothing = (
            f"Llama-2-7b-chat was run for {', '.join(large)} only, so none of the paper's claims is tested."
        )
        paragraphs.append(summary(large, "Llama-2-7b-chat on BoolQ") or nothing)
    text = summary(small, "SmolLM2-135M-Instruct on review snippets")
    if not any_large:
        text += " The paper's model has not been run."
    elif not large:
        text += " The paper's model was run with other settings only."
    return "\n\n".join([*paragraphs, text.strip()]).strip()


# Rows of the page: the methods of one model that differ from the usual settings at most in learning rates


def rates_of(run):
    return tuple(run.settings[name] for name in RATES if name in run.settings)


def rates_text(run):
    return " and ".join(f"{rate:g}" for rate in rates_of(run))


def rate_ratios(rows):
    """How many times the paper's learning rates HEFT 3 + 3 used, such as "20 and 25"; "" if the paper's."""
    if "HEFT 3 + 3" not in rows:
        return ""
    settings = rows["HEFT 3 + 3"].settings.iloc[0]
    ratios = [f"{settings[name] / PAPER['settings'][name]:.3g}" for name in RATES]
    return "" if ratios == ["1", "1"] else " and ".join(ratios)


def is_usual(runs):
    """Which runs differ from the usual settings at most in learning rates or code, and were trained."""
    usual = [odd <= {*RATES, *EDITION} for odd in runs.odd]
    return np.array(usual, dtype=bool) & (runs.kind != "base model")


def page_rows(runs, trials=None):
    """{name: runs}, with a row for each choice of learning rates. The kind alone, such as LoRA 20, is the
    name of the row with the rates of the kind's best trial, if it was run, else with the usual rates. A row
    has the runs of all editions; main_edition() are those that count."""
    best = {}
    if trials is not None:
        for _, trial in trials.sort_values("accuracy", kind="stable").iterrows():
            best[trial.kind] = rates_of(trial)
    runs = runs[is_usual(runs)]
    rows = {}
    for kind, same_kind in runs.groupby("kind", sort=False):
        rates = same_kind.apply(rates_of, axis=1)
        usual = [not odd & set(RATES) for odd in same_kind.odd]
        order = same_kind.assign(rates=rates, best=rates == best.get(kind), usual=usual)
        order = order.sort_values(["best", "usual"], ascending=False, kind="stable")
        for number, (_, group) in enumerate(order.groupby("rates", sort=False)):
            name = kind if number == 0 else f"{kind} at {rates_text(group.iloc[0])}"
            rows[name] = group
    return rows


def main_edition(runs):
    """Of the runs of a row, those of the edition with the most seeds; without second runs of one seed."""
    runs = runs[runs.run_number == 1]
    seeds = runs.groupby("method", sort=False).seed.nunique()
    return runs[runs.method == seeds.idxmax()].sort_values("seed")


def compare_rows(first, second):
    """compare() two rows, with the editions that share the most seeds, and of the same code if possible."""
    best = None
    for a, runs_a in first[first.run_number == 1].groupby("method"):
        for b, runs_b in second[second.run_number == 1].groupby("method"):
            found = compare(runs_a, runs_b)
            if found and (best is None or (found.seeds, found.same_code) > (best.seeds, best.same_code)):
                best = found
                best.labels = a, b
    return best


def papers_minutes(kind):
    """Training time in the paper, in minutes. That of LoRA 4 is computed from that of 20 epochs."""
    return PAPER_ROWS["LoRA 20"]["minutes"] * 4 / 20 if kind == "LoRA 4" else PAPER_ROWS[kind]["minutes"]


def accuracy_text(runs):
    low, high = accuracy_interval(runs)
    return f"{runs.accuracy.mean():.2f} ({low:.1f} to {high:.1f})"


def headline_table(small, large):
    """The rows of the paper and LoRA 4, and one more for each other choice of learning rates."""
    table = []
    other_rates = [name for name in small if " at " in name and name.split(" at ")[0] in HEADLINE]
    for name in HEADLINE + other_rates:
        row = {"method": name}
        if name in PAPER_ROWS:
            row["paper: accuracy %"] = f"{PAPER_ROWS[name]['accuracy']:.2f}"
            row["paper: time"] = clock(60 * papers_minutes(name))
        elif name == "LoRA 4":
            row["paper: accuracy %"] = "not in the paper"
            row["paper: time"] = clock(60 * papers_minutes(name)) + ", computed"
        if name in large:
            runs = main_edition(large[name])
            row["7B here: accuracy %"] = accuracy_text(runs)
            row["7B here: time"] = clock(runs.seconds.min())
        if name in small:
            runs = main_edition(small[name])
            row["SmolLM2: accuracy %"] = accuracy_text(runs)
            row["SmolLM2: seeds"] = len(runs)
            row["SmolLM2: minutes, computed"] = minutes(runs.computed_seconds.min())
            row["SmolLM2: learning rates"] = rates_text(runs.iloc[0])
        table.append(row)
    return markdown(table)


def question_table(rows):
    """The page's questions, for each choice of learning rates."""
    table = []
    for a, b, question in QUESTIONS:
        for first in rows:
            for second in rows:
                same = first.split(" at ")[0] == a and second.split(" at ")[0] == b
                if same and (found := compare_rows(rows[first], rows[second])):
                    table.append(comparison_row(question, *found.labels, found))
    return markdown(table)


def method_table(runs):
    """A row for each method. To add a column, add a line here."""
    rows = []
    for label, every in runs.groupby("method", sort=False):
        method = every[every.run_number == 1].sort_values("seed")
        answers = pd.Series(np.concatenate(list(method.predictions)))
        each = []
        for _, run in every.sort_values(["seed", "run_number"]).iterrows():
            extra = f", run {run.run_number}, not counted" if run.run_number > 1 else ""
            each.append(f"{run.accuracy:.2f} ({run.seed}{extra})")
        row = {"method": label, "seeds": len(method)}
        row["accuracy % (95 % interval)"] = accuracy_text(method)
        row["standard deviation"] = f"{method.accuracy.std():.2f}" if len(method) > 1 else ""
        row["accuracy % (seed)"] = ", ".join(each)
        row["Yes %"] = f"{100 * (answers == 'Yes').mean():.1f}"
        row["neither %"] = f"{100 * (~answers.isin(['Yes', 'No'])).mean():.1f}"
        row["minutes, computed"] = minutes(method.computed_seconds.min())
        row["minutes, as run"] = range_text(method.seconds)
        rows.append(row)
    return markdown(rows)


def comparison_row(question, a, b, found):
    row = {"question": question, "first": a, "second": b, "difference": f"{found.points:+.2f}"}
    row["95 % interval"] = f"{found.low:+.2f} to {found.high:+.2f}"
    paper = papers_difference(a.split(",")[0], b.split(",")[0]) if question else None
    row["paper (95 % interval)"] = "{:+.2f} ({:+.2f} to {:+.2f})".format(*paper) if paper else ""
    row["seeds"] = found.seeds
    row["only first right"], row["only second right"] = found.only_a, found.only_b
    row["exact p"] = "" if found.p is None else p_text(found.p).removeprefix("= ")
    row["the first is"] = found.conclusion or "not shown to differ"
    return row


def pair_table(runs, only_other_settings=False):
    """Any two methods with the same epochs or the same settings, and any two if there are at most six. Or, if
    so asked, only those with other settings against those of the usual settings with the same epochs."""
    methods = dict(list(runs[runs.run_number == 1].groupby("method", sort=False)))
    rows = []
    for b, a in combinations(methods, 2):
        if methods[a].odd.iloc[0] < methods[b].odd.iloc[0]:
            a, b = b, a
        first, second = methods[a].iloc[0], methods[b].iloc[0]
        same_epochs, same_settings = first.kind == second.kind, first.odd == second.odd
        wanted = same_epochs or same_settings or len(methods) <= 6
        if only_other_settings:
            wanted = same_epochs and b == second.kind
        if wanted and (found := compare(methods[a], methods[b])):
            rows.append(comparison_row("", a, b, found))
    return markdown(rows)


def trial_table(trials):
    """A row for each method whose learning rate was chosen, the best rate first."""
    rows = []
    for (kind, model, seed), runs in trials.groupby(["kind", "model", "seed"], sort=False):
        tried = []
        for _, run in runs.sort_values("accuracy", ascending=False, kind="stable").iterrows():
            tried.append(f"{rates_text(run)}: {run.accuracy:.2f}")
        row = {"method": kind, "model and data": model, "seed": seed}
        row["steps"] = max(run.lora_steps, run.reft_steps)
        row["questions"] = run.questions
        row["learning rate: accuracy %"] = "; ".join(tried)
        rows.append(row)
    return markdown(rows)


def repeated_table(runs):
    """Runs with settings and seed of an earlier one, by other code, machine or dtype."""
    rows = []
    runs = runs.assign(repeated=["repeated" in folders for folders in runs.folders])
    runs = runs.sort_values(["repeated", "run_number"], kind="stable")
    alike = [known_settings(settings) | {"DTYPE": ""} for settings in runs.settings]
    runs["same"] = [json.dumps(settings, sort_keys=True) for settings in alike]
    for _, same in runs.groupby(["kind", "model", "seed", "same"], sort=False):
        stored = same.iloc[0]
        for _, run in same.iloc[1:].iterrows():
            if why_not_comparable(stored, run):
                continue
            equal = sum(x == y for x, y in zip(stored.predictions, run.predictions))
            row = {"run": f"{run.kind}, seed {run.seed}"}
            row["stored: accuracy %"] = f"{stored.accuracy:.2f}"
            row["repeated: accuracy %"] = f"{run.accuracy:.2f}"
            row["equal predictions"] = f"{equal:,} of {run.questions:,}"
            row["code"] = "the same" if same_code(stored, run) else "other"
            row["torch"] = torch_of(stored)
            row["torch, repeated"] = torch_of(run)
            row["dtype"] = stored.settings["DTYPE"]
            row["dtype, repeated"] = run.settings["DTYPE"]
            rows.append(row)
    return markdown(rows)


# ---------------------------------------------------------------------------------------------
# 4. Figure and pages

# Colour and marker; the colours are distinct for the colour-blind, too (Okabe and Ito)
STYLE = {"HEFT": ("#0072B2", "o"), "LoRA": ("#D55E00", "s"), "LoReFT": ("#009E73", "^")}
DIFFERENCES = [(a, b) for a, b, _ in QUESTIONS[:6]]
SOURCES = {  # of differences: colour of the mark, its inside, place above or below the tick
    "paper": ("0.45", "white", 0.22),
    "7B here": ("#CC79A7", "#CC79A7", 0.0),
    "SmolLM2": ("black", "black", -0.22),
}


def mark(axes, kind, minutes, accuracy, interval, place):
    """A mark with its 95 % interval, and its name at `place`: points to the right and up, and alignment."""
    color, marker = STYLE[kind.split()[0]]
    axes.plot([minutes] * 2, interval, color=color, lw=1.2, alpha=0.6, zorder=2)
    axes.plot(minutes, accuracy, marker, ms=8, color=color, zorder=3)
    style = {"color": color, "ha": place[2], "textcoords": "offset points", "weight": "bold"}
    axes.annotate(kind, (minutes, accuracy), place[:2], **style)


def draw_marks(axes, title, marks):
    """Accuracy against time. `marks`: (minutes, accuracy in percent, its interval) by kind. LoRA 3, 4 and 20
    are joined by a line."""
    axes.set_title(title, loc="left", weight="bold", pad=22)
    # Neighbours have their names on different sides
    places = {"HEFT 3 + 3": (-9, 5, "right"), "LoRA 3": (-9, -4, "right"), "LoReFT 20": (9, -9, "left")}
    places |= {"LoRA 20": (4, 11, "left"), "HEFT 20 + 20": (5, -16, "right")}
    if {"LoRA 20", "HEFT 20 + 20"} <= set(marks) and marks["LoRA 20"][1] < marks["HEFT 20 + 20"][1]:
        places |= {"LoRA 20": (-9, -14, "right"), "HEFT 20 + 20": (5, 9, "right")}
    line = []
    for kind, (minutes, accuracy, interval) in marks.items():
        mark(axes, kind, minutes, accuracy, interval, places.get(kind, (9, 5, "left")))
        if kind.startswith("LoRA"):
            line.append((minutes, accuracy))
    if line:
        axes.plot(*zip(*sorted(line)), color=STYLE["LoRA"][0], lw=1, ls=":", zorder=1)


def draw_paper(axes):
    """The paper's Table 1, and the time that LoRA 4 would have taken."""
    marks = {}
    for kind, row in PAPER_ROWS.items():
        marks[kind] = row["minutes"], row["accuracy"], wilson(row["correct"], PAPER_QUESTIONS)
    draw_marks(axes, "Paper: Llama-2-7b-chat on BoolQ", marks)
    color, marker = STYLE["LoRA"]
    place = papers_minutes("LoRA 4"), 81.5
    axes.set_ylim(place[1])
    axes.plot(*place, marker, ms=8, color=color, mfc="white", clip_on=False, zorder=4)
    note = "time of LoRA 4\n(not in the paper)"
    axes.annotate(note, place, (9, 5), textcoords="offset points", color=color, fontsize=8)


def draw_runs(axes, title, rows, seconds):
    """The rows of one model. `seconds`: the column with the training time."""
    marks = {}
    for kind in ["LoRA 3", "LoRA 4", "LoRA 20", "LoReFT 3", "LoReFT 20", "HEFT 3 + 3", "HEFT 20 + 20"]:
        if kind in rows:
            runs = main_edition(rows[kind])
            if runs[seconds].notna().any():
                marks[kind] = runs[seconds].min() / 60, runs.accuracy.mean(), accuracy_interval(runs)
    draw_marks(axes, title, marks)


def draw_differences(axes, models):
    """Differences in points with 95 % intervals: the paper's, and those of each model that was run."""
    axes.set_title("Differences in accuracy", loc="left", weight="bold", pad=22)
    axes.axvline(0, color="0.4", lw=1)
    for name in ["paper", *models]:
        color, inside, shift = SOURCES[name]
        axes.plot([], [], "D-", ms=5, color=color, mfc=inside, label=name)  # for the legend
        for number, (a, b) in enumerate(DIFFERENCES):
            difference = papers_difference(a, b) if name == "paper" else None
            rows = models.get(name, {})
            if a in rows and b in rows and (found := compare_rows(rows[a], rows[b])):
                difference = found.points, found.low, found.high
            if difference:
                points, low, high = difference
                axes.plot([low, high], [shift - number] * 2, color=color, lw=1.2)
                axes.plot(points, shift - number, "D", ms=5, color=color, mfc=inside)
    axes.set_yticks(-np.arange(len(DIFFERENCES)), [f"{a}\nminus {b}" for a, b in DIFFERENCES])
    axes.set_ylim(0.6 - len(DIFFERENCES), 0.6)
    axes.set_xlabel("points")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.05, 0.985), ncols=3, frameon=False, handlelength=1.2)
    axes.grid(axis="x", color="0.92", zorder=0)


def log_minutes(axes):
    """A logarithmic time axis with plain numbers, wide enough for the names."""
    axes.set(xscale="log", xlabel="training time (minutes, log scale)", ylabel="accuracy (%)")
    low, high = axes.get_xlim()
    low, high = low / 2.2, high * 1.4
    ticks = [minutes for minutes in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= minutes <= high]
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.set_xlim(low, high)
    axes.grid(axis="y", color="0.92", zorder=0)


def figure_1(path, small, large):
    """Accuracy against training time, and differences: path.png and path.svg. Rows by name."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams["svg.hashsalt"] = "heft"  # the same runs give the same bytes
    if large:
        figure, axes = plt.subplots(2, 2, figsize=(10, 8.8))
    else:
        figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), width_ratios=[1.2, 1.2, 1])
    axes = axes.flatten()
    draw_paper(axes[0])
    if large:
        draw_runs(axes[1], "Here: Llama-2-7b-chat on BoolQ", large, "seconds")
    draw_runs(axes[-2], "Here: SmolLM2-135M on review snippets", small, "computed_seconds")
    models = {"7B here": large, "SmolLM2": small}
    draw_differences(axes[-1], {name: rows for name, rows in models.items() if rows})
    for panel in axes[:-1]:
        log_minutes(panel)
    figure.tight_layout()
    for ending, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        figure.savefig(path.with_name(path.name + ending), dpi=150, metadata=metadata)
    plt.close(figure)


def folder_page(folder):
    """What is in a folder and below, as a page."""
    runs, skipped = read_folder(folder)
    blocks = [f"# Results in {folder}"]
    if len(runs):
        for section, group in runs.groupby("section"):
            blocks += [f"## {section}", method_table(group), pair_table(group)]
    else:
        blocks.append("No results.")
    if skipped:
        blocks += ["## Skipped files", "\n".join(f"- {line}" for line in skipped)]
    return "\n\n".join(block for block in blocks if block)


def fill_template(text, blocks):
    """Replace {{name}} by the block of that name. A paragraph with an empty block is left out, and so is a
    section (## heading) in which all blocks are empty."""
    kept = []
    for section in re.split(r"\n(?=## )", text):
        names = re.findall(r"{{(.+?)}}", section)
        if names and not any(blocks[name] for name in names):
            continue
        for paragraph in section.strip().split("\n\n"):
            if all(blocks[name] for name in re.findall(r"{{(.+?)}}", paragraph)):
                kept.append(re.sub(r"{{(.+?)}}", lambda match: str(blocks[match[1]]), paragraph))
    return "\n\n".join(kept)


def write_page(path, text):
    """Write a page, but not over one that this program has not written."""
    if path.exists() and not path.read_text().startswith(MARKER):
        raise ValueError(f"{path} was not written by this program: move it away first")
    path.write_text(f"{MARKER}\n{text.strip()}\n")


def learning_rate_facts(rows, trials):
    """Blocks on how the learning rates were chosen, and for how many steps they were used."""
    blocks = dict.fromkeys(["rates", "trial steps", "steps", "long", "final loss"], "")
    if "HEFT 3 + 3" not in rows or trials.empty:
        return blocks
    lora, reft = rates_of(rows["HEFT 3 + 3"].iloc[0])
    blocks["rates"] = f"{lora:g} for LoRA and {reft:g} for LoReFT, {rate_ratios(rows)} times the paper's"
    short = trials[trials[["lora_epochs", "reft_epochs"]].max(axis=1) <= 3]
    blocks["trial steps"] = short[["lora_steps", "reft_steps"]].max(axis=None)
    steps = set()
    for runs in rows.values():
        steps |= {*runs.lora_steps, *runs.reft_steps} - {0}
    blocks["steps"] = ", ".join(map(str, sorted(steps)))
    long = trials[trials.kind == "LoRA 20"].sort_values("accuracy", kind="stable")
    blocks["long"] = "The rows with 20 epochs use the rates that were best for 3 epochs"
    if "LoRA 20" in rows and len(long):
        used, best = rates_text(rows["LoRA 20"].iloc[0]), rates_text(long.iloc[-1])
        blocks["long"] += f", but LoRA 20 uses {used}: the best of its trials with 20 epochs was {best}"
    ends = []
    for kind in {"LoRA 20", "LoRA 3"} & set(rows):
        losses = []
        for _, run in main_edition(rows[kind]).iterrows():
            losses += run.result["loss"]["lora"][-run.lora_steps // run.lora_epochs :]
        ends.append(f"{np.mean(losses):.1f} for {kind}")
    blocks["final loss"] = " and ".join(sorted(ends))
    return blocks


def run_facts(rows):
    """Blocks on what the runs took: minutes of LoRA 20 as run and computed, peak memory in GB, torch."""
    blocks = dict.fromkeys(
        ["LoRA 20 took", "LoRA 20 computed", "LoRA 4 longer", "memory", "torch", "yes"], ""
    )
    if "LoRA 20" in rows:
        blocks["LoRA 20 took"] = range_text(main_edition(rows["LoRA 20"]).seconds)
        blocks["LoRA 20 computed"] = minutes(rows["LoRA 20"].computed_seconds.min())
    if {"LoRA 4", "HEFT 3 + 3"} <= set(rows):
        ratio = rows["LoRA 4"].computed_seconds.min() / rows["HEFT 3 + 3"].computed_seconds.min()
        blocks["LoRA 4 longer"] = f"{100 * (ratio - 1):.0f}"
    peaks, versions = [0], set()
    for runs in rows.values():
        for _, run in runs.iterrows():
            peak = run.result["peak_memory_gb"]
            peaks += list(peak.values()) if isinstance(peak, dict) else [peak]
            versions.add(torch_of(run))
            blocks["yes"] = f"{100 * run.answers.count('Yes') / run.questions:.1f}"
    blocks["memory"], blocks["torch"] = f"{max(peaks):.1f}", " and ".join(sorted(versions))
    return blocks


def torch_of(run):
    """The version of torch that made a run."""
    versions = run.result["versions"]
    versions = [versions] if "torch" in versions else list(versions.values())
    return " and ".join(sorted({part.get("torch", "unknown") for part in versions}))


def always_yes(rows):
    """Blocks on what always answering Yes scores, and which rows are shown to be better."""
    if not rows:
        return {"always yes": "", "beat always yes": ""}
    better = []
    for name, runs in rows.items():
        run = main_edition(runs).iloc[0]
        yes = np.array(run.answers) == "Yes"
        ahead, behind = (run.right & ~yes).sum(), (~run.right & yes).sum()
        if ahead > behind and mcnemar(ahead, behind) < 0.05:
            better.append(name)
    told = f"{', '.join(better)} beat that by the exact test" if better else "no method is shown to beat that"
    return {"always yes": f"{100 * yes.mean():.2f}", "beat always yes": told}


def papers_totals():
    """Blocks on what the paper's totals can tell."""
    short, long, lora = (PAPER_ROWS[kind]["correct"] for kind in ("HEFT 3 + 3", "HEFT 20 + 20", "LoRA 20"))
    error = np.sqrt(lora * (1 - lora / PAPER_QUESTIONS))
    blocks = {"error in questions": f"{error:.0f}", "error in points": f"{100 * error / PAPER_QUESTIONS:.2f}"}
    blocks |= {"short above": short - lora, "long above": long - lora}
    blocks["LoRA 20 minutes"] = papers_minutes("LoRA 20")
    blocks["LoRA 4 time"] = clock(60 * papers_minutes("LoRA 4"))
    blocks["HEFT time"] = clock(60 * papers_minutes("HEFT 3 + 3"))
    return blocks | {"needed": f"{norm.ppf(0.975) * 2**0.5 * error:.0f}"}


def runs_of_papers_experiment(runs):
    """Those of Llama-2-7b-chat on all of BoolQ with the paper's settings, but for the epochs."""
    keep = []
    for _, run in runs.iterrows():
        papers = all(run.settings.get(name, value) == value for name, value in PAPER["settings"].items())
        whole = run.section == PAPER_MODEL and run.questions == PAPER_QUESTIONS
        keep.append(papers and whole and run.kind in HEADLINE and not run.settings["TAG"])
    runs = runs[np.array(keep, dtype=bool)]
    return name_methods(runs) if len(runs) else runs


def publish(folder=HERE):
    """Rewrite README.md, details.md and figure 1 of `folder` from the runs in its published folders."""
    runs, skipped, large_runs, more_skipped = (
        *read_folder(folder / "smollm2"),
        *read_folder(folder / "llama2"),
    )
    small_runs, boolq_runs = runs[runs.section == SMALL_MODEL], runs[runs.section == SMALL_BOOLQ]
    trials = runs[runs.section.str.endswith("(tuning)")]
    papers = runs_of_papers_experiment(large_runs)
    small, boolq, large = page_rows(small_runs, trials), page_rows(boolq_runs), page_rows(papers)
    pool = folder / "smollm2/pool.json"

    blocks = papers_totals() | run_facts(small) | learning_rate_facts(small, trials) | always_yes(boolq)
    blocks["finding"] = finding(small, large, any_large=PAPER_MODEL.split()[0] in set(large_runs.base))
    blocks["headline table"] = headline_table(small, large)
    blocks["methods"] = method_table(small_runs[is_usual(small_runs)])
    blocks["comparisons"] = question_table(small)
    blocks["7B methods"], blocks["7B comparisons"] = method_table(papers), question_table(large)
    blocks["pooled"] = json.loads(pool.read_text())["why"] if pool.exists() else ""
    blocks["trials"] = trial_table(trials)
    blocks["repeated"] = repeated_table(runs)
    blocks["boolq methods"] = method_table(boolq_runs[is_usual(boolq_runs)])
    blocks["boolq comparisons"] = question_table(boolq)
    blocks["skipped"] = "\n".join(f"- {line}" for line in skipped + more_skipped)
    write_page(folder / "README.md", fill_template((HERE / "template.md").read_text(), blocks))
    on_page = set(papers.file)
    for runs_shown in (small_runs, boolq_runs):
        on_page |= set(runs_shown[is_usual(runs_shown)].file)
    write_page(folder / "details.md", details_page([runs, large_runs], on_page))
    figure_1(folder / "figure1", small, large)


def details_page(folders, on_page):
    """The methods that are not in README.md (`on_page`: the files of those that are), and Table 2."""
    blocks = ["# Details", "Methods that are not in [README.md](README.md), on the same questions."]
    blocks.append("Most are tests with one seed: one small p among several is no evidence.")
    for runs in folders:
        for section, group in runs[~runs.section.str.endswith(")")].groupby("section"):
            rest = group[~group.file.isin(on_page)]
            if len(rest):
                blocks += [f"## {section}", method_table(rest), pair_table(group, only_other_settings=True)]
    blocks += ["## Table 2 of the paper", f"Source: {PAPER['table_2']['source']}."]
    rows = []
    for model, size, accuracy in PAPER["table_2"]["rows"]:
        rows.append({"model": model, "size": size, "accuracy %": accuracy})
    return "\n\n".join(block for block in [*blocks, markdown(rows)] if block)


def compare_files(paths):
    """The text of `report.py A.json B.json`. ValueError if the two cannot be compared."""
    if paths[0].exists() and paths[1].exists() and paths[0].samefile(paths[1]):
        raise ValueError(f"{paths[0]} twice: give two results")
    runs = []
    for path in paths:
        try:
            runs.append(pd.Series(read_run(path)))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: {error}") from None
    a, b = runs
    if reason := why_not_comparable(a, b):
        raise ValueError(f"{paths[0]} and {paths[1]} cannot be compared: {reason}")
    found = compare(pd.DataFrame([a]).assign(seed=0), pd.DataFrame([b]).assign(seed=0))
    lines = []
    for letter, path, run in zip("AB", paths, runs):
        low, high = wilson(run.right.sum(), run.questions)
        lines.append(f"{letter}: {path}")
        lines.append(f"   {run.kind}, seed {run.seed}, {run.model}")
        lines.append(f"   accuracy {run.accuracy:.2f} % (95 % interval {low:.2f} to {high:.2f}), ")
        lines[-1] += f"{run.right.sum()} of {run.questions} correct"
    lines.append(
        f"A minus B: {found.points:+.2f} points (95 % interval {found.low:+.2f} to {found.high:+.2f})"
    )
    lines.append(f"only A correct: {found.only_a}, only B correct: {found.only_b}; ")
    lines[-1] += f"exact McNemar test: p {p_text(found.p)}"
    lines.append(f"settings that differ: {differing_settings(a, b) or 'none'}")
    lines.append(f"code: {code_text(a, b)}")
    return "\n".join([*lines, verdict("A", "B", found)])


def differing_settings(a, b):
    """The settings that decide results and differ between two runs. Those of an absent stage do not count."""
    values = []
    for run in (a, b):
        names = {"EPOCHS_LORA": run.lora_epochs, "EPOCHS_REFT": run.reft_epochs, "SEED": run.seed}
        values.append({"model and data": run.model} | names | run.settings)
    words = []
    for name in differing_names(*values):
        shown = ["none" if value[name] == "" else str(value[name]) for value in values]
        words.append(f"{name} {' and '.join(shown)}")
    return ", ".join(words)


def code_text(a, b):
    """Whether the same code, model files and data made two runs."""
    commits = f"commits {a.result.get('commit')} and {b.result.get('commit')}"
    if a.older != b.older:
        return f"differs, one is of an older edition ({commits})"
    if differ := differing_names(a.made_by, b.made_by):
        return f"differs in {', '.join(differ)} ({commits})"
    if a.result.get("script_sha256") == b.result.get("script_sha256"):
        return "the same"
    if a.older:
        return f"may differ: other versions of the script ({commits})"
    return "the same where it decides results; the rest of the script differs"


def show(text):
    """Print, also if nobody reads to the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main():
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__, formatter_class=shown)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="two results, or one folder")
    parser.add_argument("--write", action="store_true", help="write FOLDER/report.md instead of printing")
    parser.add_argument("--publish", action="store_true", help="rewrite the published pages")
    given = parser.parse_args()
    folder = given.paths[0] if given.paths else HERE
    try:
        if given.publish:
            if given.paths or given.write:
                raise ValueError("--publish goes alone")
            publish()
        elif len(given.paths) == 2 and not given.write:
            show(compare_files(given.paths))
        elif len(given.paths) > 1 or not folder.is_dir():
            wanted = "give two results, or one folder"
            raise ValueError(wanted if folder.exists() else f"{folder} does not exist")
        elif given.write:
            write_page(folder / "report.md", folder_page(folder))
            show(f"written: {folder / 'report.md'}")
        else:
            show(folder_page(folder))
    except (ValueError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
