"""Write results/README.md, details.md and figure 1 from the stored runs: python results/report.py [folder]

Reads every result of heft_finetuning.py in the folder (default: the folder of this file) and below. Runs that
differ in nothing but the seed are one method. A folder `tuning` has trials of learning rates. A folder
`timing` has runs on an idle machine: their seconds per step, times the steps, are the training time of all
runs of that model and data with the same layers and ranks. Smoke runs are kept apart. The page's text is in
template.md (`only here`: not for other folders), the paper's numbers are in paper.json.
Needs the packages in requirements.txt.
"""

import argparse
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy.stats import ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

HERE = Path(__file__).resolve().parent
PAPER = json.loads((HERE / "paper.json").read_text())
N = PAPER["num_validation_samples"]
# Model and data, without their folders: the paper's, and two of a laptop's size
LLAMA, REVIEWS = "Llama-2-7b-chat-hf on boolq", "SmolLM2-135M-Instruct on reviews"
SMALL_BOOLQ = "SmolLM2-135M-Instruct on boolq"
# The seed, and settings that do not change the answers. Runs that differ in any other are never pooled. (Of
# model and data, the hashes count.)
NOT_DECIDING = """SEED PUSH_TO_HUB PRIVATE_REPOS HF_USER HF_REPO_LORA HF_REPO_REFIT MERGED_DIR OUTPUT_DIR
    RESULTS_DIR RESULTS_FILE STAGE_1 STAGE_2 BASE_MODEL DATASET""".split()
QUESTIONS = {  # that the page answers, by the methods compared
    ("HEFT 3 + 3", "LoRA 20"): "Does HEFT 3 + 3 match LoRA 20?",
    ("LoRA 4", "LoRA 20"): "Does LoRA 4 match LoRA 20?",
    ("HEFT 3 + 3", "LoRA 4"): "Is HEFT better than LoRA of about the same time?",
    ("HEFT 3 + 3", "LoReFT 20"): "Is HEFT better than LoReFT of about the same time?",
    ("HEFT 3 + 3", "LoReFT 3"): "Does LoRA first improve on LoReFT 3?",
    ("HEFT 3 + 3", "LoRA 3"): "Does LoReFT improve on LoRA 3?",
    ("HEFT 20 + 20", "LoRA 20"): "Does LoReFT improve on LoRA 20?",
}


def kind(lora, reft):
    """What is trained in so many epochs of each stage."""
    name = f"HEFT {lora} + {reft}" if lora and reft else f"LoRA {lora}" if lora else f"LoReFT {reft}"
    return name if lora or reft else "base model"


ROWS = {kind(row["lora_epochs"], row["reft_epochs"]): row for row in PAPER["table_1"].values()}

# ---------------------------------------------------------------------------------------------
# Runs, methods (the runs that differ in nothing but the seed), and how methods compare


def read_run(path, folders=()):
    """A result with its predictions. ValueError says what is wrong with it."""
    try:
        run = SimpleNamespace(**json.loads(path.read_text()), folders=folders)
        with path.with_suffix(".predictions.jsonl").open() as lines:
            rows = [json.loads(line) for line in lines]
        run.answers, run.said = ([row[key] for row in rows] for key in ("answer", "prediction"))
        run.right = [said == answer for said, answer in zip(run.said, run.answers)]
        run.percent = 100 * run.correct_predictions / run.num_validation_samples
        run.pair = " on ".join(Path(run.settings[key]).name for key in ("BASE_MODEL", "DATASET"))
        run.questions = run.settings["BASE_VERSION"], run.settings["VALIDATION_DATA"], run.answers
        run.kind, run.seed = kind(run.lora_epochs, run.reft_epochs), run.settings["SEED"]
        run.deciding, smoke = deciding(run), run.settings.get("SMOKE") or "smoke" in folders
        run.section = "smoke runs" if smoke else "tuning" if "tuning" in folders else run.pair
        run.steps = {stage: len(losses) for stage, losses in run.loss.items() if losses}
        run.training = run.seconds["lora"] + run.seconds["reft"]
    except FileNotFoundError:
        raise ValueError("has no predictions beside it") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"is not a complete result ({type(error).__name__}: {error})") from None
    if (sum(run.right), len(rows)) != (run.correct_predictions, run.num_validation_samples):
        raise ValueError(f"contradicts its predictions, of which {sum(run.right)} of {len(rows)} are right")
    return run


def deciding(run):
    """The settings that decide what the run answers, but for the seed; without those of an absent stage."""
    absent = [stage for stage in ("LORA", "REFT") if not getattr(run, f"{stage.lower()}_epochs")]
    absent += ["TRAIN"] * (len(absent) == 2)
    parts = vars(run).get("tokens_per_microbatch", {})  # since FORMAT 3
    settings = run.settings | {f"TOKENS_{part}": tokens for part, tokens in parts.items()}
    names = [n for n in sorted(settings) if n not in NOT_DECIDING and not any(stage in n for stage in absent)]
    return {"FORMAT": settings["FORMAT"], "ON": run.pair} | {name: settings[name] for name in names}


def read_runs(folder):
    """All runs in `folder` and below, in the order of their names, and what was skipped, as sentences."""
    runs, skipped, timed = [], [], {}
    for path in sorted(folder.rglob("*.json"), key=lambda path: path.with_suffix("")):
        name = path.relative_to(folder)
        try:
            runs += [] if name == Path("paper.json") else [read_run(path, name.parent.parts)]
        except ValueError as error:
            skipped.append(f"`{name}` {error}")
    for run in runs:
        if "timing" in run.folders:
            timed[run.pair] = run
    for run in runs:
        names = [name for name in run.deciding if name.startswith(("LORA_", "REFT_", "TOKENS_"))]
        idle = timed.get(run.pair)
        if idle and all(run.deciding[name] == idle.deciding.get(name) for name in names):
            run.training = sum(n * idle.seconds[stage] / idle.steps[stage] for stage, n in run.steps.items())
    return [run for run in runs if "timing" not in run.folders], skipped


def methods_of(runs):
    """Methods by label: the kind, and what differs from the usual settings (of HEFT with the most seeds). Of
    two runs with one seed the first counts. Seconds are the fastest run's: other work only adds to them."""
    groups, usual, methods = {}, {}, {}
    for run in runs:
        groups.setdefault(json.dumps(run.deciding), {}).setdefault(run.seed, run)
    groups = [[group[seed] for seed in sorted(group)] for group in groups.values()]
    for runs in sorted(groups, key=lambda g: (g[0].kind[:4] != "HEFT", -len(g))):
        usual = runs[0].deciding | usual
    for runs in sorted(groups, key=lambda g: (g[0].reft_epochs > 0, g[0].lora_epochs, g[0].reft_epochs)):
        odd = [name for name, value in runs[0].deciding.items() if value != usual[name]]
        odd = [f"{name.lower()}={runs[0].deciding[name]}" for name in odd if "EPOCHS" not in name]
        label = ", ".join([runs[0].kind, *odd])
        while label in methods:
            label += " (other)"
        mean, seconds = fmean(run.percent for run in runs), min(run.training for run in runs)
        methods[label] = SimpleNamespace(kind=runs[0].kind, runs=runs, mean=mean, seconds=seconds)
    return methods


def compare(methods, a, b):
    """Method `a` against `b`, seed by seed on the same questions; None if no seed has both. `interval`: 95 %,
    of the difference over the seeds, in points (paired t). p: exact McNemar test of all answers pooled."""
    mine, theirs = ({run.seed: run for run in methods[m].runs} if m in methods else {} for m in (a, b))
    pairs = [(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]
    pairs = [(x, y) for x, y in pairs if x.questions == y.questions]
    if not pairs:
        return None
    changes = [Counter(zip(x.right, y.right)) for x, y in pairs]
    only_a, only_b = ([change[key] for change in changes] for key in ((True, False), (False, True)))
    ahead, point = [x - y for x, y in zip(only_a, only_b)], 100 / len(pairs[0][0].right)
    found = SimpleNamespace(seeds=len(pairs), points=point * fmean(ahead), interval=None, ends="none")
    found.accuracies = [fmean(run.percent for run in runs) for runs in zip(*pairs)]
    found.only_a, found.only_b = sum(only_a), sum(only_b)
    found.p = float(mcnemar([[0, found.only_a], [found.only_b, 0]], exact=True).pvalue)
    if len(set(ahead)) > 1:  # one seed shows no spread, and equal differences do not show that there is none
        found.interval = [point * end for end in ttest_1samp(ahead, 0).confidence_interval()]
        found.ends = "{:+.2f} to {:+.2f}".format(*found.interval)
    return found


def share(answer, runs):
    """How often the runs give that answer, in percent."""
    return 100 * fmean(said == answer for run in runs for said in run.said)


def wilson(correct, n):
    """95 % interval of one accuracy, in percent."""
    return [100 * end for end in proportion_confint(correct, n, method="wilson")]


# ---------------------------------------------------------------------------------------------
# Sentences and tables


def missing_seeds(methods):
    """How many seeds a row of Table 1 has less than the method with the most, if it has less."""
    seeds = {label: len(method.runs) for label, method in methods.items()}
    lacks = {label: max(seeds.values(), default=1) - seeds.get(label, 0) for label in ROWS}
    return {label: n for label, n in lacks.items() if n}


def summary(methods, pairs):
    """How the first method of each pair compares with the second, in sentences; "" if no seed has both. Times
    are told for the pairs that have the first pair's second method."""
    found = {pair: compare(methods, *pair) for pair in pairs}
    found = {pair: difference for pair, difference in found.items() if difference}
    if not found:
        return ""
    base = next(iter(found))[1]
    # over the seeds that the difference is over, too
    means = {label: mean for pair, d in reversed(found.items()) for label, mean in zip(pair, d.accuracies)}
    name = {label: f"{label} ({mean:.2f} %)" for label, mean in means.items()}
    share = {a: 100 * methods[a].seconds / methods[b].seconds for a, b in found if b == base}
    times = [f"{name[label]} takes {percent:.0f} %" for label, percent in share.items()]
    times[0] += f" of the training time of {name[base]}"
    seeds = " to ".join(map(str, sorted({d.seeds for d in found.values()})))
    points = [f"{a} minus {b} {d.points:+.2f} ({d.ends})" for (a, b), d in found.items()]
    ends = [d.interval or (0, 0) for d in found.values()]
    clear = [place for place, (low, high) in zip(("first", "second", "third"), ends) if low > 0 or high < 0]
    told = f"Measurable: the {' and the '.join(clear)}." if clear else "No difference is measurable."
    return f"{', '.join(times)}. In points (95 % intervals, seeds: {seeds}): {', '.join(points)}. {told}"


def statement(small, seven):
    """The answer in at most 90 words: of the paper's model if it was run, or else of the small one."""
    pairs = [("HEFT 3 + 3", "LoRA 20"), ("LoRA 4", "LoRA 20"), ("HEFT 3 + 3", "LoRA 4")]
    if summary(seven, pairs[:1]):
        return f"With Llama-2-7b-chat on BoolQ, {summary(seven, pairs)}"
    told = ["With SmolLM2-135M-Instruct on film reviews,"]
    told.append("" if summary(small, pairs[:1]) else "it is open whether HEFT 3 + 3 matches LoRA 20.")
    told += [summary(small, pairs), "The paper's model has not been run."]
    return " ".join(filter(None, told))


def papers_totals():
    """What the paper's totals can tell, for the template."""
    short, long, lora = (ROWS[label]["correct"] for label in ("HEFT 3 + 3", "HEFT 20 + 20", "LoRA 20"))
    error = (lora * (1 - lora / N)) ** 0.5
    numbers = {"error": f"{error:.0f}", "error in points": f"{100 * error / N:.2f}", "short": short - lora}
    return numbers | {"long": long - lora, "need": f"{1.96 * 2**0.5 * error:.0f}"}


def always_yes(methods):
    """What always Yes would score, in percent, from the first run of the methods."""
    answers = next((method.runs[0].answers for method in methods.values()), [])
    return f"{100 * answers.count('Yes') / len(answers):.2f}" if answers else "?"


def table(head, rows):
    """A table; `head` has its columns as "a | b"."""
    lines = [head.split(" | "), ["---"] * len(head.split(" | ")), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) if rows else "Not run here."


def clock(seconds):
    """4980 as 1:23."""
    return f"{round(seconds / 60) // 60}:{round(seconds / 60) % 60:02d}"


def table_1(small, seven):
    rows, missing = [], missing_seeds(small)
    for label, row in ROWS.items():
        cells = [f"{row['accuracy']:.2f} %, {clock(60 * row['minutes'])}", "", "not run yet"]
        for column, methods in ((1, seven), (2, small)):
            if method := methods.get(label):
                yes = f"{share('Yes', method.runs):.0f} %"
                cells[column] = f"{method.mean:.2f} % (Yes {yes}), {clock(method.seconds)}"
        cells[2] += f"; seeds missing: {missing[label]}" if label in missing else ""
        rows.append([label, *cells])
    return table("method | paper | 7B here | SmolLM2", rows)


def method_table(methods):
    rows = []
    for label, method in methods.items():
        scores = [run.percent for run in method.runs]
        spread = f"{stdev(scores):.2f}" if len(scores) > 1 else ""
        each = ", ".join(f"{run.percent:.2f} ({run.seed})" for run in method.runs)
        said = f"{share('Yes', method.runs):.1f} / {share('Unknown', method.runs):.1f}"
        rows.append([label, len(scores), f"{method.mean:.2f}", spread, each, said, f"{method.seconds:.0f}"])
    head = "method | seeds | mean accuracy % | standard deviation | accuracy % (seed) | Yes / neither %"
    return table(f"{head} | training s", rows)


def pair_table(methods, pairs):
    """`pairs`: a question for each two labels."""
    rows = []
    for (a, b), question in pairs.items():
        if found := compare(methods, a, b):
            numbers = f"{found.points:+.2f}", found.ends, found.seeds, found.only_a, found.only_b
            p = f"{found.p:.2g}" if found.p >= 1e-4 else "<0.0001"
            # of several seeds it would be too small: each question would count once per seed
            rows.append([question, a, b, *numbers, p if found.seeds == 1 else ""])
    head = "question | first | second | difference | 95 % interval | seeds"
    return table(f"{head} | only first right | only second right | p", rows)


def trial_table(trials):
    """A row for each method whose learning rate was chosen, the best rate first."""
    rows = {}
    for run in sorted(trials, key=lambda run: (run.pair, run.kind, run.seed, -run.percent)):
        rates = " and ".join(f"{x:g}" for name, x in run.deciding.items() if name.startswith("LEARNING_RATE"))
        cell = f"{rates}: {run.percent:.2f} (Yes {share('Yes', [run]):.0f} %)"
        rows.setdefault((run.kind, run.pair, run.seed, len(run.said)), []).append(cell)
    rows = [[*row, "; ".join(cells)] for row, cells in rows.items()]
    return table("method | model and data | seed | questions | learning rate: accuracy %", rows)


# ---------------------------------------------------------------------------------------------
# Figure 1: one colour and one marker for each method, distinct for the colour-blind, too (Okabe and Ito)

STYLE = {"HEFT": ("o", "#0072B2"), "LoRA": ("s", "#D55E00"), "LoReFT": ("^", "#009E73")}


def mark(axes, label, x, y, seeds=()):
    """A large mark with its label, and a small one for each seed; hollow for what is not in Table 1."""
    marker, color = STYLE[label.split(" ", 1)[0]]
    text, inside, edge, order, weight = label, color, "white", 3, "bold"
    if label not in ROWS:  # on top: a hollow mark hides nothing
        text, inside, edge, order, weight = label.split(", ")[-1], "none", color, 4, "normal"
    axes.plot([x] * len(seeds), seeds, marker, ms=4.5, mfc=inside, mec=edge, mew=0.7, zorder=order)
    axes.plot(x, y, marker, ms=9.5, mfc=inside, mec=edge, mew=1, zorder=order)
    left = label == "LoRA 20"  # so that labels seldom meet
    offset = {"LoRA 4": (9, -10), "LoReFT 20": (9, -4), "LoRA 3": (-24, 8), "LoReFT 3": (9, -12)}
    offset = offset.get(label, (-8 if left else 11, 5))
    text, offset = ("HEFT\n20 + 20", (9, -9)) if text == "HEFT 20 + 20" else (text, offset)
    style = {"color": color, "weight": weight, "ha": "right" if left else "left"}
    axes.annotate(text, (x, y), (11, -11) if text == "here" else offset, textcoords="offset points", **style)


def figure_1(path, small, seven):
    """Accuracy against training time, the paper's and the small model's: path.png and .svg."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams["svg.hashsalt"] = "heft"  # the same runs give the same bytes
    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1, 1.35))
    picture.subplots_adjust(left=0.055, right=0.99, top=0.86, bottom=0.115, wspace=0.13)
    for label, row in ROWS.items():
        bar = {"color": STYLE[label.split()[0]][1], "marker": "_", "ms": 7, "lw": 1}
        left.plot([row["minutes"] / 60] * 2, wilson(row["correct"], N), **bar)
        mark(left, label, row["minutes"] / 60, row["accuracy"])
    for label, method in seven.items():
        mark(left, f"{label}, here", method.seconds / 3600, method.mean)
    for label, method in small.items():
        mark(right, label, method.seconds / 60, method.mean, [run.percent for run in method.runs])
    missing = ", ".join(label for label in ROWS if label not in small)
    right.text(
        0.99, 0.03, f"not run yet: {missing}" if missing else "", transform=right.transAxes, ha="right"
    )
    titles = "Paper: Llama-2-7b-chat on BoolQ", "Here: SmolLM2-135M-Instruct on film reviews"
    notes = (
        "3 + 3: epochs of LoRA + LoReFT. Bars: our 95 % intervals",
        "Large: mean of the seeds. Small: one seed. Hollow: not in the paper",
    )
    for axes, title, note, unit in zip((left, right), titles, notes, ("hours", "minutes")):
        axes.set(xlabel=f"training time ({unit})", ylabel="accuracy (%)", xlim=(0, 1.19 * axes.get_xlim()[1]))
        axes.set_title(f"{title}\n", loc="left", weight="bold")
        axes.text(0, 1.03, note, transform=axes.transAxes)
        axes.grid(axis="y", color="0.92", zorder=0)
    for ending, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        picture.savefig(path.with_name(path.name + ending), dpi=200, metadata=metadata)
    plt.close(picture)


def on_page(methods):
    """Those that were trained, with the usual settings."""
    return {label: method for label, method in methods.items() if label == method.kind != "base model"}


def write_pages(folder):
    """README.md and details.md of `folder`, from its runs. Returns the methods for the figure."""
    runs, skipped = read_runs(folder)
    sections = {name: [] for name in (REVIEWS, SMALL_BOOLQ, LLAMA, "tuning")}
    for run in runs:
        sections.setdefault(run.section, []).append(run)
    trials, methods = sections.pop("tuning"), {name: methods_of(runs) for name, runs in sections.items()}
    small, boolq = (on_page(methods[name]) for name in (REVIEWS, SMALL_BOOLQ))
    seven = [run for run in sections[LLAMA] if run.num_validation_samples == N]
    seven = [run for run in seven if all(run.deciding.get(k, v) == v for k, v in PAPER["settings"].items())]
    seven = {label: methods_of([run for run in seven if run.kind == label]) for label in ROWS}
    seven = {label: found[label] for label, found in seven.items() if found}  # the one with the most seeds
    blocks = papers_totals() | {
        "statement": statement(small, seven),
        "table 1": table_1(small, seven),
        "methods": method_table(small),
        "comparisons": pair_table(small, QUESTIONS),
        "learning rates": trial_table(trials),
        "always yes": always_yes(boolq),
        "boolq methods": method_table(boolq),
        "boolq comparisons": pair_table(boolq, QUESTIONS),
        "skipped": "\n".join(["## Skipped files\n", *(f"- {x}" for x in skipped)] if skipped else []),
    }
    text, own = (HERE / "template.md").read_text(), (folder / "template.md").exists()
    text = re.sub("(?s)<!-- only here -->(.*?)<!-- end -->", r"\1" if own else "", text)
    text = re.sub("<!-- (.+?) -->", lambda match: str(blocks[match[1]]), text)
    (folder / "README.md").write_text(text.strip() + "\n")

    note = "Methods that are not in [README.md](README.md). Among several tests of one seed each, one small p"
    note += " is no evidence. Seconds of other layers and ranks are as measured, maybe beside other work."
    details = ["# Details", note]
    for name, found in methods.items():
        shown = on_page(found) if name in (REVIEWS, SMALL_BOOLQ) else {}
        rest = {label: method for label, method in found.items() if label not in shown}
        pairs = {(label, m.kind): "Does the setting matter?" for label, m in rest.items() if label != m.kind}
        if not (own and shown):  # all pairs, other settings against the usual ones
            ordered = sorted(found, key=lambda label: label != found[label].kind)
            pairs = {(a, b): QUESTIONS.get((a, b), "Do they differ?") for b, a in combinations(ordered, 2)}
        compared = {pair: text for pair, text in pairs.items() if compare(found, *pair)}
        details += [f"## {name}", method_table(rest), pair_table(found, compared) if compared else ""]
    details += ["## Table 2 of the paper", f"Source: {PAPER['table_2']['source']}."]
    details += [table("model | size | accuracy %", PAPER["table_2"]["rows"])]
    (folder / "details.md").write_text("\n\n".join(filter(None, details)) + "\n")
    print("\n".join([*(f"skipped: {x}" for x in skipped), f"{folder / 'README.md'}: {len(runs)} runs"]))
    return small, seven


def write_report(folder=HERE):
    figure_1(folder / "figure1", *write_pages(folder))


if __name__ == "__main__":
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE)
    folder = parser.parse_args().folder
    if not folder.is_dir():
        parser.error(f"{folder} is not a folder")
    write_report(folder)
