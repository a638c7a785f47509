"""The script against the paper's procedure (tests/listing.py), on one model, data, precision and device.

    python tests/benchmark.py                                  # a run of minutes on one core, or on a GPU
    python tests/benchmark.py --model FOLDER --data FOLDER     # a tokenizer with config.json, and BoolQ rows
    python tests/benchmark.py --layers 0 --dtype bfloat16 --examples 320 --questions 100    # 7B, on a GPU
    python tests/benchmark.py --trainer                        # stage 1 with transformers' Trainer, too
    python tests/benchmark.py --answers 1000 --dtype bfloat16  # how many answers depend on batching
    python tests/benchmark.py --count                          # the paper's 3 + 3 run in operations, not run

The model has random weights: right for speed and memory, wrong for accuracy. Without --data, prompts have
lengths drawn from the real distribution (lognormal; median 191 tokens, 99 % under 486, longest 1,417).

The default model has 18 layers of width 512, 4 heads of the 7B model's 128, 32,000 words, and the
intervention in the middle, as in the 7B model. The blocks have 78 % of the operations per token (7B: 98 %),
the output layer the rest. Attention between tokens comes on top and weighs more than in the 7B model: the
last line of the count says how much. 32 examples are one step, so that micro-batches are as full as in a real
run; LoReFT then trains on what LoRA's step has made. The default run has 35e12 operations, and up to 10e12 of
attention: about a quarter of an hour on a core that does 60e9 in a second.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Of both: on shared cores, threads that wait for each other would measure the neighbours.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import listing
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import heft_finetuning as heft

DEVICE = heft.DEVICE
STAGES = ("lora", "reft", "evaluation")
# What options that are not given are, in a run, with --answers and with --count.
RUN = dict(layers=18, width=512, examples=32, questions=100, epochs_lora=1, epochs_reft=2)
# Narrow: the answers, not the seconds, are looked at.
ANSWERS = dict(layers=18, width=64, examples=64, epochs_lora=0, epochs_reft=0)
# The paper's 3 + 3 epochs on all of BoolQ with the 7B model.
COUNT = dict(layers=0, width=512, examples=9427, questions=3270, epochs_lora=3, epochs_reft=3)


# ---------------------------------------------------------------------------------------------
# Model and data


def make_config(source, layers, width, tokenizer):
    """The shape of `source` (without one: of the 7B model), or `layers` of `width` if `layers` is not 0."""
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = AutoConfig.from_pretrained(source) if source else LlamaConfig(vocab_size=32000, **ends)
    if layers:
        shape = dict(num_hidden_layers=layers, hidden_size=width, intermediate_size=43 * width // 16)
        config.update(shape | dict(num_attention_heads=4, num_key_value_heads=4, head_dim=width // 4))
    return config


def make_model(folder, source, layers, width, dtype, spread=0.02):
    """A random model with the tokenizer of `source` in `folder`; `layers` 0 keeps the shape of `source`.

    With a standard deviation of the weights (`spread`) of 0.02 it says much the same to every prompt;
    0.2 makes it listen."""
    tokenizer = AutoTokenizer.from_pretrained(source or ROOT / "smoke/model")
    config = make_config(source, layers, width, tokenizer)
    config.initializer_range = spread
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_data(folder, source, examples, questions, tokenizer):
    """`examples` training and `questions` validation rows: made up, or the first of `source`."""
    folder.mkdir()
    rng = random.Random(0)
    words = "keeps plays likes speaks visits studies cats piano bread French Paris law".split()
    overhead = len(tokenizer(heft.BOOLQ_PROMPT_TMPL % ("", "is it law"))["input_ids"])

    def made_up(length):
        passage = " ".join(rng.choice(words) for _ in range(length - overhead))
        return json.dumps({"question": "is it law", "passage": passage, "answer": rng.random() < 0.62})

    for split, n in (("train", examples), ("validation", questions)):
        if source:
            lines = (Path(source) / f"{split}.jsonl").read_text().strip().split("\n")[:n]
        else:
            lengths = [round(191 * 2.71828 ** (0.4 * rng.gauss(0, 1))) for _ in range(n)]
            lines = [made_up(min(1417, max(overhead + 5, length))) for length in lengths]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------
# Operations that the weights need: 2 per weight and token forward, and 2 back, as the weights are frozen.
# Padding counts. Left out: attention between tokens, LoRA's and LoReFT's own weights, and what is no product.


def steps(examples, epochs):
    """The examples of each step, in the order that both procedures take them in."""
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(heft.SEED + epoch)
        order = torch.randperm(len(examples), generator=generator).tolist()
        for first in range(0, len(order), heft.EXAMPLES_PER_STEP):
            yield [examples[i] for i in order[first : first + heft.EXAMPLES_PER_STEP]]


def weights(config):
    """The weights that each token is multiplied with: (those of the blocks, those of the output layer)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    body = sum(weight.numel() for name, weight in model.named_parameters() if ".layers." in name)
    return body, config.vocab_size * config.hidden_size


def operations(procedure, config, layer, epochs, lora, reft, prompts):
    """Operations of each stage, in the "paper" procedure or in "heft".

    layer: the block of the intervention; epochs: (LoRA's, LoReFT's); lora, reft: their
    training examples; prompts: the lengths of the questions in tokens."""
    paper = procedure == "paper"
    body, head = weights(config)
    above = body * (config.num_hidden_layers - 1 - layer) / config.num_hidden_layers
    forward, backward = 2 * (body + head), 2 * (above + head)

    # Stage 1: forward and back through everything; the paper pads each example to MAX_LENGTH.
    groups = [group for step in steps(lora, epochs[0]) for group in heft.collate(step)]
    tokens = sum(group["input_ids"].numel() for group in groups)
    found = {"lora": 2 * forward * (epochs[0] * len(lora) * heft.MAX_LENGTH if paper else tokens)}

    # Stage 2: forward, and back to the intervention. The paper does so with all tokens of eight examples.
    # Here what comes before the last prompt token goes through the blocks only, forward only, and the start
    # that all prompts share only once.
    if paper:
        before = tokens = 0
        for step in steps(reft, epochs[1]):
            lengths = [len(example["before_mask"]) + len(example["input_ids"]) for example in step]
            tokens += sum(len(e) * max(e) for e in (lengths[i : i + 8] for i in range(0, len(lengths), 8)))
    else:
        start = len(os.path.commonprefix([example["before"][:-1] for example in reft]))
        reft = [example | {"before": example["before"][start:]} for example in reft]
        groups = [group for step in steps(reft, epochs[1]) for group in heft.collate(step)]
        before = start * bool(groups) + sum(group["before"].numel() for group in groups)
        tokens = sum(group["input_ids"].numel() for group in groups)
    found["reft"] = 2 * body * before + (forward + backward) * tokens

    # Evaluation: the prompt through the blocks, its last token through the output layer, then the generated
    # tokens but for the last. Batching adds only padding to that.
    groups = [[i] for i in range(len(prompts))]
    if not paper:
        groups = heft.microbatches(prompts, 4 * heft.TOKENS_PER_MICROBATCH)
    tokens = sum(len(group) * max(prompts[i] for i in group) for group in groups)
    found["evaluation"] = 2 * body * tokens + len(prompts) * (2 * head + forward * (heft.MAX_NEW_TOKENS - 1))
    return found


def print_count(config, needed, mean):
    """The table of --count. needed: {procedure: its `operations`}; mean: tokens of a training prompt."""

    def short(number):
        return f"{number / 1e12:,.0f}" if number >= 1e14 else f"{number / 1e12:.3g}"

    body, head = weights(config)
    print(f"the blocks have {100 * body / (body + head):.0f} % of the operations per token\n")
    print("| stage | paper's procedure, 10^12 operations | heft | ratio |\n|---|---|---|---|")
    for stage in (*STAGES, "all"):
        paper, ours = (sum(found.values()) if stage == "all" else found[stage] for found in needed.values())
        if ours:
            print(f"| {stage} | {short(paper)} | {short(ours)} | {paper / ours:.2f} |")
    # Two products of each token with each other per block, forward; without skipping what the mask hides.
    each = 4 * config.num_hidden_layers * config.hidden_size / (2 * (body + head))
    extra = [100 * each * tokens for tokens in (heft.MAX_LENGTH, mean)]
    print(f"\nNot counted: attention between tokens, up to {extra[0]:.0f} % on top of the paper's", end=" ")
    print(f"stage 1, and about {extra[1]:.1f} % on top of the rest", flush=True)


# ---------------------------------------------------------------------------------------------
# The two procedures, each in a process of its own: {"seconds", "peak", "loss": {stage: ...}, "texts"}


def peak_memory():
    """GB that the process has needed so far, on the GPU if there is one: as in the script's results."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def theirs(folder, o):
    """The listing's three parts."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    options = dict(dtype=getattr(torch, o.dtype), device_map=DEVICE)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **options)
    heft.DATASET = str(folder / "data")
    rows, questions = heft.load_boolq("train", tokenizer), heft.load_boolq("validation", tokenizer)
    found, reft = {"seconds": {}, "peak": {}, "loss": {"lora": [], "reft": []}}, None

    def timed(name, work, *arguments, **options):
        started = time.monotonic()
        value = work(*arguments, **options)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        found["seconds"][name], found["peak"][name] = time.monotonic() - started, peak_memory()
        return value

    training = (tokenizer, rows)
    if o.epochs_lora:  # without dropout: the two would draw other masks
        model, losses = timed("lora", listing.stage_1, model, *training, o.epochs_lora, dropout=0.0)
        found["loss"]["lora"], model = losses, model.merge_and_unload()
    if o.epochs_reft:
        reft, losses = timed("reft", listing.stage_2, model, *training, o.epochs_reft, layer=o.layer)
        found["loss"]["reft"] = losses
    found["texts"] = timed("evaluation", listing.evaluate, model, tokenizer, questions, reft)
    return found


def trainers_stage_1(folder, o):
    """Seconds of stage 1 with transformers' Trainer and PEFT, as most users would write it: 8 rows per micro-
    batch, 4 micro-batches per step, rows of similar length together, padded to the longest of them."""
    from peft import get_peft_model
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, o.dtype))
    heft.DATASET, heft.LORA_DROPOUT = str(folder / "data"), 0.0
    examples = heft.lora_training_examples(tokenizer, heft.load_boolq("train", tokenizer))
    arguments = TrainingArguments(
        folder / "trainer",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        train_sampling_strategy="group_by_length",
        num_train_epochs=o.epochs_lora,
        learning_rate=2e-4,
        use_cpu=DEVICE == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": example["input_ids"]} for example in examples]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = get_peft_model(model, heft.lora_config())
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows)
    started = time.monotonic()
    trainer.train()
    return time.monotonic() - started


def ours(folder, o):
    """The script itself, as a user starts it."""
    flags = ["--base-model", folder / "model", "--dataset", folder / "data", "--no-push-to-hub"]
    flags += ["--epochs-lora", o.epochs_lora, "--epochs-reft", o.epochs_reft, "--reft-layer", o.layer]
    flags += ["--lora-dropout", 0, "--dtype", o.dtype, "--tokens-per-microbatch", o.tokens]
    command = [sys.executable, str(ROOT / "heft_finetuning.py"), *map(str, flags)]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
        (result,) = (json.loads(path.read_text()) for path in Path(place, "results").glob("*.json"))
        (predictions,) = Path(place, "results").glob("*.predictions.jsonl")
        texts = [json.loads(line)["text"] for line in predictions.read_text().splitlines()]
    return {key: result[key] for key in ("seconds", "loss")} | {
        "texts": texts,
        "peak": result["peak_memory_gb"],
    }


# ---------------------------------------------------------------------------------------------
# What is measured


def product_rate(dtype):
    """Floating-point operations per second of a matrix product on this device."""
    size = 8192 if DEVICE == "cuda" else 1536
    a = torch.randn(size, size, device=DEVICE, dtype=getattr(torch, dtype))
    best = 0
    for _ in range(5):
        started = time.monotonic()
        for _ in range(8):
            a @ a
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        best = max(best, 8 * 2 * size**3 / (time.monotonic() - started))
    return best


def print_times(new, old, needed, tokens, rate):
    """The table of a run. old: None with --ours-only; tokens: of the prompts that each stage takes in."""
    print("\n| stage | paper's procedure s | heft s | ratio | prompt tokens per s", end=" ")
    print("| share of the matrix product % | peak GB so far, paper's | heft |")
    print("|---" * 8 + "|")
    stages = [stage for stage in STAGES if new["seconds"][stage]]
    for part in [[stage] for stage in stages] + [stages] * (len(stages) > 1):
        ours, theirs = (sum(run["seconds"][stage] for stage in part) if run else None for run in (new, old))
        row = [f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.1f}"] if old else ["", f"{ours:.1f}", ""]
        share = 100 * sum(needed["heft"][stage] for stage in part) / ours / rate
        row += [f"{sum(tokens[stage] for stage in part) / ours:,.0f}", f"{share:.1f}"]
        row += [f"{max(run['peak'][stage] for stage in part):.1f}" if run else "" for run in (old, new)]
        print(f"| {part[0] if len(part) == 1 else 'all'} | {' | '.join(row)} |")


def print_differences(new, old, dtype):
    """How far the losses and the answers of the two procedures are apart."""
    print()
    for stage in ("lora", "reft"):
        if new["loss"][stage]:
            a, b = torch.tensor(new["loss"][stage]), torch.tensor(old["loss"][stage])
            largest = f"{((a - b).abs() / b).max().item():.1e} over {len(a)} steps"
            print(f"{stage}: largest relative difference of a step's loss {largest}")
    pairs = list(zip(new["texts"], old["texts"]))
    texts = sum(a != b for a, b in pairs)
    answers = sum(heft.predict(a) != heft.predict(b) for a, b in pairs)
    share = [f"{100 * differ / len(pairs):.1f} %" for differ in (texts, answers)]
    print(f"batched against one by one, {dtype}: {texts} of {len(pairs)} texts differ ({share[0]}),", end=" ")
    print(f"{answers} answers ({share[1]}); {len(set(new['texts']))} different texts")


# ---------------------------------------------------------------------------------------------


def read_options():
    """The command line; what is not given is taken from RUN, ANSWERS or COUNT."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)

    def add(flag, text, **options):
        name = flag[2:].replace("-", "_")
        if name in RUN:
            options, text = options | dict(type=int), f"{text} (default: {RUN[name]}; --count: {COUNT[name]})"
        parser.add_argument(flag, help=text, **options)

    add("--model", "folder with a tokenizer and config.json (default: the smoke model's tokenizer)")
    add("--data", "folder with train.jsonl and validation.jsonl (default: made up, of real lengths)")
    add("--layers", "0: the shape in --model, or the 7B shape")
    add("--width", "of the hidden states, unless --layers is 0")
    add("--examples", "training examples")
    add("--questions", "validation questions")
    add("--epochs-lora", "epochs of stage 1")
    add("--epochs-reft", "epochs of stage 2")
    add("--dtype", "(default: float32)", default="float32", choices=["float32", "bfloat16"])
    add("--tokens", "TOKENS_PER_MICROBATCH (default: 2048)", type=int, default=2048)
    add("--layer", "REFT_LAYER (default: the middle, in the 7B shape the paper's 15)", type=int)
    add("--answers", "no training: compare so many answers, batched and one by one; width 64", type=int)
    add("--ours-only", "leave the paper's procedure out", action="store_true")
    add("--trainer", "stage 1 with transformers' Trainer, too", action="store_true")
    add("--count", "only count operations", action="store_true")
    o = parser.parse_args()
    if o.answers:
        o.questions, o.epochs_lora, o.epochs_reft = o.answers, 0, 0
    for name, value in (COUNT if o.count else ANSWERS if o.answers else RUN).items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    return o


def main(o):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tokenizer = AutoTokenizer.from_pretrained(o.model or ROOT / "smoke/model")
        config = make_config(o.model, o.layers, o.width, tokenizer)
        o.layer = (config.num_hidden_layers - 1) // 2 if o.layer is None else o.layer
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        make_data(folder / "data", o.data, o.examples, o.questions, tokenizer)
        heft.DATASET, heft.TOKENS_PER_MICROBATCH = str(folder / "data"), o.tokens
        rows, questions = heft.load_boolq("train", tokenizer), heft.load_boolq("validation", tokenizer)
        prompts = [len(row["tokens"]) for row in questions]
        train, epochs = sum(len(row["tokens"]) for row in rows), (o.epochs_lora, o.epochs_reft)
        lora = heft.lora_training_examples(tokenizer, rows)
        data = (lora, heft.reft_training_examples(tokenizer, rows), prompts)
        needed = {name: operations(name, config, o.layer, epochs, *data) for name in ("paper", "heft")}

        shape = f"{config.num_hidden_layers} layers of width {config.hidden_size}, LoReFT at block {o.layer}"
        lengths = [f"{train / len(rows):.0f} prompt tokens each", f"{sum(prompts) / len(prompts):.0f}"]
        print(f"{shape}; {len(rows):,} examples ({lengths[0]}), {epochs[0]} + {epochs[1]} epochs;", end=" ")
        print(f"{len(prompts):,} questions ({lengths[1]}); {o.tokens} tokens per micro-batch")
        print_count(config, needed, train / len(rows))
        if o.count:
            return

        rate = product_rate(o.dtype)
        print(f"\n{heft.device_name()}; torch {torch.__version__}; {o.dtype};", end=" ")
        print(f"matrix product {rate / 1e9:,.0f} billion operations per second", flush=True)
        spread = 0.2 if o.answers else 0.02
        make_model(folder / "model", o.model, o.layers, o.width, o.dtype, spread=spread)
        new, old, trainer = ours(folder, o), None, None
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as process:
            if o.trainer and o.epochs_lora:
                trainer = process.submit(trainers_stage_1, folder, o).result()
            if not o.ours_only:
                old = process.submit(theirs, folder, o).result()
    tokens = {"lora": o.epochs_lora * train, "reft": o.epochs_reft * train, "evaluation": sum(prompts)}
    print_times(new, old, needed, tokens, rate)
    if trainer:
        print(f"\nstage 1 with transformers' Trainer and PEFT: {trainer:.1f} s")
    if old:
        print_differences(new, old, o.dtype)


if __name__ == "__main__":
    main(read_options())
