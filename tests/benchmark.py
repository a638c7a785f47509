"""The script against the paper's procedure (tests/listing.py), on one model, data, precision and device, in turn.

    python tests/benchmark.py                                        # 18 layers of width 64, 32,000 words, CPU or GPU
    python tests/benchmark.py --model FOLDER --data FOLDER           # a tokenizer with config.json, and BoolQ rows
    python tests/benchmark.py --layers 0 --model 7B_FOLDER --examples 320 --epochs-reft 1 --dtype bfloat16    # on a GPU
    python tests/benchmark.py --answers 1000 --dtype bfloat16        # how many answers depend on batching

The model has random weights: right for speed and memory, wrong for accuracy. Without --data, prompts have lengths drawn
from the real distribution (lognormal; median 191 tokens, 99 % under 486, longest 1,417).
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of both: on shared cores, threads that wait for each other would measure the neighbours
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_model(folder, source, layers, width, dtype, seed=0, spread=0.02):
    """A random model with the tokenizer of `source` in `folder`; `layers` 0 keeps the shape of `source`.
    With a standard deviation of the weights (`spread`) of 0.02 it says much the same to every prompt; 0.2 makes it listen."""
    tokenizer = AutoTokenizer.from_pretrained(source or ROOT / "smoke/model")
    config = AutoConfig.from_pretrained(source) if source else LlamaConfig(vocab_size=32000, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    if layers:
        config.update(dict(num_hidden_layers=layers, hidden_size=width, intermediate_size=43 * width // 16, num_attention_heads=4, num_key_value_heads=4, head_dim=width // 4))
    config.initializer_range = spread
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return config


def make_data(folder, source, examples, questions, tokenizer, seed=0):
    """`examples` training and `questions` validation rows: the first of `source`, or made up with real lengths."""
    import heft_finetuning as heft
    folder.mkdir()
    rng = random.Random(seed)
    words = ["keeps", "plays", "likes", "speaks", "visits", "studies", "cats", "piano", "bread", "French", "Paris", "law"]
    overhead = len(tokenizer(heft.BOOLQ_PROMPT_TMPL % ("", "is it law"))["input_ids"])
    for split, n in (("train", examples), ("validation", questions)):
        if source:
            lines = (Path(source) / f"{split}.jsonl").read_text().splitlines()
            if split == "validation" and n > len(lines):
                lines += (Path(source) / "train.jsonl").read_text().splitlines()
            lines = lines[:n]
        else:
            lengths = [min(1417, max(overhead + 5, round(191 * 2.71828 ** (0.4 * rng.gauss(0, 1))))) for _ in range(n)]
            lines = [json.dumps({"question": "is it law", "passage": " ".join(rng.choice(words) for _ in range(length - overhead)), "answer": rng.random() < 0.62}) for length in lengths]
        assert len(lines) == n, f"{split}: {len(lines)} rows, {n} wanted"
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def peak():
    return (torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9


def baseline(arguments):
    """Run in a process of its own: the listing's three parts, timed. Prints one line of JSON."""
    import heft_finetuning as heft
    import listing
    folder, epochs_lora, epochs_reft, dtype, layer = Path(arguments[0]), int(arguments[1]), int(arguments[2]), arguments[3], int(arguments[4])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype), device_map=DEVICE)
    rows, questions = heft.load_boolq(str(folder / "data"), "train"), heft.load_boolq(str(folder / "data"), "validation")
    found, reft = {"seconds": {}, "peak": {}, "loss": {"lora": [], "reft": []}}, None

    def timed(name, work):
        started = time.time()
        value = work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        found["seconds"][name], found["peak"][name] = time.time() - started, peak()
        return value

    if epochs_lora:
        model, found["loss"]["lora"] = timed("lora", lambda: listing.stage_1(model, tokenizer, rows, epochs_lora, dropout=0.0))
        model = model.merge_and_unload()
    if epochs_reft:
        reft, found["loss"]["reft"] = timed("reft", lambda: listing.stage_2(model, tokenizer, rows, epochs_reft, layer=layer))
    found["texts"] = timed("evaluation", lambda: listing.evaluate(model, tokenizer, questions, reft))
    print(json.dumps(found))


def ours(folder, epochs_lora, epochs_reft, dtype, layer, tokens):
    """The script itself, as a user starts it. Returns the same as `baseline` prints."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        subprocess.run([sys.executable, ROOT / "heft_finetuning.py", "--base-model", folder / "model", "--dataset", folder / "data", "--no-push-to-hub", "--dtype", dtype,
                        "--epochs-lora", str(epochs_lora), "--epochs-reft", str(epochs_reft), "--reft-layer", str(layer), "--lora-dropout", "0",
                        "--tokens-per-microbatch", str(tokens)], cwd=place, check=True, stdout=subprocess.DEVNULL)
        (result,) = (json.loads(path.read_text()) for path in Path(place, "results").glob("*.json"))
        (predictions,) = Path(place, "results").glob("*.predictions.jsonl")
        peaks = {json.loads(path.read_text())["content"][:6]: json.loads(path.read_text())["peak_memory_gb"] for path in Path(place, "output").glob("*/heft.json")}
        return {"seconds": result["seconds"], "loss": result["loss"], "texts": [json.loads(line)["text"] for line in predictions.read_text().splitlines()],
                "peak": {"lora": peaks.get("Merged"), "reft": peaks.get("LoReFT"), "evaluation": result["peak_memory_gb"]}}


def theirs(folder, *arguments):
    done = subprocess.run([sys.executable, __file__, "--baseline", folder, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def product_rate(dtype):
    """Floating-point operations per second of a matrix product on this device."""
    size = 8192 if DEVICE == "cuda" else 1536
    a = torch.randn(size, size, device=DEVICE, dtype=getattr(torch, dtype))
    best = 0
    for _ in range(5):
        started = time.time()
        for _ in range(8):
            a @ a
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        best = max(best, 8 * 2 * size**3 / (time.time() - started))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with a tokenizer and config.json (default: the smoke model's tokenizer, 32,000 words)")
    parser.add_argument("--data", help="folder with train.jsonl and validation.jsonl (default: made up, with real lengths)")
    parser.add_argument("--layers", type=int, default=18, help="0: the shape in --model (default: 18)")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--examples", type=int, default=64, help="training examples (default: 64)")
    parser.add_argument("--questions", type=int, default=100, help="validation questions (default: 100)")
    parser.add_argument("--epochs-lora", type=int, default=1, help="(default: 1)")
    parser.add_argument("--epochs-reft", type=int, default=4, help="(default: 4: as many steps as make starting up a small part)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=2048, help="TOKENS_PER_MICROBATCH (default: 2048)")
    parser.add_argument("--layer", type=int, default=15, help="REFT_LAYER (default: 15)")
    parser.add_argument("--answers", type=int, help="no training: compare the answers to so many prompts, batched and one by one")
    parser.add_argument("--ours-only", action="store_true", help="leave the baseline out")
    o = parser.parse_args()
    if o.answers:
        o.questions, o.epochs_lora, o.epochs_reft = o.answers, 0, 0

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        config = make_model(folder / "model", o.model, o.layers, o.width, o.dtype, spread=0.2 if o.answers else 0.02)
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        make_data(folder / "data", o.data, o.examples, o.questions, tokenizer)
        import heft_finetuning as heft
        tokens = {split: sum(len(tokenizer(row["prompt"])["input_ids"]) for row in heft.load_boolq(str(folder / "data"), split)) for split in ("train", "validation")}
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        work = skeleton.num_parameters() - skeleton.get_input_embeddings().weight.numel()  # products per token
        body, head = work - config.vocab_size * config.hidden_size, config.vocab_size * config.hidden_size
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"{device}; torch {torch.__version__}; {config.num_hidden_layers} layers of width {config.hidden_size}, {o.dtype}, {skeleton.num_parameters():,} parameters\n"
              f"{o.examples} examples ({tokens['train'] / o.examples:.0f} prompt tokens each), {o.epochs_lora} + {o.epochs_reft} epochs; "
              f"{o.questions} questions ({tokens['validation'] / o.questions:.0f}); {o.tokens} tokens per micro-batch", flush=True)
        rate = product_rate(o.dtype)
        new = ours(folder, o.epochs_lora, o.epochs_reft, o.dtype, o.layer, o.tokens)
        old = None if o.ours_only else theirs(folder, o.epochs_lora, o.epochs_reft, o.dtype, o.layer)

    # Useful operations: what the mathematics needs. Stage 1: 2 per weight and token forward, 2 back (the weights are frozen).
    # Stage 2: the prompt forward without the head, then three tokens forward and, above the intervention, back.
    above = 1 - (o.layer + 1) / config.num_hidden_layers
    operations = {"lora": o.epochs_lora * 4 * work * (tokens["train"] + 2 * o.examples),
                  "reft": o.epochs_reft * (2 * body * tokens["train"] + o.examples * 3 * (2 * work + 2 * (above * body + head))),
                  "evaluation": 2 * body * tokens["validation"] + 2 * head * o.questions + 4 * 2 * work * o.questions}
    count = {"lora": o.epochs_lora * tokens["train"], "reft": o.epochs_reft * tokens["train"], "evaluation": tokens["validation"]}
    print(f"matrix product measured here: {rate / 1e9:,.0f} billion operations per second\n")
    print("| stage | paper's procedure s | heft s | ratio | tokens per s | share of the matrix product % | peak GB, paper's | peak GB, heft |\n|---|---|---|---|---|---|---|---|")
    stages = [stage for stage in ("lora", "reft", "evaluation") if new["seconds"][stage]]
    for stage in stages + ["all"] * (len(stages) > 1):
        seconds = sum(new["seconds"][s] for s in stages) if stage == "all" else new["seconds"][stage]
        before = old and (sum(old["seconds"][s] for s in stages) if stage == "all" else old["seconds"][stage])
        print(f"| {stage} | {f'{before:.1f}' if old else ''} | {seconds:.1f} | {f'{before / seconds:.1f}' if old else ''} | "
              + (" |  |  |  |" if stage == "all" else f"{count[stage] / seconds:,.0f} | {100 * operations[stage] / seconds / rate:.1f} "
                 f"| {f'''{old['peak'][stage]:.1f}''' if old else ''} | {new['peak'][stage]:.1f} |"))
    if old:
        for stage in ("lora", "reft"):
            if new["loss"][stage]:
                a, b = torch.tensor(new["loss"][stage]), torch.tensor(old["loss"][stage])
                print(f"\n{stage}: largest relative difference of a step's loss {((a - b).abs() / b).max().item():.1e} over {len(a)} steps", end="")
        texts = sum(a != b for a, b in zip(new["texts"], old["texts"]))
        answers = sum(heft.predict(a) != heft.predict(b) for a, b in zip(new["texts"], old["texts"]))
        print(f"\nbatched against one by one, {o.dtype}: {texts} of {o.questions} texts differ ({100 * texts / o.questions:.1f} %), {answers} answers ({100 * answers / o.questions:.1f} %); {len(set(new['texts']))} different texts")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--baseline"]:
        baseline(sys.argv[2:])
    else:
        main()
