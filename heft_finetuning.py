"""HEFT: fine-tune Llama-2-7b-chat on BoolQ with LoRA, merge, refine with LoReFT, evaluate.

The reference reproduction of "HEFT: A Coarse-to-Fine Hierarchy for Enhancing the Efficiency
and Accuracy of Language Model Reasoning" (arXiv 2509.09801), one experiment from top to bottom.

    python heft_finetuning.py --smoke                           # tiny embedded model, CPU, offline
    python heft_finetuning.py --no-push-to-hub                  # the paper's main run: LoRA 3 + LoReFT 3 epochs
    python heft_finetuning.py --epochs-lora 20 --epochs-reft 0  # Table 1, LoRA-only
    python heft_finetuning.py --epochs-lora 0 --epochs-reft 20  # Table 1, ReFT-only
    python heft_finetuning.py --epochs-lora 20 --epochs-reft 20 # Table 1, the longest run
    condor_submit heft.sub                                      # the same on a GPU cluster

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
SEED = 42                  # of the starting weights, the order of the examples and the dropout
DTYPE = "bfloat16"         # of the model's weights: bfloat16 or float32
# Stage 1, LoRA
LORA_RANK = 8              # rank of the update
LORA_ALPHA = 32            # the update is scaled by alpha / rank
LORA_DROPOUT = 0.05        # on the input of the update, 0 to below 1
LORA_TARGETS = ""          # "" is PEFT's default (q_proj, v_proj), the paper's code; all-linear is the paper's text
LEARNING_RATE_LORA = 2e-4  # at the first step; falls linearly to 0
# Stage 2, LoReFT
REFT_LAYER = 15            # the block, counted from 0, whose output is edited
REFT_RANK = 4              # dimension of the edited subspace
LEARNING_RATE_REFT = 2e-4  # at the first step; falls linearly to 0
# Both stages
EXAMPLES_PER_STEP = 32     # examples per optimizer step
MAX_LENGTH = 2048          # tokens; what is longer is cut in training
TOKENS_PER_MICROBATCH = 2048  # memory knob (rows x longest row); changes results by rounding only
# Evaluation
MAX_NEW_TOKENS = 5         # tokens generated per question, greedily
# Output
PUSH_TO_HUB = True         # upload the merged model and the LoReFT intervention
PRIVATE_REPOS = True       # Hub repositories made here are private
HF_USER = ""               # owner of the repositories; "" is the token's owner
HF_REPO_LORA = ""          # repository of the merged model; "" is heft-<name of stage 1>
HF_REPO_REFIT = ""         # repository of the LoReFT intervention; "" is heft-<name of the run>
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
import platform
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
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds: a job may be told to go at any time, and all that is done is on disk
    signal.signal(signal.SIGTERM, lambda *_: (os.write(2, b"\nstopped by SIGTERM; the same command continues\n"), sys.exit(85)))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads cost tenfold where cores are shared
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

warnings.filterwarnings("ignore", category=FutureWarning)

import datasets
import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback

with contextlib.redirect_stdout(None):  # it advertises a package that is not needed here
    from pyreft import LoreftIntervention, ReftConfig, get_reft_model
from pyvene.models.intervenable_modelcard import type_to_module_mapping

IGNORE = -100  # label of a token without loss
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the scheduler's CUDA_VISIBLE_DEVICES is left alone
HERE = Path(__file__).resolve().parent

# The paper's value of each setting that changes the experiment; one that differs becomes a part of the run's name.
PAPER_VALUES = dict(BASE_MODEL="meta-llama/Llama-2-7b-chat-hf", DATASET="google/boolq",
                    LORA_RANK=8, LORA_ALPHA=32, LORA_DROPOUT=0.05, LORA_TARGETS="", LEARNING_RATE_LORA=2e-4,
                    REFT_LAYER=15, REFT_RANK=4, LEARNING_RATE_REFT=2e-4,
                    EXAMPLES_PER_STEP=32, MAX_LENGTH=2048, MAX_NEW_TOKENS=5, DTYPE="bfloat16", SEED=42)

# What --smoke changes: the same script on the embedded toy, which needs larger steps.
SMOKE_VALUES = dict(BASE_MODEL=os.path.relpath(HERE / "smoke/model"), DATASET=os.path.relpath(HERE / "smoke/data"), DTYPE="float32",
                    LEARNING_RATE_LORA=9e-4, LEARNING_RATE_REFT=1e-3,
                    PUSH_TO_HUB=False, OUTPUT_DIR="output/smoke", RESULTS_DIR="results/smoke")


# ---------------------------------------------------------------------------------------------
# Settings, names and files


def stop(message, status=2):
    """End the program with one line on stderr; status 2 is a mistake that the user can mend."""
    tqdm.write(f"heft: error: {' '.join(str(message).split())}", file=sys.stderr)  # on a line of its own, beside a progress bar, too
    sys.exit(status)


def first_line(error):
    """The first line of an exception's message: libraries add pages of advice."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}" if str(error).strip() else type(error).__name__


def read_settings(arguments=None):
    """The constants above, overridden by the flags in `arguments` (default: the command line), as a dict; checked."""
    meaning = dict(re.findall(r"^([A-Z_]+) = .*?# (.+)$", Path(__file__).read_text(), re.M))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = stop
    parser.add_argument("--smoke", action="store_true", help="the embedded tiny model and data on the CPU, no Hub")
    kinds = {name: type(value) for name, value in PAPER_VALUES.items()}  # not of the constants, which may be edited wrongly
    kinds |= dict.fromkeys(["EPOCHS_LORA", "EPOCHS_REFT", "TOKENS_PER_MICROBATCH"], int) | dict.fromkeys(["PUSH_TO_HUB", "PRIVATE_REPOS"], bool)
    for name in SETTINGS:
        value, flag = globals()[name], "--" + name.lower().replace("_", "-")
        if kinds.get(name) is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value, help=meaning[name])
        else:
            parser.add_argument(flag, metavar=name, default=value, type=kinds.get(name, str),
                                help=f"{meaning[name]} (default: {value!r})".replace("%", "%%"))
    if "--smoke" in (sys.argv[1:] if arguments is None else arguments):
        parser.set_defaults(**{name.lower(): value for name, value in SMOKE_VALUES.items()})
    parsed = parser.parse_args(arguments)
    settings = {name: getattr(parsed, name.lower()) for name in SETTINGS} | {"SMOKE": parsed.smoke}

    for name, value in settings.items():
        flag, kind = "--" + name.lower().replace("_", "-"), kinds.get(name, bool if name == "SMOKE" else str)
        if not isinstance(value, (int, float) if kind is float else kind):
            stop(f"{flag} must be of type {kind.__name__}, not {value!r}")
        if kind in (int, float):
            may_be_0 = name in ("EPOCHS_LORA", "EPOCHS_REFT", "SEED", "REFT_LAYER", "LORA_DROPOUT")
            lowest = 0 if may_be_0 else 1 if kind is int else sys.float_info.min
            below = 1 if name == "LORA_DROPOUT" else 2**32 if name == "SEED" else math.inf
            if not lowest <= value < below:
                stop(f"{flag} must be {f'from {lowest}' if kind is int or may_be_0 else 'above 0'}"
                     f"{f' to below {below}' if below < math.inf else ' and finite'}, not {value}")
        elif isinstance(value, str) and not value.strip() and name in ("BASE_MODEL", "DATASET", "OUTPUT_DIR", "RESULTS_DIR"):
            stop(f"{flag} must not be empty")
    if settings["DTYPE"] not in ("bfloat16", "float32"):
        stop(f"--dtype must be bfloat16 or float32, not {settings['DTYPE']}")
    if Path(settings["RESULTS_FILE"]).name != settings["RESULTS_FILE"] or Path(settings["RESULTS_FILE"]).suffix not in ("", ".json"):
        stop(f"--results-file must be a file name that ends in .json, without a folder (--results-dir names that), not {settings['RESULTS_FILE']}")
    return settings


def made_by(settings, stage_1_only=False):
    """The settings that decide the outcome of the run, or of its stage 1, alone."""
    without = [] if settings["EPOCHS_LORA"] else ["LORA"]
    without += ["REFT", "MAX_NEW"] if stage_1_only else [] if settings["EPOCHS_REFT"] else ["REFT"]
    names = ["EPOCHS_LORA"] + ["EPOCHS_REFT"] * (not stage_1_only) + [n for n in PAPER_VALUES if not any(w in n for w in without)]
    return {name: settings[name] for name in names}


def run_name(settings, stage_1_only=False):
    """`lora3-reft3`, or `lora3` for stage 1 alone, and one part for each setting that differs from the paper's
    (in a smoke run: from the smoke run's), such as `lora3-reft3-reft_layer10-seed7`."""
    usual = PAPER_VALUES | (SMOKE_VALUES if settings["SMOKE"] else {})
    parts = [f"lora{settings['EPOCHS_LORA']}"] + [f"reft{settings['EPOCHS_REFT']}"] * (not stage_1_only)
    for name, value in made_by(settings, stage_1_only).items():
        if name in usual and value != usual[name]:
            text = "_" + os.path.basename(value.rstrip("/")) if isinstance(value, str) else f"{value:.10g}"
            parts.append(name.lower() + re.sub(r"[^A-Za-z0-9._+]+", "_", text))
    return "-".join(parts)


def write_file(path, text):
    """Write `text` under a temporary name, then rename: a reader finds the whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(folder, settings):
    """`heft.json`, the record that is written last into a finished folder, or None; one made by other settings is refused."""
    if not (folder / "heft.json").exists():
        return None
    record = json.loads((folder / "heft.json").read_text())
    refuse_other(record["settings"], settings, folder)
    return record


def refuse_other(theirs, ours, where):
    """Stop if an artefact was made by other settings than this run's."""
    if theirs != ours:
        other = [f"{k.lower()} {theirs.get(k)!r}, not {ours.get(k)!r}" for k in ours | theirs if theirs.get(k) != ours.get(k)]
        stop(f"{where} was made with {'; '.join(other)}: move it away, or choose another --output-dir, --results-dir or repository")


def lock(folder):
    """Make `folder` and hold it for this process, so that a second run of the same name waits; freed by the kernel."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another run that works in {folder}", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def explain(kind, error, trace):
    """`sys.excepthook`: one line for what is no bug, a traceback for what is."""
    try:
        if issubclass(kind, KeyboardInterrupt):
            stop("interrupted; the same command continues", 130)
        if issubclass(kind, torch.OutOfMemoryError):
            stop("the GPU's memory is full: the same command with a lower --tokens-per-microbatch continues", 1)
        full = re.search("No space left|file write failed|os error 28|unexpected pos", str(error))  # not all writers give an errno
        if full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            stop("the disk is full: make room, then the same command continues from the last checkpoint", 1)
    except SystemExit:
        return
    sys.__excepthook__(kind, error, trace)


# ---------------------------------------------------------------------------------------------
# BoolQ as prompts (paper, appendix)

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
    return {"prompt": BOOLQ_PROMPT_TMPL % (example["passage"], example["question"]),
            "answer": "Yes" if example["answer"] else "No"}


def load_boolq(name, split):
    """The questions of a split, as prompts and answers, in the data's order."""
    try:
        rows = datasets.load_dataset(name, split=split)
    except datasets.exceptions.DatasetGenerationError:
        stop(f"cannot read the {split} split of the dataset {name!r}: a file is damaged, or not all have the fields question, passage, answer")
    except Exception as error:  # missing, unreachable, no such split: a dozen types
        stop(f"cannot read the {split} split of the dataset {name!r} ({first_line(error)}): "
             "--dataset takes a Hub name or a folder with train and validation files")
    wanted = {"question": "string", "passage": "string", "answer": "bool"}
    found = {field: str(feature.dtype).replace("large_", "") for field, feature in rows.features.items() if hasattr(feature, "dtype")}
    if missing := [f"{field} ({dtype})" for field, dtype in wanted.items() if found.get(field) != dtype]:
        stop(f"the {split} split of the dataset {name!r} lacks {', '.join(missing)}; it has {found}")
    if len(rows) == 0:
        stop(f"the {split} split of the dataset {name!r} has no rows")
    rows = rows.select_columns(list(wanted)).to_list()
    if broken := [number for number, row in enumerate(rows, 1) if None in row.values()]:
        stop(f"the {split} split of the dataset {name!r} has no question, passage or answer in row {broken[0]}")
    return [format_boolq(row) | {"question": row["question"]} for row in rows]


def tokens_after_prompt(tokenizer, text):
    """Token ids of `text` where it follows a prompt; every prompt ends alike, so they need finding once only."""
    prompt = BOOLQ_PROMPT_TMPL % ("", "")
    before, whole = tokenizer([prompt, prompt + text])["input_ids"]
    assert whole[:len(before)] == before, f"{text!r} changes the tokens of the prompt before it"
    return whole[len(before):]


# ---------------------------------------------------------------------------------------------
# Training: one step is EXAMPLES_PER_STEP examples, in micro-batches that hold little padding


def microbatches(lengths, tokens):
    """Positions in `lengths`, from short to long, in groups of at most `tokens` (rows x longest row); a longer row goes alone."""
    groups = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def collate(examples):
    """The examples of a step (dicts of token lists) as micro-batches (dicts of right-padded (rows, columns) tensors).
    Causal attention never looks right, so right padding needs no mask."""
    lengths = [len(example.get("prefix", [])) + len(example["input_ids"]) for example in examples]
    return [{key: pad_sequence([torch.tensor(examples[i][key]) for i in group], batch_first=True, padding_value=IGNORE if key == "labels" else 0)
             for key in examples[0]} for group in microbatches(lengths, TOKENS_PER_MICROBATCH)]


def example_losses(logits, labels):
    """Mean token loss of each example: (rows, columns, words) and (rows, columns) to (rows,)."""
    labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)  # column t predicts token t + 1
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view_as(labels).sum(1) / (labels != IGNORE).sum(1)


class StepTrainer(Trainer):
    """A Trainer whose batch is one optimizer step: a list of micro-batches."""

    def training_step(self, model, batch, num_items_in_batch=None):
        """Gradient of the mean over the step's examples of each example's mean token loss, as transformers 4.45
        gave it; the Trainer of today would weight by tokens. Returns that mean."""
        model.train()
        examples, total = sum(len(rows["labels"]) for rows in batch), 0
        for rows in batch:
            loss = self.losses_of(rows).sum() / examples
            loss.backward()
            total += loss.detach()
        if not torch.isfinite(total):
            stop(f"the loss is {total.item()} at step {self.state.global_step + 1}: lower the learning rate, or try --dtype float32", 1)
        return total


class StepCallback(ProgressCallback):
    """A progress bar with the loss; checkpoints that name their settings; a clean end on SIGTERM.
    (The Trainer's `enable_jit_checkpoint` waits 3 s, then saves before the step's loss is recorded.)"""

    def __init__(self, settings, seconds_before):
        super().__init__()
        self.settings, self.started, self.stopping = settings, time.time() - seconds_before, False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.stopping:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):  # the last file of a checkpoint: without it, it is torn
        record = {"settings": self.settings, "seconds": time.time() - self.started}
        write_file(Path(args.output_dir, f"checkpoint-{state.global_step}", "heft.json"), json.dumps(record))


def train(model, losses_of, examples, epochs, learning_rate, folder, settings):
    """Train the parameters of `model` that require a gradient, from the last checkpoint in `folder` if there is one.

    losses_of: function from a micro-batch (dict of (rows, columns) tensors) to its rows' losses (rows,).
    examples: list of dicts of token lists. Returns {"loss": [one per step], "seconds": of all attempts together}.
    AdamW, linear decay to 0 without warm-up, gradient clip 1.0. Exits with 85 after a SIGTERM."""
    checkpoint, seconds_before = None, 0
    for found in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        if record := read_record(found, settings):
            checkpoint, seconds_before = str(found), record["seconds"]
        else:
            shutil.rmtree(found)  # torn: the process died while writing it
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=EXAMPLES_PER_STEP,
        learning_rate=learning_rate, lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
        save_strategy="steps", save_steps=math.ceil(len(examples) / EXAMPLES_PER_STEP), save_total_limit=2,  # each epoch's end
        logging_steps=1, logging_nan_inf_filter=False, disable_tqdm=False, report_to="none", seed=SEED, data_seed=SEED,
        remove_unused_columns=False, label_names=["labels"], use_cpu=DEVICE == "cpu", dataloader_pin_memory=DEVICE != "cpu")
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one GPU, whatever is there: more would multiply the examples per step
    trainer = StepTrainer(model=model, args=arguments, train_dataset=examples, data_collator=collate)
    trainer.losses_of = losses_of
    callback = StepCallback(settings, seconds_before)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(callback)
    if checkpoint:
        print(f"resuming from {checkpoint}", flush=True)
    at_once = signal.signal(signal.SIGTERM, lambda *_: setattr(callback, "stopping", True))
    trainer.train(resume_from_checkpoint=checkpoint)
    signal.signal(signal.SIGTERM, at_once)
    if trainer.state.global_step < trainer.state.max_steps:
        print(f"stopped by SIGTERM at step {trainer.state.global_step} of {trainer.state.max_steps}; the same command continues", flush=True)
        sys.exit(85)
    return {"loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], "seconds": time.time() - callback.started}


# ---------------------------------------------------------------------------------------------
# Evaluation (paper, section 4)


def predict(text):
    """"Yes", "No" or "Unknown" (counts as wrong) from a generated text, by the paper's rule."""
    return "Yes" if "Yes" in text else "No" if "No" in text else "Unknown"


def wilson(correct, n):
    """95 % interval of an accuracy, in percent (Wilson 1927)."""
    z, share = 1.959963984540054, correct / n
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [max(0.0, 100 * (centre - half) / (1 + z * z / n)), min(100.0, 100 * (centre + half) / (1 + z * z / n))]


# ---------------------------------------------------------------------------------------------
# Models and the Hub


def load_model(name):
    """The causal language model `name` (folder or Hub), for inference, on the device; safetensors only, no remote code."""
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, DTYPE), device_map=DEVICE, use_safetensors=True, output_loading_info=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing, torn or foreign file: a dozen types
        stop(f"cannot load the model {name!r} ({first_line(error)})")
    if loading["missing_keys"]:
        stop(f"the model {name!r} lacks weights: {', '.join(sorted(loading['missing_keys'])[:3])} ...")
    return model.eval()


def model_version(name):
    """Which weights `name` stands for now: the Hub's commit, or a hash over both ends of a folder's weight files."""
    if not os.path.isdir(name):
        return Path(huggingface_hub.try_to_load_from_cache(name, "config.json")).parent.name
    digest = hashlib.sha256()
    for path in sorted(Path(name).glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def peak_memory():
    """Largest memory this process has held so far, in GB: the GPU's, without one the machine's."""
    return (torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9


def hub_repo(chosen, name):
    """`chosen`, with its owner, or a name made from the run's."""
    chosen = chosen or f"heft-{name}"
    return chosen if "/" in chosen else f"{HF_USER or huggingface_hub.whoami()['name']}/{chosen}"


def hub_record(repo, settings):
    """The record in a Hub repository that these settings made, None if there is none; one by other settings is refused."""
    try:
        record = json.loads(Path(huggingface_hub.hf_hub_download(repo, "heft.json")).read_text())
    except (RepositoryNotFoundError, RemoteEntryNotFoundError):
        return None
    refuse_other(record["settings"], settings, f"the Hub repository {repo}")
    return record


def push(folder, repo, record, files):
    """Upload `files` of `folder`, with `record` and a model card, in one commit: a reader finds all of it or nothing."""
    write_file(folder / "heft.json", json.dumps(record, indent=1))
    write_file(folder / "README.md", model_card(repo, record))
    huggingface_hub.create_repo(repo, private=PRIVATE_REPOS, exist_ok=True)
    huggingface_hub.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=[*files, "heft.json", "README.md"], commit_message="HEFT")


def model_card(repo, record):
    """The README of a pushed repository."""
    base, data = (name if not os.path.isdir(name) else os.path.basename(os.path.abspath(name)) for name in (BASE_MODEL, DATASET))
    result = "\n".join(f"- {key}: {value}" for key, value in record.get("result", {}).items())
    return f"""---
base_model: {base}
datasets: [{data}]
license: {'llama2' if 'llama-2' in base.lower() else 'other'}
---
# {repo.split("/")[-1]}

{record["content"]}, made from {base} by the reference reproduction of HEFT (arXiv 2509.09801).

{result or "Accuracy: see the repositories of the LoReFT interventions that build on it."}

Settings: `{json.dumps(record["settings"])}`

The licence of the base model applies to what is derived from it. Llama 2 is licensed under the
LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.
"""


def table_row(name, result, paper=None):
    """One row of Table 1 in Markdown: run, epochs, correct of all, accuracy, 95 % interval, unknown answers, time, paper."""
    low, high = result["confidence_interval_95"]
    minutes = round(result["seconds"]["total"] / 60)
    return (f"| {name} | {result['lora_epochs']} | {result['reft_epochs']} | {result['correct_predictions']} of {result['num_validation_samples']} "
            f"| {result['accuracy']} | {low:.2f} to {high:.2f} | {result['unknown_answers']} | {minutes // 60}:{minutes % 60:02d} | {paper or ''} |")


TABLE_HEAD = """| run | LoRA epochs | ReFT epochs | correct | accuracy | 95 % interval | unknown | time h:mm | paper |
|---|---|---|---|---|---|---|---|---|"""


if __name__ == "__main__":
    # ---------------------------------------------------------------------------------------------
    # Checks: every mistake is told before the first minute of training
    sys.excepthook = explain
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it has to say is told by load_boolq
    huggingface_hub.get_session().timeout = 60  # seconds; by default a stalled Hub is waited for for ever
    settings = read_settings()
    globals().update(settings)
    if SMOKE:
        DEVICE = "cpu"

    train_rows = load_boolq(DATASET, "train") if EPOCHS_LORA or EPOCHS_REFT else []
    validation_rows = load_boolq(DATASET, "validation")
    try:
        config = AutoConfig.from_pretrained(BASE_MODEL)
        tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL, padding_side="left")  # evaluation's; training pads by itself
        with torch.device("meta"):  # the model without its weights
            skeleton = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPE))
        targets = LORA_TARGETS if LORA_TARGETS == "all-linear" else LORA_TARGETS.split(",") if LORA_TARGETS else None
        lora_config = LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT, target_modules=targets)
        parameters, blocks = skeleton.num_parameters(), config.num_hidden_layers
        weights_bytes = parameters * skeleton.dtype.itemsize
        if EPOCHS_LORA:
            get_peft_model(skeleton, lora_config)
    except Exception as error:
        if "gated" in str(error).lower() or "403" in str(error) or "401" in str(error):
            stop(f"no access to {BASE_MODEL}: ask for it at https://huggingface.co/{BASE_MODEL}, then set HF_TOKEN to a token of that account "
                 f"({'a token is set' if huggingface_hub.get_token() else 'no token is set'})")
        stop(f"cannot use the model {BASE_MODEL!r} ({first_line(error)}): "
             "--base-model takes a Hub name or a folder, --lora-targets names of its layers")
    if os.path.isdir(BASE_MODEL) and not list(Path(BASE_MODEL).glob("*.safetensors")):
        stop(f"the folder {BASE_MODEL!r} holds no weights in safetensors form")
    if tokenizer.eos_token is None:
        stop(f"the tokenizer of {BASE_MODEL!r} has no end-of-sequence token")
    if EPOCHS_REFT and type(skeleton) not in type_to_module_mapping:
        stop(f"pyvene cannot intervene in a {type(skeleton).__name__}: choose a Llama model, or --epochs-reft 0")
    if EPOCHS_REFT and REFT_LAYER >= blocks:
        stop(f"--reft-layer {REFT_LAYER}: the blocks of {BASE_MODEL!r} are 0 to {blocks - 1}")
    if DEVICE == "cpu" and weights_bytes > 4e9:
        stop(f"no GPU found, and {BASE_MODEL!r} has {weights_bytes / 1e9:.1f} GB of weights: use a machine with a GPU of 32 GB or more "
             "(condor_submit heft.sub), or try --smoke")
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 1.2 * weights_bytes:
        stop(f"{BASE_MODEL!r} needs at least {1.2 * weights_bytes / 1e9:.0f} GB of GPU memory, and {torch.cuda.mem_get_info()[0] / 1e9:.0f} GB are free "
             f"on {torch.cuda.get_device_name()}")

    # What decides the outcome, and the names that follow from it
    settings["BASE_VERSION"] = model_version(BASE_MODEL)
    for split, rows in {"TRAIN_DATA": train_rows, "VALIDATION_DATA": validation_rows}.items():
        settings[split] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    lora_made_by = made_by(settings, stage_1_only=True) | {k: settings[k] for k in ("BASE_VERSION", "TRAIN_DATA")}
    run_made_by = made_by(settings) | {k: settings[k] for k in ("BASE_VERSION", "TRAIN_DATA", "VALIDATION_DATA")}
    name, lora_name = run_name(settings), run_name(settings, stage_1_only=True)
    lora_dir, run_dir = Path(OUTPUT_DIR, lora_name), Path(OUTPUT_DIR, name)
    result_file = Path(RESULTS_DIR, RESULTS_FILE or f"{name}.json").with_suffix(".json")

    gigabytes = {OUTPUT_DIR: weights_bytes / 32e9, RESULTS_DIR: 0.01}  # what each folder must take
    if PUSH_TO_HUB and EPOCHS_LORA:
        gigabytes["."] = weights_bytes / 1e9
    if MERGED_DIR:
        gigabytes[MERGED_DIR] = weights_bytes / 1e9
    if not os.path.isdir(BASE_MODEL) and not isinstance(huggingface_hub.try_to_load_from_cache(BASE_MODEL, "model.safetensors.index.json"), str):
        gigabytes[huggingface_hub.constants.HF_HUB_CACHE] = weights_bytes / 1e9
    for folder, size in gigabytes.items():
        there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            stop(f"cannot write to the folder {folder!r}")
        if shutil.disk_usage(there).free < size * 1e9:
            stop(f"the disk of {folder!r} needs {size:.1f} GB of free room and has {shutil.disk_usage(there).free / 1e9:.1f} GB")

    old_result = None
    if result_file.exists():
        try:
            old_result = json.loads(result_file.read_text())
            refuse_other({key: old_result["settings"].get(key) for key in run_made_by}, run_made_by, result_file)
        except (ValueError, KeyError, AttributeError, TypeError):
            stop(f"{result_file} is no result of this program: move it away, or choose another --results-file")

    lora_repo = reft_repo = lora_on_hub = reft_on_hub = None
    unpushed = []  # what the Hub did not take, told at the end
    if PUSH_TO_HUB and (EPOCHS_LORA or EPOCHS_REFT):
        if not huggingface_hub.get_token():
            stop("PUSH_TO_HUB needs a token: set HF_TOKEN to one that may write, or give --no-push-to-hub")
        try:
            lora_repo = hub_repo(HF_REPO_LORA, lora_name) if EPOCHS_LORA else None
            reft_repo = hub_repo(HF_REPO_REFIT, name) if EPOCHS_REFT else None
            lora_on_hub = lora_repo and hub_record(lora_repo, lora_made_by)
            reft_on_hub = reft_repo and hub_record(reft_repo, run_made_by)
            for repo in filter(None, [lora_repo, reft_repo]):
                huggingface_hub.create_repo(repo, private=PRIVATE_REPOS, exist_ok=True)
                huggingface_hub.auth_check(repo, write=True)
        except Exception as error:  # a Hub that is down now must not keep a GPU waiting: the upload is tried again later
            if isinstance(error, HfHubHTTPError) and error.response.status_code in (400, 401, 403):
                stop(f"the Hub refuses {lora_repo or reft_repo or 'the token'} ({first_line(error)}): "
                     "set HF_TOKEN to a token that may write there, or give --no-push-to-hub")
            print(f"the Hub does not answer now ({first_line(error)}); training goes on, and uploads are tried as they come", flush=True)
    to_push = PUSH_TO_HUB and (EPOCHS_LORA and not lora_on_hub or EPOCHS_REFT and not reft_on_hub)
    if old_result and not to_push:
        print(f"already done: {result_file}; move it away to evaluate again\n\n{TABLE_HEAD}\n{table_row(name, old_result)}")
        sys.exit(0)

    run_lock, lora_lock = lock(run_dir), lock(lora_dir) if EPOCHS_LORA else None
    Path(RESULTS_DIR).mkdir(parents=True, exist_ok=True)
    lora_record = read_record(lora_dir, lora_made_by) if EPOCHS_LORA else None
    reft_record = read_record(run_dir, run_made_by) if EPOCHS_REFT else None

    # ---------------------------------------------------------------------------------------------
    # BoolQ as tokens; each prompt is tokenized once
    def to_tokens(rows):
        return tokenizer([row["prompt"] for row in rows])["input_ids"] if rows else []

    train_prompts, validation_prompts = to_tokens(train_rows), to_tokens(validation_rows)
    # The paper's text ends in " Yes" in stage 1 and in "Yes" in stage 2; both add the end-of-sequence token.
    endings = {text: tokens_after_prompt(tokenizer, text + tokenizer.eos_token) for text in (" Yes", " No", "Yes", "No")}
    # All prompts begin with the same instruction: stage 2 computes it once. At least one token of each is left for the prefix.
    start = os.path.commonprefix([prompt[:-2] for prompt in train_prompts])
    lora_examples, reft_examples = [], []
    for row, prompt in zip(train_rows, train_prompts):
        tokens = (prompt + endings[" " + row["answer"]])[:MAX_LENGTH]
        # The loss is over the whole text. The paper pads with the end-of-sequence token and so masks the real one, too.
        lora_examples.append({"input_ids": tokens, "labels": [IGNORE if token == tokenizer.eos_token_id else token for token in tokens]})
        tokens = endings[row["answer"]]
        if len(prompt) + len(tokens) <= MAX_LENGTH:  # cut, its answer would be gone
            # All before the last prompt token is the prefix, here without the common start; the loss is on the answer and its end only.
            reft_examples.append({"prefix": prompt[len(start):-1], "prefix_mask": [1] * len(prompt[:-1]),
                                  "input_ids": prompt[-1:] + tokens, "labels": [IGNORE] + tokens})
    if EPOCHS_REFT and not reft_examples:
        stop(f"no training example fits into --max-length {MAX_LENGTH}")
    print(f"run {name} on {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'the CPU'}: {BASE_MODEL}, {DTYPE}, {parameters:,} parameters\n"
          f"{len(train_rows):,} training examples, {sum(map(len, train_prompts)):,} prompt tokens"
          f"{f' ({len(train_rows) - len(reft_examples)} too long for stage 2)' if len(reft_examples) < len(train_rows) else ''}, "
          f"{math.ceil(len(lora_examples) / EXAMPLES_PER_STEP)} steps per epoch; {len(validation_rows):,} validation questions", flush=True)

    # ---------------------------------------------------------------------------------------------
    # Stage 1: LoRA (paper, section 3.2)
    seconds = {"lora": 0.0, "merge": 0.0, "reft": 0.0, "evaluation": 0.0}
    started = time.time()
    if lora_on_hub and not lora_record:
        print(f"stage 1 is finished in {lora_repo}", flush=True)
        model, lora_record = load_model(lora_repo), lora_on_hub
    elif EPOCHS_LORA:
        model = load_model(BASE_MODEL)
        if lora_record:
            print(f"stage 1 is finished in {lora_dir}", flush=True)
            model = PeftModel.from_pretrained(model, lora_dir)
        else:
            set_seed(SEED)  # directly before the weights are drawn: they depend on the seed alone
            model = get_peft_model(model, lora_config)
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            if (config.model_type, config.hidden_size, blocks, LORA_RANK, LORA_TARGETS) == ("llama", 4096, 32, 8, ""):
                assert trainable == 4_194_304, f"LoRA on the 7B model trains 4,194,304 parameters, not {trainable:,}"
            print(f"\nstage 1, LoRA: {trainable:,} trainable parameters, {EPOCHS_LORA} epochs", flush=True)

            def lora_losses(rows):
                return example_losses(model(input_ids=rows["input_ids"]).logits, rows["labels"])

            started = time.time()
            lora_record = train(model, lora_losses, lora_examples, EPOCHS_LORA, LEARNING_RATE_LORA, lora_dir, lora_made_by)
            model.save_pretrained(lora_dir)
            lora_record |= {"content": "Merged model of stage 1 (LoRA)", "settings": lora_made_by, "peak_memory_gb": peak_memory()}
            write_file(lora_dir / "heft.json", json.dumps(lora_record))  # last: the stage is finished
            for checkpoint in lora_dir.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            started = time.time()

        # -----------------------------------------------------------------------------------------
        # Merge, in the model's dtype as in the paper, and push
        model = model.merge_and_unload().eval()
    else:
        model = load_model(BASE_MODEL)
    seconds["lora"] = lora_record["seconds"] if EPOCHS_LORA else 0.0
    seconds["merge"] = time.time() - started
    if lora_lock:
        lora_lock.close()
    if MERGED_DIR or (PUSH_TO_HUB and EPOCHS_LORA and not lora_on_hub):
        # Not in OUTPUT_DIR, which a cluster sends back and forth, and not kept: base and adapter give it back in seconds.
        folder = Path(MERGED_DIR or tempfile.mkdtemp(prefix=".merged-", dir="."))
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if PUSH_TO_HUB and EPOCHS_LORA and not lora_on_hub:
                lora_repo = lora_repo or hub_repo(HF_REPO_LORA, lora_name)
                print(f"pushing the merged model to {lora_repo}", flush=True)
                push(folder, lora_repo, lora_record, ["*.safetensors", "*.json", "tokenizer*"])
        except Exception as error:  # whatever the Hub does, the run goes on
            unpushed.append(f"the merged model to {lora_repo or 'the Hub'} ({first_line(error)})")
        finally:
            if not MERGED_DIR:
                shutil.rmtree(folder)

    # ---------------------------------------------------------------------------------------------
    # Stage 2: LoReFT on the merged, frozen model, at the last prompt token (paper, section 3.3)
    if EPOCHS_REFT:
        model.requires_grad_(False)
        set_seed(SEED)  # directly before the weights are drawn: they depend on the seed alone
        intervention = LoreftIntervention(embed_dim=config.hidden_size, low_rank_dimension=REFT_RANK, dtype=model.dtype)
        rotation = intervention.rotate_layer.parametrizations.weight[0]
        rotation.base = rotation.base.contiguous()  # or it cannot be saved
        reft_model = get_reft_model(model, ReftConfig(representations={
            "layer": REFT_LAYER, "component": "block_output", "low_rank_dimension": REFT_RANK, "intervention": intervention}))
        if not reft_record:
            trainable = sum(p.numel() for p in intervention.parameters())
            assert trainable == REFT_RANK * (2 * config.hidden_size + 1)  # R, W and b; 32,772 on the 7B model
            print(f"\nstage 2, LoReFT at block {REFT_LAYER}: {trainable:,} trainable parameters, {EPOCHS_REFT} epochs", flush=True)

            with torch.no_grad():  # what comes before the intervention is constant: its keys and values need no gradient
                start_cache = model.base_model(input_ids=torch.tensor([start], device=DEVICE), use_cache=True).past_key_values

            def reft_losses(rows):
                with torch.no_grad():
                    prefix = copy.deepcopy(start_cache)
                    prefix.batch_repeat_interleave(len(rows["prefix"]))
                    model.base_model(input_ids=rows["prefix"], past_key_values=prefix)
                position = rows["prefix_mask"].sum(1, keepdim=True) + torch.arange(rows["input_ids"].shape[1], device=DEVICE)
                mask = torch.cat([rows["prefix_mask"], torch.ones_like(rows["input_ids"])], 1)
                inputs = {"input_ids": rows["input_ids"], "attention_mask": mask, "position_ids": position, "past_key_values": prefix}
                _, output = reft_model(inputs, unit_locations={"base": 0})
                return example_losses(output.logits, rows["labels"])

            # A list of the parts, because the intervention's own state_dict is lossy: training would resume elsewhere.
            parts = torch.nn.ModuleList([intervention.rotate_layer, intervention.learned_source])
            reft_record = train(parts, reft_losses, reft_examples, EPOCHS_REFT, LEARNING_RATE_REFT, run_dir, run_made_by)
            reft_model.set_device("cpu", set_model=False)  # a file that loads without a GPU
            with contextlib.redirect_stdout(None):
                reft_model.save(run_dir)
            reft_record |= {"content": "LoReFT intervention of stage 2, for pyreft.ReftModel.load on the merged model of stage 1",
                            "settings": run_made_by, "peak_memory_gb": peak_memory()}
            write_file(run_dir / "heft.json", json.dumps(reft_record))  # last: the stage is finished
            for checkpoint in run_dir.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        else:
            print(f"stage 2 is finished in {run_dir}", flush=True)
        # What is evaluated is what was saved. (ReftModel.load would make learned_source bfloat16 whatever it was.)
        (saved,) = run_dir.glob("intkey_*.bin")
        intervention.load_state_dict(torch.load(saved, map_location=DEVICE, weights_only=True))
        reft_model.set_device(DEVICE, set_model=False)
        seconds["reft"] = reft_record["seconds"]

    # ---------------------------------------------------------------------------------------------
    # Evaluation: greedy, from short to long prompts, left-padded so that the last prompt token is the last column
    print(f"\nevaluation of {len(validation_rows):,} questions", flush=True)
    tokenizer.pad_token = tokenizer.eos_token
    greedy = GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW_TOKENS,  # the chat model's own settings would sample
                              eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    answers_file = run_dir / "answers.jsonl"  # a line per micro-batch, behind a line with the settings
    lines = []
    if answers_file.exists():
        for line in answers_file.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # torn: the process died while writing it
            lines.append(json.loads(line))
    if lines:
        refuse_other(lines[0]["settings"], run_made_by, answers_file)
    lines = lines or [{"settings": run_made_by}]
    write_file(answers_file, "".join(json.dumps(line) + "\n" for line in lines))
    texts = {i: text for line in lines[1:] for i, text in zip(line["rows"], line["texts"])}
    seconds["evaluation"] = sum(line["seconds"] for line in lines[1:])
    if texts:
        print(f"resuming after {len(texts):,} answers", flush=True)
    with open(answers_file, "a") as file, tqdm(total=len(validation_rows), initial=len(texts), unit="question", dynamic_ncols=True) as bar:
        # Without gradient, four times the tokens fit into stage 1's memory.
        for group in microbatches([len(prompt) for prompt in validation_prompts], 4 * TOKENS_PER_MICROBATCH):
            if all(i in texts for i in group):
                continue
            started = time.time()
            rows = tokenizer.pad({"input_ids": [validation_prompts[i] for i in group]}, return_tensors="pt").to(DEVICE)
            columns = rows["input_ids"].shape[1]
            if EPOCHS_REFT:
                _, output = reft_model.generate(dict(rows), unit_locations={"base": columns - 1}, intervene_on_prompt=True,
                                                generation_config=greedy)
            else:
                output = model.generate(**rows, generation_config=greedy)
            generated = tokenizer.batch_decode(output[:, columns:], skip_special_tokens=True)
            line = {"rows": group, "texts": [text.strip() for text in generated], "seconds": time.time() - started}
            file.write(json.dumps(line) + "\n")
            file.flush()
            texts |= zip(group, line["texts"])
            seconds["evaluation"] += line["seconds"]
            bar.update(len(group))

    # ---------------------------------------------------------------------------------------------
    # Results
    predictions = [{"question": row["question"], "answer": row["answer"], "prediction": predict(texts[i]), "text": texts[i]}
                   for i, row in enumerate(validation_rows)]
    correct = sum(row["prediction"] == row["answer"] for row in predictions)
    describe = ["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=12"]
    git = subprocess.run(describe, capture_output=True, text=True) if shutil.which("git") else None
    result = {
        "lora_epochs": EPOCHS_LORA, "reft_epochs": EPOCHS_REFT, "num_validation_samples": len(predictions), "correct_predictions": correct,
        "accuracy": f"{100 * correct / len(predictions):.2f}%",
        "confidence_interval_95": wilson(correct, len(predictions)),
        "unknown_answers": sum(row["prediction"] == "Unknown" for row in predictions),
        "settings": settings,
        "seconds": seconds | {"total": sum(seconds.values())},
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        "peak_memory_gb": max([peak_memory()] + [record["peak_memory_gb"] for record in (lora_record, reft_record) if record]),
        "versions": {"python": platform.python_version()} | {
            package: importlib.metadata.version(package)
            for package in ("torch", "transformers", "peft", "pyreft", "pyvene", "accelerate", "datasets", "huggingface_hub")},
        "commit": git.stdout.strip() if git and git.returncode == 0 else None,
        "loss": {"lora": lora_record["loss"] if lora_record else [], "reft": reft_record["loss"] if reft_record else []},
    }
    if not old_result:
        write_file(result_file.with_suffix(".predictions.jsonl"), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions))
        write_file(result_file, json.dumps(result, indent=1) + "\n")  # last: the run is finished
    summary = {key: result[key] for key in ("accuracy", "correct_predictions", "num_validation_samples", "unknown_answers", "device")}

    if PUSH_TO_HUB and EPOCHS_REFT and not reft_on_hub:
        try:
            reft_repo = reft_repo or hub_repo(HF_REPO_REFIT, name)
            print(f"pushing the LoReFT intervention to {reft_repo}", flush=True)
            push(run_dir, reft_repo, reft_record | {"result": summary}, ["intkey_*.bin", "config.json"])
        except Exception as error:  # whatever the Hub does, the run is done
            unpushed.append(f"the LoReFT intervention to {reft_repo or 'the Hub'} ({first_line(error)})")

    paper_file = HERE / "results/paper.json"
    paper = json.loads(paper_file.read_text())["table_1"].get(name) if paper_file.exists() and not SMOKE else None
    low, high = result["confidence_interval_95"]
    trained = [f"{method} {epochs} epochs" for method, epochs in (("LoRA", EPOCHS_LORA), ("LoReFT", EPOCHS_REFT)) if epochs]
    files = [result_file, result_file.with_suffix(".predictions.jsonl")] + [lora_dir] * bool(EPOCHS_LORA) + [run_dir] * bool(EPOCHS_REFT)
    print(f"""
{name}: {' + '.join(trained) or 'the base model, untrained'}
accuracy {result['accuracy']} (95 % interval {low:.2f} to {high:.2f}), {correct:,} of {len(predictions):,} correct, {result['unknown_answers']} unknown
seconds  {', '.join(f'{stage} {value:.1f}' for stage, value in result['seconds'].items())}; peak memory {result['peak_memory_gb']:.1f} GB
files    {', '.join(map(str, files))}

{TABLE_HEAD}
{table_row(name, result, paper and f"{paper['accuracy']} %")}""")
    for item in unpushed:
        tqdm.write(f"heft: error: not pushed: {item}; the trained weights are on disk, and this pushes them later: "
                   f"{shlex.join(['python', *sys.argv])}", file=sys.stderr)
    sys.exit(1 if unpushed else 0)
