"""Write results/README.md and the figures from all runs: python results/report.py [folder]

Reads each result of heft_finetuning.py in the folder (by default this file's) and below, and the paper's
numbers from paper.json. Runs of the paper's model on the paper's data stand beside the paper's, as in
figure1.png. Any other pair of base model and dataset gets a section, with figure-<dataset>.png in the folder
of its runs. The first paragraph of about.md, there or above, is told in each section, the rest at the end.
Runs in a folder named tuning chose the learning rates: a section apart, nothing but their accuracies. One in
a folder named timing tells the seconds of a step, for all runs of its model and data. Smoke
runs, and all in smoke/, are kept apart, too. Needs matplotlib and statsmodels (requirements.txt).
"""

import argparse
import json
import math
import re
import textwrap
from collections import namedtuple
from itertools import combinations, product
from pathlib import Path
from statistics import fmean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas
from scipy.stats import ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

HERE = Path(__file__).resolve().parent
PAPER = json.loads((HERE / "paper.json").read_text())
TABLE_1, N = PAPER["table_1"], PAPER["num_validation_samples"]
PAPERS_PAIR = ("Llama-2-7b-chat-hf", "boolq")
# Runs that differ only in these settings are put together.
BESIDE = """SEED TOKENS_PER_MICROBATCH PUSH_TO_HUB PRIVATE_REPOS HF_USER HF_REPO_LORA HF_REPO_REFIT
    MERGED_DIR OUTPUT_DIR RESULTS_DIR RESULTS_FILE STAGE_1 STAGE_2""".split()


# ---------------------------------------------------------------------------------------------
# Runs, and methods: runs that differ in nothing but the seed


def read_run(path):
    """A result with its predictions, checked; ValueError says what is wrong with it."""
    try:
        run = json.loads(path.read_text())
        with path.with_suffix(".predictions.jsonl").open() as lines:
            answers = [json.loads(line) for line in lines]
        n, correct, settings = run["num_validation_samples"], run["correct_predictions"], run["settings"]
        run["right"] = right = [row["prediction"] == row["answer"] for row in answers]
        # What runs must have in common to be compared; questions may be alike on different passages.
        run["ground"] = [settings.get("BASE_VERSION"), settings.get("VALIDATION_DATA")]
        run["ground"] += [(row["question"], row["answer"]) for row in answers]
        run["pair"] = tuple(Path(settings[key]).name for key in ("BASE_MODEL", "DATASET"))
        trained = any(epochs(run))  # untrained, it answers alike for every seed
        run["seed"], run["deciding"] = settings["SEED"] if trained else "any", deciding(run)
        run["training"] = run["seconds"]["lora"] + run["seconds"]["reft"]
        run["unknown_answers"], run["peak_memory_gb"], run["device"]  # these must be there
        run["seconds"]["evaluation"], run["seconds"]["total"], run["loss"]["lora"], run["loss"]["reft"]
    except FileNotFoundError as error:
        raise ValueError(f"lacks {Path(error.filename).name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError("is no complete JSON") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is no result of heft_finetuning.py ({type(error).__name__}: {error})") from None
    if not n or len(right) != n or sum(right) != correct:
        here = f"{sum(right)} of {len(right)} here"
        raise ValueError(f"contradicts its predictions: {correct} of {n} correct there, {here}")
    return run | {"percent": 100 * correct / n}


def deciding(run):
    """The settings that decide the run's outcome, but for the seed. Those of an absent stage do not."""
    absent = [stage for stage in ("LORA", "REFT") if not run[f"{stage.lower()}_epochs"]]
    absent += ["TRAIN", "EXAMPLES_PER_STEP", "MAX_LENGTH"] * (len(absent) == 2)
    old = {"MAX_TRAIN_SAMPLES": 0, "MAX_EVAL_SAMPLES": 0, "FORMAT": 1}  # what results of old formats lack
    # The folders of model and data do not count, their hashes do.
    settings = old | run["settings"] | dict(zip(("BASE_MODEL", "DATASET"), run["pair"]))
    names = [name for name in sorted(settings) if name not in BESIDE and not any(s in name for s in absent)]
    return {name: settings[name] for name in names}


def read_runs(folder):
    """All runs in `folder` and below, in the order of their names, and what was skipped, as sentences."""
    runs, skipped = [], []
    for path in sorted(folder.rglob("*.json"), key=lambda path: path.with_suffix("").parts):
        name = path.relative_to(folder).as_posix()
        try:
            named = {"name": name.removesuffix(".json"), "tuning": "tuning" in Path(name).parent.parts}
            runs += [] if name == "paper.json" else [read_run(path) | named]
        except ValueError as error:
            skipped.append(f"`{name}` {error}")
    for path in sorted(folder.rglob("*.predictions.jsonl")):
        if not path.with_name(path.name.replace(".predictions.jsonl", ".json")).exists():
            skipped.append(f"`{path.relative_to(folder).as_posix()}` has no result beside it")
    clocks = {run["pair"]: run for run in runs if "timing" in Path(run["name"]).parent.parts}
    runs = [run for run in runs if run not in clocks.values()]
    for run in [run for run in runs if run["pair"] in clocks]:
        clock = clocks[run["pair"]]
        pace = {stage: clock["seconds"][stage] / len(loss) for stage, loss in clock["loss"].items() if loss}
        run["training"] = sum(len(loss) * pace[stage] for stage, loss in run["loss"].items() if loss)
    return runs, skipped


def epochs(run):
    return run["lora_epochs"], run["reft_epochs"]


def kind(run):
    """What was trained, with its epochs."""
    lora, reft = epochs(run)
    name = f"HEFT {lora} + {reft}" if lora and reft else f"LoRA {lora}" if lora else f"LoReFT {reft}"
    return name if lora or reft else "base model"


def place(run):
    """Layer and rank of the LoReFT intervention."""
    return run["settings"]["REFT_LAYER"], run["settings"]["REFT_RANK"]


Method = namedtuple("Method", "label runs seconds")


def methods_of(runs):
    """The methods among `runs`: base model, LoRA, LoReFT, HEFT; and apart HEFT with other layers or ranks.

    The label says what is not as in most HEFT runs (of layer 15 and rank 4, if there are any). The seconds of
    training are those of the fastest seed: other work on the machine can only add to them. A second run of
    the same seed is left out."""
    groups, usual = {}, {}
    for run in runs:
        groups.setdefault(json.dumps(run["deciding"]), {}).setdefault(run["seed"], run)
    groups = [[group[seed] for seed in sorted(group)] for group in groups.values()]
    groups.sort(key=lambda g: (all(epochs(g[0])), place(g[0]) == (15, 4), len(g)), reverse=True)
    for group in groups:
        usual = group[0]["deciding"] | usual
    found = [Method(label(group[0], usual), group, min(run["training"] for run in group)) for group in groups]
    found.sort(key=lambda m: (epochs(m.runs[0])[1] > 0, *epochs(m.runs[0]), place(m.runs[0]), m.label))
    varied = [m for m in found if m.label.startswith("HEFT") and re.search("reft_(layer|rank)=", m.label)]
    return [m for m in found if m not in varied], varied


def label(run, usual):
    """The kind, and the settings that are not as usual: hashes only if nothing else differs."""
    settings = run["deciding"]
    odd = [name for name in settings if settings[name] != usual[name] and not name.startswith("EPOCHS")]
    odd = [name for name in odd if not name.endswith(("_DATA", "_VERSION"))] or odd
    odd = [f", {name.lower()}={str(settings[name])[:10]}" for name in odd]
    return kind(run) + "".join(odd).replace("learning_rate", "lr").replace("max_", "").replace("_samples", "")


# ---------------------------------------------------------------------------------------------
# Numbers


def interval(correct, n):
    """95 % Wilson interval of an accuracy, in percent."""
    low, high = proportion_confint(correct, n, method="wilson")
    return 100 * low, 100 * high


def totals(runs):
    """Correct answers and questions of all the runs together."""
    return [sum(run[key] for run in runs) for key in ("correct_predictions", "num_validation_samples")]


def discordant(a, b):
    """How many questions only run `a` and only run `b` got right; None if they cannot be compared."""
    pairs, same = list(zip(a["right"], b["right"])), a["ground"] == b["ground"]
    return (pairs.count((True, False)), pairs.count((False, True))) if same else None


def p_value(only_a, only_b):
    """Exact McNemar test, which looks at the discordant questions alone."""
    return float(mcnemar([[0, only_a], [only_b, 0]], exact=True).pvalue)


def verdict(only_a, only_b, n):
    """What `a` is beside `b`, by how many percentage points, and p; as texts."""
    p, points = p_value(only_a, only_b), f"{100 * (only_a - only_b) / n:+.2f}"
    word = "not distinguishable from" if p >= 0.05 else "better than" if only_a > only_b else "worse than"
    return word, points, f"{p:.2g}" if p >= 0.0001 else "<0.0001"


def against(a, b):
    """Method `a` against `b`: {seed: (only a is right, only b is right, questions)}, and "all" adds them up.
    Empty if no two runs of one seed can be compared."""
    found = {}
    for x, y in product(a.runs, b.runs):
        if y["seed"] in (x["seed"], "any") and (counts := discordant(x, y)):
            found[x["seed"]] = (*counts, len(x["right"]))
    return found and found | {"all": tuple(map(sum, zip(*found.values())))}


# ---------------------------------------------------------------------------------------------
# The report, in blocks: a heading, paragraph, list or table each, or "" for nothing


def table(head, rows):
    """A table; `head` has its columns as "a | b"."""
    lines = [head.split(" | "), ["---"] * len(head.split(" | ")), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) if rows else ""


def hours(minutes):
    """83 as 1:23."""
    return f"{round(minutes) // 60}:{round(minutes) % 60:02d}"


def score(runs):
    """Three cells of a table: correct, accuracy %, 95 % interval."""
    (correct, n), (low, high) = totals(runs), interval(*totals(runs))
    return [f"{correct:,} of {n:,}", f"{100 * correct / n:.2f}", f"{low:.2f} to {high:.2f}"]


RUN_HEAD = "run | LoRA epochs | ReFT epochs | correct | accuracy % | 95 % interval | unknown"
RUN_HEAD += " | LoRA s | ReFT s | evaluation s | total h:mm | peak GB | device"


def cells(run):
    """A row of RUN_HEAD after the name."""
    times = [f"{run['seconds'][part]:.0f}" for part in ("lora", "reft", "evaluation")]
    times += [hours(run["seconds"]["total"] / 60), f"{run['peak_memory_gb']:.1f}", run["device"]]
    return [*epochs(run), *score([run]), run["unknown_answers"], *times]


def method_table(methods):
    """A row per method, its seeds together."""
    rows = []
    for name, runs, seconds in methods:
        scores, (correct, _, wilson) = [run["percent"] for run in runs], score(runs)
        means = f"{fmean(scores):.2f}", f"{stdev(scores):.2f}" if len(scores) > 1 else ""
        each = ", ".join(f"{run['percent']:.2f} ({run['seed']})" for run in runs)
        unknown = sum(run["unknown_answers"] for run in runs)
        rows.append([name, len(runs), *means, each, correct, wilson, unknown, f"{seconds:.0f}"])
    head = "method | seeds | mean accuracy % | standard deviation | accuracy % (seed) | correct, all seeds"
    return table(head + " | 95 % interval | unknown | training s", rows)


def pair_table(pairs):
    """A row for each of the pairs of methods that were asked the same questions."""
    rows = []
    for b, a in pairs:
        if found := against(a, b):
            counts, each = found.pop("all"), {seed: verdict(*counts)[1:] for seed, counts in found.items()}
            each = "; ".join(f"{points}, {p} ({seed})" for seed, (points, p) in each.items())
            word, *numbers = verdict(*counts)
            rows.insert(0, [a.label, word, b.label, *counts, *numbers, each])
    head = "method | is | method | only the first right | only the second right | answers | points | p"
    return table(head + " | points, p (seed)", rows)


NOTES = """p is from the exact McNemar test on the same questions, with the counts of all seeds added up
(last column: seed by seed); below 0.05 a pair counts as different. The seeds answer the same questions, so
what is pooled, interval and p, is optimistic, and says nothing about other seeds. The untrained base model
answers the same for any seed, and is not in the figure; where it says neither Yes nor No, a comparison with
it is about the form of the answer. Training time is that of the fastest seed; but where a folder `timing` has
a run of the same model and data, which had a core to itself, it is the seconds of a step there times the
steps, whatever the layer."""


def run_blocks(runs, prefix=""):
    """What all kinds of runs have: the methods, their pairs, other layers and ranks, the runs."""
    methods, varied = methods_of(runs)
    blocks = [method_table(methods), " ".join(NOTES.split()), pair_table(combinations(methods, 2))]
    if repeated := len(runs) - sum(len(method.runs) for method in methods + varied):
        blocks.append(f"{repeated} run(s) repeat settings and seed of another: listed below, not counted.")
    if varied:  # against that of the same epochs
        pairs = [(a, b) for a, b in product(methods, varied) if a.label == kind(b.runs[0])]
        blocks += ["HEFT with another layer or rank of stage 2:", method_table(varied), pair_table(pairs)]
    rows = [[run["name"].removeprefix(prefix), *cells(run)] for run in runs]
    return [*blocks, "All runs:", table(RUN_HEAD, rows)]


def paper_blocks(folder, runs):
    """The paper's model on the paper's data."""
    # A run is a row of Table 1 if it is that experiment: the name says so, and the questions are all there.
    main = {run["name"]: run for run in runs if run["name"] in TABLE_1 and run["num_validation_samples"] == N}
    rows, shown = [], []
    for name, paper in TABLE_1.items():
        ours = cells(main[name]) if name in main else [*epochs(paper), *[""] * 10]
        rows.append([name, *ours, f"{paper['accuracy']:.2f}", hours(paper["minutes"])])
        total = {"correct_predictions": paper["correct"], "num_validation_samples": N, "loss": {}}
        shown.append(Method(f"{kind(paper)}, paper", [total], 60 * paper["minutes"]))
    rows_2 = [[*row, "paper"] for row in PAPER["table_2"]["rows"]]
    rows_2 += [[name, "7B", f"{run['percent']:.2f}", "measured here"] for name, run in main.items()]
    shown += methods_of([run for run in runs if run["num_validation_samples"] == N])[0]
    figure(folder / "figure1", "BoolQ validation", shown, "hours")

    correct = {name: paper["correct"] for name, paper in TABLE_1.items()}
    share = correct["lora20-reft0"] / N
    need = math.ceil(1.959964 * math.sqrt(2 * share * (1 - share) * N))  # 1.96 standard errors
    short, long = (correct[name] - correct["lora20-reft0"] for name in ("lora3-reft3", "lora20-reft20"))
    told = f"""Of the paper's rows only totals are known, so no paired test is possible. Two independent runs
        near 85 % on {N:,} questions must differ by about {need} answers ({100 * need / N:.2f} points) for
        p < 0.05. The paper's HEFT 3 + 3 and LoRA-only 20 are {short} answers apart, HEFT 20 + 20 and
        LoRA-only 20 are {long}: not distinguishable from the totals. (A paired test on the same questions can
        detect a smaller difference: if only d questions change, all one way, d = 6 is enough.)"""
    return [
        "![accuracy, training time and losses](figure1.png)",
        "## Table 1",
        f"BoolQ validation, {N:,} questions. Empty rows have not been run here.",
        table(RUN_HEAD + " | paper % | paper h:mm", rows),
        *(["## All runs of the paper's model", *run_blocks(runs)] if runs else []),
        "## What the paper's totals can tell",
        " ".join(told.split()),
        "## Table 2 (paper, context)",
        f"Source: {PAPER['table_2']['source']}.",
        table("model | size | accuracy % | source", rows_2),
    ]


def compared(a, b):
    """What method `a` is, in words."""
    found = against(a, b)
    word, points, p = verdict(*found.pop("all"))
    ahead = f"seeds ahead: {sum(x > y for x, y, _ in found.values())} of {len(found)}"
    return f"{word} {b.label} ({points} points, {ahead}, p {p})"


def over_seeds(a, b):
    """p of the paired t-test with the seed as the unit, in words; nothing if the seeds do not vary."""
    found = against(a, b)
    differences = [(x - y) / n for seed, (x, y, n) in found.items() if seed != "all"]
    if len(set(differences)) < 2:
        return []
    return [f"{ttest_1samp(differences, 0).pvalue:.2g} against {b.label}"]


def reached(method):
    """The accuracy of a method, in words."""
    scores, unknown = [run["percent"] for run in method.runs], sum(r["unknown_answers"] for r in method.runs)
    more = [f"{min(scores):.2f} to {max(scores):.2f} over {len(scores)} seeds"] * (len(scores) > 1)
    more += [f"neither Yes nor No: {unknown:,}"] * bool(unknown)
    return f"{method.label} {fmean(scores):.2f} %" + f" ({'; '.join(more)})" * bool(more)


def in_words(pair, methods, trials):
    """The answer for a reader who wants no table. `trials`: the runs that chose the learning rates."""
    usual = [method for method in methods if method.label == kind(method.runs[0])]
    answers = [answer for _, answer in usual[0].runs[0]["ground"][2:]]
    often = max(("Yes", "No"), key=answers.count)
    always = f"always {often} would score {100 * answers.count(often) / len(answers):.2f} %"
    told = [f"Accuracy on {len(answers):,} questions: {', '.join(map(reached, usual))}; {always}."]
    if heft := max((m for m in usual if all(epochs(m.runs[0]))), key=lambda m: len(m.runs), default=None):
        name, (lora, reft) = heft.label, epochs(heft.runs[0])
        rivals = [m for m in usual if against(heft, m)]
        parts = [m for m in rivals if m.label in (f"LoRA {lora}", f"LoReFT {reft}")]
        units = [p for m in parts for p in over_seeds(heft, m)]
        ask = "Whether other seeds would show this is tested by a paired t-test over the seeds: p"
        told.insert(0, f"{ask} {', '.join(units)}." * bool(units))
        alone = " and ".join(compared(heft, m) for m in parts)
        told.insert(0, f"On the answers of these models, {name} is {alone}." * bool(parts))
        longer = [m for m in rivals if m.label.startswith("LoRA ") and epochs(m.runs[0])[0] > lora]
        told.append(f"In training time, {name} took {heft.seconds:.0f} s")
        told[-1] += "" if longer else "; LoRA alone was not trained for as long."
        for m in sorted(longer, key=lambda m: abs(m.seconds - heft.seconds))[:1]:
            told[-1] += f" and {m.label} {m.seconds:.0f} s: {name} is {compared(heft, m)}."
        told.append("Not distinguishable (p of at least 0.05, exact McNemar test) does not mean equal.")
        many = "The answers of all seeds are pooled; the questions are the same for each: p is optimistic."
        told.append(many if len(heft.runs) > 1 else "With one seed, the spread between seeds is not known.")
    chosen = ", ".join(sorted({f"seed {run['seed']} on {run['pair'][1]}" for run in trials}))
    told.append(f"The learning rates were chosen with {chosen}; " * bool(trials))
    told[-1] += f"{pair[0]} on {pair[1]} says nothing about {' on '.join(PAPERS_PAIR)}."
    return " ".join(filter(None, told))


def trial_table(runs):
    """The runs that chose learning rates, the best of each method marked."""
    best, rows = {}, []
    for run in runs:
        best[kind(run)] = max(run["percent"], best.get(kind(run), 0))
        rates = [f"{value:g}" for name, value in run["deciding"].items() if name.startswith("LEARNING_RATE")]
        rows.append([kind(run), ", ".join(rates), run["seed"], *score([run]), run["percent"]])
    rows = [[*row[:-1], "yes" * (row[-1] == best[row[0]])] for row in sorted(rows)]
    return table("method | learning rate | seed | correct | accuracy % | 95 % interval | best", rows)


def sections(folder, runs):
    """One for each pair of base model and dataset, one for its trials; then the rest of each about.md."""
    blocks, rest, pictures = [], {}, set()
    for pair, tuning in sorted({(run["pair"], run["tuning"]) for run in runs}):
        ours = [run for run in runs if (run["pair"], run["tuning"]) == (pair, tuning)]
        above = {folder / place / "about.md" for run in ours for place in Path(run["name"]).parents}
        methods, trials = methods_of(ours)[0], [r for r in runs if r["tuning"] and r["pair"][0] == pair[0]]
        title = f"## {' on '.join(pair)}"
        blocks += [f"{title}: learning rates"] if tuning else [title, in_words(pair, methods, trials)]
        for file in sorted(filter(Path.exists, above)):
            head, _, rest[file.parent.relative_to(folder)] = file.read_text().strip().partition("\n\n")
            blocks.append(head)
        if tuning:
            blocks.append(trial_table(ours))
            continue
        here = Path(ours[0]["name"]).parent
        picture = (here / f"figure-{pair[1]}").as_posix()
        picture += f"-{pair[0]}" if picture in pictures else ""  # two models in one folder
        pictures.add(picture)
        if any(method.seconds for method in methods):
            figure(folder / picture, pair[1], methods)
            blocks.append(f"![accuracy, training time and losses]({picture}.png)")
        blocks += run_blocks(ours, prefix=f"{here.as_posix()}/")
    return blocks + [
        f"## How the runs in {place} were made\n\n{text}" for place, text in rest.items() if text
    ]


# ---------------------------------------------------------------------------------------------
# Figures: told apart by markers, no colour is needed


def figure(path, data, methods, unit="s"):
    """Accuracy of each trained method, the same against training time, and the losses: path.png and .svg."""
    methods = [method for method in methods if method.seconds]
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"svg.hashsalt": "heft", "svg.fonttype": "none"})  # same runs, same bytes
    panels = 2 + any(any(method.runs[0]["loss"].values()) for method in methods)
    size = {"figsize": (3.8 * panels, max(3.2, 0.4 * len(methods))), "layout": "constrained"}
    picture, (left, middle, *right) = plt.subplots(1, panels, **size)
    curves = {}  # stages with the same losses are one: HEFT's first is LoRA's
    for number, (name, runs, seconds) in enumerate(methods):
        average, (low, high) = 100 * totals(runs)[0] / totals(runs)[1], interval(*totals(runs))
        own = not name.endswith(", paper")  # the paper's are grey and hollow
        style = {"color": f"C{number % 10}" if own else "0.45", "marker": "os^DvPXp<>"[number % 10]}
        bar = {"xerr": [[average - low], [high - average]], "capsize": 2, "elinewidth": 0.8}
        left.errorbar(average, number, mfc=style["color"] if own else "white", **bar, **style)
        time = seconds / (3600 if unit == "hours" else 1)
        middle.plot(time, average, ms=6, mfc="none", **style)  # hollow: shows what lies below it
        rows = [number + 0.22 + 0.45 * i / len(runs) for i in range(len(runs))]
        if len(runs) > 1:
            left.plot([run["percent"] for run in runs], rows, ls="", ms=3, mew=0.6, mfc="white", **style)
        for stage, loss in runs[0]["loss"].items():
            curves.setdefault((stage, *loss), (number, style, []))[2].append(name)
    labels = [textwrap.fill(method.label, 24, break_long_words=False) for method in methods]
    left.set_yticks(range(len(methods)), labels)
    left.invert_yaxis()
    left.set(xlabel=f"{data} accuracy (%)", title="95 % intervals; small: each seed")
    middle.set(xlabel=f"training time ({unit})", ylabel=f"{data} accuracy (%)", title="Means against time")
    middle.set_xlim(left=0)
    for (stage, *loss), (number, style, owners) in curves.items():
        if loss:
            title = f"{'LoRA' if stage == 'lora' else 'LoReFT'} stage of {', '.join(owners)}"
            marks = (len(loss) * number // 40, 1 + len(loss) // 8)  # not upon those of others
            style = style | {"ls": "-" if stage == "lora" else "--", "markevery": marks, "mfc": "white"}
            smooth = pandas.Series(loss).rolling(1 + len(loss) // 20, min_periods=1).mean()
            right[0].plot(smooth.index + 1, smooth, lw=0.9, ms=4, label=textwrap.fill(title, 30), **style)
    for axes in right:
        axes.set(xlabel="optimizer step of the stage", ylabel="loss", title="Losses, running means")
        axes.legend(frameon=False, fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    for ending, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        picture.savefig(path.with_name(path.name + ending), dpi=200, metadata=metadata)
    plt.close(picture)


def write_report(folder=HERE):
    """README.md and the figures of `folder`, from its runs."""
    runs, skipped = read_runs(folder)
    toys, ours, others = [], [], []
    for run in runs:  # wherever it lies, a smoke run never mixes with others
        toy = run["settings"].get("SMOKE") or run["name"].startswith("smoke/")
        (toys if toy else ours if run["pair"] == PAPERS_PAIR and not run["tuning"] else others).append(run)

    intro = """Written by `python results/report.py`; edits are lost. Columns marked "paper" are from arXiv
        2509.09801. Methods are named with their epochs: LoRA 3 is LoRA alone, HEFT 3 + 3 both stages."""
    blocks = ["# Results", " ".join(intro.split()), *paper_blocks(folder, ours), *sections(folder, others)]
    about_toy = ["The embedded toy, nothing about BoolQ. Five seeds: [smoke/README.md](smoke/README.md)."]
    about_toy *= (folder / "smoke/README.md").exists()
    blocks += ["## Smoke runs", *about_toy] if toys or about_toy else []
    if toys:
        blocks += ["Run here on the toy, not the paper's experiment:", *run_blocks(toys, prefix="smoke/")]
    blocks += ["## Skipped files", "\n".join(f"- {sentence}" for sentence in skipped)] if skipped else []
    (folder / "README.md").write_text("\n\n".join(filter(None, blocks)) + "\n")
    for sentence in skipped:
        print(f"skipped: {sentence}")
    print(f"{folder / 'README.md'}: {len(ours)} + {len(others)} runs, {len(toys)} smoke runs")


if __name__ == "__main__":
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE)
    folder = parser.parse_args().folder
    if not folder.is_dir():
        parser.error(f"{folder} is no folder")
    write_report(folder)
