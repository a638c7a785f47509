"""Write results/README.md and the figures from all runs: python results/report.py [folder]

Reads each result of heft_finetuning.py in the folder (by default this file's) and below, and the paper's
numbers from paper.json. Runs of the paper's model on the paper's data stand beside the paper's, as in
figure1.png. Any other pair of base model and dataset gets a section, with the text of about.md from the
folder of its runs, and figure-<dataset>.png there. Smoke runs, and all in smoke/, are kept apart.
Needs matplotlib and statsmodels, which requirements.txt installs.
"""

import argparse
import json
import math
import os
import textwrap
from itertools import combinations
from pathlib import Path
from statistics import fmean, mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
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
# Runs, and groups of runs that differ in nothing but the seed: {seed: run}


def read_run(path):
    """A result with its predictions, checked; ValueError says what is wrong with it."""
    try:
        run = json.loads(path.read_text())
        lines = path.with_suffix(".predictions.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        n, correct, settings = run["num_validation_samples"], run["correct_predictions"], run["settings"]
        right = [row["prediction"] == row["answer"] for row in answers]
        questions = [(row["question"], row["answer"]) for row in answers]
        training = run["seconds"]["lora"] + run["seconds"]["reft"]
        pair = tuple(Path(settings.get(key, "unknown")).name for key in ("BASE_MODEL", "DATASET"))
        run |= {"right": right, "questions": questions, "pair": pair}
        run |= {"seed": settings["SEED"], "training": training}
        for key in ("unknown_answers", "peak_memory_gb", "device", "lora_epochs", "reft_epochs"):
            run[key]  # must be there
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


def read_runs(folder):
    """All runs in `folder` and below, in the order of their names, and what was skipped, as sentences."""
    runs, skipped = [], []
    for path in sorted(folder.rglob("*.json"), key=lambda path: path.with_suffix("").parts):
        name = path.relative_to(folder).as_posix()
        try:
            runs += [] if name == "paper.json" else [read_run(path) | {"name": name.removesuffix(".json")}]
        except ValueError as error:
            skipped.append(f"`{name}` {error}")
    for path in sorted(folder.rglob("*.predictions.jsonl")):
        if not path.with_name(path.name.replace(".predictions.jsonl", ".json")).exists():
            skipped.append(f"`{path.relative_to(folder).as_posix()}` has no result beside it")
    return runs, skipped


def configuration(run):
    """The settings that decide the run's outcome, but for the seed. Those of an absent stage do not."""
    absent = [stage for stage in ("LORA", "REFT") if not run[f"{stage.lower()}_epochs"]]
    absent += ["TRAIN", "EXAMPLES_PER_STEP", "MAX_LENGTH"] * (len(absent) == 2)
    old = {"MAX_TRAIN_SAMPLES": 0, "MAX_EVAL_SAMPLES": 0, "FORMAT": 1}  # what results of old formats lack
    # The folders of model and data do not count, their hashes do.
    settings = old | run["settings"] | dict(zip(("BASE_MODEL", "DATASET"), run["pair"]))
    names = [name for name in sorted(settings) if name not in BESIDE and not any(s in name for s in absent)]
    return {name: settings[name] for name in names}


def groups_of(runs):
    """The groups that the runs form; a second run of the same seed is left out."""
    groups = {}
    for run in runs:
        groups.setdefault(json.dumps(configuration(run)), {}).setdefault(run["seed"], run)
    return [dict(sorted(group.items())) for group in groups.values()]


def one(group):
    """A run of the group."""
    return next(iter(group.values()))


def method(run):
    """The method with its epochs."""
    lora, reft = run["lora_epochs"], run["reft_epochs"]
    if lora and reft:
        return f"HEFT {lora} + {reft}"
    return f"LoRA {lora}" if lora else f"LoReFT {reft}" if reft else "base model"


def place(run):
    """Layer and rank of the LoReFT intervention."""
    return run["settings"].get("REFT_LAYER", 15), run["settings"].get("REFT_RANK", 4)


def is_heft(group):
    """Whether it had both stages."""
    return bool(one(group)["lora_epochs"] and one(group)["reft_epochs"])


def arrange(runs):
    """The methods among `runs`, as (label, group, variants); the label says what is not as in most HEFT runs.

    HEFT groups that differ in layer or rank alone are one method: its group is that of layer 15 and rank 4
    (else of most seeds), its variants are the others."""
    families, usual = {}, {}
    for group in groups_of(runs):
        same = configuration(one(group))
        for name in ("REFT_LAYER", "REFT_RANK") if is_heft(group) else ():
            same.pop(name, None)
        families.setdefault(json.dumps(same), []).append(group)
    mains = [max(family, key=lambda g: (place(one(g)) == (15, 4), len(g))) for family in families.values()]
    for group in sorted(mains, key=lambda g: (is_heft(g), len(g)), reverse=True):
        usual = configuration(one(group)) | usual
    methods = []
    for main, family in zip(mains, families.values()):
        label = method(one(main)) + unlike(configuration(one(main)), usual)
        methods.append((label, main, [group for group in family if group is not main]))
    return sorted(methods, key=order)


def order(entry):
    """Base model, LoRA, LoReFT, HEFT; then by epochs; as usual before the rest."""
    run = one(entry[1])
    return run["reft_epochs"] > 0, run["lora_epochs"], run["reft_epochs"], entry[0]


def unlike(settings, usual):
    """The end of a label: the settings that are not as usual, hashes only if nothing else differs."""
    odd = [name for name in settings if settings[name] != usual[name] and not name.startswith("EPOCHS")]
    odd = [name for name in odd if not name.endswith(("_DATA", "_VERSION"))] or odd
    return "".join(f", {name.lower()}={str(settings[name])[:10]}" for name in odd)


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
    """How many questions only run `a` and only run `b` got right; None if they were not asked the same."""
    pairs = list(zip(a["right"], b["right"]))
    same = a["questions"] == b["questions"]
    return (pairs.count((True, False)), pairs.count((False, True))) if same else None


def p_value(only_a, only_b):
    """Exact McNemar test, which looks at the discordant questions alone."""
    return float(mcnemar([[0, only_a], [only_b, 0]], exact=True).pvalue)


def compare(a, b):
    """A plain sentence on two runs on the same questions, with its numbers; None if the questions differ."""
    counts = discordant(a, b)
    if counts is None:
        return None
    (only_a, only_b), p = counts, p_value(*counts)
    verdict = "not distinguishable" if p >= 0.05 else f"`{(a if only_a > only_b else b)['name']}` is better"
    text = f"`{a['name']}` and `{b['name']}`: {abs(only_a - only_b)} of {len(a['right']):,} questions apart "
    text += f"({only_a} right in the first only, {only_b} in the second only); p = {p:.2g}; {verdict}."
    return {"only_a": only_a, "only_b": only_b, "p": p, "text": text}


def smallest_difference(n, share):
    """Correct answers by which two independent runs of this accuracy must differ for p < 0.05."""
    return math.ceil(1.959963984540054 * math.sqrt(2 * share * (1 - share) * n))


# ---------------------------------------------------------------------------------------------
# The report, in blocks: a heading, paragraph, list or table each, or "" for nothing


def table(head, rows):
    """A table; `head` has its columns as "a | b"."""
    lines = [head.split(" | "), ["---"] * len(head.split(" | ")), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) if rows else ""


def hours(minutes):
    """83 as 1:23."""
    return f"{round(minutes) // 60}:{round(minutes) % 60:02d}"


def score(correct, n):
    """Three cells of a table: correct, accuracy %, 95 % interval."""
    low, high = interval(correct, n)
    return [f"{correct:,} of {n:,}", f"{100 * correct / n:.2f}", f"{low:.2f} to {high:.2f}"]


RUN_HEAD = "run | LoRA epochs | ReFT epochs | correct | accuracy % | 95 % interval | unknown"
RUN_HEAD += " | LoRA s | ReFT s | evaluation s | total h:mm | peak GB | device"


def cells(run):
    """A row of RUN_HEAD after the name."""
    times = [f"{run['seconds'][part]:.0f}" for part in ("lora", "reft", "evaluation")]
    times += [hours(run["seconds"]["total"] / 60), f"{run['peak_memory_gb']:.1f}", run["device"]]
    return [run["lora_epochs"], run["reft_epochs"], *score(*totals([run])), run["unknown_answers"], *times]


def run_table(runs, prefix=""):
    """A row per run; names without the folder `prefix`."""
    return table(RUN_HEAD, [[run["name"].removeprefix(prefix), *cells(run)] for run in runs])


def seed_blocks(runs):
    """Mean and spread of each group of several seeds."""
    rows = []
    for group in (group for group in groups_of(runs) if len(group) > 1):
        scores = [run["percent"] for run in group.values()]
        name = min((run["name"] for run in group.values()), key=len).split("-seed")[0]
        seeds = f"{len(group)} ({', '.join(map(str, group))})"
        spread = f"{mean(scores):.2f}", f"{stdev(scores):.2f}", f"{min(scores):.2f} to {max(scores):.2f}"
        rows.append([name, seeds, *spread, sum(run["unknown_answers"] for run in group.values())])
    head = "run | seeds | mean accuracy % | standard deviation | range | unknown, all together"
    return ["Runs that differ only in the seed:", table(head, rows)] if rows else []


def pair_blocks(runs):
    """The sentence of each pair of runs; pairs on different questions are counted, not compared."""
    found = [compare(a, b) for a, b in combinations(runs, 2)]
    lines = [f"- {pair['text']}" for pair in found if pair]
    if different := found.count(None):
        lines.append(f"- {different} pair(s) are on different questions and cannot be compared.")
    intro = "By the exact McNemar test on the stored predictions; below p = 0.05 a pair counts as different."
    return ["### Pairs", intro, "\n".join(lines)] if found else []


def paper_blocks(folder, runs):
    """The paper's model on the paper's data."""
    # A run is a row of Table 1 if it is that experiment: the name says so, and the questions are all there.
    main = {run["name"]: run for run in runs if run["name"] in TABLE_1 and run["num_validation_samples"] == N}
    others = [run for run in runs if run["name"] not in main]
    rows = []
    for name, paper in TABLE_1.items():
        ours = cells(main[name]) if name in main else [paper["lora_epochs"], paper["reft_epochs"], *[""] * 10]
        rows.append([name, *ours, f"{paper['accuracy']:.2f}", hours(paper["minutes"])])
    rows_2 = [[*row, "paper"] for row in PAPER["table_2"]["rows"]]
    rows_2 += [[name, "7B", f"{run['percent']:.2f}", "measured here"] for name, run in main.items()]

    points = []
    for paper in TABLE_1.values():
        point = {"label": f"{method(paper)}, paper", "totals": (paper["correct"], N)}
        points.append(point | {"time": paper["minutes"] / 60, "scores": [], "loss": {}})
    methods = arrange([run for run in runs if run["num_validation_samples"] == N])
    points += [points_of(label, group, unit=3600) for label, group, _ in methods]
    figure(folder / "figure1", "BoolQ validation", "hours", points)

    correct = {name: paper["correct"] for name, paper in TABLE_1.items()}
    need = smallest_difference(N, correct["lora20-reft0"] / N)
    short, long = (correct[name] - correct["lora20-reft0"] for name in ("lora3-reft3", "lora20-reft20"))
    told = f"""Of the paper's rows only totals are known, so no paired test is possible. Two independent runs
        near 85 % on {N:,} questions must differ by about {need} answers ({100 * need / N:.2f} points) for
        p < 0.05. The paper's HEFT 3 + 3 and LoRA-only 20 are {short} answers apart, HEFT 20 + 20 and
        LoRA-only 20 are {long}: not distinguishable from the totals. (A paired test on the same questions can
        resolve less: if only d questions change, all one way, d = 6 is enough.)"""
    return [
        "![accuracy, training time and losses](figure1.png)",
        "## Table 1",
        f"BoolQ validation, {N:,} questions. Empty rows have not been run here.",
        table(RUN_HEAD + " | paper % | paper h:mm", rows),
        *(["## Other runs", run_table(others)] if others else []),
        *seed_blocks(runs),
        *pair_blocks(runs),
        "## What the paper's totals can tell",
        " ".join(told.split()),
        "## Table 2 (paper, context)",
        f"Source: {PAPER['table_2']['source']}.",
        table("model | size | accuracy % | source", rows_2),
    ]


def method_table(methods):
    """A row per method, its seeds together."""
    rows = []
    for label, group, _ in methods:
        runs, scores = group.values(), [run["percent"] for run in group.values()]
        correct, _, wilson = score(*totals(runs))
        means = f"{mean(scores):.2f}", f"{stdev(scores):.2f}" if len(scores) > 1 else ""
        each = ", ".join(f"{run['percent']:.2f} ({seed})" for seed, run in group.items())
        unknown, seconds = sum(run["unknown_answers"] for run in runs), fmean(run["training"] for run in runs)
        rows.append([label, len(group), *means, each, correct, wilson, unknown, f"{seconds:.0f}"])
    head = "method | seeds | mean accuracy % | standard deviation | accuracy % (seed) | correct, all seeds"
    return table(head + " | 95 % interval | unknown | training s", rows)


def ground(run):
    """The base weights and the questions: what runs must have in common to be compared."""
    return run["settings"].get("BASE_VERSION"), run["settings"].get("VALIDATION_DATA")


def changes(run, group):
    """`discordant` for the run and that of its seed in the group; None if there is none like it."""
    # The base model has one answer for all seeds.
    other = one(group) if method(one(group)) == "base model" else group.get(run["seed"])
    return discordant(run, other) if other and ground(run) == ground(other) else None


def comparison_table(name, main, methods):
    """HEFT against each other method: seed by seed, and with the counts of all seeds added up."""
    rows = []
    for label, group, _ in methods:
        found = {seed: changes(run, group) for seed, run in main.items() if group is not main}
        found = {seed: (*counts, len(main[seed]["right"])) for seed, counts in found.items() if counts}
        found |= {"all": [sum(column) for column in zip(*found.values())]} if len(found) > 1 else {}
        for seed, (ours, theirs, n) in found.items():
            p = p_value(ours, theirs)
            better = "not distinguishable" if p >= 0.05 else name if ours > theirs else label
            points = f"{100 * (ours - theirs) / n:+.2f}"
            rows.append([label, seed, f"{n:,}", ours, theirs, points, f"{p:.2g}", better])
    head = f"{name} against | seed | questions | only {name} right | only the other right"
    return table(head + " | difference, points | p | better", rows)


def sensitivity_table(main, variants):
    """A row per run with another layer or rank, and per run of the main group with a seed of theirs."""
    runs = [run for group in variants for run in group.values()]
    beside = [main[seed] for seed in {run["seed"] for run in runs} if seed in main]
    rows = []
    for run in sorted(runs + beside, key=lambda run: (*place(run), run["seed"])):
        counts = None if run is main.get(run["seed"]) else changes(run, main)
        p = f"{p_value(*counts):.2g}" if counts else ""
        rows.append([*place(run), run["seed"], *score(*totals([run])), p])
    layer, rank = place(one(main))
    head = "layer | rank | seed | correct | accuracy % | 95 % interval"
    return table(f"{head} | p against layer {layer}, rank {rank}", rows)


POOLED = """The seeds answer the same questions, so pooled numbers (the interval here, the rows "all" below)
count each question once per seed: interval and p are optimistic."""
TESTED = """Exact McNemar tests on the same questions: seed by seed, and with the counts of all seeds added
up. The base model, untrained, answers alike for every seed."""


def section_blocks(folder, pair, runs, picture, about):
    """Another base model or dataset."""
    title, methods = " on ".join(pair), arrange(runs)
    figure(folder / picture, pair[1], "s", [points_of(label, group) for label, group, _ in methods])
    blocks = [f"## {title}", *about, f"![accuracy, training time and losses]({picture}.png)"]
    blocks += [method_table(methods), " ".join(POOLED.split())]
    if repeated := len(runs) - sum(map(len, groups_of(runs))):
        blocks.append(f"{repeated} run(s) repeat settings and seed of another: listed below, not counted.")
    mains = {}  # the HEFT group of most seeds, on each ground
    for label, group, _ in sorted(filter(lambda m: is_heft(m[1]), methods), key=lambda m: -len(m[1])):
        mains.setdefault(ground(one(group)), (label, group))
    compared = [comparison_table(label, group, methods) for label, group in mains.values()]
    blocks += [" ".join(TESTED.split()), *compared] if any(compared) else []
    for label, group, variants in methods:
        if variants:
            blocks.append(f"{label} with another layer or rank, tested against the run of the same seed:")
            blocks.append(sensitivity_table(group, variants))
    return [*blocks, "All runs:", run_table(runs, prefix=f"{Path(picture).parent.as_posix()}/")]


def all_sections(folder, runs):
    """A section for each pair of base model and dataset."""
    blocks, told, pictures = [], {}, set()
    for pair in sorted({run["pair"] for run in runs}):
        ours, about = [run for run in runs if run["pair"] == pair], []
        for file in sorted({(folder / run["name"]).with_name("about.md") for run in ours}):
            if file.exists():
                known = file in told and f"Weights and data: see {told[file]}, above."
                about.append(known or file.read_text().strip())
                told.setdefault(file, " on ".join(pair))
        picture = Path(ours[0]["name"]).with_name(f"figure-{pair[1]}").as_posix()
        picture += f"-{pair[0]}" if picture in pictures else ""  # two models in one folder
        pictures.add(picture)
        blocks += section_blocks(folder, pair, ours, picture, about)
    return blocks


# ---------------------------------------------------------------------------------------------
# Figures: told apart by markers, no colour is needed


def points_of(label, group, unit=1):
    """What the figure shows of a group, its times in `unit` seconds."""
    scores, times = zip(*((run["percent"], run["training"] / unit) for run in group.values()))
    point = {"label": label, "totals": totals(group.values()), "scores": scores, "time": fmean(times)}
    return point | {"loss": one(group)["loss"]}


def smooth(loss):
    """Running mean over a twentieth of the steps."""
    window = 1 + len(loss) // 20
    return [fmean(loss[max(0, i - window + 1) : i + 1]) for i in range(len(loss))]


def figure(path, data, unit, points):
    """Accuracy of each method, the same against training time, and the losses: path.png and .svg."""
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"svg.hashsalt": "heft", "svg.fonttype": "none"})  # same runs, same bytes
    stages = [stage for stage in ("lora", "reft") if any(point["loss"].get(stage) for point in points)]
    panels = [["methods", "time", stage] for stage in stages] or [["methods", "time"]]
    size = (3.6 * len(panels[0]), max(3.2, 0.4 * len(points)))
    picture, axes = plt.subplot_mosaic(panels, figsize=size, layout="constrained")
    left, middle, curves = axes["methods"], axes["time"], {}
    labels = [textwrap.fill(point["label"], 24, break_long_words=False) for point in points]
    for number, (point, label) in enumerate(zip(points, labels)):
        (correct, n), (low, high) = point["totals"], interval(*point["totals"])
        average = 100 * correct / n
        color = f"C{number % 10}" if point["scores"] else "0.45"  # grey: the paper's
        style = {"color": color, "marker": "os^DvPXp<>"[number % 10], "mfc": "white"}
        bar = {"xerr": [[average - low], [high - average]], "capsize": 2, "elinewidth": 0.8}
        left.errorbar(average, number, **bar, **(style | {"mfc": color if point["scores"] else "white"}))
        middle.plot(point["time"], average, ms=6, **(style | {"mfc": "none"}))  # shows what lies below it
        if len(point["scores"]) > 1:
            rows = [number + 0.22 + 0.45 * i / len(point["scores"]) for i in range(len(point["scores"]))]
            left.plot(point["scores"], rows, ls="", ms=3, mew=0.6, **style)
        for stage, loss in point["loss"].items():
            curve = curves.setdefault((stage, *loss), {"number": number, "style": style, "owners": []})
            curve["owners"].append(label)  # HEFT has stage 1 in common with LoRA alone
    left.set_yticks(range(len(points)), labels)
    left.invert_yaxis()
    left.set(xlabel=f"{data} accuracy (%)", title="95 % intervals; small: each seed")
    longest = max(point["time"] for point in points) or 1
    middle.set(xlabel=f"training time ({unit})", ylabel=f"{data} accuracy (%)", title="Means against time")
    middle.set_xlim(-0.06 * longest, 1.06 * longest)
    for (stage, *loss), curve in curves.items():
        if loss:
            marks = (len(loss) * curve["number"] // 40, 1 + len(loss) // 8)  # not upon those of others
            style = curve["style"] | {"lw": 0.9, "ms": 4, "markevery": marks}
            style |= {"label": " and\n".join(curve["owners"])}
            axes[stage].plot(range(1, len(loss) + 1), smooth(loss), **style)
    for stage in stages:
        title = f"{'LoRA' if stage == 'lora' else 'LoReFT'} loss, running mean"
        axes[stage].set(xlabel="optimizer step", ylabel="loss", title=title)
        axes[stage].legend(frameon=False, fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    for ending, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        temporary = path.with_name(f".{path.name}.{os.getpid()}{ending}")
        picture.savefig(temporary, dpi=200, metadata=metadata)
        temporary.replace(path.with_name(path.name + ending))
    plt.close(picture)


def write_report(folder=HERE):
    """README.md and the figures of `folder`, from its runs."""
    runs, skipped = read_runs(folder)
    toys, ours, others = [], [], []
    for run in runs:  # wherever it lies, a smoke run never mixes with others
        toy = run["settings"].get("SMOKE") or run["name"].startswith("smoke/")
        (toys if toy else ours if run["pair"] == PAPERS_PAIR else others).append(run)

    intro = "Written by `python results/report.py`; edits are lost. "
    intro += 'Columns marked "paper" are from arXiv 2509.09801.'
    blocks = ["# Results", intro, *paper_blocks(folder, ours), *all_sections(folder, others)]
    about_toy = ["The embedded toy, nothing about BoolQ. Five seeds: [smoke/README.md](smoke/README.md)."]
    about_toy *= (folder / "smoke/README.md").exists()
    blocks += ["## Smoke runs", *about_toy] if toys or about_toy else []
    if toys:
        blocks += ["Run here on the toy, not the paper's experiment:", run_table(toys, prefix="smoke/")]
        blocks += [*seed_blocks(toys), *pair_blocks(toys)]
    blocks += ["## Skipped files", "\n".join(f"- {sentence}" for sentence in skipped)] if skipped else []
    temporary = folder / f".README.md.{os.getpid()}"  # then renamed: the whole file or none
    temporary.write_text("\n\n".join(blocks) + "\n")
    temporary.replace(folder / "README.md")
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
