"""Write results/README.md and results/figure1.png and .svg from all runs: `python results/report.py [folder]`.

Reads every result of heft_finetuning.py in the folder and in its smoke/, and the paper's numbers from paper.json.
Needs matplotlib and statsmodels, which requirements.txt installs.
"""

import json
import math
import os
import statistics
import sys
from itertools import combinations
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

HERE = Path(__file__).resolve().parent
HEAD = ("| run | LoRA epochs | ReFT epochs | correct | accuracy % | 95 % interval | unknown | LoRA s | ReFT s | evaluation s | total h:mm | peak GB | device | paper % | paper h:mm |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")


def hours(minutes):
    """83 as 1:23."""
    return f"{int(round(minutes)) // 60}:{int(round(minutes)) % 60:02d}"


def write(path, text):
    """The whole file or none: under a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def interval(correct, n):
    """95 % Wilson interval of an accuracy, in percent."""
    low, high = proportion_confint(correct, n, method="wilson")
    return 100 * low, 100 * high


def read_run(path):
    """A result with its predictions, checked; ValueError says what is wrong with it."""
    try:
        run = json.loads(path.read_text())
        predictions = [json.loads(line) for line in path.with_suffix(".predictions.jsonl").read_text().splitlines()]
        n, correct = run["num_validation_samples"], run["correct_predictions"]
        right = [row["prediction"] == row["answer"] for row in predictions]
        questions = [(row["question"], row["answer"]) for row in predictions]
        run["settings"]["SEED"], run["seconds"]["total"], run["loss"]["lora"], run["loss"]["reft"]  # must be there
        for key in ("unknown_answers", "peak_memory_gb", "device", "lora_epochs", "reft_epochs"):
            run[key]
    except FileNotFoundError as error:
        raise ValueError(f"lacks {Path(error.filename).name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError("is no complete JSON") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is no result of heft_finetuning.py ({type(error).__name__}: {error})") from None
    if not n or len(predictions) != n or sum(right) != correct:
        raise ValueError(f"contradicts its predictions: {correct} of {n} correct there, {sum(right)} of {len(predictions)} here")
    return run | {"name": path.stem, "right": right, "questions": questions}


def read_runs(folder):
    """All runs of a folder by name, and what was skipped, as sentences."""
    runs, skipped = {}, []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem):
        if path.name != "paper.json":
            try:
                runs[path.stem] = read_run(path)
            except ValueError as error:
                skipped.append(f"`{path.name}` {error}")
    for path in sorted(folder.glob("*.predictions.jsonl")):
        if not (folder / (path.name.removesuffix(".predictions.jsonl") + ".json")).exists():
            skipped.append(f"`{path.name}` has no result beside it")
    return runs, skipped


def row(name, run=None, paper=None):
    """A row of Table 1; empty where there is no run."""
    theirs = f"{paper['accuracy']:.2f} | {hours(paper['minutes'])}" if paper else " | "
    if not run:
        return f"| {name} | {paper['lora_epochs']} | {paper['reft_epochs']} |  |  |  |  |  |  |  |  |  |  | {theirs} |"
    n, correct, seconds = run["num_validation_samples"], run["correct_predictions"], run["seconds"]
    low, high = interval(correct, n)
    return (f"| {name} | {run['lora_epochs']} | {run['reft_epochs']} | {correct:,} of {n:,} | {100 * correct / n:.2f} | {low:.2f} to {high:.2f} "
            f"| {run['unknown_answers']} | {seconds['lora']:.0f} | {seconds['reft']:.0f} | {seconds['evaluation']:.0f} | {hours(seconds['total'] / 60)} "
            f"| {run['peak_memory_gb']:.1f} | {run['device']} | {theirs} |")


def compare(a, b):
    """A plain sentence on two runs on the same questions: exact McNemar test; None if the questions differ."""
    if a["questions"] != b["questions"]:
        return None
    only_a = sum(x and not y for x, y in zip(a["right"], b["right"]))
    only_b = sum(y and not x for x, y in zip(a["right"], b["right"]))
    both, n = sum(x and y for x, y in zip(a["right"], b["right"])), len(a["right"])
    p = mcnemar([[both, only_a], [only_b, n - both - only_a - only_b]], exact=True).pvalue
    verdict = "not distinguishable" if p >= 0.05 else f"`{(a if only_a > only_b else b)['name']}` is better"
    return {"only_a": only_a, "only_b": only_b, "p": float(p), "text":
            f"`{a['name']}` and `{b['name']}`: {abs(only_a - only_b)} of {n:,} questions apart ({only_a} right in the first only, {only_b} in the second only); "
            f"p = {p:.2g}; {verdict}."}


def smallest_difference(n, accuracy):
    """Correct answers that two independent runs of this accuracy (0 to 1) on n questions must differ by for p < 0.05."""
    return math.ceil(1.959963984540054 * math.sqrt(2 * accuracy * (1 - accuracy) * n))


def without_seed(run):
    """What two runs that differ only in their seed have in common."""
    ignored = ("SEED", "TOKENS_PER_MICROBATCH", "PUSH_TO_HUB", "PRIVATE_REPOS", "HF_USER", "HF_REPO_LORA", "HF_REPO_REFIT", "MERGED_DIR", "OUTPUT_DIR", "RESULTS_DIR", "RESULTS_FILE")
    return json.dumps({key: value for key, value in run["settings"].items() if key not in ignored}, sort_keys=True)


def seed_table(runs):
    """Mean and spread of each group of runs that differ in nothing but the seed; lines, empty if there is no group."""
    groups = {}
    for run in runs.values():
        groups.setdefault(without_seed(run), []).append(run)
    lines = []
    for group in sorted((g for g in groups.values() if len(g) > 1), key=lambda g: g[0]["name"]):
        scores = [100 * run["correct_predictions"] / run["num_validation_samples"] for run in group]
        seeds = sorted(run["settings"]["SEED"] for run in group)
        name = min((run["name"] for run in group), key=len).split("-seed")[0]
        lines.append(f"| {name} | {len(group)} ({', '.join(map(str, seeds))}) | {statistics.mean(scores):.2f} | {statistics.stdev(scores):.2f} "
                     f"| {min(scores):.2f} to {max(scores):.2f} | {sum(run['unknown_answers'] for run in group)} |")
    return ["", "Runs that differ only in the seed:", "", "| run | seeds | mean accuracy % | standard deviation | range | unknown, all together |",
            "|---|---|---|---|---|---|", *lines] if lines else []


MCNEMAR = "Pairs, by the exact McNemar test on the stored predictions; below p = 0.05 a pair counts as different."


def pair_lines(runs):
    """The sentence of each pair of runs; pairs on different questions are named, not compared."""
    lines, different = [], 0
    for a, b in combinations(runs.values(), 2):
        sentence = compare(a, b)
        lines += [f"- {sentence['text']}"] if sentence else []
        different += sentence is None
    return lines + ([f"- {different} pair(s) are on different questions and cannot be compared."] if different else [])


def write_report(folder=HERE):
    """README.md and the figure of `folder`, from its runs."""
    paper = json.loads((HERE / "paper.json").read_text())
    table_1, n = paper["table_1"], paper["num_validation_samples"]
    runs, skipped = read_runs(folder)
    smoke, smoke_skipped = read_runs(folder / "smoke")
    smoke |= {name: run for name, run in runs.items() if run["settings"].get("SMOKE")}  # wherever it lies, it never mixes
    runs = {name: run for name, run in runs.items() if not run["settings"].get("SMOKE")}
    # A run counts for a row of Table 1 if it is that experiment: the name says so, and the questions are all there.
    main = {name: runs[name] for name in table_1 if name in runs and runs[name]["num_validation_samples"] == n}
    others = {name: run for name, run in runs.items() if name not in main}
    seeds, seeds_skipped = read_runs(folder / "smoke/seeds")
    skipped += [f"smoke/{s}" for s in smoke_skipped] + [f"smoke/seeds/{s}" for s in seeds_skipped]

    lines = ["# Results", "", "Written by `python results/report.py`; edits are lost. Columns marked \"paper\" are from arXiv 2509.09801.", "",
             "![accuracy against training time, and losses](figure1.png)", "", "## Table 1", "",
             f"BoolQ validation, {n:,} questions. Empty rows have not been run here.", "", HEAD,
             *[row(name, main.get(name), theirs) for name, theirs in table_1.items()]]
    if others:
        lines += ["", "## Other runs", "", HEAD, *[row(name, run) for name, run in others.items()]]
    lines += seed_table(runs)
    if len(runs) > 1:
        lines += ["", "## Pairs", "", MCNEMAR, "", *pair_lines(runs)]
    best, second = table_1["lora20-reft20"], table_1["lora20-reft0"]
    need = smallest_difference(n, second["correct"] / n)
    lines += ["", "## What the paper's totals can tell", "",
              f"Of the paper's rows only totals are known, so no paired test is possible. Two independent runs near 85 % on {n:,} questions must differ by about "
              f"{need} answers ({100 * need / n:.2f} points) for p < 0.05. The paper's HEFT 3 + 3 and LoRA-only 20 are "
              f"{table_1['lora3-reft3']['correct'] - second['correct']} answers apart, HEFT 20 + 20 and LoRA-only 20 are {best['correct'] - second['correct']}: "
              "not distinguishable from the totals. (A paired test on the same questions can resolve less: if only d questions change, "
              "all one way, d = 6 is enough.)",
              "", "## Table 2 (paper, context)", "", f"Source: {paper['table_2']['source']}.", "", "| model | size | accuracy % | source |", "|---|---|---|---|",
              *[f"| {model} | {size} | {accuracy} | paper |" for model, size, accuracy in paper["table_2"]["rows"]],
              *[f"| {name} | 7B | {100 * run['correct_predictions'] / n:.2f} | measured here |" for name, run in main.items()]]
    toy = []
    if smoke or seeds:
        toy += ["", "## Smoke runs", "", "The embedded toy (`smoke/`), not the paper's experiment: nothing here says anything about BoolQ.", ""]
    if seeds:
        toy += ["As shipped, five seeds of each of four settings:", "", HEAD, *[row(name, run) for name, run in seeds.items()], *seed_table(seeds)]
        won = [seeds[f"lora3-reft3{end}"]["correct_predictions"] >= run["correct_predictions"] for name, run in seeds.items()
               if name.startswith("lora3-reft0") and f"lora3-reft3{(end := name.removeprefix('lora3-reft0'))}" in seeds]
        toy += ["", f"HEFT is at least as good as LoRA-only in {sum(won)} of {len(won)} seeds."]
    if smoke:
        toy += ["", "Run here:", "", HEAD, *[row(name, run) for name, run in smoke.items()], *seed_table(smoke)]
        toy += ["", MCNEMAR, "", *pair_lines(smoke)] if len(smoke) > 1 else []
    lines += toy
    if skipped:
        lines += ["", "## Skipped files", "", *[f"- {sentence}" for sentence in skipped]]
    figure(folder, runs, table_1, n)
    write(folder / "README.md", "\n".join(lines) + "\n")
    if toy:
        (folder / "smoke").mkdir(exist_ok=True)
        write(folder / "smoke/README.md", "\n".join(["Written by `python results/report.py`; also in [results/README.md](../README.md).", *toy]) + "\n")
    for sentence in skipped:
        print(f"skipped: {sentence}")
    print(f"{folder / 'README.md'}: {len(main)} of {len(table_1)} rows of Table 1, {len(others)} other runs, {len(smoke) + len(seeds)} smoke runs")


def smooth(loss, window):
    """Running mean over `window` steps."""
    return [statistics.fmean(loss[max(0, i - window + 1):i + 1]) for i in range(len(loss))]


def figure(folder, runs, table_1, n):
    """Figure 1 (accuracy with 95 % intervals against training time) and the loss curves of both stages.
    A row of Table 1 is told by its marker, ours from the paper's by filling: no colour is needed."""
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "heft", "svg.fonttype": "none"})
    picture, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2), gridspec_kw={"width_ratios": [1.15, 1]}, layout="constrained")
    markers = dict(zip(table_1, "^sDo"))
    row_of = lambda run: next((name for name in table_1 if run["name"] in (name, f"{name}-seed{run['settings']['SEED']}")), None)

    def point(axes, hours, correct, **style):
        (low, high), accuracy = interval(correct, n), 100 * correct / n
        axes.errorbar(hours, accuracy, [[accuracy - low], [high - accuracy]], capsize=2, lw=0.8, ms=5, **style)

    for name, theirs in table_1.items():
        point(left, theirs["minutes"] / 60, theirs["correct"], fmt=markers[name], mfc="white", color="0.45",
              label=f"{theirs['method']} {theirs['lora_epochs']} + {theirs['reft_epochs']}, paper")
    labels = set()
    for run in (run for run in runs.values() if run["num_validation_samples"] == n):
        name = row_of(run)
        label = f"{table_1[name]['method']} {run['lora_epochs']} + {run['reft_epochs']}, measured" if name else "other settings, measured"
        point(left, run["seconds"]["total"] / 3600, run["correct_predictions"], fmt=markers.get(name, "x"), color="C0", label=None if label in labels else label)
        labels.add(label)
    left.set(xlabel="training time (hours)", ylabel="BoolQ validation accuracy (%)", title="Figure 1", xscale="log")
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if left.get_xlim()[0] <= tick <= left.get_xlim()[1]]
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    left.legend(frameon=False, fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)

    curves = {row_of(run): run for run in reversed(runs.values()) if row_of(run) and (run["loss"]["lora"] or run["loss"]["reft"])}
    for number, (name, run) in enumerate(sorted(curves.items())):
        for stage, style in (("lora", "-"), ("reft", "--")):
            if loss := run["loss"][stage]:
                right.plot(range(1, len(loss) + 1), smooth(loss, 1 + len(loss) // 50), style, lw=0.9, color=f"C{number}", marker=markers[name], ms=4, mfc="white",
                           markevery=(len(loss) * number // 40, 1 + len(loss) // 8), label=f"{name}, {'LoRA' if stage == 'lora' else 'LoReFT'}")
    right.set(xlabel="optimizer step", ylabel="loss (running mean)", title="Loss: LoRA solid, LoReFT dashed")
    if curves:
        right.legend(frameon=False, fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    else:
        right.set(xticks=[], yticks=[])
        right.text(0.5, 0.5, "no runs of the real experiment yet", ha="center", va="center", transform=right.transAxes, color="0.5")
    for ending, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        temporary = folder / f".figure1.{os.getpid()}{ending}"
        picture.savefig(temporary, dpi=200, metadata=metadata)
        temporary.replace(folder / f"figure1{ending}")
    plt.close(picture)


if __name__ == "__main__":
    write_report(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
