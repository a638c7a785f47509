"""HEFT: fine-tune Llama-2-7b-chat on BoolQ with LoRA, merge, refine with LoReFT, evaluate.

The reference reproduction of "HEFT: A Coarse-to-Fine Hierarchy for Enhancing the Efficiency and Accuracy of
Language Model Reasoning" (arXiv 2509.09801). If a run is interrupted, its command continues it.
Exit status: 0 done; 2 an error that you can fix, explained in one line; 85 stopped by SIGTERM, 130 by Ctrl-C,
129 by a lost terminal, in training with a checkpoint; anything else is a failure.
HEFT_TRACEBACK=1 in the environment shows the traceback of an error that is explained in one line.

    python heft_finetuning.py --smoke                            # tiny embedded model, CPU, offline
    python heft_finetuning.py                                    # the paper's main run, 3 + 3 epochs
    python heft_finetuning.py --epochs-lora 0 --epochs-reft 20   # Table 1, ReFT-only
    python heft_finetuning.py --epochs-lora 20 --epochs-reft 20  # Table 1, the longest run
    python heft_finetuning.py --epochs-lora 20 --epochs-reft 0   # Table 1, LoRA-only: reuses the above
    condor_submit heft.sub                                       # the main run on a GPU cluster
"""

# fmt: off
# ---------------------------------------------------------------------------------------------
# Settings. Edit one, or pass its flag: EPOCHS_LORA is --epochs-lora. Defaults are the paper's.
# Experiment
EPOCHS_LORA = 3            # epochs of stage 1; 0 skips the stage
EPOCHS_REFT = 3            # epochs of stage 2; 0 skips the stage
BASE_MODEL = "meta-llama/Llama-2-7b-chat-hf"  # Hub name or folder
BASE_REVISION = ""         # commit, branch or tag of a model on the Hub; "" is the newest
DATASET = "google/boolq"   # Hub name, or folder with train.jsonl and validation.jsonl
MAX_TRAIN_SAMPLES = 0      # use only the first N training examples; 0 uses all
MAX_EVAL_SAMPLES = 0       # use only the first N validation questions; 0 uses all
SEED = 42                  # starting weights, order, dropout; choose seeds further apart than the epochs
DTYPE = "bfloat16"         # of the model's weights
TAG = ""                   # a word in the run's name, to keep runs of edited code beside the others
# Stage 1, LoRA
LORA_RANK = 8              # rank of the update
LORA_ALPHA = 32            # the update is scaled by alpha / rank
LORA_DROPOUT = 0.05        # on the input of the update
LORA_TARGETS = ""          # "" is Llama's q_proj, v_proj (the paper's code); all-linear (its text); or a,b
LEARNING_RATE_LORA = 2e-4  # at the first step; falls linearly to 0
# Stage 2, LoReFT
REFT_LAYER = 15            # the block, counted from 0, whose output is edited
REFT_RANK = 4              # dimension of the edited subspace
LEARNING_RATE_REFT = 2e-4  # at the first step; falls linearly to 0
# Both stages
EXAMPLES_PER_STEP = 32     # examples per optimizer step
MAX_LENGTH = 2048          # in tokens; longer examples are cut in stage 1, left out of stage 2
TOKENS_PER_MICROBATCH = 2048  # rows x longest row; less saves memory; changes rounding and dropout
# Evaluation
MAX_NEW_TOKENS = 5         # tokens generated per question, greedily
# Output
PUSH_TO_HUB = True         # upload the merged model and the LoReFT intervention; reuse what is there
PRIVATE_REPOS = True       # new Hub repositories are private
HF_USER = ""               # owner of repositories without one, a user or organisation; "" is the token's
HF_REPO_LORA = ""          # of the merged model, name or owner/name; "" is heft-<name of stage 1>
HF_REPO_REFIT = ""         # of the LoReFT intervention (the paper's spelling); "" is heft-<name of stage 2>
OUTPUT_DIR = "output"      # folder of adapters, interventions and checkpoints (tens of MB)
RESULTS_DIR = "results"    # folder of results and predictions
ACCEPT_OTHER_CODE = False  # reuse stages, checkpoints and results that other code made; the result says so
# ---------------------------------------------------------------------------------------------
# fmt: on
# Files remember the code that made them; comments and the bookkeeping do not count, docstrings do. After an
# edit of main() or of a section before the evaluation, stages and results of other code are refused: TAG
# keeps old and new side by side. After an edit of the evaluation, only results are refused, and another
# RESULTS_DIR keeps both. ACCEPT_OTHER_CODE is for edits that change nothing. A new setting needs a row in the
# table SETTINGS, below, with the old behaviour as the paper's value.

import argparse
import contextlib
import copy
import difflib
import fcntl
import hashlib
import io
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
import tokenize
import traceback
import warnings
from collections import namedtuple
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

SOURCE = Path(__file__).read_text("utf-8")  # as it runs: the file may be edited meanwhile
STOP_STATUS = {signal.SIGTERM: 85, signal.SIGINT: 130, signal.SIGHUP: 129}  # exit statuses; 85 is HTCondor's
if __name__ == "__main__":  # before the imports below, which take ten seconds
    with contextlib.suppress(OSError):
        print("heft: loading the libraries", flush=True)
    for number, status in STOP_STATUS.items():  # until set_up_process
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, lambda *_, status=status: os._exit(status))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # busy waiting is ten times slower on shared cores
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # Xet has no timeout, and its errors do not name a cause
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # batch shapes vary
    os.environ.setdefault("USER", "heft")  # a container's user may have no name, for which torch would ask
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = os.getcwd()  # nor a home, where libraries keep their caches

import datasets
import httpx2  # huggingface_hub's HTTP library
import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import binomtest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

with contextlib.redirect_stdout(None):  # they print an advertisement
    from pyreft import LoreftIntervention, ReftConfig, get_reft_model
    from pyvene import type_to_module_mapping

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORE = -100  # label of a token without loss, as in torch


def main():
    """The experiment. In [brackets] the paper's sections."""
    settings = read_settings(sys.argv[1:])
    globals().update(settings)  # from here on the constants, and SMOKE, are what the flags say
    set_up_process()

    # Data: BoolQ as prompts with the answers Yes and No, and what each stage learns from them [4.1]
    base = inspect_base_model()
    check_device(base)
    choose_padding(base.tokenizer, base.meta_model)
    train_rows = load_boolq("train", base.tokenizer) if EPOCHS_LORA or EPOCHS_REFT else []
    questions = load_boolq("validation", base.tokenizer)
    lora_examples = lora_training_examples(base.tokenizer, train_rows) if EPOCHS_LORA else []
    reft_examples = reft_training_examples(base.tokenizer, train_rows) if EPOCHS_REFT else []
    check_data(base, train_rows, [*lora_examples, *reft_examples], questions)

    # Reuse what earlier runs with the same settings, code, data and base model finished; refuse the rest
    run = plan_run(settings, base, train_rows, questions)
    print_plan(run, base, train_rows, reft_examples, questions)
    find_earlier_work(run)
    if already_done(run):
        return
    read_or_lock_stages(run)
    if PUSH_TO_HUB:
        create_repos(run.stages)

    # Stage 1, coarse: LoRA on the whole text of prompt and answer, merged into the weights [3.2]
    model = load_base_model(base)
    if EPOCHS_LORA:
        model = stage_1_lora(model, run.lora, lora_examples)
        model = model.merge_and_unload()  # in the model's dtype, as in the paper
    model.eval().requires_grad_(False)

    # Stage 2, fine: LoReFT on the merged, frozen model, one edit of one hidden state per question [3.3]
    reft_model = stage_2_loreft(model, run.reft, reft_examples) if EPOCHS_REFT else None

    # Evaluation: greedy answers to the validation questions [4]
    if not run.result:  # else only the upload is left
        generated, record = generate_answers(model, reft_model, base.tokenizer, questions)
        run.result = write_result(run, settings, record, questions, generated)

    # All results are on disk now: what is large, and what may fail, comes last
    print_summary(run)
    if PUSH_TO_HUB:
        push_stages(run, model, base)


# ----- Data: BoolQ as prompts and tokens (paper, section 4.1 and appendix)
# Exactly the paper's. The tokenizer adds a BOS of its own, so prompts start with two.
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
    limit = MAX_TRAIN_SAMPLES if split == "train" else MAX_EVAL_SAMPLES
    rows = read_rows(split)[: limit or None]
    rows = [format_boolq(row) | {"question": row["question"]} for row in rows]
    return [row | {"tokens": tokenizer(row["prompt"])["input_ids"]} for row in rows]


def choose_padding(tokenizer, model):
    """Let EOS be the padding token, as in the paper, unless the tokenizer has one that the model knows."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not tokenizer.pad_token or tokenizer.pad_token_id >= vocabulary:
        tokenizer.pad_token = tokenizer.eos_token


def lora_training_examples(tokenizer, rows):
    """What LoRA learns from, as lists: input_ids (the whole text) and labels."""
    examples = []
    for row in rows:
        text = f"{row['prompt']} {row['answer']}{tokenizer.eos_token}"
        tokens = tokenizer(text)["input_ids"][:MAX_LENGTH]
        # As in the paper, the padding token has no loss. Llama 2's is EOS, so LoRA does not learn to stop.
        labels = [IGNORE if token == tokenizer.pad_token_id else token for token in tokens]
        examples.append({"input_ids": tokens, "labels": labels})
    return examples


def reft_training_examples(tokenizer, rows):
    """What LoReFT learns from, as lists: input_ids (the last prompt token, the answer, EOS), labels, and
    before (the prompt tokens before the last) with a before_mask of ones (see prepare_forward)."""
    examples = []
    for row in rows:
        # The paper's stage 2 has no space before the answer.
        tokens = tokenizer(f"{row['prompt']}{row['answer']}{tokenizer.eos_token}")["input_ids"]
        prompt = row["tokens"]
        joined = tokens[: len(prompt)] != prompt
        stop_if(joined, f"the tokenizer of {BASE_MODEL!r} joins prompt and answer: use --epochs-reft 0")
        before, last = prompt[:-1], prompt[-1]
        answer = tokens[len(prompt) :]  # and EOS, which has a loss, too
        if len(tokens) <= MAX_LENGTH:  # cutting a longer one would remove its answer
            inputs = {"before": before, "before_mask": [1] * len(before), "input_ids": [last, *answer]}
            examples.append(inputs | {"labels": [IGNORE, *answer]})
    stop_if(not examples, f"no training example fits into --max-length {MAX_LENGTH}")
    return examples


# ----- The base model
def load_base_model(base):
    """The causal language model BASE_MODEL in DTYPE on the device; from safetensors only."""
    fetch_model(base.folder.name, "*.safetensors")  # the folder of a model on the Hub is named by its commit
    # Its own generation_config.json would fill in what generate_answers leaves open.
    options = dict(generation_config=GenerationConfig(), use_safetensors=True, output_loading_info=True)
    options |= dict(dtype=getattr(torch, DTYPE), device_map=DEVICE, config=base.meta_model.config)
    with explained(f"cannot load the model {BASE_MODEL!r}"):
        model, loading = AutoModelForCausalLM.from_pretrained(base.folder, **options)
    wrong = {key: sorted(loading[key])[:3] for key in ("missing_keys", "unexpected_keys") if loading[key]}
    stop_if(wrong, f"the weights of the model {BASE_MODEL!r} are not those of its config.json: {wrong}")
    model.name_or_path = BASE_MODEL  # PEFT writes it into the adapter: not the path of the Hub's cache
    return model


# ----- Training: a step is EXAMPLES_PER_STEP examples, in micro-batches that hold little padding
def train(stage, module, forward, examples, initial_rate):
    """Train the parameters of `module` that require gradients. Returns the stage's record.

    AdamW, linear decay to 0, no warm-up, gradient clip 1.0. Rate, order and (with the same micro-batches)
    dropout follow from SEED, step and number of steps: a resumed run gives the same result. On a signal:
    checkpoint, exit. forward(**microbatch without labels).logits is (batch, length, vocabulary)."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, initial_rate, weight_decay=0.0)  # the fused rounds differently
    steps_per_epoch = math.ceil(len(examples) / EXAMPLES_PER_STEP)  # the last may have fewer examples
    steps = steps_per_epoch * stage.epochs
    say(f"\n{stage.title}: {sum(p.numel() for p in parameters):,} trainable parameters, {steps} steps")
    tensors = [*parameters, *module.buffers()]  # LoReFT's R is relative to its first value, a buffer
    record = resume(stage, tensors, optimizer)  # its list "loss" has one for each finished step
    check_memory(forward, examples)
    began = time.monotonic() - record["seconds"]
    stopping.delayed = True
    for step in range(len(record["loss"]), steps):
        epoch, position = divmod(step, steps_per_epoch)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(SEED + epoch))
        batch = [examples[i] for i in order.split(EXAMPLES_PER_STEP)[position]]
        # Seeds the dropout; from a text, so that no two seeds share masks. (Close ones do share orders:
        # SEED + epoch is kept for the sake of the stored results.)
        torch.manual_seed(random.Random(f"{SEED} {step}").getrandbits(32))
        rate = initial_rate * ((steps - step) / steps)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = accumulate_gradients(forward, batch)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        failed = f"loss {loss}, gradient {norm} at step {step + 1}: try a lower rate, or --dtype float32"
        stop_if(not (loss + norm).isfinite(), failed, status=1)
        optimizer.step()
        record["loss"].append(loss.item())
        log_progress(record, began, "step", step + 1, steps, f"loss {loss:.4f}, rate {rate:.2e}")
        stop = stopping.signal  # read once: a signal that comes from now on waits for the next step
        if stop or position == steps_per_epoch - 1:
            state = {"tensors": tensors, "optimizer": optimizer.state_dict()}
            write(stage.folder / "checkpoint.pt", record | state)
        if stop:
            break
    stopping.delayed = bool(stopping.signal)  # a second one changes nothing now, unless it is Ctrl-C
    if stopping.signal:
        name, done = signal.Signals(stopping.signal).name, len(record["loss"])
        say(f"stopped by {name} after step {done}; the same command continues")
        sys.exit(STOP_STATUS[stopping.signal])
    return record


def accumulate_gradients(forward, examples):
    """Backpropagate the loss of a step, micro-batch by micro-batch, and return it, a scalar tensor.

    forward: as in train."""
    loss = 0.0
    for microbatch in collate(examples):
        labels = microbatch.pop("labels")
        # A mean over the step's examples, as in the paper, which has one example per forward.
        microbatch_loss = example_losses(forward(**microbatch).logits, labels).sum() / len(examples)
        microbatch_loss.backward()
        loss += microbatch_loss.detach()
    return loss


def example_losses(logits, labels):
    """Mean token loss of each example: (batch, length, vocabulary) and (batch, length) to (batch,)."""
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # column t predicts token t + 1
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels).sum(1) / (labels != IGNORE).sum(1)


def collate(examples):
    """The examples of a step (dicts of lists) as micro-batches (dicts of (batch, length) tensors). They are
    padded on the right, where causal attention never looks: only what comes before input_ids has a mask."""

    def padded(key, group):
        rows = [torch.tensor(examples[i][key]) for i in group]
        value = IGNORE if key == "labels" else 0
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value).to(DEVICE)

    groups = microbatches([token_count(example) for example in examples], TOKENS_PER_MICROBATCH)
    return [{key: padded(key, group) for key in examples[0]} for group in groups]


def token_count(example):
    """The tokens that an example adds to a micro-batch."""
    return len(example.get("before", [])) + len(example["input_ids"])


def microbatches(lengths, max_tokens):
    """Positions in `lengths`, short to long, in groups of rows x longest <= max_tokens; longer go alone."""
    groups = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or (len(groups[-1]) + 1) * lengths[i] > max_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


# ----- Stage 1: LoRA (paper, section 3.2)
def lora_config():
    """PEFT's configuration of LoRA; its default targets unless LORA_TARGETS names others."""
    targets = LORA_TARGETS.replace(",", " ").split() if LORA_TARGETS else None
    if targets == ["all-linear"]:
        targets = "all-linear"  # PEFT's keyword
    sizes = dict(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT)
    return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **sizes)


def stage_1_lora(model, stage, examples):
    """`model` with the stage's adapter, as a peft.PeftModel: read if the stage is finished, else trained."""
    if stage.record:
        return PeftModel.from_pretrained(model, stage.folder, config=lora_config())
    set_seed(SEED)  # directly before the weights are drawn: they depend on the seed alone
    model = get_peft_model(model, lora_config()).train()
    record = train(stage, model, partial(model, use_cache=False), examples, LEARNING_RATE_LORA)
    finish(stage, record, partial(model.save_pretrained, save_embedding_layers=False))
    return model


# ----- Stage 2: LoReFT (paper, section 3.3): at the last prompt token, h becomes h + R^T (W h + b - R h)
def stage_2_loreft(model, stage, examples):
    """A pyreft.ReftModel around `model`: its intervention is read if the stage is finished, else trained."""
    reft_model, intervention = add_intervention(model)
    if not stage.record:
        examples, forward = prepare_forward(model, reft_model, examples)
        record = train(stage, intervention, forward, examples, LEARNING_RATE_REFT)
        reft_model.set_device("cpu", set_model=False)  # saved from the CPU, the file loads without a GPU
        with contextlib.redirect_stdout(None):
            finish(stage, record, reft_model.save)
    # Load the saved file even right after training: a later run then evaluates the same weights.
    # (Not by ReftModel.load, which always returns bfloat16.)
    (file,) = stage.folder.glob("intkey_*.bin")
    intervention.load_state_dict(torch.load(file, map_location=DEVICE, weights_only=True))
    reft_model.set_device(DEVICE, set_model=False)
    return reft_model


def add_intervention(model):
    """(pyreft.ReftModel around `model`, its intervention). R: REFT_RANK x hidden size, orthonormal rows."""
    set_seed(SEED)  # directly before the weights are drawn: they depend on the seed alone
    width = model.config.hidden_size
    intervention = LoreftIntervention(embed_dim=width, low_rank_dimension=REFT_RANK, dtype=model.dtype)
    rotation = intervention.rotate_layer.parametrizations.weight[0]
    rotation.base = rotation.base.contiguous()  # in another layout, the last bits of stored results differ
    place = {"layer": REFT_LAYER, "component": "block_output", "low_rank_dimension": REFT_RANK}
    config = ReftConfig(representations=place | {"intervention": intervention})
    return get_reft_model(model, config), intervention


def prepare_forward(model, reft_model, examples):
    """(examples without the start that all prompts share, function `forward` for `train`).

    The paper backpropagates through all prompt tokens. Only the last one is edited: keys and values of those
    before it do not depend on what is trained, and need no gradient. Those of the shared start are computed
    once: it is removed from `before`, which keeps at least one token, but not from before_mask."""
    # A row is [start | before, padded | last prompt token, answer, EOS]; the cache holds the first two.
    # commonprefix works on lists, too; without its last token, no `before` becomes empty.
    common = os.path.commonprefix([example["before"][:-1] for example in examples])
    examples = [example | {"before": example["before"][len(common) :]} for example in examples]
    decoder = model.base_model  # transformers' name for the model without its output layer
    start = decoder(torch.tensor([common], device=DEVICE), use_cache=True).past_key_values

    def forward(input_ids, before, before_mask):
        # All (batch, columns). before_mask has the columns of start and before, as start was cut from before
        # only, and is 0 where before is padded.
        cache = copy.deepcopy(start)
        cache.batch_repeat_interleave(len(input_ids))
        with torch.no_grad():
            decoder(before, past_key_values=cache)  # only for its keys and values, which it adds to the cache
        position = before_mask.sum(1, keepdim=True) + torch.arange(input_ids.shape[1], device=DEVICE)
        mask = torch.cat([before_mask, torch.ones_like(input_ids)], 1)
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position}
        # Column 0 is the last prompt token: there, and nowhere else, the hidden state is edited.
        _, output = reft_model(inputs | {"past_key_values": cache}, unit_locations={"base": 0})
        return output

    return examples, forward


# ----- Evaluation (paper, section 4)
def generate_answers(model, reft_model, tokenizer, questions):
    """([{"text": the generated text} for each question, in their order], the evaluation's record)."""
    say(f"\nevaluation of {len(questions):,} questions")
    prompts = [row["tokens"] for row in questions]
    generated = {}  # by the question's position
    # Greedy: the chat model's own generation_config.json, which load_base_model leaves out, would sample.
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **ends)
    # Four times as many tokens fit without gradients. Longest first: too little memory shows at once.
    groups = microbatches([len(prompt) for prompt in prompts], 4 * TOKENS_PER_MICROBATCH)[::-1]
    record, began = new_record(), time.monotonic()
    for number, group in enumerate(groups, 1):
        # Left padding: the last column, the same for all rows, is the last prompt token.
        rows = {"input_ids": [prompts[i] for i in group]}
        rows = tokenizer.pad(rows, return_attention_mask=True, return_tensors="pt").to(DEVICE)
        columns = rows["input_ids"].shape[1]
        if reft_model:
            where = dict(unit_locations={"base": columns - 1}, intervene_on_prompt=True)
            _, output = reft_model.generate(dict(rows), generation_config=greedy, **where)
        else:
            output = model.generate(**rows, generation_config=greedy)
        texts = tokenizer.batch_decode(output[:, columns:], skip_special_tokens=True)
        generated.update((i, {"text": text.strip()}) for i, text in zip(group, texts))
        log_progress(record, began, "micro-batch", number, len(groups), f"{len(generated):,} questions")
    return [generated[i] for i in range(len(prompts))], record


def predict(text):
    """The answer in a generated text by the paper's rule: Yes, No, or Unknown, which counts as wrong."""
    return "Yes" if "Yes" in text else "No" if "No" in text else "Unknown"


def score(predictions, answers):
    """The accuracy, as the paper's script writes it, and what helps to judge it. Two lists of words."""
    n = len(answers)
    correct = sum(prediction == answer for prediction, answer in zip(predictions, answers))
    majority = max(("Yes", "No"), key=answers.count)
    return {
        "lora_epochs": EPOCHS_LORA,
        "reft_epochs": EPOCHS_REFT,
        "num_validation_samples": n,
        "correct_predictions": correct,
        "accuracy": f"{100 * correct / n:.2f}%",
        "confidence_interval_95": [100 * end for end in binomtest(correct, n).proportion_ci(method="wilson")],
        "yes_answers": predictions.count("Yes"),
        "unknown_answers": predictions.count("Unknown"),
        "majority_answer": majority,
        "majority_accuracy": f"{100 * answers.count(majority) / n:.2f}%",
    }


# =============================================================================================
# Bookkeeping: the experiment ends here. First the settings as flags, and what they decide
HERE = Path(__file__).resolve().parent


# For example, LORA_RANK must be a whole number from 1. It decides stage 1 and all that builds on it. A run
# with another value than the paper's 8 is called lora3-reft3-lora_rank16. Names have the order of the table.
Legal = namedtuple("Legal", "convert is_legal words")  # text to value, test, test in words
# decides: what depends on it: epochs, stages (both), lora, reft, evaluation, or "" for nothing
Setting = namedtuple("Setting", "legal decides prefix paper", defaults=("", "", None))


# fmt: off
COUNT = Legal(int, lambda n: 0 <= n < 2**32, "a whole number from 0")
SIZE = Legal(int, lambda n: 1 <= n < 2**32, "a whole number from 1")
LENGTH = Legal(int, lambda n: 2 <= n < 2**32, "a whole number from 2")
SHARE = Legal(float, lambda x: 0 <= x < 1, "from 0 to below 1")
RATE = Legal(float, lambda x: 0 < x < math.inf, "above 0")
PRECISION = Legal(str, lambda text: text in ("bfloat16", "float32"), "bfloat16 or float32")
PLACE = Legal(
    lambda text: os.path.expanduser(os.path.expandvars(text.strip())), re.compile("[^~$][^$]*").fullmatch,
    "a name, not empty, in which each ~ and $VARIABLE has a value")  # one without a value is left as it is
LINE = Legal(str, str.isprintable, 'one line, "" for none')
WORD = Legal(str, re.compile("[A-Za-z0-9._+]*").fullmatch, 'letters, digits and . _ +, "" for none')
SWITCH = Legal(bool, None, "True or False")
SETTINGS = {
    # name                           legal      decides       prefix in names      paper's value
    "EPOCHS_LORA":           Setting(COUNT,     "epochs",     "lora"),  # always named
    "EPOCHS_REFT":           Setting(COUNT,     "epochs",     "reft"),
    "BASE_MODEL":            Setting(PLACE,     "stages",     "",         "meta-llama/Llama-2-7b-chat-hf"),
    "BASE_REVISION":         Setting(LINE,      "stages",     "revision_",         ""),
    "DATASET":               Setting(PLACE,     "stages",     "on_",               "google/boolq"),
    "LORA_RANK":             Setting(SIZE,      "lora",       "lora_rank",         8),
    "LORA_ALPHA":            Setting(SIZE,      "lora",       "lora_alpha",        32),
    "LORA_DROPOUT":          Setting(SHARE,     "lora",       "lora_dropout",      0.05),
    "LORA_TARGETS":          Setting(LINE,      "lora",       "lora_targets_",     ""),
    "LEARNING_RATE_LORA":    Setting(RATE,      "lora",       "lr_lora",           2e-4),
    "REFT_LAYER":            Setting(COUNT,     "reft",       "reft_layer",        15),
    "REFT_RANK":             Setting(SIZE,      "reft",       "reft_rank",         4),
    "LEARNING_RATE_REFT":    Setting(RATE,      "reft",       "lr_reft",           2e-4),
    "EXAMPLES_PER_STEP":     Setting(SIZE,      "stages",     "examples_per_step", 32),
    "MAX_LENGTH":            Setting(LENGTH,    "stages",     "max_length",        2048),
    "MAX_NEW_TOKENS":        Setting(SIZE,      "evaluation", "max_new_tokens",    5),
    "DTYPE":                 Setting(PRECISION, "stages",     "dtype_",            "bfloat16"),
    "SEED":                  Setting(COUNT,     "stages",     "seed",              42),
    "MAX_TRAIN_SAMPLES":     Setting(COUNT,     "stages",     "train",             0),
    "MAX_EVAL_SAMPLES":      Setting(COUNT,     "evaluation", "eval",              0),
    "TAG":                   Setting(WORD,      "stages",     "",                  ""),
    "TOKENS_PER_MICROBATCH": Setting(SIZE),  # stated in the result; a checkpoint needs it unchanged
    **dict.fromkeys(["PUSH_TO_HUB", "PRIVATE_REPOS", "ACCEPT_OTHER_CODE"], Setting(SWITCH)),
    **dict.fromkeys(["HF_USER", "HF_REPO_LORA", "HF_REPO_REFIT"], Setting(LINE)),
    **dict.fromkeys(["OUTPUT_DIR", "RESULTS_DIR"], Setting(PLACE)),
}
# What --smoke changes: the same script on the embedded toy, which needs larger steps.
SMOKE_VALUES = dict(
    BASE_MODEL=os.path.relpath(HERE / "smoke/model"), DATASET=os.path.relpath(HERE / "smoke/data"),
    DTYPE="float32", LEARNING_RATE_LORA=9e-4, LEARNING_RATE_REFT=1e-3,
    PUSH_TO_HUB=False, OUTPUT_DIR="output/smoke", RESULTS_DIR="results/smoke")
PAPER_ACCURACY = {"lora0-reft20": 83.36, "lora20-reft0": 85.05, "lora3-reft3": 85.17, "lora20-reft20": 85.47}
# fmt: on


def read_settings(arguments):
    """All settings by name: the constants on the first screen, or what the flags in `arguments` say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = partial(stop_if, True)
    parser.add_argument("--smoke", dest="SMOKE", action="store_true", help="the embedded toy, CPU, no Hub")
    defaults = globals() | (SMOKE_VALUES if "--smoke" in arguments else {})
    first_screen = SOURCE.partition("\nimport ")[0]  # a constant's comment is the help of its flag
    for name, comment in re.findall(r"^([A-Z0-9_]+) = .*?(?:  # (.*))?$", first_screen, re.M):
        stop_if(name not in SETTINGS, f"{name} has no row in SETTINGS: nothing would notice a change of it")
        legal, default = SETTINGS[name].legal, defaults[name]
        if legal is SWITCH:
            stop_if(not isinstance(default, bool), f"{name} must be True or False, not {default!r}")
            options = dict(action=argparse.BooleanOptionalAction, default=default)
        else:  # the default as text, so that argparse checks an edited constant like a flag
            options = dict(type=partial(legal_value, legal), default=str(default), metavar="X")
        about = f"{comment} [{legal.words}; default: {default!r}]".replace("%", "%%")
        parser.add_argument(f"--{name.lower().replace('_', '-')}", dest=name, help=about, **options)
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = re.findall(r"--[a-z0-9-]+", parser.format_usage())
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1)
        hint = f"do you mean {near[0]}?" if near else "--help lists the flags"
        raise Stop(f"unrecognized arguments: {' '.join(unknown)}; {hint}")
    return vars(values)


def legal_value(legal, text):
    """The value of a setting from the text of a flag or a constant."""
    with contextlib.suppress(ValueError):
        value = legal.convert(text)
        if legal.is_legal(value) and text != "None":  # what an unset variable, or an edited constant, becomes
            return value
    raise argparse.ArgumentTypeError(f"must be {legal.words} (it is {text!r})")


def deciding_settings(settings, part):
    """Names of the settings that decide a part: "lora" (stage 1), "reft" (stage 2) or "run" (the result)."""
    groups = ["stages", "evaluation"] if part == "run" else ["stages"]
    groups += ["lora"] if settings["EPOCHS_LORA"] else []
    groups += ["reft"] if settings["EPOCHS_REFT"] and part != "lora" else []
    epochs = ["EPOCHS_LORA"] if part == "lora" else ["EPOCHS_LORA", "EPOCHS_REFT"]
    return epochs + [name for name, setting in SETTINGS.items() if setting.decides in groups]


def name_of(settings, part):
    """Such as lora3-reft3-seed7: the epochs, then what differs from the paper (or from the smoke run)."""
    usual = {name: setting.paper for name, setting in SETTINGS.items()}
    usual |= SMOKE_VALUES if settings["SMOKE"] else {}
    words = []
    for name in deciding_settings(settings, part):
        value = settings[name]
        if value != usual[name]:
            text = value if isinstance(value, str) else f"{value:.10g}"
            if name in ("BASE_MODEL", "DATASET"):
                text = os.path.basename(value.rstrip("/"))
            words.append(re.sub(r"[^A-Za-z0-9._+]+", "_", SETTINGS[name].prefix + text))
    return shortened("-".join(words), 200)  # a file's name, with its ending, may have 255 bytes


def shortened(name, limit):
    """The name; a longer one than `limit` characters ends with a hash."""
    return name if len(name) <= limit else f"{name[: limit - 17].rstrip('-.')}-{digest(name)}"


def identity(settings, part, **hashes):
    """What must be equal for reuse: settings and, as hashes, code, model and data of a part. For stage 1:
    {"EPOCHS_LORA": 3, "LORA_RANK": 8, ..., "TRAIN_DATA": "5e78...", "CODE_OF_STAGES": "a03c..."}."""
    # The names of the next three do not count: the hashes of their contents do.
    names = set(deciding_settings(settings, part)) - {"BASE_MODEL", "BASE_REVISION", "DATASET"}
    hashes["CODE_OF_STAGES"] = code_hash("def main():", "# ----- Evaluation")
    if part == "run":
        hashes["CODE_OF_EVALUATION"] = code_hash("# ----- Evaluation", "# ======")
    return {name: settings[name] for name in SETTINGS if name in names} | hashes


def code_hash(start, end):
    """Hash of this script from the line `start` to the line `end`, without blank lines and comments."""
    text = SOURCE[SOURCE.index(f"\n{start}") : SOURCE.index(f"\n{end}")]
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row = token.start[0] - 1
            lines[row] = lines[row].removesuffix(token.string)
    return digest([line.rstrip() for line in lines if line.strip()])


@cache
def script_version():
    """Commit (None outside a git repository, as in a cluster's job) and SHA-256 of this script."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"commit": commit or None, "script_sha256": hashlib.sha256(SOURCE.encode()).hexdigest()}


def version_text(content):
    """The version of the script that a record, checkpoint or result names, in a few words."""
    commit = f"commit {content['commit']}, " if content["commit"] else ""
    return f"{commit}script {content['script_sha256'][:8]}"


# ----- Errors: one line for what the user can fix (status 2) or what failed outside (1), else a traceback
class Stop(Exception):
    """Ends the program with one line on stderr, which says what to do."""

    def __init__(self, message, status=2):
        super().__init__(" ".join(message.split()))
        self.status = status


def stop_if(condition, message, status=2):
    """Stop with this message if the condition holds."""
    if condition:
        raise Stop(message, status)


@contextlib.contextmanager
def explained(what, status=2):
    """Turn an error of a library into a Stop whose message begins with `what`; of status 1 if the Hub fails.
    Keep the block small: it hides bugs, too."""
    try:
        yield
    except (Stop, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, GatedRepoError):
            what = f"request access at https://huggingface.co/{error.repo_id}, and set HF_TOKEN to your token"
        answer = getattr(getattr(error, "response", None), "status_code", 0)  # the Hub's, such as 404
        unreachable = (httpx2.RequestError, ConnectionError, TimeoutError, LocalEntryNotFoundError)
        no_answer = isinstance(error, unreachable) and not answer and not huggingface_hub.is_offline_mode()
        status = 1 if no_answer or answer > 404 else status  # up to 404 the user can fix it, 429 and 500 not
        why = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]  # not the pages of advice
        raise Stop(f"{what} ({why})", status) from error


def report_error(error):
    """Print what ended the program: one line, or the traceback of a bug. Returns the exit status."""
    line = str(error) if isinstance(error, Stop) else ""
    if isinstance(error, torch.OutOfMemoryError):
        smaller = (
            f"--tokens-per-microbatch below {TOKENS_PER_MICROBATCH} (a checkpoint begun with more is refused)"
        )
        line = f"GPU memory is full: set {smaller}, or use a GPU with more memory"
    if isinstance(error, OSError) and error.filename:  # such as a full disk, or a folder of somebody else
        line = f"{error.filename}: {error.strerror}; when that is fixed, the same command continues"
    with contextlib.suppress(OSError, ValueError):  # nobody can read it, but the status counts
        if not line or os.environ.get("HEFT_TRACEBACK"):
            traceback.print_exception(error)
        if line:
            print(f"heft: error: {line}", file=sys.stderr)
    return getattr(error, "status", 1)


# ----- The process: screen, signals, progress
def set_up_process():
    """Prepare screen, signals and libraries, whose own messages stay off the screen."""
    global DEVICE
    DEVICE = "cpu" if SMOKE else DEVICE
    with contextlib.suppress(AttributeError):  # a notebook's screen, or none
        sys.stdout.reconfigure(errors="replace")  # letters that it lacks become ?
    for number in STOP_STATUS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, on_signal)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if PUSH_TO_HUB or not (os.path.isdir(BASE_MODEL) and os.path.isdir(DATASET)):
        with explained("cannot connect to the Hub: correct or unset SSL_CERT_FILE, SSL_CERT_DIR and *_PROXY"):
            hooks = huggingface_hub.get_session().event_hooks
        # huggingface_hub's own client would wait for a stalled Hub for ever. timeout: in seconds.
        client = partial(httpx2.Client, event_hooks=hooks, follow_redirects=True, timeout=60)
        huggingface_hub.set_client_factory(client)


def say(text):
    """Print a line. When nobody can read any more (a closed terminal), the run goes on: results are files."""
    try:
        print(text, flush=True)  # flush: keeps a job's log up to date
    except (OSError, ValueError):
        sys.stdout = None  # print then does nothing


# delayed: in training, a signal waits until the step has ended and a checkpoint is saved. signal: which one
stopping = SimpleNamespace(delayed=False, signal=None)


def on_signal(number, _frame):
    """End the program or, while that is delayed, only remember the signal for `train`."""
    impatient = stopping.signal and number == signal.SIGINT  # a second Ctrl-C
    if stopping.delayed and not impatient:
        stopping.signal = stopping.signal or number
        return
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"\nstopped by {signal.Signals(number).name}; the same command continues\n".encode())
    sys.exit(STOP_STATUS[number])


def log_progress(record, began, unit, done, total, text):
    """Update the record; print a line after the first step, every 50 (as in the paper) and the last.

    began: time.monotonic() when the part began, less the seconds before it was interrupted."""
    record["seconds"] = time.monotonic() - began
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:  # of the process so far; Linux counts in KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    record["peak_memory_gb"] = max(record["peak_memory_gb"], peak / 1e9)
    if total > 1 and (done % 50 == 0 or done in (1, total)):
        pace = record["seconds"] / done
        left = timedelta(seconds=round(pace * (total - done)))
        say(f"{unit} {done} of {total}: {text}, {pace:.2f} s per {unit}, {left} left")


# ----- Reading data: nothing is guessed, a row is right or refused
def read_rows(split):
    """All rows of a split, in order: dicts with question and passage (text) and answer (bool)."""
    if os.path.isdir(DATASET):
        path = Path(DATASET, f"{split}.jsonl")
        convert = f"datasets.load_dataset(...)[{split!r}].to_json({path.name!r}) writes it"
        with explained(f"cannot read {path}, which a dataset folder must contain: {convert}"):
            rows = path.read_bytes().splitlines()
        location = f"{path}, line"
    else:
        no_name = f"--dataset {DATASET!r} is neither a folder nor a Hub name such as google/boolq"
        stop_if(DATASET.count("/") != 1, no_name)
        check_download_locks("datasets", DATASET)
        with explained(f"cannot read the {split} split of {DATASET!r}, no folder here, from the Hub"):
            rows = datasets.load_dataset(DATASET, split=split).to_list()
        location = f"{DATASET}, {split}, row"
    stop_if(not rows, f"the {split} split of the dataset {DATASET!r} is empty")
    return [checked_row(row, f"{location} {number}") for number, row in enumerate(rows, 1)]


def checked_row(row, location):
    """A row, a dict or a line of JSON, as a dict. Stop if it is not as read_rows promises."""
    with explained(f"{location}: a row needs question and passage (text) and answer (true or false)"):
        if isinstance(row, bytes):
            pairs = json.loads(row.decode(), object_pairs_hook=list)  # a dict would hide equal keys
            row = dict(pairs)
            if len(row) < len(pairs):
                raise ValueError("it has a key twice")
        for key, kind in dict(question=str, passage=str, answer=bool).items():
            if type(row[key]) is not kind or re.search(r"[\ud800-\udfff]", str(row[key])):
                raise ValueError(f"its {key} is {row[key]!r}"[:200])
    return row


# ----- The base model and the machine, checked before anything takes time
TOKENIZER_FILES = "tokenizer* *.model special_tokens_map.json added_tokens.json vocab* merges.txt".split()


@dataclass
class BaseModel:
    """BASE_MODEL without its weights."""

    folder: Path  # BASE_MODEL or, of a model on the Hub, its copy in the cache
    content: str  # hash of the files that decide its outputs
    tokenizer: transformers.PreTrainedTokenizerBase
    meta_model: torch.nn.Module  # the model without weights, on the "meta" device
    lora_targets: list  # names of the layers that LoRA adapts


def inspect_base_model():
    """The BaseModel that BASE_MODEL names. Stop if it cannot be loaded, trained, merged or prompted."""
    folder = fetch_model(BASE_REVISION or None, ["*.json", "*.model", "*.txt", "*.jinja"])
    usable = f"cannot use {BASE_MODEL!r} as --base-model, the folder or Hub name of a language model"
    with explained(usable):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    plain = config.get_text_config() is config and not hasattr(config, "quantization_config")
    stop_if(not plain, f"{BASE_MODEL!r} is multimodal or quantized: use a plain language model")
    adapter = (folder / "adapter_config.json").exists()  # transformers would attach it unasked
    stop_if(adapter, f"{BASE_MODEL!r} holds a PEFT adapter, too: merge it, or move it away")
    check_tokenizer(tokenizer)
    if (getattr(config, "pad_token_id", None) or 0) >= config.vocab_size:
        config.pad_token_id = None  # torch refuses one without a row in the embedding
    with explained(usable), torch.device("meta"):
        meta_model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPE))
    lora_targets = check_lora(meta_model) if EPOCHS_LORA else []
    if EPOCHS_REFT:
        kind, last, width = type(meta_model), config.num_hidden_layers - 1, config.hidden_size
        known = kind in type_to_module_mapping
        stop_if(not known, f"pyvene does not know {kind.__name__}: use --epochs-reft 0")
        stop_if(REFT_LAYER > last, f"--reft-layer {REFT_LAYER}: the blocks are 0 to {last}")
        stop_if(REFT_RANK > width, f"--reft-rank {REFT_RANK}: the width is {width}")
    with explained(usable):
        return BaseModel(folder, content_of_model(folder), tokenizer, meta_model, lora_targets)


def content_of_model(folder):
    """Hash of the names and contents of the files that decide the base model's outputs."""
    if os.path.isdir(BASE_MODEL) or huggingface_hub.is_offline_mode():
        weights = {path.name: digest(path) for path in folder.glob("*.safetensors")}
    else:  # not downloaded yet, but the Hub has their SHA-256
        files = huggingface_hub.model_info(BASE_MODEL, revision=folder.name, files_metadata=True).siblings
        files = [file for file in files if file.lfs and re.fullmatch(r"[^/]*\.safetensors", file.rfilename)]
        weights = {file.rfilename: file.lfs.sha256[:16] for file in files}
    stop_if(not weights, f"{BASE_MODEL!r}: there are no weights in safetensors form in {folder}")
    patterns = ["config.json", *TOKENIZER_FILES]
    others = {path.name: digest(path) for pattern in patterns for path in folder.glob(pattern)}
    return digest(sorted((weights | others).items()))


def fetch_model(revision, patterns):
    """The folder of BASE_MODEL: of a model on the Hub that in the cache, with these files downloaded."""
    if os.path.isdir(BASE_MODEL):
        return Path(BASE_MODEL)
    check_download_locks("models", BASE_MODEL)
    name = f"{BASE_MODEL!r} at --base-revision {BASE_REVISION}," if BASE_REVISION else repr(BASE_MODEL)
    with explained(f"cannot use {name} as --base-model, the folder or Hub name of a language model"):
        return Path(huggingface_hub.snapshot_download(BASE_MODEL, revision=revision, allow_patterns=patterns))


def check_download_locks(kind, name):
    """Stop if another process is downloading it: huggingface_hub would wait for its locks without a word."""
    locks = Path(huggingface_hub.constants.HF_HUB_CACHE, ".locks", f"{kind}--{name.replace('/', '--')}")
    for path in locks.glob("*.lock"):
        busy = f"another process is downloading {name}: try again when it has ended, or remove {path}"
        with contextlib.suppress(OSError):  # a cache of somebody else
            lock(path, busy, fcntl.LOCK_SH).close()  # shared: others may look, too


def check_device(base):
    """Stop if this machine cannot run the model. Its memory is measured later, by check_memory."""
    if DEVICE == "cuda":
        able = DTYPE == "float32" or torch.cuda.get_device_capability() >= (8, 0)
        stop_if(not able, f"{device_name()} has no bfloat16 in hardware: use another GPU, or --dtype float32")
    else:
        size = base.meta_model.num_parameters() / 1e9
        advice = "use a GPU of 32 GB (condor_submit heft.sub; nvidia-smi shows its driver), or try --smoke"
        stop_if(size > 2, f"no GPU found, and {BASE_MODEL!r} has {size:.1f} billion parameters: {advice}")


def device_name():
    """The GPU's name, or the processor's and the number of threads."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo")  # Linux
    name = re.search(r"model name\s*: (.*)|$", about.read_text("utf-8") if about.exists() else "")[1]
    return f"CPU {name or os.uname().machine}, {torch.get_num_threads()} threads"


def check_memory(forward, examples):
    """Run the largest possible micro-batch once on a GPU: too little memory shows within seconds."""

    def copies(example):  # of it in a micro-batch
        return min(EXAMPLES_PER_STEP, max(1, TOKENS_PER_MICROBATCH // token_count(example)))

    if DEVICE != "cpu":
        largest = max(examples, key=lambda example: copies(example) * token_count(example))
        accumulate_gradients(forward, [largest] * copies(largest))


# ----- Other models, tokenizers and data: the paper's pass all of these checks
def check_tokenizer(tokenizer):
    """Stop if it cannot read and write the answers and, as one token, their end."""
    end = tokenizer.eos_token
    right = f"followed by one end-of-sequence token, {end}: see its add_eos_token and split_special_tokens"
    for word in ("Yes", "No"):
        plain, ended = tokenizer([word, f"{word}{end}"])["input_ids"]
        one_end = ended == [*plain, tokenizer.eos_token_id] and plain[-1:] != ended[-1:]
        able = one_end and predict(tokenizer.decode(plain)) == word
        stop_if(not able, f"the tokenizer of {BASE_MODEL!r} cannot read and write {word!r} {right}")


def check_lora(meta_model):
    """Stop if LoRA does not fit the model, or could not be merged. Returns the adapted layers' names."""
    flag = f"--lora-targets {LORA_TARGETS!r}"
    with explained(f"{flag} does not fit {BASE_MODEL!r}"):
        adapted = get_peft_model(meta_model, lora_config())
    targets = sorted(adapted.peft_config["default"].target_modules)
    for target in targets:  # PEFT complains only if none is found
        found = any(f".{name}".endswith(f".{target}") for name in adapted.targeted_module_names)
        stop_if(not found, f"{flag}: no layer of {BASE_MODEL!r} is called {target}")
    ends = [meta_model.get_input_embeddings(), meta_model.get_output_embeddings()]
    at_an_end = any(hasattr(layer, "base_layer") for layer in ends)  # PEFT wraps the layers it adapts
    shared = meta_model.config.tie_word_embeddings and at_an_end
    stop_if(shared, f"{flag}: input and output embeddings are one matrix, so no update can be merged")
    adapted.unload()  # get_peft_model has changed meta_model itself
    return targets


def check_data(base, train_rows, examples, questions):
    """Stop if a row is longer than the model allows, or has tokens that the model does not know."""
    texts = [row["tokens"] for row in [*train_rows, *questions]] + [row["input_ids"] for row in examples]
    highest = max(base.tokenizer.eos_token_id, base.tokenizer.pad_token_id, *map(max, texts))
    size = base.meta_model.get_input_embeddings().weight.shape[0]
    stop_if(highest >= size, f"{BASE_MODEL!r} has {size} tokens, its tokenizer produces number {highest}")
    check_tokenizer_file(base, [row["prompt"] for row in [*train_rows, *questions]])
    lengths = [len(row["tokens"]) + MAX_NEW_TOKENS for row in questions]
    longest = max(lengths + [token_count(example) for example in examples])
    # Beyond the original length of a stretched model, a row depends on its batch. So it does beyond a sliding
    # window, which would count the padding between `before` and the last prompt token.
    sizes = "original_max_position_embeddings" + ("|window|window_size" if EPOCHS_REFT else "")  # key ends so
    limits = re.findall(rf'(?:{sizes})": (\d+)', base.meta_model.config.to_json_string(use_diff=False))
    limits.append(getattr(base.meta_model.config, "max_position_embeddings", None) or longest)
    limit = min(map(int, limits))
    remedy = "leave out longer rows, or use another model (or --max-length; with a window, --epochs-reft 0)"
    stop_if(longest > limit, f"{BASE_MODEL!r} takes {limit} tokens, and a row has {longest}: {remedy}")


def check_tokenizer_file(base, prompts):
    """Stop if transformers' tokenizer ignores a part of tokenizer.json, with which the model was trained.
    Spaces are not compared: Llama 2's class adds fewer than its file, as the paper's slow tokenizer does."""

    def tokens(tokenizer):
        rows = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        return [" ".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", "").split() for ids in rows]

    file = base.folder / "tokenizer.json"
    if file.exists():
        as_written = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
        ignored = tokens(base.tokenizer) != tokens(as_written)
        stop_if(ignored, f"transformers ignores a part of {file}: use another model")


# ----- Stages and their records
# OUTPUT_DIR/lora3/                stage 1: adapter_model.safetensors, adapter_config.json, heft.json
# OUTPUT_DIR/lora3-reft3/          stage 2: intkey_*.bin (the intervention), config.json, heft.json
# OUTPUT_DIR/lora3-reft3/adapter/  a copy of the stage 1 that stage 2 was trained on
# OUTPUT_DIR/*/heft.json           the stage's record, written last: made_with (what must be equal for reuse),
#                                  below (the hash of those it was trained on), files (with hashes), ...
# OUTPUT_DIR/*/checkpoint.pt       of an unfinished stage: its record so far, weights and optimizer
# OUTPUT_DIR/*/lock                locked by the process that trains the stage, for as long as it lives
# RESULTS_DIR/lora3-reft3.json     the result; .predictions.jsonl is beside it
FILES = {"lora": ["adapter_*"], "reft": ["intkey_*.bin", "config.json"]}  # of a stage, beside its record


@dataclass
class Stage:
    """One training stage: what is planned, and what was found or made."""

    part: str  # lora or reft
    title: str  # in messages: "stage 1, LoRA"
    epochs: int  # passes over the data
    made_with: dict  # what must be equal for reuse, apart from the weights below
    repo: str  # its repository on the Hub, owner/name
    below: "Stage | None"  # the stage that it is trained on
    folder: Path  # where it is stored (stage 1: in stage 2's folder adapter/, if that is there)
    record: dict | None = None  # content of heft.json; None: not finished
    checkpoint: dict | None = None  # content of checkpoint.pt, if not finished
    hub_record: dict | None = None  # content of heft.json in the repository; None: not there
    lock: object = None  # the open file that locks the folder until the process ends, if it was not finished


@dataclass
class Run:
    """What is evaluated: the base model after the stages that have epochs."""

    name: str  # such as lora3-reft3-seed7
    lora: Stage | None
    reft: Stage | None
    made_with: dict  # what must be equal for reuse, apart from the stages' weights
    file: Path  # of the result
    result: dict | None = None  # content of the file; None: not evaluated yet

    @property
    def stages(self):
        """The stages that the run has."""
        return [stage for stage in (self.lora, self.reft) if stage]


def plan_run(settings, base, train_rows, questions):
    """The Run: its stages, all that decides it, and the folders it uses."""
    hashes = dict(BASE_MODEL_FILES=base.content, TRAIN_DATA=digest(train_rows))

    def planned(part, title, epochs, repo, below):
        if not epochs:
            return None
        name = name_of(settings, part)
        # The Hub allows names of at most 96 characters, without -- and .., that end in neither - nor a point.
        default = re.sub(r"([-.])[-.]+", r"\1", f"heft-{name}".replace("+", "_")).rstrip("-.")
        repo = repo or shortened(default, 96)
        if PUSH_TO_HUB and "/" not in repo:
            with explained("set HF_TOKEN to a valid token, or use --no-push-to-hub"):
                repo = f"{HF_USER or huggingface_hub.whoami(cache=True)['name']}/{repo}"
        decided_by = identity(settings, part, **hashes)
        return Stage(part, title, epochs, decided_by, repo, below, Path(OUTPUT_DIR, name))

    lora = planned("lora", "stage 1, LoRA", EPOCHS_LORA, HF_REPO_LORA, below=None)
    reft = planned("reft", "stage 2, LoReFT", EPOCHS_REFT, HF_REPO_REFIT, below=lora)
    name = name_of(settings, "run")
    decided_by = identity(settings, "run", **hashes, VALIDATION_DATA=digest(questions))
    return Run(name, lora, reft, decided_by, Path(RESULTS_DIR, f"{name}.json"))


def find_earlier_work(run):
    """Read the run's result and, if there is something to push, what the Hub has."""
    run.result = read_checked(run.file, run.made_with)
    if PUSH_TO_HUB:
        both = "one Hub repository cannot hold both stages: choose another --hf-repo-refit"
        stop_if(len({stage.repo for stage in run.stages}) < len(run.stages), both)
        for stage in run.stages:
            stage.hub_record = read_hub_record(stage)


def already_done(run):
    """True, after a message, if nothing is left to evaluate or to upload."""
    to_push = PUSH_TO_HUB and not all(stage.hub_record for stage in run.stages)
    if to_push or not run.result:
        return False
    say(f"already done: {run.file}; move it away to evaluate again\n{summary(run.result)}")
    for stage in run.stages:
        if stage.hub_record and weights_hash(stage.hub_record) != run.result["weights"][stage.part]:
            say(f"note: {stage.repo} holds {stage.title} of another run of the same settings")
    return True


# A stage 2 that is                  uses the stage 1 of
# not finished here, but on the Hub  its repository, in adapter/; both are copied
# finished or begun here             its own folder, in adapter/
# new                                OUTPUT_DIR/lora3, which other runs share; or of the Hub; or trained, too
def read_or_lock_stages(run):
    """Read the stages that are finished, here or on the Hub; lock the others until this process ends."""
    for folder in (OUTPUT_DIR, RESULTS_DIR):
        with explained(f"cannot write in the folder {folder!r}: choose another"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    if run.reft:
        claim(run.reft)  # first: it brings the stage 1 that it was trained on
        adapter = run.reft.folder / "adapter"
        if run.lora and (adapter / "heft.json").exists():
            run.lora.folder = adapter
    if run.lora:
        claim(run.lora)
    begun = run.reft and (run.reft.record or run.reft.checkpoint)  # both name the stage 1 below them
    if begun and begun["below"] != weights_hash(run.lora and run.lora.record):
        raise Stop(f"{run.reft.folder} was trained on another stage 1, which is missing: move it away")
    for stage in run.stages:
        # A finished result is here only to be pushed, with the weights that it was measured on.
        other_result = run.result and run.result["weights"][stage.part] != weights_hash(stage.record)
        measured = f"{run.file} was not measured on the {stage.title} in {stage.folder}"
        stop_if(other_result, f"{measured}: move it away to evaluate again, or use --no-push-to-hub")


def claim(stage):
    """Read a finished stage, from the Hub if it is only there. Lock an unfinished one."""
    read_stage(stage)
    if not stage.record:
        stage.folder.mkdir(exist_ok=True)
        busy = f"another run is training in {stage.folder}: when it has ended, run the same command again"
        stage.lock = lock(stage.folder / "lock", busy)
        if stage.hub_record:
            copy_from_hub(stage)
        read_stage(stage)  # again: copied, or finished by another run meanwhile
    if stage.record:
        say(f"{stage.title} is finished in {stage.folder}")


def read_stage(stage):
    """Set the stage's record or, if unfinished, its checkpoint. Stop if they are not what is planned."""
    stage.record = read_checked(stage.folder / "heft.json", stage.made_with)
    if stage.record:
        check_files(stage.folder, stage.record)
    else:  # it continues with its own micro-batches, as they decide which dropout masks are drawn
        begun = stage.made_with | {"TOKENS_PER_MICROBATCH": TOKENS_PER_MICROBATCH}
        stage.checkpoint = read_checked(stage.folder / "checkpoint.pt", begun)


def read_checked(file, expected, name=None):
    """The record, checkpoint or result in `file`; None if there is none. Stop if it is damaged, or made with
    other settings, code, model or data than `expected`. name: what messages call it."""
    if not os.path.exists(file):
        return None
    name = name or file
    data = io.BytesIO(file.read_bytes())
    with explained(f"{name} is damaged or not of this version of the program: move it away"):
        content = torch.load(data, "cpu") if file.suffix == ".pt" else json.load(data)
        # What a file does not name was no setting yet, and as in the paper.
        found = {key: setting.paper for key, setting in SETTINGS.items()} | content["made_with"]
        found["TOKENS_PER_MICROBATCH"] = content.get("tokens_per_microbatch")  # expected by read_stage
        made_by = version_text(content)
    differing = [key for key, value in expected.items() if found.get(key) != value]
    keys = [key for key in differing if not key.startswith("CODE_OF")]
    others = "; ".join(f"{key.lower()} {found.get(key)!r}, not {expected[key]!r}" for key in keys)
    advice = "use those, move it away, or choose another --output-dir, --results-dir or repository"
    stop_if(others, f"{name} was made with {others}: {advice}")
    if differing:
        code = f"{name} was made by other code, {made_by}; this is {version_text(script_version())}"
        ways = "to evaluate again, move it away or choose another --results-dir"
        if "CODE_OF_STAGES" in differing:
            ways = "to keep both, use --tag WORD, or another --output-dir and --results-dir (or repository)"
        accept = "to use it all the same, add --accept-other-code; or go back to that version"
        stop_if(not ACCEPT_OTHER_CODE, f"{code}: {ways}; {accept}")
        content["other_code"] = made_by
    return content


def new_record():
    """The record of a part that begins: what makes it, where, and what log_progress measures."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    packages = "transformers peft pyreft pyvene accelerate datasets huggingface_hub".split()
    versions = {"python": sys.version.split()[0], "torch": str(torch.__version__)}  # +cpu or +cu128
    versions |= {name: version(name) for name in packages}
    record = dict(device=device_name(), versions=versions, tokens_per_microbatch=TOKENS_PER_MICROBATCH)
    return script_version() | record | dict(seconds=0.0, peak_memory_gb=0.0)


def resume(stage, tensors, optimizer):
    """A new record, or that of the checkpoint, with its state restored. Copies stage 1 below stage 2."""
    adapter = stage.folder / "adapter"  # stage 2 keeps the stage 1 that it is trained on
    if stage.below and stage.below.folder != adapter:
        copy_stage(stage.below.record, stage.below.folder, adapter)
    new, record = new_record(), stage.checkpoint
    planned = {"made_with": stage.made_with, "below": weights_hash(stage.below and stage.below.record)}
    if not record:
        return new | planned | {"loss": []}
    for tensor, saved in zip(tensors, record.pop("tensors"), strict=True):
        tensor.data.copy_(saved)
    optimizer.load_state_dict(record.pop("optimizer"))
    say(f"resuming from {stage.folder / 'checkpoint.pt'} after step {len(record['loss'])}")
    for key in ("commit", "script_sha256", "device", "versions"):
        if new[key] != record[key]:
            record.setdefault("resumed_with", {})[key] = new[key]
    if "other_code" in record:  # it names the version that began the stage; the one that ends it is ours
        planned |= script_version()
    return record | planned


def finish(stage, record, save_weights):
    """Save the weights, then the record, which makes them valid. save_weights: function of a folder."""
    with explained(f"cannot write to {stage.folder}: is the disk full?", status=1):
        save_weights(stage.folder)
    (stage.folder / "README.md").unlink(missing_ok=True)  # PEFT writes an empty model card
    files = {path.name: digest(path) for pattern in FILES[stage.part] for path in stage.folder.glob(pattern)}
    stage.record = record | {"files": files}
    write(stage.folder / "heft.json", json.dumps(stage.record))
    (stage.folder / "checkpoint.pt").unlink(missing_ok=True)


def copy_stage(record, source, target):
    """Copy a finished stage; heft.json comes last. Stop if its files are not what the record describes."""
    target.mkdir(parents=True, exist_ok=True)
    for name in record["files"]:
        shutil.copy(source / name, target)
    check_files(target, record, source)
    write(target / "heft.json", json.dumps(record))


def weights_hash(record):
    """The hash of a finished stage's weights; None without a record. Not of .json: PEFT's order is random."""
    files = record["files"] if record else {}
    return "+".join(files[name] for name in files if not name.endswith(".json")) or None


def check_files(folder, record, source=None):
    """Stop if a stage's files in `folder`, perhaps copied from `source`, are not those of its record."""
    found = {name: digest(folder / name) for name in record["files"] if (folder / name).exists()}
    changed = f"the files in {source or folder} have changed since heft.json named them: move them away"
    stop_if(found != record["files"], changed)


def lock(path, message, kind=fcntl.LOCK_EX):
    """Lock a file until the returned object is closed. Stop with `message` if another process has it."""
    file = open(path, "a")
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Stop(message, 1) from error
    except OSError:  # a file system without locks
        pass
    return file


def digest(content):
    """The first 16 digits of the SHA-256 of a file (a Path), or of anything else as JSON."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def write(path, content):
    """Write text, or anything else with torch.save, then rename: a reader finds all of it or nothing."""
    buffer = io.BytesIO(content.encode() if isinstance(content, str) else b"")
    if not isinstance(content, str):
        torch.save(content, buffer)  # into a file, it hides that the disk is full
    temporary = path.with_name(path.name + ".tmp")
    try:
        with explained(f"cannot write {path}; when that is fixed, the same command continues", status=1):
            temporary.write_bytes(buffer.getvalue())
            temporary.replace(path)
    finally:  # half a file would keep a full disk full
        temporary.unlink(missing_ok=True)


# ----- The Hub: queried at the start, where errors show early; filled at the end, when everything is on disk
# YOU/heft-lora3        stage 1: heft.json, the merged model and its tokenizer; adapter/ as in OUTPUT_DIR
# YOU/heft-lora3-reft3  stage 2: its files, adapter/ and heft.json, as in OUTPUT_DIR
def read_hub_record(stage):
    """The record in the stage's repository; None if that is missing or empty. Stop if it has other files."""
    advice = "choose another, or use --no-push-to-hub"
    repo, files = f"the Hub repository {stage.repo}", set()
    with explained(f"cannot use {repo}: {advice}"):
        with contextlib.suppress(RepositoryNotFoundError):
            files = set(huggingface_hub.list_repo_files(stage.repo)) - {".gitattributes"}
        if not files:
            return None
        stop_if("heft.json" not in files, f"{repo} holds something else: {advice}, or empty it")
        file = huggingface_hub.hf_hub_download(stage.repo, "heft.json")
    return read_checked(Path(file), stage.made_with, repo)


def create_repos(stages):
    """Create the repositories that the stages still need: most missing rights show now, not after hours."""
    advice = "set HF_TOKEN to one that may write, choose another --hf-user, or use --no-push-to-hub"
    for stage in stages:
        if not stage.hub_record:
            refused = f"the token may not write {stage.repo}: {advice}"
            with explained(refused):
                token = huggingface_hub.whoami(cache=True).get("auth", {}).get("accessToken", {})
                stop_if(token.get("role") == "read", refused)
                huggingface_hub.create_repo(stage.repo, private=PRIVATE_REPOS, exist_ok=True)


def copy_from_hub(stage):
    """Copy a stage from its repository into its folder, where it is then found and checked like any other."""
    say(f"copying {stage.title} from {stage.repo}")
    with explained(f"cannot copy {stage.title} from the Hub repository {stage.repo}"):
        patterns = ["heft.json", "adapter/*", *stage.hub_record["files"]]
        source = Path(huggingface_hub.snapshot_download(stage.repo, allow_patterns=patterns))
        adapter = source / "adapter"  # stage 1: beside the merged model, or below stage 2
        if stage.below:
            copy_stage(json.loads((adapter / "heft.json").read_text()), adapter, stage.folder / "adapter")
        copy_stage(stage.hub_record, adapter if stage.part == "lora" else source, stage.folder)


def push_stages(run, model, base):
    """Upload the finished stages that the Hub does not have. Stop with status 1 if that fails."""
    failed = []
    for stage in [stage for stage in run.stages if not stage.hub_record]:
        try:
            with explained(f"{stage.title} to {stage.repo}"):
                push(stage, run, model, base)
        except Stop as error:  # the other stage is pushed all the same
            failed.append(str(error))
    later = f"everything is saved; to push later, run: {shlex.join(['python', *sys.argv])}"
    stop_if(failed, f"not pushed: {'; '.join(failed)}; {later}", 1)


def push(stage, run, model, base):
    """Upload a finished stage in one commit, unless the repository has one of the same settings by now."""
    if read_hub_record(stage):
        say(f"{stage.repo} has {stage.title} of the same settings from another run: left as it is")
        return
    say(f"pushing {stage.title} to {stage.repo}")
    # Not in OUTPUT_DIR, which a cluster transfers: the merged model can be rebuilt in seconds. The name is
    # fixed, so that the next process removes what a killed one left.
    folder = Path(f".merged-{run.name}")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        if run.lora:
            copy_stage(run.lora.record, run.lora.folder, folder / "adapter")
        if stage is run.reft:
            copy_stage(stage.record, stage.folder, folder)
        else:
            model.save_pretrained(folder)
            (folder / "generation_config.json").unlink(missing_ok=True)  # an empty one; the base's follows
            for pattern in ("generation_config.json", "chat_template*", *TOKENIZER_FILES):
                for path in base.folder.glob(pattern):
                    shutil.copy(path, folder)
            write(folder / "heft.json", json.dumps(stage.record))
        write(folder / "README.md", model_card(stage, run))
        huggingface_hub.upload_folder(repo_id=stage.repo, folder_path=folder, commit_message="HEFT")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def model_card(stage, run):
    """The README of a repository. Names of folders mean nothing to the Hub, and are left out."""
    model, data = (None if os.path.isdir(name) else name for name in (BASE_MODEL, DATASET))
    licence = "llama2" if "llama-2" in BASE_MODEL.lower() else "other"
    about = huggingface_hub.ModelCardData(base_model=model, datasets=data, license=licence)
    made = f"{stage.title} of the run {run.name}, by the reference reproduction of HEFT (arXiv 2509.09801)."
    return f"---\n{about.to_yaml()}\n---\n{made} Result of the whole run: {summary(run.result)}\n"


# ----- The screen and the result
def print_plan(run, base, train_rows, reft_examples, questions):
    """Print what is going to be done, and with what, before it takes time."""
    say(f"run      {run.name} on {device_name()}; {version_text(script_version())}")
    say(f"model    {BASE_MODEL}, {base.meta_model.num_parameters():,} parameters in {DTYPE}")
    say(f"data     {DATASET}: {len(questions):,} questions; seed {SEED}")
    if run.lora:
        epochs = f"{EPOCHS_LORA} epochs of {len(train_rows):,} examples, rate {LEARNING_RATE_LORA:g}"
        say(f"stage 1  LoRA, {epochs}, rank {LORA_RANK} on {', '.join(base.lora_targets)}")
    if run.reft:
        epochs = f"{EPOCHS_REFT} epochs of {len(reft_examples):,} examples, rate {LEARNING_RATE_REFT:g}"
        say(f"stage 2  LoReFT, {epochs}, block {REFT_LAYER}")
    say(f"files    {', '.join(map(str, [run.file, *(stage.folder for stage in run.stages)]))}")
    repos = [stage.repo for stage in run.stages if PUSH_TO_HUB]
    say(f"uploads  {' and '.join(repos) or 'none'}{' (private, if new)' if repos and PRIVATE_REPOS else ''}")


def summary(result):
    """A result in one line."""
    low, high = result["confidence_interval_95"]
    correct, n = result["correct_predictions"], result["num_validation_samples"]
    said = f"{correct:,} of {n:,} correct, {result['yes_answers']} Yes, {result['unknown_answers']} Unknown"
    text = f"accuracy {result['accuracy']} (95 % interval {low:.2f} to {high:.2f}), "
    text += f"{said}; always {result['majority_answer']} would score {result['majority_accuracy']}"
    if "other_code" in result:
        text += f"; reused what other code made: {result['other_code']}"
    return text


RECORDED = "weights seconds loss device peak_memory_gb tokens_per_microbatch versions resumed_with other_code"


def write_result(run, settings, evaluation, questions, generated):
    """Write the result and the predictions of the run. Returns the result, the paper's five keys first.

    evaluation, generated: from generate_answers; all that `generated` holds enters the predictions."""
    rows = [{key: row[key] for key in ("question", "answer")} for row in questions]
    rows = [row | {"prediction": predict(new["text"])} | new for row, new in zip(rows, generated)]
    records = dict.fromkeys(["lora", "reft"], {"weights": None, "seconds": 0.0, "loss": []})  # 0 epochs
    for stage in run.stages:
        records[stage.part] = stage.record | {"weights": weights_hash(stage.record)}
    records["evaluation"] = evaluation
    result = score([row["prediction"] for row in rows], [row["answer"] for row in rows]) | script_version()
    result |= {"settings": settings, "made_with": run.made_with}
    for key in RECORDED.split():
        values = {part: record[key] for part, record in records.items() if key in record}
        result |= {key: values} if values else {}
    result["seconds"]["total"] = sum(result["seconds"].values())
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write(run.file.with_suffix(".predictions.jsonl"), "".join(lines))
    write(run.file, json.dumps(result, indent=1) + "\n")  # last: the run is finished
    return result


def print_summary(run):
    """Print the result, its time and memory, its file, and how to compare it."""
    seconds = ", ".join(f"{part} {value:.1f}" for part, value in run.result["seconds"].items())
    say(f"\n{run.name}: {summary(run.result)}")
    if run.name in PAPER_ACCURACY and not SMOKE:
        say(f"paper    {PAPER_ACCURACY[run.name]:.2f}%")
    say(f"seconds  {seconds}; peak memory {max(run.result['peak_memory_gb'].values()):.1f} GB")
    say(f"result   {run.file}")
    python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    say(f"compare  {python} {os.path.relpath(HERE / 'results/report.py')} {run.file} ANOTHER.json")


if __name__ == "__main__":
    try:
        main()
        status = 0
    except Exception as error:
        status = report_error(error)
    for number in STOP_STATUS:
        signal.signal(number, signal.SIG_IGN)  # Python takes a second to exit
    sys.exit(status)
