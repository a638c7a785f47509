"""HEFT: fine-tune Llama-2-7b-chat on BoolQ with LoRA, merge, refine with LoReFT, evaluate.

The reference reproduction of "HEFT: A Coarse-to-Fine Hierarchy for Enhancing the Efficiency
and Accuracy of Language Model Reasoning" (arXiv 2509.09801), one experiment from top to bottom.

    python heft_finetuning.py --smoke                            # tiny embedded model, CPU, offline
    python heft_finetuning.py --no-push-to-hub                   # the paper's main run, 3 + 3 epochs
    python heft_finetuning.py --epochs-lora 20 --epochs-reft 0   # Table 1, LoRA-only
    python heft_finetuning.py --epochs-lora 0 --epochs-reft 20   # Table 1, ReFT-only
    python heft_finetuning.py --epochs-lora 20 --epochs-reft 20  # Table 1, the longest run
    condor_submit heft.sub                                       # the same on a GPU cluster

A run that was stopped, by whatever, continues with the same command.
Exit status: 0 done, 2 a mistake said in one line, 85 stopped by SIGTERM with a checkpoint, else a failure.
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
LORA_TARGETS = ""          # "" is PEFT's default (q_proj, v_proj) as in the paper's code; text: all-linear
LEARNING_RATE_LORA = 2e-4  # at the first step; falls linearly to 0
# Stage 2, LoReFT
REFT_LAYER = 15            # the block, counted from 0, whose output is edited
REFT_RANK = 4              # dimension of the edited subspace
LEARNING_RATE_REFT = 2e-4  # at the first step; falls linearly to 0
# Both stages
EXAMPLES_PER_STEP = 32     # examples per optimizer step
MAX_LENGTH = 2048          # tokens; what is longer is cut in training
TOKENS_PER_MICROBATCH = 2048  # memory knob (rows x longest row); changes rounding and the dropout masks drawn
# Evaluation
MAX_NEW_TOKENS = 5         # tokens generated per question, greedily
# Output
PUSH_TO_HUB = True         # upload the merged model and the LoReFT intervention
PRIVATE_REPOS = True       # Hub repositories made here are private
HF_USER = ""               # owner of the repositories; "" is the token's owner
HF_REPO_LORA = ""          # repository of the merged model; "" is heft-<name of stage 1>
HF_REPO_REFIT = ""         # repository of the LoReFT intervention; "" is heft-<name of stage 2>
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
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # before the imports that take seconds: a job may be told to go at any time
    words = b"\nstopped by SIGTERM; the same command continues\n"
    signal.signal(signal.SIGTERM, lambda *_: (os.write(2, words), sys.exit(85)))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads cost tenfold where cores are shared
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # micro-batches vary in shape
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="CUDA initialization")  # told by check_device

import datasets
import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from scipy.stats import binomtest
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

with contextlib.redirect_stdout(None):  # it advertises a package that is not needed here
    from pyreft import LoreftIntervention, ReftConfig, get_reft_model
from pyvene.models.intervenable_modelcard import type_to_module_mapping

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the scheduler's CUDA_VISIBLE_DEVICES is left alone
IGNORE = -100  # label of a token without loss


def main():
    """The experiment, in the order of the paper's sections [in brackets]; mistakes end it early."""
    settings = begin()

    # Data: BoolQ as prompts with the answers Yes and No, and what each stage is to learn from them [4.1]
    base, tokenizer, skeleton = look_at_base_model()
    train_rows, questions = load_boolq("train", tokenizer), load_boolq("validation", tokenizer)
    lora_examples, reft_examples, common = training_examples(tokenizer, train_rows)
    check_device(skeleton, max(len(row["tokens"]) for row in train_rows + questions))

    # What earlier runs have left is taken up if the same settings, data and weights made it, else refused
    lora, reft, run = take_up(settings, base, train_rows, questions)
    print(f"run {run.name} on {device_name()}: {skeleton.num_parameters():,} parameters, {DTYPE}")
    print(f"{len(lora_examples):,} examples, {len(reft_examples):,} in stage 2; {len(questions):,} questions")

    # Stage 1, coarse: LoRA on the whole text of prompt and answer, merged into the weights [3.2]
    if lora.hub and not lora.record:
        print(f"stage 1 is finished in {lora.repo}", flush=True)
        model = load_model(lora.repo)
    else:
        model = load_model(BASE_MODEL, base.version)
        if EPOCHS_LORA:
            model = stage_1_lora(model, lora, lora_examples)
            model = model.merge_and_unload()  # in the model's dtype, as in the paper
    model.eval().requires_grad_(False)
    lora.release()
    if MERGED_DIR:
        write_merged(model, base, MERGED_DIR)

    # Stage 2, fine: LoReFT on the merged, frozen model, one edit of one hidden state per question [3.3]
    reft.settings["STAGE_1"] = content_of(lora)
    reft_model = stage_2_loreft(model, reft, reft_examples, common) if EPOCHS_REFT else None

    # Evaluation: greedy answers to the validation questions [4]
    if not run.result:
        texts, seconds = answer(model, reft_model, tokenizer, questions)
        run.result = write_result(settings, run, lora, reft, questions, texts, seconds)

    # The Hub comes last: everything is on disk by now
    unpushed = push_what_is_missing(model, base, lora, reft, run)
    last_screen(run, lora, reft, unpushed)
    sys.exit(1 if unpushed else 0)


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
    """The questions of a split in the data's order: dicts of prompt, answer, question and prompt tokens."""
    if split == "train" and not EPOCHS_LORA and not EPOCHS_REFT:
        return []
    where = f"the {split} split of the dataset {DATASET!r}"
    try:
        rows = datasets.load_dataset(DATASET, split=split)
    except Exception as error:  # missing, unreachable, damaged, no such split: a dozen types
        advice = "a file is missing or damaged, or not all have the fields question, passage, answer"
        stop(f"cannot read {where}, a Hub name or a folder ({first_line(error)}): {advice}", status_of(error))
    found = {name: getattr(kind, "dtype", "?").replace("large_", "") for name, kind in rows.features.items()}
    for field, kind in {"answer": "bool", "question": "string", "passage": "string"}.items():
        if found.get(field) != kind:
            stop(f"{where} lacks {field} ({kind}); it has {found}")
    rows = rows.select_columns(["question", "passage", "answer"]).to_list()
    rows = rows[: (MAX_TRAIN_SAMPLES if split == "train" else MAX_EVAL_SAMPLES) or None]
    if broken := [number for number, row in enumerate(rows, 1) if None in row.values()]:
        stop(f"{where} has no question, passage or answer in row {broken[0]}")
    if not rows:
        stop(f"{where} has no rows")
    rows = [format_boolq(row) | {"question": row["question"]} for row in rows]
    tokens = tokenizer([row["prompt"] for row in rows])["input_ids"]
    return [row | {"tokens": prompt} for row, prompt in zip(rows, tokens)]


def tokens_after_prompt(tokenizer, text):
    """Token ids of `text` where it follows a prompt; every prompt ends alike, so they are found once."""
    prompt = BOOLQ_PROMPT_TMPL % ("", "")
    before, whole = tokenizer([prompt, prompt + text])["input_ids"]
    assert whole[: len(before)] == before, f"{text!r} changes the tokens of the prompt before it"
    return whole[len(before) :]


def training_examples(tokenizer, rows):
    """What each stage learns from (lists of dicts of token lists), and the tokens that start all prompts."""
    # The paper's text ends in " Yes" in stage 1 and in "Yes" in stage 2; both add the end-of-sequence token.
    words = (" Yes", " No", "Yes", "No")
    endings = {word: tokens_after_prompt(tokenizer, word + tokenizer.eos_token) for word in words}
    common = os.path.commonprefix([row["tokens"][:-2] for row in rows])  # no prefix below may be empty
    lora_examples, reft_examples = [], []
    for row in rows:
        # Loss over the whole text. The paper pads with the end-of-sequence token and so masks the real one.
        tokens = (row["tokens"] + endings[" " + row["answer"]])[:MAX_LENGTH]
        labels = [IGNORE if token == tokenizer.eos_token_id else token for token in tokens]
        lora_examples.append({"input_ids": tokens, "labels": labels})
        # Loss on the answer and its end. The prefix, all before the last prompt token, needs no gradient.
        (*prefix, last), ending = row["tokens"], endings[row["answer"]]
        example = {"prefix": prefix[len(common) :], "prefix_mask": [1] * len(prefix)}
        if len(prefix) + 1 + len(ending) <= MAX_LENGTH:  # cut, its answer would be gone
            reft_examples.append(example | {"input_ids": [last, *ending], "labels": [IGNORE, *ending]})
    if EPOCHS_REFT and not reft_examples:
        stop(f"no training example fits into --max-length {MAX_LENGTH}")
    return lora_examples, reft_examples, common


# ----- Training: a step is EXAMPLES_PER_STEP examples, in micro-batches that hold little padding


def microbatches(lengths, tokens):
    """Positions in `lengths`, short to long, in groups of rows x longest <= `tokens`; longer go alone."""
    groups = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def collate(examples):
    """The examples of a step (dicts of token lists) as micro-batches (dicts of (rows, columns) tensors).
    Padding is on the right, where causal attention never looks: without a prefix, no mask is needed."""

    def padded(key, group):
        rows, value = [torch.tensor(examples[i][key]) for i in group], IGNORE if key == "labels" else 0
        return pad_sequence(rows, batch_first=True, padding_value=value).to(DEVICE)

    lengths = [len(example.get("prefix", [])) + len(example["input_ids"]) for example in examples]
    groups = microbatches(lengths, TOKENS_PER_MICROBATCH)  # the paper pads stage 1's examples to 2048 tokens
    return [{key: padded(key, group) for key in examples[0]} for group in groups]


def example_losses(logits, labels):
    """Mean token loss of each example: (rows, columns, words) and (rows, columns) to (rows,)."""
    labels = pad(labels[:, 1:], (0, 1), value=IGNORE)  # column t predicts token t + 1
    logits = logits.float().flatten(0, 1)
    losses = cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view_as(labels).sum(1) / (labels != IGNORE).sum(1)


def train(stage, losses_of, tensors, examples, peak_rate):
    """Train `tensors`, those of them that require a gradient; continue from the stage's checkpoint.

    losses_of: function from a micro-batch (dict of (rows, columns) tensors) to its rows' losses (rows,).
    AdamW, linear decay to 0, no warm-up, gradient clip 1.0. Rate, order and dropout follow from SEED and the
    step's number: a step needs weights and optimizer alone, and a resumed run equals an undisturbed one.
    Returns {"loss": [one per step], "seconds": of all attempts}. After SIGTERM it saves and exits with 85."""
    parameters = [tensor for tensor in tensors if tensor.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, weight_decay=0.0)  # fused rounds otherwise
    per_epoch = math.ceil(len(examples) / EXAMPLES_PER_STEP)  # an epoch's last step may have fewer examples
    steps, losses, seconds = per_epoch * stage.epochs, [], 0.0
    trainable = sum(parameter.numel() for parameter in parameters)
    print(
        f"\n{stage.title}: {trainable:,} trainable parameters, {stage.epochs} epochs, {steps} steps",
        flush=True,
    )
    checkpoint = stage.folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for tensor, saved in zip(tensors, state["tensors"]):
            tensor.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        losses, seconds = state["loss"], state["seconds"]
        print(f"resuming from {checkpoint} after step {len(losses)} of {steps}", flush=True)
    started, stopping = time.time() - seconds, []
    at_once = signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    bar = tqdm(range(len(losses), steps), initial=len(losses), total=steps, dynamic_ncols=True)
    for step in bar:
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
        batch = [examples[i] for i in order[position * EXAMPLES_PER_STEP :][:EXAMPLES_PER_STEP]]
        torch.manual_seed(random.Random(f"{SEED} {step}").getrandbits(32))  # of the dropout
        optimizer.param_groups[0]["lr"] = peak_rate * ((steps - step) / steps)
        loss = 0.0
        for rows in collate(batch):
            # A mean over the step's examples, as in transformers 4.45; its Trainer now weights by tokens.
            part = losses_of(rows).sum() / len(batch)
            part.backward()
            loss += part.detach()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            advice = "try a lower learning rate, or --dtype float32"
            stop(f"the loss is {losses[-1]} at step {step + 1}: {advice}", 1)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
        if stopping or position == per_epoch - 1:
            state = {"settings": stage.settings, "tensors": tensors, "optimizer": optimizer.state_dict()}
            save(checkpoint, state | {"loss": losses, "seconds": time.time() - started})
            if stopping:
                break
    signal.signal(signal.SIGTERM, at_once)
    if stopping:
        print(f"stopped by SIGTERM at step {len(losses)} of {steps}; the same command continues", flush=True)
        sys.exit(85)
    return {"loss": losses, "seconds": time.time() - started}


# ----- Stage 1: LoRA (paper, section 3.2)


def lora_config():
    """The adapter's: PEFT's default targets unless LORA_TARGETS names others."""
    targets = {"": None, "all-linear": "all-linear"}.get(LORA_TARGETS, LORA_TARGETS.split(","))
    sizes = dict(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT)
    return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **sizes)


def stage_1_lora(model, stage, examples):
    """`model` with the stage's adapter, which is read if the stage is finished, else trained."""
    if stage.record:
        print(f"stage 1 is finished in {stage.folder}", flush=True)
        return PeftModel.from_pretrained(model, stage.folder)
    set_seed(SEED)  # directly before the weights are drawn: they depend on the seed alone
    model = get_peft_model(model, lora_config()).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if "Llama-2-7b" in BASE_MODEL and (LORA_RANK, LORA_TARGETS) == (8, ""):
        assert sum(parameter.numel() for parameter in parameters) == 4_194_304

    def losses_of(rows):
        return example_losses(model(input_ids=rows["input_ids"], use_cache=False).logits, rows["labels"])

    record = train(stage, losses_of, parameters, examples, LEARNING_RATE_LORA)
    model.save_pretrained(stage.folder)
    finish(stage, record)
    return model


# ----- Stage 2: LoReFT (paper, section 3.3): at the last prompt token, h becomes h + R^T (W h + b - R h)


def stage_2_loreft(model, stage, examples, common):
    """A pyreft.ReftModel around `model`: its intervention is read if the stage is finished, else trained."""
    set_seed(SEED)  # directly before the weights are drawn: they depend on the seed alone
    width = model.config.hidden_size
    intervention = LoreftIntervention(embed_dim=width, low_rank_dimension=REFT_RANK, dtype=model.dtype)
    rotation = intervention.rotate_layer.parametrizations.weight[0]
    rotation.base = rotation.base.contiguous()  # or it cannot be saved
    place = {"layer": REFT_LAYER, "component": "block_output", "low_rank_dimension": REFT_RANK}
    reft_model = get_reft_model(model, ReftConfig(representations=place | {"intervention": intervention}))
    if not stage.record:
        trainable = sum(parameter.numel() for parameter in intervention.parameters())
        assert trainable == REFT_RANK * (2 * width + 1)  # R, W and b; 32,772 on the 7B model
        # The paper backpropagates through all prompt tokens. Those before the last are constant: their keys
        # and values are computed without gradient, those of the words that start all prompts only once.
        with torch.no_grad():
            start = model.base_model(torch.tensor([common], device=DEVICE), use_cache=True).past_key_values

        def losses_of(rows):
            inputs, mask = rows["input_ids"], rows["prefix_mask"]
            with torch.no_grad():
                prefix = copy.deepcopy(start)
                prefix.batch_repeat_interleave(len(inputs))
                model.base_model(rows["prefix"], past_key_values=prefix)
            position = mask.sum(1, keepdim=True) + torch.arange(inputs.shape[1], device=DEVICE)
            mask = torch.cat([mask, torch.ones_like(inputs)], 1)
            inputs = {"input_ids": inputs, "attention_mask": mask, "position_ids": position}
            _, output = reft_model(inputs | {"past_key_values": prefix}, unit_locations={"base": 0})
            return example_losses(output.logits, rows["labels"])

        tensors = [*intervention.parameters(), *intervention.buffers()]  # its own state_dict is lossy
        record = train(stage, losses_of, tensors, examples, LEARNING_RATE_REFT)
        reft_model.set_device("cpu", set_model=False)  # a file that loads without a GPU
        with contextlib.redirect_stdout(None):
            reft_model.save(stage.folder)
        finish(stage, record)
    else:
        print(f"stage 2 is finished in {stage.folder}", flush=True)
    # What was saved is evaluated. (ReftModel.load would make learned_source bfloat16, whatever it was.)
    intervention.load_state_dict(torch.load(stage.weights, map_location=DEVICE, weights_only=True))
    reft_model.set_device(DEVICE, set_model=False)
    return reft_model


# ----- Evaluation (paper, section 4)


def answer(model, reft_model, tokenizer, questions):
    """The generated text for each question, in their order, and the seconds it took."""
    print(f"\nevaluation of {len(questions):,} questions", flush=True)
    prompts = [row["tokens"] for row in questions]
    end = tokenizer.pad_token_id = tokenizer.eos_token_id
    ends = {"max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": end, "pad_token_id": end}
    greedy = GenerationConfig(do_sample=False, **ends)  # the chat model's own settings would sample
    texts, started = {}, time.time()
    # Without gradient four times as many tokens fit. Left padding: the last column is the last prompt token.
    groups = microbatches([len(prompt) for prompt in prompts], 4 * TOKENS_PER_MICROBATCH)
    for group in tqdm(groups, unit="micro-batch", dynamic_ncols=True):
        rows = tokenizer.pad({"input_ids": [prompts[i] for i in group]}, return_tensors="pt").to(DEVICE)
        columns = rows["input_ids"].shape[1]
        if reft_model:
            edited = dict(unit_locations={"base": columns - 1}, intervene_on_prompt=True)
            _, output = reft_model.generate(dict(rows), generation_config=greedy, **edited)
        else:
            output = model.generate(**rows, generation_config=greedy)
        texts |= zip(group, tokenizer.batch_decode(output[:, columns:], skip_special_tokens=True))
    return [texts[i].strip() for i in range(len(prompts))], time.time() - started


def predict(text):
    """ "Yes", "No" or "Unknown" (counts as wrong) from a generated text, by the paper's rule."""
    return "Yes" if "Yes" in text else "No" if "No" in text else "Unknown"


def wilson(correct, n):
    """95 % interval of an accuracy, in percent (Wilson 1927)."""
    return [100 * end for end in binomtest(correct, n).proportion_ci(method="wilson")]


# =============================================================================================
# Bookkeeping: the experiment ends here

# ----- Settings as flags, and the names of runs

# The paper's value of each setting that changes the experiment;
# what differs becomes a part of the run's name, in this order (a new one comes last: names must not change).
# fmt: off
PAPER_VALUES = dict(
    BASE_MODEL="meta-llama/Llama-2-7b-chat-hf", DATASET="google/boolq",
    LORA_RANK=8, LORA_ALPHA=32, LORA_DROPOUT=0.05, LORA_TARGETS="", LEARNING_RATE_LORA=2e-4,
    REFT_LAYER=15, REFT_RANK=4, LEARNING_RATE_REFT=2e-4,
    EXAMPLES_PER_STEP=32, MAX_LENGTH=2048, MAX_NEW_TOKENS=5, DTYPE="bfloat16", SEED=42,
    MAX_TRAIN_SAMPLES=0, MAX_EVAL_SAMPLES=0)
PAPER_ACCURACY = {"lora0-reft20": 83.36, "lora20-reft0": 85.05, "lora3-reft3": 85.17, "lora20-reft20": 85.47}
# What --smoke changes: the same script on the embedded toy, which needs larger steps.
HERE = Path(__file__).resolve().parent
SCRIPT = Path(__file__).read_text()  # as it is now: a run takes hours, in which it may be edited
SMOKE_VALUES = dict(
    BASE_MODEL=os.path.relpath(HERE / "smoke/model"), DATASET=os.path.relpath(HERE / "smoke/data"),
    DTYPE="float32", LEARNING_RATE_LORA=9e-4, LEARNING_RATE_REFT=1e-3,
    PUSH_TO_HUB=False, OUTPUT_DIR="output/smoke", RESULTS_DIR="results/smoke")
# fmt: on
MAY_BE_0 = "EPOCHS_LORA EPOCHS_REFT SEED REFT_LAYER LORA_DROPOUT MAX_TRAIN_SAMPLES MAX_EVAL_SAMPLES".split()


def read_settings(arguments=None):
    """The constants on the first screen, overridden by the flags in `arguments` (or the command line)."""
    meaning = dict(re.findall(r"^([A-Z_]+) = .*?# (.+)$", SCRIPT, re.M))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: stop(re.sub("^argument (--[^:]+):", r"\1", message))
    parser.add_argument("--smoke", action="store_true", help="the embedded tiny model and data, CPU, no Hub")
    smoke = "--smoke" in (sys.argv[1:] if arguments is None else arguments)
    for name in SETTINGS:
        flag, value = "--" + name.lower().replace("_", "-"), globals()[name]
        value, words = SMOKE_VALUES.get(name, value) if smoke else value, meaning[name].replace("%", "%%")
        if name in ("PUSH_TO_HUB", "PRIVATE_REPOS"):
            if not isinstance(value, bool):
                stop(f"{flag} must be True or False, not {value!r}")
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value, help=words)
        else:  # the default goes in as text: argparse checks it like a flag's, however it was edited
            words += f" (default: {value!r})"
            parser.add_argument(flag, metavar=name, default=str(value), type=partial(legal, name), help=words)
    parsed = parser.parse_args(arguments)
    return {name: getattr(parsed, name.lower()) for name in SETTINGS} | {"SMOKE": smoke}


def legal(name, text):
    """The value of the setting `name`, whose text comes from a flag or a constant."""
    # Types are not taken from the constants, which may have been edited wrongly.
    ints = ("EPOCHS_LORA", "EPOCHS_REFT", "TOKENS_PER_MICROBATCH")
    kind = int if name in ints else type(PAPER_VALUES.get(name, ""))
    lowest = 0 if name in MAY_BE_0 else 1 if kind is int else sys.float_info.min
    below = {"LORA_DROPOUT": 1, "SEED": 2**32}.get(name, math.inf)
    must = f"be {'above 0' if 0 < lowest < 1 else f'from {lowest}'} to below {below} ({kind.__name__})"
    try:
        value = kind(text)
        fine = kind is str or lowest <= value < below
    except ValueError:
        fine = False
    if name in ("BASE_MODEL", "DATASET", "OUTPUT_DIR", "RESULTS_DIR"):
        fine, must = bool(text.strip()), "not be empty"
    elif name == "DTYPE":
        fine, must = text in ("bfloat16", "float32"), "be bfloat16 or float32"
    elif name == "RESULTS_FILE":
        fine, must = re.fullmatch(r"([^/]*\.json)?", text), "end in .json, without a folder"
    if not fine:
        raise argparse.ArgumentTypeError(f"must {must} (it is {text!r})")
    return value


def made_by(settings, what="run"):
    """The settings that decide the outcome of `what`: stage "lora", stage "reft", or the whole "run"."""
    without = [] if settings["EPOCHS_LORA"] else ["LORA"]
    without += ["REFT"] if what == "lora" or not settings["EPOCHS_REFT"] else []
    without += [] if what == "run" else ["MAX_NEW", "EVAL"]
    names = ["EPOCHS_LORA"] + ["EPOCHS_REFT"] * (what != "lora") + list(PAPER_VALUES)
    return {n: settings[n] for n in names if n.startswith("EPOCHS") or not any(word in n for word in without)}


def run_name(settings, what="run"):
    """`lora3-reft3`, or `lora3` for stage 1, and a part for each setting that differs from the paper's (in a
    smoke run: the smoke run's), such as `lora3-reft3-reft_layer10-seed7`."""
    short = {"BASE_MODEL": "", "DATASET": "on_", "MAX_TRAIN_SAMPLES": "train", "MAX_EVAL_SAMPLES": "eval"}
    short |= {"LEARNING_RATE_LORA": "lr_lora", "LEARNING_RATE_REFT": "lr_reft"}
    usual = PAPER_VALUES | (SMOKE_VALUES if settings["SMOKE"] else {})
    parts = [f"lora{settings['EPOCHS_LORA']}"] + [f"reft{settings['EPOCHS_REFT']}"] * (what != "lora")
    for name, value in made_by(settings, what).items():
        if name in usual and value != usual[name]:
            text = os.path.basename(value.rstrip("/")) if isinstance(value, str) else f"{value:.10g}"
            key = short.get(name, name.lower() + "_" * isinstance(value, str))
            parts.append(re.sub(r"[^A-Za-z0-9._+]+", "_", key + text))
    return "-".join(parts)


def begin():
    """Make the constants what the flags say, quieten the libraries, and turn errors into single lines."""
    sys.excepthook = explain
    for library in (transformers, huggingface_hub, datasets):
        library.logging.set_verbosity(50)  # what they have to say is told by this script
    datasets.disable_progress_bars()
    huggingface_hub.get_session().timeout = 60  # seconds; by default a stalled Hub is waited for for ever
    settings = read_settings()
    globals().update(settings | ({"DEVICE": "cpu"} if settings["SMOKE"] else {}))  # SMOKE: --smoke was given
    return settings


# ----- Errors: one line for what is no bug


def stop(message, status=2):
    """End the program with one line on stderr; status 2 is a mistake that the user can mend."""
    tqdm.write(f"heft: error: {' '.join(str(message).split())}", file=sys.stderr)  # not within a progress bar
    sys.exit(status)


def first_line(error):
    """The first line of an exception's message: libraries add pages of advice."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def status_of(error):
    """The exit status for an error of the Hub's libraries: 1 if network or server failed, else 2."""
    code = getattr(getattr(error, "response", None), "status_code", 0)
    network = isinstance(error, ConnectionError | LocalEntryNotFoundError) or code == 429 or code >= 500
    network = network or isinstance(error.__cause__, LocalEntryNotFoundError)  # transformers wraps it
    return 1 if network and not huggingface_hub.constants.HF_HUB_OFFLINE else 2


def explain(kind, error, trace):
    """`sys.excepthook`: one line for what is no bug, a traceback for what is."""
    folders = [folder for folder in (OUTPUT_DIR, RESULTS_DIR, ".") if os.path.isdir(folder)]
    full = min(shutil.disk_usage(folder).free for folder in folders) < 1e5  # not all writers give an errno
    if issubclass(kind, KeyboardInterrupt):
        stop("interrupted; the same command continues", 130)
    if issubclass(kind, torch.OutOfMemoryError):
        stop("the GPU's memory is full: the same command with fewer --tokens-per-microbatch continues", 1)
    if full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        stop("the disk is full: make room, then the same command continues from the last checkpoint", 1)
    sys.__excepthook__(kind, error, trace)


# ----- The base model and the machine, looked at before anything takes time


def look_at_base_model():
    """(base, tokenizer, skeleton): the folder of the model's small files and the version of its weights; its
    tokenizer; the model with its adapter, without weights."""
    local, folder, small = os.path.isdir(BASE_MODEL), BASE_MODEL, ["*.json", "*.model", "*.txt", "*.jinja"]
    try:
        if not local:
            quiet = partial(tqdm, disable=True)
            folder = huggingface_hub.snapshot_download(BASE_MODEL, allow_patterns=small, tqdm_class=quiet)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")  # for generation
        with torch.device("meta"):
            options = {"dtype": getattr(torch, DTYPE)}
            skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **options)
        known = type(skeleton) in type_to_module_mapping
        if EPOCHS_LORA:
            skeleton = get_peft_model(skeleton, lora_config())
    except GatedRepoError:
        token = "a token is set" if huggingface_hub.get_token() else "no token is set"
        ask = f"ask for it at https://huggingface.co/{BASE_MODEL}"
        stop(f"no access to {BASE_MODEL}: {ask}, then set HF_TOKEN to a token of that account ({token})")
    except Exception as error:  # a missing, torn or foreign file: a dozen types
        advice = "--base-model takes a Hub name or a folder, --lora-targets names of its layers"
        stop(f"cannot use the model {BASE_MODEL!r} ({first_line(error)}): {advice}", status_of(error))
    folder, blocks = Path(folder), skeleton.config.num_hidden_layers
    if local and not list(folder.glob("*.safetensors")):
        stop(f"the folder {BASE_MODEL!r} holds no weights in safetensors form")
    if tokenizer.eos_token is None:
        stop(f"the tokenizer of {BASE_MODEL!r} has no end-of-sequence token")
    if EPOCHS_REFT and not known:
        stop(f"pyvene cannot intervene in {BASE_MODEL!r}: choose a Llama model, or --epochs-reft 0")
    if EPOCHS_REFT and REFT_LAYER >= blocks:
        stop(f"--reft-layer {REFT_LAYER}: the blocks of {BASE_MODEL!r} are 0 to {blocks - 1}")
    # A folder is what its weights are, however it is called; a Hub model is its commit.
    files = sorted(folder.glob("*.safetensors"))
    version = digest({path.name: digest(path) for path in files}) if local else folder.name
    return SimpleNamespace(folder=folder, version=version), tokenizer, skeleton


def bytes_per_token(skeleton):
    """Estimated GPU memory beside the weights, bytes per one of TOKENS_PER_MICROBATCH: (stage 1, evaluation).
    Fitted to a simulation of the 7B shape in bfloat16: 5.9 MB (10.3 MB with all-linear), and 4 x 0.63 MB."""
    config, size = skeleton.config, skeleton.dtype.itemsize
    width, blocks, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    adapted = sum(module.in_features for module in skeleton.modules() if isinstance(module, LoraLayer))
    wide = getattr(config, "intermediate_size", 4 * width)
    training = blocks * size * (5 * width + 4 * wide) + 5 * adapted + 14 * config.vocab_size
    cache = 2 * blocks * size * width * getattr(config, "num_key_value_heads", heads) // heads
    return training if adapted else 0, 4 * (cache + 26 * width)


def check_device(skeleton, longest):
    """Stop if the model does not fit this machine. longest: tokens of the longest prompt."""
    weights = skeleton.num_parameters() * skeleton.dtype.itemsize
    needs = f"{BASE_MODEL!r} has {weights / 1e9:.1f} GB of weights"
    if DEVICE == "cpu":
        if weights > 4e9:
            try:
                torch.cuda.init()
            except (AssertionError, RuntimeError) as error:  # no GPU, or a driver too old: torch says which
                where = "use a machine with a GPU of 32 GB or more (condor_submit heft.sub), or try --smoke"
                stop(f"no GPU found ({first_line(error)}), and {needs}: {where}")
        return
    gpu, free, each = device_name(), torch.cuda.mem_get_info()[0], max(bytes_per_token(skeleton))
    if DTYPE == "bfloat16" and torch.cuda.get_device_capability() < (8, 0):
        advice = "use a GPU of compute capability 8.0 or newer, or --dtype float32"
        stop(f"{gpu} has no bfloat16 in hardware: {advice}")
    need, fits = weights + each * max(longest, TOKENS_PER_MICROBATCH), int((0.97 * free - weights) / each)
    if need > 0.97 * free:
        advice = f"--tokens-per-microbatch {fits} fits" if fits >= longest else "take one with more memory"
        stop(f"{needs}, needs about {need / 1e9:.0f} GB, and {gpu} has {free / 1e9:.0f} GB free: {advice}")


def load_model(name, revision="main"):
    """The causal language model `name` (folder, or revision on the Hub), on the device; safetensors only."""
    options = {"dtype": getattr(torch, DTYPE), "device_map": DEVICE, "revision": revision}
    options |= {"use_safetensors": True, "output_loading_info": True}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(name, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing, torn or foreign file: a dozen types
        stop(f"cannot load the model {name!r} ({first_line(error)})", status_of(error))
    if loading["missing_keys"]:
        stop(f"the model {name!r} lacks weights: {', '.join(sorted(loading['missing_keys'])[:3])} ...")
    return model


# ----- Records: heft.json, written last into a stage's folder, says what made it: settings, data, parent


def digest(content):
    """16 digits of the SHA-256 of a file (a Path), or of anything else as JSON."""
    if isinstance(content, Path):
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def save(path, content):
    """Write text, or what torch.save makes of the rest, then rename: a reader finds all of it or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    if isinstance(content, str):
        temporary.write_text(content, encoding="utf-8")
    else:
        torch.save(content, temporary)
    temporary.replace(path)


def check_record(record, settings, where):
    """`record`, if these settings, data and weights made it; else a ValueError that says what differs."""
    theirs = record.get("settings") if isinstance(record, dict) else None
    if not isinstance(theirs, dict):
        raise ValueError(f"{where} is no result of this program: move it away, or choose another name")
    other = [f"{k.lower()} {theirs.get(k)!r}, not {v!r}" for k, v in settings.items() if theirs.get(k) != v]
    if other:
        advice = "move it away, or choose another --output-dir, --results-dir or repository"
        raise ValueError(f"{where} was made with {'; '.join(other)}: {advice}")
    return record


def content_of(stage):
    """The hash of the stage's weights, here or on the Hub; None for a stage that is left out."""
    known = stage.settings if stage.record or not stage.hub else stage.hub["settings"]
    return known.get("WEIGHTS", "not trained yet") if stage.epochs else None


def read_record(stage):
    """Hold the stage's folder, so that a second run waits; set `record` if the stage there is finished."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    lock = open(stage.folder / "lock", "w")  # the kernel frees it
    stage.release = lock.close
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another run that works in {stage.folder}", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    if stage.hub and stage.what == "reft" and not (stage.folder / "heft.json").exists():
        for name in (stage.weights.name, "config.json", "heft.json"):
            shutil.copy(huggingface_hub.hf_hub_download(stage.repo, name), stage.folder / name)
    if (stage.folder / "heft.json").exists():
        record = json.loads((stage.folder / "heft.json").read_text())
        stage.record = check_record(record, stage.settings, stage.folder)
        stage.settings["WEIGHTS"] = digest(stage.weights)
        check_record(record, stage.settings, stage.folder)
    elif (checkpoint := stage.folder / "checkpoint.pt").exists():
        found = torch.load(checkpoint, map_location="cpu", weights_only=True)
        check_record(found, stage.settings, checkpoint)


def finish(stage, record):
    """Write the record of a stage whose weights have been saved, last: the stage is finished."""
    stage.settings["WEIGHTS"] = digest(stage.weights)
    stage.record = record | {"settings": stage.settings, "peak_memory_gb": peak_memory()}
    save(stage.folder / "heft.json", json.dumps(stage.record))
    (stage.folder / "checkpoint.pt").unlink(missing_ok=True)


def take_up(settings, base, train_rows, questions):
    """The run's parts and what earlier runs have left of them: (lora, reft, run).

    A stage has epochs, name, folder, settings (what decides its weights), record (if it is finished), repo
    (on the Hub) and hub (the record there). Ends with 0 if all is done, with 2 if something is foreign."""
    versions = {"FORMAT": 2, "BASE_VERSION": base.version, "TRAIN_DATA": digest(train_rows)}
    lora = SimpleNamespace(what="lora", title="stage 1, LoRA", epochs=EPOCHS_LORA, chosen=HF_REPO_LORA)
    reft = SimpleNamespace(what="reft", title="stage 2, LoReFT", epochs=EPOCHS_REFT, chosen=HF_REPO_REFIT)
    run = SimpleNamespace(what="run")
    for part in (lora, reft, run):
        part.name, deciding = run_name(settings, part.what), made_by(settings, part.what)
        # Content counts, not spelling: the versions stand for what BASE_MODEL and DATASET name.
        part.settings = {k: v for k, v in deciding.items() if k not in ("BASE_MODEL", "DATASET")} | versions
        part.folder, part.release = Path(OUTPUT_DIR, part.name), lambda: None
        part.record = part.hub = part.repo = None
    lora.weights = lora.folder / "adapter_model.safetensors"  # the names that PEFT and pyvene give
    reft.weights = reft.folder / f"intkey_layer_{REFT_LAYER}_comp_block_output_unit_pos_nunit_1#0.bin"
    run.settings["VALIDATION_DATA"] = digest(questions)
    run.file = Path(RESULTS_DIR, RESULTS_FILE or f"{run.name}.json").with_suffix(".json")
    stages = [stage for stage in (lora, reft) if stage.epochs]
    try:
        run.result = json.loads(run.file.read_text()) if run.file.exists() else None
        if run.result is not None:
            check_record(run.result, run.settings, run.file)
        if PUSH_TO_HUB and stages:
            ask_hub(stages)
        if run.result and not MERGED_DIR and (not PUSH_TO_HUB or all(stage.hub for stage in stages)):
            print(f"already done: {run.file}; move it away to evaluate again\n{result_line(run.result)}")
            sys.exit(0)
        for folder in (OUTPUT_DIR, RESULTS_DIR):
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                stop(f"cannot write to the folder {folder!r} ({error.strerror})")
        for stage in stages:
            if stage is reft:
                reft.settings["STAGE_1"] = content_of(lora)
            if stage.hub:  # before its parent was known, only the rest could be compared
                check_record(stage.hub, stage.settings, f"the Hub repository {stage.repo}")
            read_record(stage)
            if stage.hub:
                check_record(stage.hub, stage.settings, f"the Hub repository {stage.repo}")
        if run.result:  # it must be of the weights that will be pushed
            weights = {"STAGE_1": content_of(lora), "STAGE_2": content_of(reft)}
            check_record(run.result, run.settings | weights, run.file)
    except (OSError, ValueError) as error:  # files that are missing or damaged, or something else's
        stop(error, status_of(error))
    sandbox = os.environ.get("_CONDOR_SCRATCH_DIR")
    if sandbox and Path(OUTPUT_DIR).resolve().is_relative_to(Path(sandbox).resolve()):
        for path in Path(OUTPUT_DIR).glob("*/checkpoint.pt"):  # sent home, it could overwrite a later one
            if path.parent not in (lora.folder, reft.folder):
                path.unlink()
    return lora, reft, run


# ----- The Hub: asked at the start, so that mistakes are told; filled at the end, when everything is on disk


def ask_hub(stages):
    """Set each stage's `repo`, and `hub`, the record there. A Hub that is down keeps no GPU waiting."""
    if not huggingface_hub.get_token():
        stop("PUSH_TO_HUB needs a token: set HF_TOKEN to one that may write, or give --no-push-to-hub")
    try:
        for stage in stages:
            stage.repo = repo_of(stage)
            stage.hub = hub_record(stage)
        if len({stage.repo for stage in stages}) < len(stages):
            raise ValueError(f"{stage.repo} cannot hold both stages: choose another --hf-repo-refit")
        for stage in stages:
            huggingface_hub.create_repo(stage.repo, private=PRIVATE_REPOS, exist_ok=True)
            huggingface_hub.auth_check(stage.repo, write=True)
    except ValueError:  # a name that the Hub does not allow, or a repository of something else
        raise
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", 0) in (400, 401, 403):
            advice = "set HF_TOKEN to a token that may write there, or give --no-push-to-hub"
            stop(f"the Hub refuses {stage.repo or 'the token'} ({first_line(error)}): {advice}")
        print(f"the Hub does not answer now ({first_line(error)}); it is asked again at the end", flush=True)


def repo_of(stage):
    """The chosen repository, or a name made from the stage's, of the Hub's 96 characters at most."""
    name = stage.chosen or re.sub(r"([-.])[-.]+", r"\1", f"heft-{stage.name}".replace("+", "_"))
    if not stage.chosen and len(name) > 96:
        name = f"{name[:79]}-{digest(name)}"
    huggingface_hub.utils.validate_repo_id(name)
    return name if "/" in name else f"{HF_USER or huggingface_hub.whoami()['name']}/{name}"


def hub_record(stage):
    """The record in the stage's Hub repository; None if it is new or empty, ValueError if it is another's."""
    try:
        files = set(huggingface_hub.list_repo_files(stage.repo)) - {".gitattributes"}
    except RepositoryNotFoundError:
        return None
    if "heft.json" in files:
        record = json.loads(Path(huggingface_hub.hf_hub_download(stage.repo, "heft.json")).read_text())
        return check_record(record, stage.settings, f"the Hub repository {stage.repo}")
    if files:
        raise ValueError(f"the Hub repository {stage.repo} holds something else: choose another, or empty it")
    return None


def push_what_is_missing(model, base, lora, reft, run):
    """Upload what the Hub lacks, each repository in one commit. Returns what failed, as phrases."""
    failed = []
    for stage in (lora, reft):
        if not PUSH_TO_HUB or not stage.epochs or stage.hub:
            continue
        what = "the merged model" if stage is lora else "the LoReFT intervention"
        try:
            for part in (lora, reft):  # the card of one names both
                part.repo = part.repo or (repo_of(part) if part.epochs else None)
            if hub_record(stage):  # another run was here since the start
                continue
            print(f"pushing {what} to {stage.repo}", flush=True)
            # Not in OUTPUT_DIR, which a cluster sends about: base and adapter give the model back in seconds.
            with tempfile.TemporaryDirectory(prefix=".merged-", dir=".") as folder:
                if stage is lora:
                    write_merged(model, base, folder)
                else:
                    shutil.copy(stage.weights, folder)
                    shutil.copy(stage.folder / "config.json", folder)
                save(Path(folder, "heft.json"), json.dumps(stage.record, indent=1))
                save(Path(folder, "README.md"), model_card(stage, what, lora.repo, reft.repo, run))
                huggingface_hub.create_repo(stage.repo, private=PRIVATE_REPOS, exist_ok=True)
                huggingface_hub.upload_folder(repo_id=stage.repo, folder_path=folder, commit_message="HEFT")
        except Exception as error:  # whatever the Hub does, the run is done
            failed.append(f"{what} to {stage.repo or 'the Hub'} ({first_line(error)})")
    return failed


def write_merged(model, base, folder):
    """The merged model in `folder`, with the base model's own tokenizer files as they are."""
    model.save_pretrained(folder)
    names = "tokenizer* special_tokens_map.json added_tokens.json vocab* merges.txt chat_template*".split()
    for path in {path for name in names for path in base.folder.glob(name)}:
        shutil.copy(path, folder)


CARD = """---
base_model: {base}
datasets: [{data}]
license: {licence}
---
# {name}

This is {what} of the run {run}, made from {base} by the reference reproduction of HEFT (arXiv 2509.09801):
{accuracy}.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{model}", dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained("{model}")
prompt = \"\"\"{prompt}\"\"\"
inputs = dict(tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
length = inputs["input_ids"].shape[1]
options = dict(max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id)
{generate}
print(tokenizer.decode(output[0, length:], skip_special_tokens=True))
```

Settings: `{settings}`

The licence of the base model applies to what is derived from it. Llama 2 is licensed under the
LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.
"""
WITHOUT_REFT = "output = model.generate(**inputs, **options)"
WITH_REFT = """from pyreft import ReftModel

reft_model = ReftModel.load("{}", model, from_huggingface_hub=True)
place = dict(unit_locations={{"base": length - 1}}, intervene_on_prompt=True)
_, output = reft_model.generate(inputs, **place, **options)"""


def model_card(stage, what, merged, intervention, run):
    """The README of a pushed repository: `what` it holds, and how to ask the run's model a question."""
    local = {name: Path(name).resolve().name for name in (BASE_MODEL, DATASET) if os.path.isdir(name)}
    values = {"base": local.get(BASE_MODEL, BASE_MODEL), "data": local.get(DATASET, DATASET), "run": run.name}
    values |= {"name": stage.repo.split("/")[-1], "what": what, "model": merged or values["base"]}
    values |= {"settings": json.dumps(stage.settings), "accuracy": result_line(run.result)}
    values["licence"] = "llama2" if "llama-2" in values["base"].lower() else "other"
    values["generate"] = WITH_REFT.format(intervention) if intervention else WITHOUT_REFT
    values["prompt"] = BOOLQ_PROMPT_TMPL % ("Ice is frozen water, and floats.", "is ice made of water")
    return CARD.format(**values)


# ----- Results


def peak_memory():
    """Largest memory this process has held so far, in GB: the GPU's, without one the machine's."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (torch.cuda.max_memory_allocated() if DEVICE == "cuda" else own) / 1e9


def device_name():
    """The GPU's name, or what there is instead."""
    cpu = f"CPU {os.uname().machine}, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if DEVICE == "cuda" else cpu


def write_result(settings, run, lora, reft, questions, texts, seconds):
    """Write the result and the predictions of the run. Returns the result, the paper's five keys first."""
    predictions = [predict(text) for text in texts]
    right = [prediction == row["answer"] for prediction, row in zip(predictions, questions)]
    n, correct = len(right), sum(right)
    records = {"lora": lora.record or lora.hub or {}, "reft": reft.record or {}}
    seconds = {name: record.get("seconds", 0.0) for name, record in records.items()} | {"evaluation": seconds}
    git = ["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    packages = "torch transformers peft pyreft pyvene accelerate datasets huggingface_hub".split()
    result = {
        "lora_epochs": EPOCHS_LORA,
        "reft_epochs": EPOCHS_REFT,
        "num_validation_samples": n,
        "correct_predictions": correct,
        "accuracy": f"{100 * correct / n:.2f}%",
        "confidence_interval_95": wilson(correct, n),
        "unknown_answers": predictions.count("Unknown"),
        "settings": settings | run.settings | {"STAGE_1": content_of(lora), "STAGE_2": content_of(reft)},
        "seconds": seconds | {"total": sum(seconds.values())},
        "device": device_name(),
        "peak_memory_gb": max(peak_memory(), *(r.get("peak_memory_gb", 0) for r in records.values())),
        "versions": {"python": sys.version.split()[0]} | {p: importlib.metadata.version(p) for p in packages},
        "commit": commit or None,  # a cluster job has none
        "script_sha256": hashlib.sha256(SCRIPT.encode()).hexdigest(),
        "loss": {name: record.get("loss", []) for name, record in records.items()},
    }
    columns = {"prediction": predictions, "text": texts}
    columns = {key: [row[key] for row in questions] for key in ("question", "answer")} | columns
    lines = [json.dumps(dict(zip(columns, row)), ensure_ascii=False) for row in zip(*columns.values())]
    save(run.file.with_suffix(".predictions.jsonl"), "\n".join(lines) + "\n")
    save(run.file, json.dumps(result, indent=1) + "\n")  # last: the run is finished
    return result


def result_line(result):
    """The accuracy with its interval in one line."""
    low, high = result["confidence_interval_95"]
    of = f"{result['correct_predictions']:,} of {result['num_validation_samples']:,} correct"
    unknown = f"{result['unknown_answers']} unknown"
    return f"accuracy {result['accuracy']} (95 % interval {low:.2f} to {high:.2f}), {of}, {unknown}"


def last_screen(run, lora, reft, unpushed):
    """What was done, how well, how long it took, where it lies, and what is left to do."""
    trained = " + ".join(f"{n} {s.epochs} epochs" for n, s in (("LoRA", lora), ("LoReFT", reft)) if s.epochs)
    seconds = ", ".join(f"{stage} {value:.1f}" for stage, value in run.result["seconds"].items())
    files = [run.file, run.file.with_suffix(".predictions.jsonl")]
    files += [stage.folder for stage in (lora, reft) if stage.record]
    print(f"\n{run.name}: {trained or 'the base model, untrained'}\n{result_line(run.result)}")
    if run.name in PAPER_ACCURACY and not SMOKE:
        print(f"paper    {PAPER_ACCURACY[run.name]:.2f}%")
    print(f"seconds  {seconds}; peak memory {run.result['peak_memory_gb']:.1f} GB")
    print(f"files    {', '.join(map(str, files))}", flush=True)
    for item in unpushed:
        later = f"all is on disk, and this pushes it later: {shlex.join(['python', *sys.argv])}"
        tqdm.write(f"heft: error: not pushed: {item}; {later}", file=sys.stderr)


if __name__ == "__main__":
    main()
