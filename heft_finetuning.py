"""HEFT: fine-tune Llama-2-7b-chat on BoolQ with LoRA, merge, refine with LoReFT, evaluate.

The reference reproduction of "HEFT: A Coarse-to-Fine Hierarchy for Enhancing the Efficiency and Accuracy of
Language Model Reasoning" (arXiv 2509.09801). The same command continues a run that was stopped.
Exit status: 0 done; 2 a mistake, said in one line; 85 stopped by SIGTERM; all others a failure.

    python heft_finetuning.py --smoke                            # tiny embedded model, CPU, offline
    python heft_finetuning.py                                    # the paper's main run, 3 + 3 epochs
    python heft_finetuning.py --epochs-lora 20 --epochs-reft 0   # Table 1, LoRA-only
    python heft_finetuning.py --epochs-lora 0 --epochs-reft 20   # Table 1, ReFT-only
    python heft_finetuning.py --epochs-lora 20 --epochs-reft 20  # Table 1, the longest run
    condor_submit heft.sub                                       # the main run on a GPU cluster
"""

# fmt: off
# ---------------------------------------------------------------------------------------------
# Settings. Edit one, or pass its flag: EPOCHS_LORA is --epochs-lora. Defaults are the paper's.
# Experiment
EPOCHS_LORA = 3            # passes over the data in stage 1; 0 leaves the stage out
EPOCHS_REFT = 3            # passes over the data in stage 2; 0 leaves the stage out
BASE_MODEL = "meta-llama/Llama-2-7b-chat-hf"  # Hub name or folder
DATASET = "google/boolq"   # Hub name, or folder with train and validation files
MAX_TRAIN_SAMPLES = 0      # use only the first so many training examples; 0 takes all
MAX_EVAL_SAMPLES = 0       # use only the first so many validation questions; 0 takes all
SEED = 42                  # of the starting weights, the order of the examples and the dropout
DTYPE = "bfloat16"         # of the model's weights: bfloat16 or float32
# Stage 1, LoRA
LORA_RANK = 8              # rank of the update
LORA_ALPHA = 32            # the update is scaled by alpha / rank
LORA_DROPOUT = 0.05        # on the input of the update, 0 to below 1
LORA_TARGETS = ""          # "": q_proj and v_proj, as the paper's code; all-linear, as its text; or names a,b
LEARNING_RATE_LORA = 2e-4  # at the first step; falls linearly to 0
# Stage 2, LoReFT
REFT_LAYER = 15            # the block, counted from 0, whose output is edited
REFT_RANK = 4              # dimension of the edited subspace
LEARNING_RATE_REFT = 2e-4  # at the first step; falls linearly to 0
# Both stages
EXAMPLES_PER_STEP = 32     # examples per optimizer step
MAX_LENGTH = 2048          # tokens; a longer example is cut in stage 1, left out in stage 2
TOKENS_PER_MICROBATCH = 2048  # memory knob (rows x longest row); changes rounding and the dropout masks drawn
# Evaluation
MAX_NEW_TOKENS = 5         # tokens generated per question, greedily
# Output
PUSH_TO_HUB = True         # upload the merged model and the LoReFT intervention; take up what is there
PRIVATE_REPOS = True       # Hub repositories made here are private
HF_USER = ""               # owner of the repositories; "" is the token's owner
HF_REPO_LORA = ""          # repository of the merged model; "" is heft-<name of stage 1>
HF_REPO_REFIT = ""         # (the paper's spelling) of the LoReFT intervention; "" is heft-<name of the run>
MERGED_DIR = ""            # folder for a copy of the merged model (13.5 GB); "" keeps none
OUTPUT_DIR = "output"      # adapters, interventions and checkpoints (tens of MB)
RESULTS_DIR = "results"    # results and predictions
RESULTS_FILE = ""          # name of the result in RESULTS_DIR; "" is <name of the run>.json
# ---------------------------------------------------------------------------------------------
# fmt: on
SETTINGS = [name for name in globals() if name.isupper()]

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # before the imports that take seconds: a job may be told to go at any time
    words = b"\nstopped by SIGTERM; the same command continues\n"
    signal.signal(signal.SIGTERM, lambda *_: (os.write(2, words), sys.exit(85)))
    sys.stdout.reconfigure(line_buffering=True)  # a job's log shows how far it is
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads cost tenfold where cores are shared
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # its errors do not say whose, and it knows no timeout
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # micro-batches vary in shape
warnings.simplefilter("ignore")

import datasets
import filelock
import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from httpx2 import RequestError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import binomtest
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

with contextlib.redirect_stdout(None):  # it advertises a package that is not needed here
    from pyreft import LoreftIntervention, ReftConfig, get_reft_model
from pyvene import type_to_module_mapping

for library in (transformers, huggingface_hub, datasets):
    library.logging.set_verbosity(50)  # what they have to say is told by this script
datasets.disable_progress_bars()
huggingface_hub.get_session().timeout = 60  # seconds; by default a stalled Hub is waited for for ever
DEVICE = "cuda" if torch.cuda.is_available() and "--smoke" not in sys.argv else "cpu"  # the toy needs no GPU
IGNORE = -100  # label of a token without loss, as torch has it


def main():
    """The experiment, in the order of the paper's sections [in brackets]; mistakes end it early."""
    settings = read_settings(sys.argv[1:])
    globals().update(settings)  # from here on the constants are what the flags say

    # Data: BoolQ as prompts with the answers Yes and No, and what each stage is to learn from them [4.1]
    base, tokenizer, skeleton = look_at_base_model()
    train_rows = load_boolq("train", tokenizer) if EPOCHS_LORA or EPOCHS_REFT else []
    questions = load_boolq("validation", tokenizer)
    lora_examples, reft_examples = training_examples(tokenizer, train_rows)
    check_device(skeleton, max(len(row["tokens"]) for row in train_rows + questions))

    # What earlier runs have left is taken up if the same settings, data and weights made it, else refused:
    # a stage that is finished has a `record`, and its `content` is the hash of its weights
    lora, reft, run = take_up(settings, base, train_rows, questions)
    print(f"run {run.name} on {DEVICE_NAME}: {skeleton.num_parameters():,} parameters in {DTYPE}, ", end="")
    print(f"{len(lora_examples):,} examples, {len(reft_examples):,} in stage 2, {len(questions):,} questions")

    # Stage 1, coarse: LoRA on the whole text of prompt and answer, merged into the weights [3.2]
    model = load_base_model(base)
    if EPOCHS_LORA:
        model = stage_1_lora(model, lora, lora_examples)
        model = model.merge_and_unload()  # in the model's dtype, as in the paper
    model.eval().requires_grad_(False)
    lora.lock.release()  # other runs may start from this stage 1 now

    # Stage 2, fine: LoReFT on the merged, frozen model, one edit of one hidden state per question [3.3]
    reft.settings["STAGE_1"] = lora.content  # known by now; on other weights it is another stage 2
    reft_model = stage_2_loreft(model, reft, reft_examples) if EPOCHS_REFT else None

    # Evaluation: greedy answers to the validation questions [4]
    if not run.result:
        texts, seconds = answer(model, reft_model, tokenizer, questions)
        run.result = write_result(settings, run, lora, reft, questions, texts, seconds)

    # What is large comes last: all else is on disk by now
    unpushed = push_what_is_missing(model, base, lora, reft, run)
    if MERGED_DIR:
        write_merged(model, base, MERGED_DIR)
    last_screen(run, unpushed)


# ----- Data: BoolQ as prompts and tokens (paper, section 4.1 and appendix)
# Character for character the paper's. The tokenizer adds a BOS of its own: prompts start with two.
BOOLQ_PROMPT_TMPL = """<s>[INST] <<SYS>>
You are a helpful assistant that answers questions with only "Yes" or
"No" based on the provided passage.
<</SYS>>
Passage: %s
Question: %s
Answer: [/INST]"""


def format_boolq(example):
    """One BoolQ row (`question`, `passage`, `answer`) as a prompt and its answer, "Yes" or "No"."""
    prompt = BOOLQ_PROMPT_TMPL % (example["passage"], example["question"])
    return {"prompt": prompt, "answer": "Yes" if example["answer"] else "No"}


def load_boolq(split, tokenizer):
    """The rows of a split in the data's order: dicts of question, prompt, answer, tokens (the prompt's)."""
    where = f"the {split} split of the dataset {DATASET!r}"
    schema = {"question": "string", "passage": "string", "answer": "bool"}
    try:
        rows = datasets.load_dataset(DATASET, split=split).select_columns([*schema])
        rows = rows.cast(datasets.Features({name: datasets.Value(kind) for name, kind in schema.items()}))
    except Exception as error:  # missing, unreachable, damaged, other fields: a dozen types
        stop(f"cannot read {where}: it takes question and passage (string), answer (bool)", error)
    rows = rows.to_list()[: (MAX_TRAIN_SAMPLES if split == "train" else MAX_EVAL_SAMPLES) or None]
    broken = [number for number, row in enumerate(rows, 1) if None in row.values()]
    require(rows and not broken, f"{where} lacks question, passage or answer in row {(broken or [1])[0]}")
    rows = [format_boolq(row) | {"question": row["question"]} for row in rows]
    return [row | {"tokens": tokenizer(row["prompt"])["input_ids"]} for row in rows]


def training_examples(tokenizer, rows):
    """Dicts of lists for (LoRA, LoReFT). LoRA learns from input_ids, labels; LoReFT from input_ids (the last
    prompt token and the ending), labels, prefix (the tokens before) and prefix_mask (a 1 for each)."""
    lora_examples, reft_examples, end = [], [], tokenizer.eos_token
    for row in rows:
        # Loss over the whole text but its end: the paper pads with that token, and masks the real one, too.
        tokens = tokenizer(f"{row['prompt']} {row['answer']}{end}")["input_ids"][:MAX_LENGTH]
        labels = [IGNORE if token == tokenizer.eos_token_id else token for token in tokens]
        lora_examples.append({"input_ids": tokens, "labels": labels})
        # Loss on the answer, in the paper's stage 2 without a space before it, and its end.
        tokens, n = tokenizer(f"{row['prompt']}{row['answer']}{end}")["input_ids"], len(row["tokens"])
        apart = tokens[:n] == row["tokens"] or not EPOCHS_REFT
        require(apart, f"the tokenizer of {BASE_MODEL!r} joins prompt and answer: give --epochs-reft 0")
        prefix = {"prefix": tokens[: n - 1], "prefix_mask": [1] * (n - 1)}
        if len(tokens) <= MAX_LENGTH:  # a longer one, cut, would lose its answer
            reft_examples.append(prefix | {"input_ids": tokens[n - 1 :], "labels": [IGNORE, *tokens[n:]]})
    require(reft_examples or not EPOCHS_REFT, f"no training example fits into --max-length {MAX_LENGTH}")
    return lora_examples, reft_examples


# ----- Training: a step is EXAMPLES_PER_STEP examples, in micro-batches that hold little padding
def microbatches(lengths, tokens):
    """Positions in `lengths`, short to long, in groups of rows x longest <= `tokens`; longer go alone."""
    groups = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or (len(groups[-1]) + 1) * lengths[i] > tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


def collate(examples):
    """The examples of a step (dicts of lists) as micro-batches (dicts of (rows, columns) tensors). They are
    padded on the right, where causal attention never looks: without a prefix, no mask is needed."""

    def padded(key, group):
        rows, value = [torch.tensor(examples[i][key]) for i in group], IGNORE if key == "labels" else 0
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value).to(DEVICE)

    lengths = [len(example.get("prefix", [])) + len(example["input_ids"]) for example in examples]
    groups = microbatches(lengths, TOKENS_PER_MICROBATCH)
    return [{key: padded(key, group) for key in examples[0]} for group in groups]


def example_losses(logits, labels):
    """Mean token loss of each example: (rows, columns, words) and (rows, columns) to (rows,)."""
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # column t predicts token t + 1
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels).sum(1) / (labels != IGNORE).sum(1)


def train(stage, module, forward, examples, peak_rate):
    """Train what requires a gradient in `module`. Returns the losses, the seconds and the peak memory.

    forward: function from a micro-batch without labels to an output with logits. AdamW, linear decay to 0, no
    warm-up, gradient clip 1.0. Rate, order and dropout follow from SEED and the step's number: a resumed run
    equals an undisturbed one. On SIGTERM: checkpoint, exit 85."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    tensors = [*parameters, *module.buffers()]  # LoReFT's R is relative to its first value, a buffer
    optimizer = torch.optim.AdamW(parameters, peak_rate, weight_decay=0.0)  # the fused one rounds otherwise
    per_epoch = math.ceil(len(examples) / EXAMPLES_PER_STEP)  # an epoch's last step may have fewer examples
    steps, checkpoint = per_epoch * stage.epochs, stage.folder / "checkpoint.pt"
    losses, stopping, started = [], [], time.time()
    print(f"\n{stage.title}: {sum(p.numel() for p in parameters):,} trainable parameters, {steps} steps")
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for tensor, saved in zip(tensors, state["tensors"]):
            tensor.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        losses, started = state["loss"], started - state["seconds"]
        print(f"resuming from {checkpoint} after step {len(losses)} of {steps}")
    exit_at_once = signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    bar = tqdm(range(len(losses), steps), initial=len(losses), total=steps, dynamic_ncols=True)
    for step in bar:
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(SEED + epoch))
        batch = [examples[i] for i in order.split(EXAMPLES_PER_STEP)[position]]
        torch.manual_seed(random.Random(f"{SEED} {step}").getrandbits(32))  # of the dropout
        optimizer.param_groups[0]["lr"] = peak_rate * ((steps - step) / steps)
        loss = 0.0
        for rows in collate(batch):
            labels = rows.pop("labels")
            # A mean over the step's examples, as in transformers 4.45; its Trainer now weights by tokens.
            part = example_losses(forward(**rows).logits, labels).sum() / len(batch)
            part.backward()
            loss += part.detach()
        require(loss.isfinite(), f"loss {loss} at step {step + 1}: try a lower rate, or --dtype float32", 1)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{loss:.4f}")
        if stopping or position == per_epoch - 1:
            state = {"settings": stage.settings, "tensors": tensors, "optimizer": optimizer.state_dict()}
            save(checkpoint, state | {"loss": losses, "seconds": time.time() - started})
            if stopping:
                break
    signal.signal(signal.SIGTERM, exit_at_once)
    if stopping:
        tqdm.write(f"stopped by SIGTERM at step {len(losses)} of {steps}; the same command continues")
        sys.exit(85)
    return {"loss": losses, "seconds": time.time() - started, "peak_memory_gb": peak_memory()}


# ----- Stage 1: LoRA (paper, section 3.2)
def lora_config():
    """LoRA's configuration; PEFT's default targets unless LORA_TARGETS names others."""
    targets = {"": None, "all-linear": "all-linear"}.get(LORA_TARGETS, LORA_TARGETS.replace(",", " ").split())
    sizes = dict(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT)
    return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **sizes)


def stage_1_lora(model, stage, examples):
    """`model` with the stage's adapter, which is read if the stage is finished, else trained."""
    if stage.record:
        return PeftModel.from_pretrained(model, stage.folder, config=lora_config())
    set_seed(SEED)  # directly before the weights are drawn: they depend on the seed alone
    model = get_peft_model(model, lora_config()).train()
    record = train(stage, model, partial(model, use_cache=False), examples, LEARNING_RATE_LORA)
    model.save_pretrained(stage.folder)
    finish(stage, record)
    return model


# ----- Stage 2: LoReFT (paper, section 3.3): at the last prompt token, h becomes h + R^T (W h + b - R h)
def stage_2_loreft(model, stage, examples):
    """A pyreft.ReftModel around `model`: its intervention is read if the stage is finished, else trained."""
    set_seed(SEED)  # directly before the weights are drawn: they depend on the seed alone
    width = model.config.hidden_size
    intervention = LoreftIntervention(embed_dim=width, low_rank_dimension=REFT_RANK, dtype=model.dtype)
    rotation = intervention.rotate_layer.parametrizations.weight[0]
    rotation.base = rotation.base.contiguous()  # the last bits of stored runs depend on this layout
    place = {"layer": REFT_LAYER, "component": "block_output", "low_rank_dimension": REFT_RANK}
    reft_model = get_reft_model(model, ReftConfig(representations=place | {"intervention": intervention}))
    if not stage.record:
        # The paper backpropagates through all prompt tokens. Those before the last are constant, the model is
        # frozen: their keys and values need no gradient. The words that start all prompts are computed once,
        # and leave the prefixes, none of which may become empty; prefix_mask still covers them.
        common = os.path.commonprefix([example["prefix"][:-1] for example in examples])
        examples = [example | {"prefix": example["prefix"][len(common) :]} for example in examples]
        start = model.base_model(torch.tensor([common], device=DEVICE), use_cache=True).past_key_values

        def forward(input_ids, prefix, prefix_mask):
            cache = copy.deepcopy(start)
            cache.batch_repeat_interleave(len(input_ids))
            model.base_model(prefix, past_key_values=cache)
            position = prefix_mask.sum(1, keepdim=True) + torch.arange(input_ids.shape[1], device=DEVICE)
            mask = torch.cat([prefix_mask, torch.ones_like(input_ids)], 1)
            inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position}
            # Column 0 is the last prompt token: there, and nowhere else, the hidden state is edited.
            return reft_model(inputs | {"past_key_values": cache}, unit_locations={"base": 0})[1]

        record = train(stage, intervention, forward, examples, LEARNING_RATE_REFT)
        reft_model.set_device("cpu", set_model=False)  # a file that loads without a GPU
        with contextlib.redirect_stdout(None):
            reft_model.save(stage.folder)
        finish(stage, record)
    # The file is evaluated, not the memory. (ReftModel.load would make learned_source bfloat16 in any case.)
    intervention.load_state_dict(torch.load(stage.weights, map_location=DEVICE, weights_only=True))
    reft_model.set_device(DEVICE, set_model=False)
    return reft_model


# ----- Evaluation (paper, section 4)
def answer(model, reft_model, tokenizer, questions):
    """The generated text for each question, in their order, and the seconds it took."""
    print(f"\nevaluation of {len(questions):,} questions")
    prompts, texts, started = [row["tokens"] for row in questions], {}, time.time()
    end = tokenizer.pad_token_id = tokenizer.eos_token_id  # greedy: the chat model's settings would sample
    how = GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=end, pad_token_id=end)
    # Without gradient four times as many tokens fit. Left padding: the last column is the last prompt token.
    groups = microbatches([len(prompt) for prompt in prompts], 4 * TOKENS_PER_MICROBATCH)
    for group in tqdm(groups, unit="micro-batch", dynamic_ncols=True):
        rows = tokenizer.pad({"input_ids": [prompts[i] for i in group]}, return_tensors="pt").to(DEVICE)
        columns = rows["input_ids"].shape[1]
        if reft_model:
            edited = dict(unit_locations={"base": columns - 1}, intervene_on_prompt=True)
            _, output = reft_model.generate(dict(rows), generation_config=how, **edited)
        else:
            output = model.generate(**rows, generation_config=how)
        texts |= zip(group, tokenizer.batch_decode(output[:, columns:], skip_special_tokens=True))
    return [texts[i].strip() for i in range(len(prompts))], time.time() - started


def predict(text):
    """The answer in a generated text by the paper's rule: Yes, No, or Unknown, which counts as wrong."""
    return "Yes" if "Yes" in text else "No" if "No" in text else "Unknown"


# =============================================================================================
# Bookkeeping: the experiment ends here. First, settings as flags, and the names of runs

DEVICE_NAME = f"CPU {os.uname().machine}, {torch.get_num_threads()} threads"
DEVICE_NAME = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE_NAME
HERE = Path(__file__).resolve().parent
SCRIPT = Path(__file__).read_text()  # as it is now: a run takes hours, in which it may be edited
COMMIT = os.popen(f"git -C {shlex.quote(str(HERE))} describe --always --dirty 2>/dev/null").read().strip()
# fmt: off
# The paper's value of each setting that changes the experiment; what differs becomes a part of the run's
# name, in this order (a new one comes last: names must not change).
PAPER_VALUES = dict(
    BASE_MODEL="meta-llama/Llama-2-7b-chat-hf", DATASET="google/boolq",
    LORA_RANK=8, LORA_ALPHA=32, LORA_DROPOUT=0.05, LORA_TARGETS="", LEARNING_RATE_LORA=2e-4,
    REFT_LAYER=15, REFT_RANK=4, LEARNING_RATE_REFT=2e-4,
    EXAMPLES_PER_STEP=32, MAX_LENGTH=2048, MAX_NEW_TOKENS=5, DTYPE="bfloat16", SEED=42,
    MAX_TRAIN_SAMPLES=0, MAX_EVAL_SAMPLES=0)
IN_NAMES = dict(BASE_MODEL="", DATASET="on_", MAX_TRAIN_SAMPLES="train", MAX_EVAL_SAMPLES="eval",
                LEARNING_RATE_LORA="lr_lora", LEARNING_RATE_REFT="lr_reft",
                EPOCHS_LORA="lora", EPOCHS_REFT="reft")  # others: in lower case
PAPER_ACCURACY = {"lora0-reft20": 83.36, "lora20-reft0": 85.05, "lora3-reft3": 85.17, "lora20-reft20": 85.47}
# What --smoke changes: the same script on the embedded toy, which needs larger steps.
SMOKE_VALUES = dict(
    BASE_MODEL=os.path.relpath(HERE / "smoke/model"), DATASET=os.path.relpath(HERE / "smoke/data"),
    DTYPE="float32", LEARNING_RATE_LORA=9e-4, LEARNING_RATE_REFT=1e-3,
    PUSH_TO_HUB=False, OUTPUT_DIR="output/smoke", RESULTS_DIR="results/smoke")
# What is legal: the first rule that a setting's name contains
RULES = {
    "EPOCHS|REFT_LAYER|SAMPLES": (int, lambda value: value >= 0, "a whole number from 0"),
    "SEED": (int, lambda value: 0 <= value < 2**32, "a whole number from 0 to below 2**32"),
    "MAX_LENGTH": (int, lambda value: value > 1, "a whole number from 2"),
    "RANK|ALPHA|STEP|TOKENS": (int, lambda value: value > 0, "a whole number from 1"),
    "DROPOUT": (float, lambda value: 0 <= value < 1, "from 0 to below 1"),
    "RATE": (float, lambda value: 0 < value < math.inf, "above 0"),
    "DTYPE": (str, re.compile("bfloat16|float32").fullmatch, "bfloat16 or float32"),
    "RESULTS_FILE": (str, re.compile(r"([^/]*\.json)?").fullmatch, "a name in .json, without a folder"),
    "BASE_MODEL|DATASET|OUTPUT_DIR|RESULTS_DIR": (str, str.strip, "a name, not empty"),
    "": (str, lambda text: text.isprintable() and text != "None", 'one line, "" for none'),
}
# fmt: on


def legal(name, text):
    """The value of the setting `name`, whose text comes from a flag or a constant."""
    kind, fine, words = next(rule for part, rule in RULES.items() if re.search(part, name))
    with contextlib.suppress(ValueError):
        if fine(kind(text)):
            return kind(text)
    raise argparse.ArgumentTypeError(f"must be {words} (it is {text!r})")


def read_settings(arguments):
    """All settings: the constants on the first screen, or what the flags in `arguments` say instead."""
    meaning = dict(re.findall(r"^([A-Z_]+) = .*?# (.+)$", SCRIPT, re.M))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: stop(re.sub("^argument (--[^:]+):", r"\1", message))
    parser.add_argument("--smoke", dest="SMOKE", action="store_true", help="the embedded toy, CPU, no Hub")
    defaults = globals() | (SMOKE_VALUES if "--smoke" in arguments else {})
    for name in SETTINGS:
        flag, value, words = "--" + name.lower().replace("_", "-"), defaults[name], meaning.get(name, "")
        if name in ("PUSH_TO_HUB", "PRIVATE_REPOS"):
            require(isinstance(value, bool), f"{flag} must be True or False, not {value!r}")
            how = {"action": argparse.BooleanOptionalAction, "default": value, "help": words}
        else:  # the default goes in as text: argparse checks it like a flag's, however it was edited
            words = f"{words} (default: {value!r})".replace("%", "%%")
            how = {"type": partial(legal, name), "default": str(value), "help": words}
        parser.add_argument(flag, dest=name, **how)
    return vars(parser.parse_args(arguments))


def identity(settings, what):
    """(name, settings) of stage "lora", stage "reft" or the whole "run": the settings that decide its result;
    `lora3-reft3` with a part for each that is not the paper's (or the smoke run's), such as `-seed7`."""
    absent = ["EVAL", "NEW_TOKENS"] * (what != "run") + ["REFT"] * (what == "lora")
    names = [f"EPOCHS_{stage}" for stage in ("LORA", "REFT") if stage not in absent]
    absent += [stage for stage in ("LORA", "REFT") if not settings[f"EPOCHS_{stage}"]]
    names += [name for name in PAPER_VALUES if not any(word in name for word in absent)]
    usual, parts = PAPER_VALUES | (SMOKE_VALUES if settings["SMOKE"] else {}), []
    for name in names:
        value, word = settings[name], IN_NAMES.get(name, name.lower() + "_" * isinstance(settings[name], str))
        text = os.path.basename(value.rstrip("/")) if isinstance(value, str) else f"{value:.10g}"
        if value != usual.get(name):
            parts.append(re.sub(r"[^A-Za-z0-9._+]+", "_", word + text))
    # Content counts, not spelling: take_up has a hash for what these two name.
    return "-".join(parts), {name: settings[name] for name in names if name not in ("BASE_MODEL", "DATASET")}


# ----- Errors: one line for what is no bug
def stop(message, cause=2):
    """End with one line on stderr. cause: the exit status, or an exception, which is told and decides: 1 if
    network or server failed, else 2, a mistake that the user can mend."""
    if isinstance(cause, Exception):
        message, causes = f"{message} ({first_line(cause)})", (cause, cause.__cause__)  # transformers wraps
        no_answer = (ConnectionError, huggingface_hub.errors.LocalEntryNotFoundError, RequestError)
        silent = any(isinstance(e, no_answer) for e in causes) and not huggingface_hub.is_offline_mode()
        codes = [e.response.status_code for e in causes if isinstance(e, HfHubHTTPError)]
        cause = 1 if silent or any(code == 429 or code >= 500 for code in codes) else 2
    tqdm.write(f"heft: error: {' '.join(str(message).split())}", file=sys.stderr)  # not within a progress bar
    sys.exit(cause)


def require(fine, message, cause=2):
    """Unless `fine`, stop."""
    if not fine:
        stop(message, cause)


def first_line(error):
    """The first line of an exception's message: libraries add pages of advice."""
    return type(error).__name__ + ": " + str(error).strip().partition("\n")[0][:300]


def explain(kind, error, trace):
    """`sys.excepthook`: one line for what is no bug, a traceback for what is."""
    folders = filter(os.path.isdir, (OUTPUT_DIR, RESULTS_DIR, MERGED_DIR, "."))
    full = min(shutil.disk_usage(folder).free for folder in folders) < 1e5  # not all writers give an errno
    full = full or getattr(error, "errno", 0) in (28, 122)  # no space, over the quota
    require(kind is not KeyboardInterrupt, "interrupted; the same command continues from its checkpoint", 130)
    require(kind is not torch.OutOfMemoryError, "GPU memory is full: take fewer --tokens-per-microbatch", 1)
    require(not full, "the disk is full: make room, then the same command continues from its checkpoint", 1)
    sys.__excepthook__(kind, error, trace)


# ----- The base model and the machine, looked at before anything takes time
def look_at_base_model():
    """(base: `folder` of its small files, `version` of its weights; tokenizer; skeleton: all but weights)."""
    local, folder, small = os.path.isdir(BASE_MODEL), BASE_MODEL, ["*.json", "*.model", "*.txt", "*.jinja"]
    try:
        if not local:
            quiet = partial(tqdm, disable=True)
            folder = huggingface_hub.snapshot_download(BASE_MODEL, allow_patterns=small, tqdm_class=quiet)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")  # for generation
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPE))
        known = type(skeleton) in type_to_module_mapping
        if EPOCHS_LORA:
            skeleton = get_peft_model(skeleton, lora_config())
            for target in skeleton.peft_config["default"].target_modules:  # PEFT minds only if none is found
                found = any(f".{name}".endswith(f".{target}") for name in skeleton.targeted_module_names)
                assert found, f"no layer is called {target}"
    except Exception as error:  # gated, missing, torn or foreign: a dozen types
        advice = "give --base-model a Hub name or a folder, --lora-targets names of its layers"
        if isinstance(error, GatedRepoError):
            advice = f"ask for it at https://huggingface.co/{BASE_MODEL}, then set HF_TOKEN to that account's"
        stop(f"cannot use the model {BASE_MODEL!r}: {advice}", error)
    files, last = sorted(Path(folder).glob("*.safetensors")), config.num_hidden_layers - 1
    require(files or not local, f"the folder {BASE_MODEL!r} holds no weights in safetensors form")
    require(tokenizer.eos_token, f"the tokenizer of {BASE_MODEL!r} has no end-of-sequence token")
    if EPOCHS_REFT:
        require(known, f"pyvene cannot intervene in {BASE_MODEL!r}: take a Llama model, or --epochs-reft 0")
        require(REFT_LAYER <= last, f"--reft-layer {REFT_LAYER}: blocks of {BASE_MODEL!r} are 0 to {last}")
    # A folder is what its weights are, however it is called; a Hub model is its commit.
    commit = digest({path.name: digest(path) for path in files}) if local else Path(folder).name
    return SimpleNamespace(folder=Path(folder), version=commit), tokenizer, skeleton


def check_device(skeleton, longest):
    """Stop if the model does not fit this machine. longest: tokens of the longest prompt."""
    config, size = skeleton.config, skeleton.dtype.itemsize
    weights, shape = skeleton.num_parameters() * size, size * config.num_hidden_layers * config.hidden_size
    # Bytes beside the weights for each of TOKENS_PER_MICROBATCH, fitted to a simulation of the 7B shape
    adapted = len(skeleton.peft_config["default"].target_modules) if EPOCHS_LORA else 0
    each = shape * (8 if not adapted else 21 if adapted < 3 else 39) + 14 * config.vocab_size
    needs = f"{BASE_MODEL!r} has {weights / 1e9:.1f} GB of weights"
    if DEVICE == "cuda":
        able = DTYPE == "float32" or torch.cuda.get_device_capability() >= (8, 0)
        require(able, f"{DEVICE_NAME} has no bfloat16 in hardware: take one that has, or --dtype float32")
        need, free = weights + each * max(longest, TOKENS_PER_MICROBATCH), 0.97 * torch.cuda.mem_get_info()[0]
        fits = int((free - weights) / each)
        advice = f"--tokens-per-microbatch {fits} fits" if fits >= longest else "take one with more memory"
        needs += f", needs about {need / 1e9:.1f} GB, and {DEVICE_NAME} has {free / 1e9:.1f} GB free"
        require(need <= free, f"{needs}: {advice}")
    elif weights > 4e9:
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:  # no GPU, or a driver too old: torch says which
            stop(f"no GPU found, and {needs}: take one of 32 GB (condor_submit heft.sub), or --smoke", error)


def load_base_model(base):
    """The causal language model BASE_MODEL in DTYPE on the device; from safetensors only."""
    how = dict(dtype=getattr(torch, DTYPE), device_map=DEVICE, use_safetensors=True, revision=base.version)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(BASE_MODEL, output_loading_info=True, **how)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing, torn or foreign file: a dozen types
        stop(f"cannot load the model {BASE_MODEL!r}", error)
    missing = sorted(loading["missing_keys"])
    require(not missing, f"the model {BASE_MODEL!r} lacks weights: {', '.join(missing[:3])} ...")
    return model


def peak_memory():
    """Largest memory this process has held so far, in GB: the GPU's, without one the machine's."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (torch.cuda.max_memory_allocated() if DEVICE == "cuda" else own) / 1e9


# ----- Records: heft.json, written last into a stage's folder, says what made it: settings, data, parent
def digest(content):
    """16 digits of the SHA-256 of a file (a Path), or of anything else as JSON."""
    if isinstance(content, Path):
        return hashlib.file_digest(content.open("rb"), "sha256").hexdigest()[:16]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def save(path, content):
    """Write text, or what torch.save makes of the rest, then rename: a reader finds all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if isinstance(content, str):
        temporary.write_text(content, encoding="utf-8")
    else:
        torch.save(content, temporary)
    temporary.replace(path)


def check_record(file, settings, where=None):
    """The record in `file` (None without one). ValueError: other settings, data or weights made it."""
    if not file.exists():
        return None
    try:
        record = torch.load(file, "cpu") if file.suffix == ".pt" else json.loads(file.read_text())
        theirs = record["settings"] | {}
    except Exception:  # damaged or foreign: a dozen types
        raise ValueError(f"{where or file} is no result of this program: move it away") from None
    other = [f"{k.lower()} {theirs.get(k)!r}, not {v!r}" for k, v in settings.items() if theirs.get(k) != v]
    if other:
        advice = "move it away, or choose another --output-dir, --results-dir or repository"
        raise ValueError(f"{where or file} was made with {'; '.join(other)}: {advice}")
    return record


def finish(stage, record):
    """Say in the stage's folder, where its weights are by now, that it is finished."""
    stage.content = stage.settings["WEIGHTS"] = digest(stage.weights)
    stage.record = record | {"settings": stage.settings}
    save(stage.folder / "heft.json", json.dumps(stage.record))
    (stage.folder / "checkpoint.pt").unlink(missing_ok=True)


def take_up(settings, base, train_rows, questions):
    """(lora, reft, run): what they are, and what earlier runs have left of them. Ends with 0 if all is done,
    with 2 if what is there was made by other settings, data or weights, or is something else's."""
    made_from = {"FORMAT": 2, "BASE_VERSION": base.version, "TRAIN_DATA": digest(train_rows)}
    lora = SimpleNamespace(title="stage 1, LoRA", epochs=EPOCHS_LORA, repo=HF_REPO_LORA, place="adapter")
    reft = SimpleNamespace(title="stage 2, LoReFT", epochs=EPOCHS_REFT, repo=HF_REPO_REFIT, place="")
    run = SimpleNamespace(stages=[stage for stage in (lora, reft) if stage.epochs])
    for part, what in ((lora, "lora"), (reft, "reft"), (run, "run")):
        part.name, part.settings = identity(settings, what)
        part.settings |= made_from  # all that decides the part
    for stage in (lora, reft):
        stage.folder = Path(OUTPUT_DIR, stage.name)
        stage.lock = filelock.FileLock(stage.folder / "lock")
        stage.record = stage.hub = None  # of a finished stage, heft.json; the file of that on the Hub
        stage.content = "not trained yet" if stage.epochs else None  # later the hash of its weights
        name = re.sub(r"([-.])[-.]+", r"\1", f"heft-{stage.name}".replace("+", "_"))
        stage.repo = stage.repo or (name if len(name) <= 96 else f"{name[:79].rstrip('-.')}-{digest(name)}")
    lora.weights = lora.folder / "adapter_model.safetensors"  # the names that PEFT and pyvene give
    reft.weights = reft.folder / f"intkey_layer_{REFT_LAYER}_comp_block_output_unit_pos_nunit_1#0.bin"
    lora.config, reft.config = lora.folder / "adapter_config.json", reft.folder / "config.json"
    run.settings["VALIDATION_DATA"] = digest(questions)
    run.file = Path(RESULTS_DIR, RESULTS_FILE or f"{run.name}.json")
    try:
        run.result = check_record(run.file, run.settings)
        if PUSH_TO_HUB and run.stages:
            ask_hub(run.stages)
        # Nor is a result done whose weights are not those on the Hub.
        there = {f"STAGE_{i}": stage.content for i, stage in enumerate((lora, reft), 1) if stage.hub}
        run.result = check_record(run.file, run.settings | there)
        run.unpushed = [stage for stage in run.stages if PUSH_TO_HUB and not stage.hub]
        if run.result and not run.unpushed and not MERGED_DIR:
            print(f"already done: {run.file}; move it away to evaluate again\n{SUMMARY.format(**run.result)}")
            sys.exit(0)
        same = MERGED_DIR and Path(MERGED_DIR).resolve() == base.folder.resolve()
        require(not same, "--merged-dir is the folder of the base model, which it would overwrite")
        for folder in filter(None, (OUTPUT_DIR, RESULTS_DIR, MERGED_DIR)):
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # a folder that cannot be written is told now
        for stage in run.stages:
            reft.settings["STAGE_1"] = lora.content
            lock_and_check(stage)
        weights = {"STAGE_1": lora.content, "STAGE_2": reft.content}  # those that will be pushed
        run.result = check_record(run.file, run.settings | weights)  # again: there may have been a wait
    except (OSError, RequestError) as error:
        where = getattr(error, "filename", None) or " or ".join(stage.repo for stage in run.stages)
        stop(f"cannot read or write {where}: mend that, or choose another folder or repository", error)
    except ValueError as error:  # damaged, of other settings, or something else's
        stop(error)
    sandbox = Path(os.environ.get("_CONDOR_SCRATCH_DIR", "nowhere")).resolve()
    for path in Path(OUTPUT_DIR).resolve().glob("*/checkpoint.pt"):  # it would overwrite a later one at home
        if path.is_relative_to(sandbox) and path.parent.name not in (lora.name, reft.name):
            path.unlink()
    return lora, reft, run


def lock_and_check(stage):
    """Lock the stage's folder. Check what is there or, of a finished stage, is brought there from the Hub."""
    stage.folder.mkdir(exist_ok=True)
    try:
        stage.lock.acquire(timeout=0)
    except filelock.Timeout:  # of two runs at once the second waits
        print(f"waiting for another run that works in {stage.folder}")
        stage.lock.acquire()
    file, checkpoint, where = stage.folder / "heft.json", stage.folder / "checkpoint.pt", stage.folder
    check_record(checkpoint, stage.settings)
    if stage.hub and not file.exists():
        where = f"the Hub repository {stage.repo}"
        for part in (stage.weights, stage.config):
            shutil.copy(huggingface_hub.hf_hub_download(stage.repo, part.name, subfolder=stage.place), part)
    if stage.hub or file.exists():
        stage.content = digest(stage.weights) if stage.weights.exists() else "missing"
        stage.settings["WEIGHTS"] = stage.content
        stage.record = check_record(file if where is stage.folder else stage.hub, stage.settings, where)
        check_record(stage.hub or file, stage.settings, f"the Hub repository {stage.repo}")
        save(file, json.dumps(stage.record))
        checkpoint.unlink(missing_ok=True)
        print(f"{stage.title.split(',')[0]} is finished in {where}")


# ----- The Hub: asked at the start, so that mistakes are told; filled at the end, when everything is on disk
def ask_hub(stages):
    """Look the stages up at the start. A Hub that is down keeps no GPU waiting."""
    advice = "set HF_TOKEN to a token that may write there, or give --no-push-to-hub"
    require(huggingface_hub.get_token(), f"PUSH_TO_HUB needs a token: {advice}")
    try:
        look_up(stages)
    except (OSError, RequestError, LookupError, RuntimeError) as error:
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (400, 401, 403)
        repos = " or ".join(stage.repo for stage in stages if not stage.hub)
        require(not refused, f"the Hub refuses {repos} ({first_line(error)}): {advice}")
        print(f"the Hub does not answer now ({first_line(error)}); it is asked again at the end")


def look_up(stages):
    """Set `hub` of the stages that are there; see that the others can be pushed. ValueError: a mistake."""
    for stage in [stage for stage in stages if not stage.hub]:
        huggingface_hub.utils.validate_repo_id(stage.repo)
        if "/" not in stage.repo:
            stage.repo = f"{HF_USER or huggingface_hub.whoami()['name']}/{stage.repo}"
        with contextlib.suppress(RepositoryNotFoundError):
            files, where = huggingface_hub.list_repo_files(stage.repo), f"the Hub repository {stage.repo}"
            if "heft.json" in files:
                file = Path(huggingface_hub.hf_hub_download(stage.repo, "heft.json"))
                stage.content = check_record(file, stage.settings, where)["settings"]["WEIGHTS"]
                stage.hub = file
            elif set(files) - {".gitattributes"}:
                raise ValueError(f"{where} holds something else: choose another, or empty it")
    if len({stage.repo for stage in stages}) < len(stages):
        raise ValueError(f"{stages[0].repo} cannot hold both stages: choose another --hf-repo-refit")
    for stage in [stage for stage in stages if not stage.hub]:
        huggingface_hub.create_repo(stage.repo, private=PRIVATE_REPOS, exist_ok=True)
        huggingface_hub.auth_check(stage.repo, write=True)


def push_what_is_missing(model, base, lora, reft, run):
    """Upload what the Hub lacks, each repository in one commit. Returns what failed, as phrases."""
    failed = []
    for stage in run.unpushed:
        what = "the merged model" if stage is lora else "the LoReFT intervention"
        try:
            look_up(run.stages)  # another run may have been here since the start; the card names both
            if stage.hub:
                continue
            print(f"pushing {what} to {stage.repo}")
            # Not in OUTPUT_DIR, which a cluster sends about: base and adapter give the model back in seconds.
            with tempfile.TemporaryDirectory(prefix=".merged-", dir=".") as folder:
                assert digest(stage.weights) == stage.content, f"{stage.weights} has changed"
                Path(folder, stage.place).mkdir(exist_ok=True)
                for file in (stage.weights, stage.config):
                    shutil.copy(file, Path(folder, stage.place))
                if stage is lora:
                    write_merged(model, base, folder)
                save(Path(folder, "heft.json"), json.dumps(stage.record, indent=1))
                save(Path(folder, "README.md"), model_card(stage, what, lora, reft, run))
                huggingface_hub.upload_folder(repo_id=stage.repo, folder_path=folder, commit_message="HEFT")
            stage.hub = stage.folder / "heft.json"
        except Exception as error:  # whatever the Hub does, the run is done
            failed.append(f"{what} to {stage.repo} ({first_line(error)})")
    return failed


def write_merged(model, base, folder):
    """The merged model in `folder`, with the base model's own tokenizer files as they are."""
    model.save_pretrained(folder)
    names = "tokenizer* special_tokens_map.json added_tokens.json vocab* merges.txt chat_template*".split()
    for path in [path for name in names for path in base.folder.glob(name)]:
        shutil.copy(path, folder)


def model_card(stage, what, lora, reft, run):
    """The README of a pushed repository: `what` it holds, and how to ask the run's model a question."""
    base, data = (Path(x).resolve().name if os.path.isdir(x) else x for x in (BASE_MODEL, DATASET))
    prompt = BOOLQ_PROMPT_TMPL % ("Ice is frozen water, and floats.", "is ice made of water")
    merged, generate = lora.repo if lora.epochs else base, "output = model.generate(**inputs, **options)"
    if reft.epochs:
        generate = f"""import pyreft
reft_model = pyreft.ReftModel.load("{reft.repo}", model, from_huggingface_hub=True)
options |= dict(unit_locations={{"base": length - 1}}, intervene_on_prompt=True)
_, output = reft_model.generate(inputs, **options)"""
    return f"""---
base_model: {base}
datasets: [{data}]
license: {"llama2" if "llama-2" in base.lower() else "other"}
---
This is {what} of the run {run.name}, made from {base} by the reference reproduction of
HEFT (arXiv 2509.09801): {SUMMARY.format(**run.result)}.
```python
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("{merged}", dtype=torch.bfloat16)
tokenizer = transformers.AutoTokenizer.from_pretrained("{merged}")
prompt = \"\"\"{prompt}\"\"\"
inputs = dict(tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
length = inputs["input_ids"].shape[1]
options = dict(max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id)
{generate}
print(tokenizer.decode(output[0, length:], skip_special_tokens=True))
```
Settings: `{json.dumps(stage.settings)}`. The licence of the base model applies. Llama 2 is licensed under the
LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.
"""


# ----- The result and the last screen
SUMMARY = (  # of a result, in one line
    "accuracy {accuracy} (95 % interval {confidence_interval_95[0]:.2f} to {confidence_interval_95[1]:.2f}), "
    "{correct_predictions:,} of {num_validation_samples:,} correct, {unknown_answers} unknown"
)


def write_result(settings, run, lora, reft, questions, texts, seconds):
    """Write the result and the predictions of the run. Returns the result, the paper's five keys first."""
    rows = [{key: row[key] for key in ("question", "answer")} for row in questions]
    rows = [row | {"prediction": predict(text), "text": text} for row, text in zip(rows, texts)]
    n, correct = len(rows), sum(row["prediction"] == row["answer"] for row in rows)
    records = {"lora": lora.record or {}, "reft": reft.record or {}}
    seconds = {name: record.get("seconds", 0.0) for name, record in records.items()} | {"evaluation": seconds}
    packages = "torch transformers peft pyreft pyvene accelerate datasets huggingface_hub".split()
    result = {
        "lora_epochs": EPOCHS_LORA,
        "reft_epochs": EPOCHS_REFT,
        "num_validation_samples": n,
        "correct_predictions": correct,
        "accuracy": f"{100 * correct / n:.2f}%",
        "confidence_interval_95": [100 * end for end in binomtest(correct, n).proportion_ci(method="wilson")],
        "unknown_answers": sum(row["prediction"] == "Unknown" for row in rows),
        "settings": settings | run.settings | {"STAGE_1": lora.content, "STAGE_2": reft.content},
        "seconds": seconds | {"total": sum(seconds.values())},
        "device": DEVICE_NAME,
        "peak_memory_gb": max(peak_memory(), *(r.get("peak_memory_gb", 0) for r in records.values())),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        "commit": COMMIT or None,  # a cluster job has none
        "script_sha256": hashlib.sha256(SCRIPT.encode()).hexdigest(),
        "loss": {name: record.get("loss", []) for name, record in records.items()},
    }
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    save(run.file.with_suffix(".predictions.jsonl"), "".join(lines))
    save(run.file, json.dumps(result, indent=1) + "\n")  # last: the run is finished
    return result


def last_screen(run, unpushed):
    """What was done, how well, how long it took, and where it lies; ends with 1 if a push has failed."""
    trained = " + ".join(f"{stage.title.split(', ')[1]} {stage.epochs} epochs" for stage in run.stages)
    seconds = ", ".join(f"{stage} {value:.1f}" for stage, value in run.result["seconds"].items())
    files = [run.file, run.file.with_suffix(".predictions.jsonl"), *(stage.folder for stage in run.stages)]
    print(f"\n{run.name}: {trained or 'the base model, untrained'}\n{SUMMARY.format(**run.result)}")
    if run.name in PAPER_ACCURACY and not SMOKE:
        print(f"paper    {PAPER_ACCURACY[run.name]:.2f}%")
    print(f"seconds  {seconds}; peak memory {run.result['peak_memory_gb']:.1f} GB")
    print(f"files    {', '.join(map(str, files))}")
    later = f"all is on disk, and this pushes it later: {shlex.join(['python', *sys.argv])}"
    require(not unpushed, f"not pushed: {'; '.join(unpushed)}; {later}", 1)


if __name__ == "__main__":
    sys.excepthook = explain
    main()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is done, but Python takes a second to leave
