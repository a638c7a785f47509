"""Compare results of heft_finetuning.py. Each result needs its .predictions.jsonl beside it.

    report.py A.json B.json    compare two runs on the same questions
    report.py FOLDER           print the methods, comparisons and skipped files of FOLDER and below
    report.py FOLDER --write   write that to FOLDER/report.md
    report.py                  print that for the folder of this file
    report.py --publish        rewrite README.md, details.md and figure 1 beside this file, from the runs in
                               smollm2 and llama2, the numbers in paper.json and the text in template.md

Runs that differ only in the seed are one method. Those in folders called smollm2, llama2, smoke, repeated,
tuning (trials of learning rates) and timing are kept apart. A run in timing, on an idle machine, gives the
seconds per step and so the computed times of runs of the same model, data and layers, in any precision.
Runs of different code, model files or data are never one method, unless their folder has a file pool.json
that says why: {"why": "one sentence"}.
"""

import argparse
import json
import re
import signal
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator
from scipy.stats import binomtest, norm, t

HERE = Path(__file__).resolve().parent
PAPER = json.loads((HERE / "paper.json").read_text())
PAPER_QUESTIONS = PAPER["num_validation_samples"]
MARKER = "<!-- Written by results/report.py, which overwrites this file. -->"
# Model and data, without their folders
PAPER_MODEL = "Llama-2-7b-chat-hf on boolq"
SMALL_MODEL = "SmolLM2-135M-Instruct on reviews"
KEPT_APART = ["smollm2", "llama2", "timing", "tuning", "repeated", "smoke"]
COLUMNS = "section model kind method odd usual settings questions run_number seed rates accuracy".split()

# ---------------------------------------------------------------------------------------------
# 1. Reading runs: a DataFrame with a row for each result

RATES = ["LEARNING_RATE_LORA", "LEARNING_RATE_REFT"]
SETTINGS = [*PAPER["settings"], "TAG", "TOKENS_PER_MICROBATCH"]
# What does not decide an answer, or is told by other columns. All that is neither here nor a setting is code,
# model files or data.
IGNORED = """EPOCHS_LORA EPOCHS_REFT SEED BASE_MODEL DATASET SMOKE STAGE_1 STAGE_2 weights PUSH_TO_HUB
    PRIVATE_REPOS HF_USER HF_REPO_LORA HF_REPO_REFIT MERGED_DIR OUTPUT_DIR RESULTS_DIR RESULTS_FILE""".split()
# What decides the computed times. Not the precision: they compare methods as if all ran like the timing run
PACE = "LORA_RANK LORA_TARGETS REFT_LAYER REFT_RANK EXAMPLES_PER_STEP TOKENS_PER_MICROBATCH".split()


def kind_of(lora_epochs, reft_epochs):
    """The name of what is trained for these epochs, such as HEFT 3 + 3."""
    if lora_epochs and reft_epochs:
        return f"HEFT {lora_epochs} + {reft_epochs}"
    if lora_epochs:
        return f"LoRA {lora_epochs}"
    return f"LoReFT {reft_epochs}" if reft_epochs else "base model"


PAPER_ROWS = {kind_of(row["lora_epochs"], row["reft_epochs"]): row for row in PAPER["table_1"].values()}
LORA_4_SECONDS = 60 * PAPER_ROWS["LoRA 20"]["minutes"] * 4 / 20  # in the paper, had it been run


def what_decides(result):
    """(settings, edition), without those of an absent stage. The edition is code, model files and data."""
    absent_words = [stage.upper() for stage in ("lora", "reft") if not result[f"{stage}_epochs"]]
    if len(absent_words) == 2:
        absent_words += ["TRAIN", "CODE_OF_STAGES", "EXAMPLES_PER_STEP"]
    older = "made_with" not in result
    made_with = result["settings"] if older else result["made_with"]
    settings = {"TAG": ""}
    edition = {"EDITION": "older" if older else "newer", "OTHER_CODE": str(result.get("other_code", ""))}
    if older:
        edition["OLDER_SCRIPT"] = result["script_sha256"][:16]
    for name in sorted(set(made_with) - set(IGNORED)):
        if any(word in name for word in absent_words):
            continue
        if name in SETTINGS:
            settings[name] = made_with[name]
        else:
            edition[f"OLDER_{name}" if older else name] = made_with[name]
    tokens = result.get("tokens_per_microbatch") or {"all": result["settings"]["TOKENS_PER_MICROBATCH"]}
    settings["TOKENS_PER_MICROBATCH"] = " and ".join(sorted({str(number) for number in tokens.values()}))
    return settings, edition


def read_result(path):
    """A result and its predictions as a dictionary: a row of the DataFrame. Times in seconds."""
    result = json.loads(path.read_text())
    run = {"result": result}
    run["settings"], run["edition"] = what_decides(result)
    run["lora_epochs"], run["reft_epochs"] = result["lora_epochs"], result["reft_epochs"]
    run["kind"] = kind_of(result["lora_epochs"], result["reft_epochs"])
    run["seed"] = int(result["settings"]["SEED"])
    run["model"] = " on ".join(Path(result["settings"][name]).name for name in ("BASE_MODEL", "DATASET"))
    run["rates"] = " and ".join(str(run["settings"][name]) for name in RATES if name in run["settings"])
    run["precision"] = str(run["settings"].get("DTYPE"))
    run["pace"] = run["model"] + str([result["settings"][name] for name in PACE])
    with path.with_suffix(".predictions.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    run["answers"] = [row["answer"] for row in rows]
    run["predictions"] = [row["prediction"] for row in rows]
    run["right"] = np.array(run["answers"]) == np.array(run["predictions"])
    run["correct"], run["questions"] = int(run["right"].sum()), len(rows)
    run["accuracy"] = 100 * run["correct"] / run["questions"]
    if (run["correct"], len(rows)) != (result["correct_predictions"], result["num_validation_samples"]):
        raise ValueError(f"{run['correct']} of {len(rows)} predictions are right")
    for stage in ("lora", "reft"):
        run[f"{stage}_steps"] = len(result["loss"][stage] or [])
        run[f"{stage}_seconds"] = result["seconds"][stage]
    run["seconds"] = run["lora_seconds"] + run["reft_seconds"]
    return run


def read_run(path):
    """read_result, but everything that is wrong with the file is a ValueError that says so."""
    try:
        return read_result(path)
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} does not exist") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise ValueError(f"{path} is not a complete result ({type(error).__name__}: {error})") from None


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
            skipped.append(f"- {error}".replace(f"{folder}/", ""))
            continue
        pooled = any((parent / "pool.json").exists() for parent in path.parents)
        apart = [word for word in KEPT_APART if word in name.parent.parts]
        run["section"] = run["model"] + (f" ({', '.join(apart)})" if apart else "")
        run["timing"] = "timing" in apart
        run["decided_by"] = run["settings"] | ({"QUESTIONS": run["questions"]} if pooled else run["edition"])
        runs.append(run)
    if not runs:
        return pd.DataFrame(columns=COLUMNS), skipped
    runs = name_methods(pd.DataFrame(runs))
    timing = runs[runs.timing].sort_values("precision", kind="stable")  # bfloat16 first
    runs["computed_seconds"] = 0.0  # NaN without a timing run
    for stage in ("lora", "reft"):
        steps = runs[f"{stage}_steps"]
        timed = timing[timing[f"{stage}_steps"] > 0].drop_duplicates("pace").set_index("pace")
        seconds = steps * runs.pace.map(timed[f"{stage}_seconds"] / timed[f"{stage}_steps"])
        runs["computed_seconds"] += seconds.mask((steps == 0) & runs.pace.isin(timing.pace), 0.0)
    return runs, skipped


def name_methods(runs):
    """Add `method`, a label for the runs that differ only in the seed; `odd`, the names in which it differs
    from the usual method (HEFT with the most seeds); `usual`, whether its settings differ at most in learning
    rates and precision; and `run_number`: 2 for a second run of a seed."""
    runs = runs.assign(method="", odd=None, heft=runs.kind.str.startswith("HEFT"))
    for _, section in runs.groupby("section"):
        seeds = section.groupby([section.kind, section.decided_by.map(str)]).seed.transform("nunique")
        order = section.assign(seeds=seeds).sort_values(["heft", "seeds"], ascending=False, kind="stable")
        usual = {}
        for values in order.decided_by:
            usual = values | usual  # of a name in both, the earlier run's value
        for run in section.itertuples():
            odd = [name for name in sorted(usual) if run.decided_by.get(name, usual[name]) != usual[name]]
            words = [f"{name.lower()}={run.decided_by[name]}" for name in odd]
            runs.at[run.Index, "method"] = ", ".join([run.kind, *words])
            runs.at[run.Index, "odd"] = set(odd)
    runs["run_number"] = runs.groupby(["section", "method", "seed"]).cumcount() + 1
    runs["usual"] = [odd & set(SETTINGS) <= {*RATES, "DTYPE"} for odd in runs.odd]
    runs["with_reft"] = runs.reft_epochs > 0
    return runs.sort_values(["with_reft", "lora_epochs", "reft_epochs"], kind="stable")


def methods_of(runs):
    """{label: runs, one for each seed}."""
    counted = runs[runs.run_number == 1].sort_values("seed", kind="stable")
    return {label: counted[counted.method == label] for label in runs.method.unique()}


def page_rows(runs, trials):
    """{kind: runs of one method}: of several, the one with the learning rates of the kind's best trial, else
    with the usual rates, else with the most seeds."""
    best = trials.sort_values("accuracy", kind="stable").groupby("kind").rates.last()
    rows, ranks = {}, {}
    for method in methods_of(runs).values():
        run = method.iloc[0]
        usual_rates = not run.odd & set(RATES)
        rank = (run.rates == best.get(run.kind), usual_rates, len(method), -len(run.odd))
        if rank > ranks.get(run.kind, ()):
            rows[run.kind], ranks[run.kind] = method, rank
    return rows


# ---------------------------------------------------------------------------------------------
# 2. Statistics: all in points, which are percent of the questions


def wilson(correct, questions):
    """95 % interval (Wilson) of the accuracy of one run, in percent."""
    interval = binomtest(int(correct), int(questions)).proportion_ci(method="wilson")
    return 100 * interval.low, 100 * interval.high


def crossed_interval(values, added):
    """95 % interval in points for the mean of `values`, an array of seeds x questions.

    It holds for other seeds and other questions: the half widths of a t interval over the seeds and of a
    normal interval over the questions are added in quadrature (Howe 1974), less the noise that is in both. It
    is never narrower than the second. In simulations with 1,000 questions it covers the true mean in 95 to
    99 % of the cases with 2 to 5 seeds and 94 to 98 % with 12. (A percentile bootstrap is too narrow with
    three seeds.)

    `added` are made-up questions that keep the interval from vanishing. With 1 and -1, and one seed, it is
    Bonett and Price's (2012) for paired proportions, which leaves out the variation between seeds.
    """
    seeds = len(values)
    values = np.hstack([values, np.tile(added, (seeds, 1))])
    mean, questions = values.mean(), values.shape[1]
    question_means = values.mean(axis=0)
    z = norm.ppf(0.975)
    squared = z**2 * question_means.var() / questions  # half width
    if seeds > 1:
        seed_means = values.mean(axis=1)
        residuals = values - seed_means[:, None] - question_means + mean
        noise = (residuals**2).sum() / (seeds - 1) / (questions - 1) / values.size
        from_seeds = t.ppf(0.975, seeds - 1) ** 2 * seed_means.var(ddof=1) / seeds
        squared = max(squared, from_seeds + squared - z**2 * noise)
    return 100 * (mean - squared**0.5), 100 * (mean + squared**0.5)


def accuracy_interval(runs):
    """95 % interval of a method's accuracy in percent, over seeds (if there are several) and questions."""
    if len(runs) == 1:
        return wilson(runs.correct.iloc[0], runs.questions.iloc[0])
    low, high = crossed_interval(np.stack(list(runs.right)).astype(float), [0, 0, 1, 1])
    return max(low, 0.0), min(high, 100.0)


def mcnemar(only_a, only_b):
    """p of the exact McNemar test: how often so many of the changed answers go one way by chance."""
    changed = int(only_a + only_b)
    return binomtest(int(only_a), changed).pvalue if changed else 1.0


def differing_names(a, b):
    """The names that both dictionaries have, with other values."""
    return sorted(name for name in a if name in b and a[name] != b[name])


def part_of_edition(name):
    """What a name in which two editions differ is about."""
    if name == "DTYPE":
        return "precision"
    if "BASE" in name:
        return "model files"
    return "data" if "DATA" in name else "code"


def same_questions(a, b):
    """Whether two runs answer the same questions. (Older and newer hashes are of two kinds.)"""
    hashes = [name for name in differing_names(a.edition, b.edition) if "VALIDATION_DATA" in name]
    return a.answers == b.answers and not hashes


def compare(first, second):
    """Two methods (DataFrames of runs), seed by seed; None if they share no seed with the same questions.

    points: first minus second. low, high: its 95 % interval. p: exact McNemar test of one seed, as text.
    conclusion: better, worse or "": of one seed by p < 0.05, of several by whether the interval has 0.
    differing: what else is not the same, such as code and precision.
    """
    pairs = [(a, b) for a in first.itertuples() for b in second.itertuples() if a.seed == b.seed]
    pairs = [(a, b) for a, b in pairs if same_questions(a, b)]
    if not pairs:
        return None
    differences = np.stack([a.right.astype(int) - b.right.astype(int) for a, b in pairs])
    found = SimpleNamespace(seeds=len(pairs), points=100 * differences.mean(), p="", conclusion="")
    found.only_a, found.only_b = (differences > 0).sum(), (differences < 0).sum()
    found.low, found.high = crossed_interval(differences, [1, -1])
    shown = found.low > 0 or found.high < 0
    if found.seeds == 1:
        p = mcnemar(found.only_a, found.only_b)
        found.p = "< 0.0001" if p < 1e-4 else f"= {p:.2g}"
        shown = p < 0.05
    if shown:
        found.conclusion = "better" if found.points > 0 else "worse"
    editions = [(run.edition | {"DTYPE": run.settings.get("DTYPE")} for run in pair) for pair in pairs]
    found.differing = sorted({part_of_edition(name) for a, b in editions for name in differing_names(a, b)})
    return found


def other_rates(first, second):
    """Whether a stage has the same epochs in both methods, but another rate: the rates would be compared."""
    a, b = first.iloc[0], second.iloc[0]
    pairs = zip(("lora_epochs", "reft_epochs"), RATES)
    return any(a[epochs] == b[epochs] and a.settings.get(r) != b.settings.get(r) for epochs, r in pairs)


def compare_rows(rows, first, second):
    """compare for two kinds of `rows`, {kind: runs}. None, too, if one is missing or has other_rates."""
    if not {first, second} <= set(rows) or other_rates(rows[first], rows[second]):
        return None
    return compare(rows[first], rows[second])


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
    ("HEFT 3 + 3", "LoReFT 20", "Is HEFT 3 + 3 better than LoReFT 20?"),
    ("LoRA 4", "LoReFT 20", "Is LoRA 4 better than LoReFT 20?"),
    ("HEFT 3 + 3", "LoRA 4", "Is HEFT better than LoRA of about the same time?"),
    ("HEFT 3 + 3", "LoRA 20", "Does HEFT 3 + 3 exceed LoRA 20?"),
    ("LoRA 4", "LoRA 20", "Does LoRA 4 exceed LoRA 20?"),
    ("HEFT 20 + 20", "LoRA 20", "Does LoReFT improve on LoRA 20?"),
    ("HEFT 3 + 3", "LoRA 3", "Does LoReFT improve on LoRA 3?"),
    ("HEFT 3 + 3", "LoReFT 3", "Does LoRA first improve on LoReFT 3?"),
]
ABOUT = ", a similar-time control"
VERDICTS = {  # of a claim of the paper, and of a control, by the conclusion of the comparison
    "better": ("exceeds {}", "is better than {}" + ABOUT),
    "worse": ("falls below {}", "is worse than {}" + ABOUT),
    "": ("is not shown to exceed {}", "is not shown to differ from {}" + ABOUT),
}


def markdown(rows):
    """A table from dictionaries, without the columns that are empty; "" without rows."""
    if not len(rows):
        return ""
    table = pd.DataFrame(rows).fillna("").astype(str)
    table = table.loc[:, (table != "").any()]
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def minutes(seconds):
    """Seconds as minutes, "" if unknown."""
    if np.isnan(seconds):
        return ""
    return f"{seconds / 60:.0f}" if seconds >= 600 else f"{seconds / 60:.1f}"


def clock(seconds):
    """Seconds as h:mm."""
    return f"{round(seconds / 60) // 60}:{round(seconds / 60) % 60:02d}"


def span(texts):
    """The first and the last of some texts or numbers, such as 2 to 5."""
    return f"{texts[0]}" if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def accuracy_text(runs):
    return "{:.2f} ({:.1f} to {:.1f})".format(runs.accuracy.mean(), *accuracy_interval(runs))


def headline_table(small, large):
    """The rows of the paper and LoRA 4. To add a column, add a line here."""
    table = []
    for kind in HEADLINE:
        row = {"method": kind, "paper: accuracy %": "not in the paper"}
        if kind == "LoRA 4":
            row["paper: time"] = f"{clock(LORA_4_SECONDS)}, computed"
        else:
            row["paper: accuracy %"] = f"{PAPER_ROWS[kind]['accuracy']:.2f}"
            row["paper: time"] = clock(60 * PAPER_ROWS[kind]["minutes"])
        here = large.get(kind)
        row["7B here: accuracy %"] = "" if here is None else accuracy_text(here)
        row["7B here: seeds"] = "" if here is None else len(here)
        row["7B here: time"] = "" if here is None else clock(here.seconds.min())
        here = small.get(kind)
        row["SmolLM2: accuracy %"] = "" if here is None else accuracy_text(here)
        row["SmolLM2: seeds"] = "" if here is None else len(here)
        row["SmolLM2: minutes, computed"] = "" if here is None else minutes(here.computed_seconds.min())
        row["SmolLM2: learning rates"] = "" if here is None else here.rates.iloc[0]
        table.append(row)
    return markdown(table)


def method_table(runs):
    """A row for each method. To add a column, add a line here."""
    table = []
    for label, method in methods_of(runs).items():
        answers = pd.Series(np.concatenate(list(method.predictions)))
        each = []
        for run in runs[runs.method == label].sort_values(["seed", "run_number"]).itertuples():
            extra = f", run {run.run_number}, not counted" if run.run_number > 1 else ""
            each.append(f"{run.accuracy:.2f} ({run.seed}{extra})")
        row = {"method": label, "learning rates": method.rates.iloc[0], "seeds": len(method)}
        row["accuracy % (95 % interval)"] = accuracy_text(method)
        row["standard deviation"] = f"{method.accuracy.std():.2f}" if len(method) > 1 else ""
        row["accuracy % (seed)"] = ", ".join(each)
        row["Yes %"] = f"{100 * (answers == 'Yes').mean():.1f}"
        row["neither %"] = f"{100 * (~answers.isin(['Yes', 'No'])).mean():.1f}"
        row["minutes, computed"] = minutes(method.computed_seconds.min())
        row["minutes, as run"] = span([minutes(method.seconds.min()), minutes(method.seconds.max())])
        table.append(row)
    return markdown(table)


def comparison_table(pairs):
    """A row for each (first method, second method, question), if they share a seed."""
    rows = []
    for first, second, question in pairs:
        found = compare(first, second)
        if not found:
            continue
        row = {"question": question, "first": first.method.iloc[0], "second": second.method.iloc[0]}
        row["difference"] = f"{found.points:+.2f}"
        row["95 % interval"] = f"{found.low:+.2f} to {found.high:+.2f}"
        paper = papers_difference(first.kind.iloc[0], second.kind.iloc[0]) if question else None
        row["paper (95 % interval)"] = "{:+.2f} ({:+.2f} to {:+.2f})".format(*paper) if paper else ""
        row["seeds"] = found.seeds
        row["only first right"], row["only second right"] = found.only_a, found.only_b
        row["exact p"] = found.p.removeprefix("= ")
        row["the first is"] = found.conclusion or "not shown to differ"
        rows.append(row)
    return markdown(rows)


def page_pairs(rows, runs):
    """{(kind, kind): (runs of a method, of another)} for the page's questions. If the second one has
    other_rates, that method of `runs` takes its place which has not, and the most seeds."""
    pairs = {}
    for a, b, _ in QUESTIONS:
        if not {a, b} <= set(rows):
            continue
        first, second = rows[a], rows[b]
        if other_rates(first, second):
            methods = methods_of(runs[runs.kind == b]).values()
            methods = [method for method in methods if not other_rates(first, method)]
            second = max(methods, key=len, default=None)
        if second is not None and compare(first, second):
            pairs[a, b] = first, second
    return pairs


def question_table(pairs):
    """The page's questions, from `page_pairs`."""
    return comparison_table([(*pairs[a, b], text) for a, b, text in QUESTIONS if (a, b) in pairs])


def pair_table(runs):
    """Any two methods with the same epochs or the same settings; any two at all if there are at most six."""
    methods = list(methods_of(runs).values())
    pairs = []
    for second, first in combinations(methods, 2):
        a, b = first.iloc[0], second.iloc[0]
        if a.kind == b.kind or a.odd == b.odd or len(methods) <= 6:
            pairs.append((first, second, ""))
    return comparison_table(pairs)


def numbers(difference):
    """The difference and how sure it is, such as +1.80 (+0.09 to +3.51), in two texts."""
    points = f"{difference.points:+.2f}{'*' if difference.differing else ''}"
    test, spread = "95 % interval", f"{difference.low:+.2f} to {difference.high:+.2f}"
    if difference.seeds == 1:
        test, spread = "exact McNemar", f"p {difference.p}"
    return (f"{points} points", f"{test} {spread}") if difference.labelled else (points, spread)


def rates_text(settings):
    """How many times the paper's the learning rates are: 20× (LoRA), 5× (LoRA 20), 25× (LoReFT). "" if all
    are the paper's. `settings`: {kind: settings of a method}, with HEFT 3 + 3 among them."""
    if not any(set(RATES) & set(differing_names(of, PAPER["settings"])) for of in settings.values()):
        return ""
    texts = []
    for name, stage in zip(RATES, ("LoRA", "LoReFT")):
        used = {kind: of[name] / PAPER["settings"][name] for kind, of in settings.items() if name in of}
        usual = used["HEFT 3 + 3"]
        texts.append(f"{usual:.3g}× ({stage})")
        texts += [f"{times:.3g}× ({kind})" for kind, times in used.items() if times != usual]
    return ", ".join(texts)


def verdicts(rows, model):
    """Sentences on how HEFT 3 + 3 of one model compares with other methods; "" without a comparison."""
    found = {other: compare_rows(rows, "HEFT 3 + 3", other) for other in ("LoReFT 20", "LoRA 4", "LoRA 20")}
    found = {other: difference for other, difference in found.items() if difference}
    if not found:
        return ""
    control = compare_rows(rows, "LoRA 4", "LoReFT 20")
    told = [*found.values(), control] if control else [*found.values()]
    seeds = sorted(difference.seeds for difference in told)
    for number, difference in enumerate(told):  # each kind of test is named once
        earlier = [other for other in told[:number] if (other.seeds > 1) == (difference.seeds > 1)]
        difference.labelled = not earlier
    text = f"{model} {span(seeds)} {'seeds' if seeds[-1] > 1 else 'seed'}"
    settings = {kind: rows[kind].settings.iloc[0] for kind in ["HEFT 3 + 3", *found]}
    if rates := rates_text(settings):
        text += f", learning rates {rates} the paper's"
    subject = ". HEFT 3 + 3 (epochs)"
    for other, difference in found.items():
        paper = papers_difference("HEFT 3 + 3", other)
        claim, same_time = VERDICTS[difference.conclusion]
        text += f"{subject} {(claim if paper else same_time).format(other)}"
        text += " ({}, {}".format(*numbers(difference))
        text += f"; paper {paper[0]:+.2f})" if paper else ")"
        subject = ". It"
    if control:
        claim, _ = VERDICTS[control.conclusion]
        text += f". LoRA 4 {claim.format('LoReFT 20')}"
        text += " ({}, {})".format(*numbers(control))
    if differing := sorted({word for difference in told for word in difference.differing}):
        text += f". *Unequal {' and '.join(differing)}"
    if seeds[0] == 1:
        text += ". One seed compares runs, not methods"
    return f"{text}."


def finding(small, large, any_large):
    """The first paragraph of the page. `any_large`: whether the paper's model was run on the paper's
    questions, with any settings."""
    model = "The paper's model (Llama-2-7b-chat, BoolQ) has"
    if text := verdicts(large, f"{model} been run:"):
        return text
    state = "been run, but HEFT 3 + 3 cannot be compared yet" if any_large else "not been run"
    return f"{model} {state}. {verdicts(small, 'Instead: SmolLM2-135M on film-review snippets,')}".strip()


# ---------------------------------------------------------------------------------------------
# 4. Figure, pages, commands

STYLE = {  # colour, marker, its inside. The colours are distinct for the colour-blind, too (Okabe and Ito)
    "HEFT 3 + 3": ("#0072B2", "o", "#0072B2"),
    "HEFT 20 + 20": ("#0072B2", "o", "white"),
    "LoRA 4": ("#D55E00", "s", "#D55E00"),
    "LoRA 20": ("#D55E00", "s", "white"),
    "LoReFT 20": ("#009E73", "^", "white"),
}
SOURCES = {  # of differences: colour, inside of the mark, place above or below the tick
    "paper": ("0.45", "white", 0.25),
    "7B here": ("#CC79A7", "#CC79A7", 0.0),
    "SmolLM2": ("black", "black", -0.25),
}


def draw_accuracies(axes, title, rows, column):
    """Accuracy against time. `column`: which seconds of the rows to show."""
    axes.set_title(title, loc="left", weight="bold")
    axes.set(
        xscale="log", xlabel="training time (minutes, log scale)", ylabel="accuracy (%) and 95 % interval"
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(axis="y", color="0.92", zorder=0)
    times = {kind: rows[kind][column].min() / 60 for kind in STYLE if kind in rows}
    times = pd.Series(times, dtype=float).dropna().sort_values(kind="stable")
    shown = 0
    for kind, time in times.items():
        shown = max(time, 1.1 * shown)  # marks at nearly the same time are moved apart
        color, marker, inside = STYLE[kind]
        axes.plot([shown] * 2, accuracy_interval(rows[kind]), color=color, lw=1.4)
        axes.plot(shown, rows[kind].accuracy.mean(), marker, ms=8, mew=1.6, color=color, mfc=inside)
    alone = [rows[kind] for kind in ("LoRA 3", "LoRA 4", "LoRA 20") if kind in rows]
    line = [(runs[column].min() / 60, runs.accuracy.mean()) for runs in alone]
    if len(line) > 1:
        axes.plot(*zip(*line), ".:", color=STYLE["LoRA 4"][0], lw=1)
    if len(times):
        axes.set_xlim(times.min() / 1.4, shown * 1.4)


def draw_differences(axes, models):
    """Differences in points with 95 % intervals: the paper's, and those of each model's `page_pairs`."""
    axes.set_title("Differences in accuracy (points)", loc="left", weight="bold")
    axes.axvline(0, color="0.4", lw=1)
    right_edge = axes.get_yaxis_transform()  # x from 0 to 1, y in data
    for name in ["paper", *models]:
        color, inside, shift = SOURCES[name]
        axes.plot([], [], "D-", ms=5, color=color, mfc=inside, label=name)  # for the legend
        for number, (a, b, _) in enumerate(QUESTIONS[:6]):
            difference = papers_difference(a, b) if name == "paper" else None
            star, height = "", shift - number
            if pair := models.get(name, {}).get((a, b)):
                found = compare(*pair)
                difference = found.points, found.low, found.high
                star = "*" if found.differing else ""
            if difference:
                points, *interval = difference
                axes.plot(interval, [height] * 2, color=color, lw=1.2)
                axes.plot(points, height, "D", ms=5, color=color, mfc=inside)
                text = f"{points:+.2f}{star}"
                axes.text(1.02, height, text, color=color, va="center", transform=right_edge)
    axes.set_yticks(-np.arange(6), [f"{a}\nminus {b}" for a, b, _ in QUESTIONS[:6]])
    axes.set_ylim(-5.4, 0.6)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=3, frameon=False)
    axes.grid(axis="x", color="0.92", zorder=0)


def figure_1(path, small, large, small_pairs, large_pairs):
    """Accuracy against training time (of page_rows), and differences: path.png and path.svg."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams["svg.hashsalt"] = "heft"  # the same runs give the same bytes
    shape, size = ((2, 2), (10, 9)) if large else ((1, 3), (13, 4.6))
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = axes.flatten()
    paper = {}
    for kind, row in PAPER_ROWS.items():
        paper[kind] = pd.DataFrame([row | {"seconds": 60 * row["minutes"], "questions": PAPER_QUESTIONS}])
    draw_accuracies(axes[0], "Paper: Llama-2-7b-chat on BoolQ", paper, "seconds")
    color, place = STYLE["LoRA 4"][0], (LORA_4_SECONDS / 60, 81.2)
    axes[0].set_ylim(place[1])
    axes[0].axvline(place[0], 0, 0.07, color=color, lw=2)
    axes[0].annotate(
        "time of LoRA 4 (not in the paper)", place, (5, 5), textcoords="offset points", color=color
    )
    if large:
        draw_accuracies(axes[1], "Here: Llama-2-7b-chat on BoolQ", large, "seconds")
    draw_accuracies(axes[-2], "Here: SmolLM2-135M on review snippets", small, "computed_seconds")
    models = {"7B here": large_pairs, "SmolLM2": small_pairs}
    draw_differences(axes[-1], {name: pairs for name, pairs in models.items() if pairs})
    for kind, (color, marker, inside) in STYLE.items():
        axes[0].plot([], [], marker, ms=8, mew=1.6, color=color, mfc=inside, label=kind)
    axes[0].plot([], [], ".:", color=STYLE["LoRA 4"][0], label="LoRA 3, 4 and 20")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper left", ncols=6, frameon=False, fontsize=10)
    for ending, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        figure.savefig(path.with_name(path.name + ending), dpi=150, metadata=metadata)
    plt.close(figure)


def sections_text(runs, skipped):
    """The methods and comparisons of each section, and the skipped files."""
    blocks = []
    for section, group in runs.groupby("section"):
        blocks += [f"## {section}", method_table(group), pair_table(group)]
    if skipped:
        blocks += ["## Skipped files", *skipped]
    return "\n\n".join(block for block in blocks if block)


def fill_template(text, blocks):
    """Replace {{name}} by the block of that name. A section with only empty blocks is left out."""
    kept = []
    for section in text.split("\n## "):
        names = re.findall("{{(.+?)}}", section)
        if not names or any(blocks[name] for name in names):
            kept.append(re.sub("{{(.+?)}}", lambda match: blocks[match[1]], section))
    return re.sub("\n\n+", "\n\n", "\n## ".join(kept))


def write_page(path, text):
    """Write a page, but not over one that this program has not written."""
    if path.exists() and not path.read_text().startswith(MARKER):
        raise ValueError(f"{path} was not written by this program: move it away first")
    path.write_text(f"{MARKER}\n{text.strip()}\n")


def publish(folder=HERE):
    """Rewrite README.md, details.md and figure 1 of `folder` from the runs in its published folders."""
    runs, skipped = read_folder(folder / "smollm2")
    large_runs, more_skipped = read_folder(folder / "llama2")
    small_model = runs.model.str.startswith(SMALL_MODEL.partition(" on ")[0])
    trials = runs[runs.section.str.endswith("(tuning)") & small_model]
    small_runs = runs[(runs.section == SMALL_MODEL) & runs.usual]
    usual = PAPER["settings"] | {"TAG": ""}
    papers = large_runs[(large_runs.section == PAPER_MODEL) & (large_runs.questions == PAPER_QUESTIONS)]
    any_large = len(papers) > 0
    other = [bool(differing_names(settings, usual)) for settings in papers.settings]
    papers = papers[~np.array(other, dtype=bool) & papers.kind.isin(HEADLINE)]
    papers = name_methods(papers) if len(papers) else papers
    small, large = page_rows(small_runs, trials), page_rows(papers, trials[:0])
    small_pairs, large_pairs = page_pairs(small, small_runs), page_pairs(large, papers)
    pool = folder / "smollm2/pool.json"

    blocks = {"headline table": headline_table(small, large)}
    blocks["finding"] = finding(small, large, any_large)
    blocks["methods"], blocks["comparisons"] = method_table(small_runs), question_table(small_pairs)
    blocks["7B methods"], blocks["7B comparisons"] = method_table(papers), question_table(large_pairs)
    blocks["pooled"] = json.loads(pool.read_text())["why"] if pool.exists() else ""
    blocks["trials"] = method_table(trials.sort_values(["kind", "accuracy"], ascending=[True, False]))
    write_page(folder / "README.md", fill_template((HERE / "template.md").read_text(), blocks))
    table_2 = pd.DataFrame(PAPER["table_2"]["rows"], columns=["model", "size", "accuracy %"])
    details = ["# Details", "All methods and comparisons. One small p among many is no evidence."]
    details += [sections_text(runs, skipped), sections_text(large_runs, more_skipped)]
    details += ["## Table 2 of the paper", f"Source: {PAPER['table_2']['source']}.", markdown(table_2)]
    write_page(folder / "details.md", "\n\n".join(block for block in details if block))
    figure_1(folder / "figure1", small, large, small_pairs, large_pairs)


def compare_files(paths):
    """The text of `report.py A.json B.json`. ValueError if the two cannot be compared."""
    a, b = (read_run(path) for path in paths)
    found = compare(*(pd.DataFrame([run]).assign(seed=0) for run in (a, b)))
    if not found:
        raise ValueError(f"{paths[0]} and {paths[1]} cannot be compared: the questions are not the same")
    lines, settings = [], []
    for letter, path, run in zip("AB", paths, (a, b)):
        interval = "95 % interval {:.2f} to {:.2f}".format(*wilson(run["correct"], run["questions"]))
        lines.append(f"{letter}: {path}")
        lines.append(f"   {run['kind']}, seed {run['seed']}, {run['model']}, {run['questions']} questions")
        lines.append(f"   accuracy {run['accuracy']:.2f} % ({interval}), {run['correct']} correct")
        told = {"model and data": run["model"], "epochs": run["kind"], "seed": run["seed"]}
        settings.append(told | run["settings"])
    interval = f"95 % interval {found.low:+.2f} to {found.high:+.2f}"
    lines.append(f"A minus B: {found.points:+.2f} points ({interval}), exact McNemar test p {found.p}")
    equal = sum(x == y for x, y in zip(a["predictions"], b["predictions"]))
    only = f"only A correct: {found.only_a}, only B correct: {found.only_b}"
    lines.append(f"{only}, equal predictions: {equal}")
    differ = []
    for name in differing_names(*settings):
        differ.append(f"{name} {settings[0][name] or 'none'} and {settings[1][name] or 'none'}")
    lines.append(f"settings that differ: {', '.join(differ) or 'none'}")
    names = differing_names(a["edition"], b["edition"])
    lines.append(f"code, model files and data that differ: {', '.join(names) or 'none'}")
    lines.append(f"A is {found.conclusion or 'not shown to be better or worse'} than B.")
    return "\n".join(lines)


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # stop silently if nobody reads to the end
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__, formatter_class=shown)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="two results, or one folder")
    parser.add_argument("--write", action="store_true", help="write FOLDER/report.md instead of printing")
    parser.add_argument("--publish", action="store_true", help="rewrite the published pages")
    given = parser.parse_args()
    folder = given.paths[0] if given.paths else HERE
    try:
        if given.publish and (given.paths or given.write):
            raise ValueError("--publish goes alone")
        if given.publish:
            publish()
        elif len(given.paths) == 2 and not given.write:
            print(compare_files(given.paths))
        elif len(given.paths) > 1 or not folder.is_dir():
            raise ValueError("give two results that exist, or one folder")
        else:
            page = f"# Results in {folder}\n\n{sections_text(*read_folder(folder)) or 'No results.'}"
            if given.write:
                write_page(folder / "report.md", page)
            else:
                print(page)
    except (ValueError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
