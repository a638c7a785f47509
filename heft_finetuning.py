"""HEFT: fine-tune Llama-2-7b-chat on BoolQ with LoRA, merge, refine with LoReFT, evaluate.

The reference reproduction of "HEFT: A Coarse-to-Fine Hierarchy for Enhancing the Efficiency and Accuracy of
Language Model Reasoning" (arXiv 2509.09801). After an interruption, the same command continues the run.
Exit status: 0 done; 2 an error that you can fix, explained in one line; 85 stopped by SIGTERM and 130 by
Ctrl-C, after saving a checkpoint; anything else is a failure.

    python heft_finetuning.py --smoke                            # tiny embedded model, CPU, offline
    python heft_finetuning.py                                    # the paper's main run, 3 + 3 epochs
    python heft_finetuning.py --epochs-lora 0 --epochs-reft 20   # Table 1, ReFT-only
    python heft_finetuning.py --epochs-lora 20 --epochs-reft 20  # Table 1, the longest run
    python heft_finetuning.py --epochs-lora 20 --epochs-reft 0   # LoRA-only: last, reuses the above
    condor_submit heft.sub                                       # the main run on a GPU cluster
"""

# fmt: off
# ---------------------------------------------------------------------------------------------
# Settings. Edit one, or pass its flag: EPOCHS_LORA is --epochs-lora. Defaults are the paper's.
# Experiment
EPOCHS_LORA = 3            # epochs of stage 1; 0 skips the stage
EPOCHS_REFT = 3            # epochs of stage 2; 0 skips the stage
BASE_MODEL = "meta-llama/Llama-2-7b-chat-hf"  # Hub name or folder
DATASET = "google/boolq"   # Hub name, or folder with train.jsonl and validation.jsonl
MAX_TRAIN_SAMPLES = 0      # use only the first N training examples; 0 uses all
MAX_EVAL_SAMPLES = 0       # use only the first N validation questions; 0 uses all
SEED = 42                  # decides the initial weights, the order of the examples and the dropout
DTYPE = "bfloat16"         # of the model's weights: bfloat16 or float32
# Stage 1, LoRA
LORA_RANK = 8              # rank of the update
LORA_ALPHA = 32            # the update is scaled by alpha / rank
LORA_DROPOUT = 0.05        # on the input of the update, 0 to below 1
LORA_TARGETS = ""          # "" is q_proj and v_proj (the paper's code); all-linear (its text); or names a,b
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
MERGED_DIR = ""            # folder for a copy of the merged model (13.5 GB); "" keeps none
OUTPUT_DIR = "output"      # adapters, interventions and checkpoints (tens of MB)
RESULTS_DIR = "results"    # results and predictions
RESULTS_FILE = ""          # name of the result in RESULTS_DIR; "" is <name of the run>.json
# ---------------------------------------------------------------------------------------------
# fmt: on
# A new one goes into ALLOWED, too (unless it is True or False), and, if it changes results, into PAPER.
SETTINGS = [name for name in globals() if name.isupper()]

import argparse
import contextlib
import copy
import errno
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
import traceback
import warnings
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":  # before the imports, which take seconds: a job may be stopped at any time
    words = b"\nstopped by a signal; the same command continues\n"
    for number, status in ((signal.SIGTERM, 85), (signal.SIGINT, 130)):  # in training, see delayed_signals
        signal.signal(number, lambda *_, status=status: (os.write(2, words), sys.exit(status)))
    sys.stdout.reconfigure(line_buffering=True)  # keeps a job's log up to date
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # busy waiting is ten times slower on shared cores
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # Xet has no timeout, and its errors do not name a cause
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # batch shapes vary

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from httpx2 import RequestError  # huggingface_hub's HTTP library
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

SMOKE = "--smoke" in sys.argv  # the toy run, which needs no GPU
DEVICE = "cuda" if torch.cuda.is_available() and not SMOKE else "cpu"
IGNORE = -100  # label of a token without loss, as in torch
LOCK_SECONDS = 600  # how long a run waits for another one that trains the same stage


def main():
    """The experiment, in the order of the paper's sections [in brackets]."""
    settings = read_settings(sys.argv[1:])
    globals().update(settings)  # from here on the constants are what the flags say
    set_up_libraries()

    # Data: BoolQ as prompts with the answers Yes and No, and what each stage learns from them [4.1]
    base = inspect_base_model()
    train_rows = load_boolq("train", base.tokenizer) if EPOCHS_LORA or EPOCHS_REFT else []
    questions = load_boolq("validation", base.tokenizer)
    lora_examples = lora_training_examples(base.tokenizer, train_rows)
    reft_examples = reft_training_examples(base.tokenizer, train_rows) if EPOCHS_REFT else []
    check_lengths(base, lora_examples, questions)
    check_device(base)

    # Reuse what earlier runs with the same settings, data and base model finished; refuse anything else
    run = plan_run(settings, base, train_rows, questions)
    if already_done(run):
        return
    check_folders()
    find_finished_stages(run)
    print(f"run {run.name} on {DEVICE_NAME}, {base.meta_model.num_parameters():,} parameters in {DTYPE}")
    print(f"{len(lora_examples):,} examples, {len(reft_examples):,} in stage 2, {len(questions):,} questions")

    # Stage 1, coarse: LoRA on the whole text of prompt and answer, merged into the weights [3.2]
    model = load_base_model(base)
    if EPOCHS_LORA:
        model = stage_1_lora(model, run.lora, lora_examples)
        model = model.merge_and_unload()  # in the model's dtype, as in the paper
    model.eval().requires_grad_(False)

    # Stage 2, fine: LoReFT on the merged, frozen model, one edit of one hidden state per question [3.3]
    reft_model = stage_2_loreft(model, run.reft, run.lora, reft_examples) if EPOCHS_REFT else None

    # Evaluation: greedy answers to the validation questions [4]
    if not run.result:
        texts, record = generate_answers(model, reft_model, base.tokenizer, questions)
        run.result = write_result(run, record, questions, texts)

    # All results are on disk now: what is large, and what may fail, comes last
    print_summary(run)
    if MERGED_DIR:
        write_merged(model, base, MERGED_DIR)
    if PUSH_TO_HUB:
        push_stages(model, base, run)


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
    rows = []
    located_rows = read_folder(split) if os.path.isdir(DATASET) else read_hub(split)
    for place, row in located_rows:
        with explained(f"{place}: a row needs question and passage (text) and answer (true or false)"):
            if isinstance(row, bytes):  # from read_folder; parsed here, so that an error names the place
                row = json.loads(row.decode())
            (row["question"] + row["passage"]).encode()  # an error, unless both are text
            if not isinstance(row["answer"], int) or row["answer"] not in (0, 1):
                raise ValueError(f"its answer is {row['answer']!r}")
        rows.append(format_boolq(row) | {"question": row["question"]})
    stop_if(not rows, f"the {split} split of the dataset {DATASET!r} is empty")
    limit = MAX_TRAIN_SAMPLES if split == "train" else MAX_EVAL_SAMPLES
    rows = rows[:limit] if limit else rows
    return [row | {"tokens": tokenizer(row["prompt"])["input_ids"]} for row in rows]


def read_folder(split):
    """(place, line) of each line of DATASET/<split>.jsonl. Nothing is guessed: a row is one line of JSON."""
    path = Path(DATASET, f"{split}.jsonl")
    convert = f"datasets.load_dataset(...)[{split!r}].to_json({path.name!r}) writes it"
    with explained(f"cannot read {path}, which a dataset folder must contain: {convert}"):
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    return [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1)]


def read_hub(split):
    """(place, row) of each row of the Hub's dataset DATASET, whose columns must have the types of BoolQ's."""
    import datasets

    datasets.disable_progress_bars()
    invalid_name = DATASET.count("/") != 1
    stop_if(invalid_name, f"--dataset {DATASET!r} is neither a folder nor a Hub name such as google/boolq")
    with explained(f"cannot read the {split} split of {DATASET!r}, which is no folder here, from the Hub"):
        rows = datasets.load_dataset(DATASET, split=split)
    for name, dtype in {"question": "string", "passage": "string", "answer": "bool"}.items():
        found = getattr(rows.features.get(name), "dtype", None)
        stop_if(found != dtype, f"{name} in {DATASET!r} must be {dtype}, as in google/boolq, not {found}")
    return [(f"{DATASET}, {split}, row {number}", row) for number, row in enumerate(rows.to_list(), 1)]


def lora_training_examples(tokenizer, rows):
    """What LoRA learns from, as lists: input_ids (the whole text) and labels."""
    examples = []
    for row in rows:
        text = f"{row['prompt']} {row['answer']}{tokenizer.eos_token}"
        tokens = tokenizer(text)["input_ids"][:MAX_LENGTH]
        # Loss on all tokens except padding. Llama 2 is padded with EOS, so the real EOS is masked, too.
        labels = [IGNORE if token == tokenizer.pad_token_id else token for token in tokens]
        examples.append({"input_ids": tokens, "labels": labels})
    return examples


def reft_training_examples(tokenizer, rows):
    """What LoReFT learns from, as lists: input_ids (the last prompt token, the answer, EOS), labels, prefix
    (the tokens before) and prefix_mask (a 1 for each)."""
    examples = []
    for row in rows:
        # The paper's stage 2 has no space before the answer.
        tokens = tokenizer(f"{row['prompt']}{row['answer']}{tokenizer.eos_token}")["input_ids"]
        n = len(row["tokens"])
        joined = tokens[:n] != row["tokens"]
        stop_if(joined, f"the tokenizer of {BASE_MODEL!r} joins prompt and answer: use --epochs-reft 0")
        if len(tokens) <= MAX_LENGTH:  # cutting a longer one would remove its answer
            prefix = {"prefix": tokens[: n - 1], "prefix_mask": [1] * (n - 1)}
            labels = [IGNORE, *tokens[n:]]  # loss on the answer and EOS
            examples.append(prefix | {"input_ids": tokens[n - 1 :], "labels": labels})
    stop_if(not examples, f"no training example fits into --max-length {MAX_LENGTH}")
    return examples


# ----- Training: a step is EXAMPLES_PER_STEP examples, in micro-batches that hold little padding
def microbatches(lengths, max_tokens):
    """Positions in `lengths`, short to long, in groups of rows x longest <= max_tokens; longer go alone."""
    groups = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or (len(groups[-1]) + 1) * lengths[i] > max_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


def length(example):
    """The tokens that an example adds to a micro-batch (in stage 2, without the start that all share)."""
    return len(example.get("prefix", [])) + len(example["input_ids"])


def collate(examples):
    """The examples of a step (dicts of lists) as micro-batches (dicts of (rows, columns) tensors). They are
    padded on the right, where causal attention never looks: without a prefix, no mask is needed."""

    def padded(key, group):
        rows = [torch.tensor(examples[i][key]) for i in group]
        value = IGNORE if key == "labels" else 0
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value).to(DEVICE)

    groups = microbatches([length(example) for example in examples], TOKENS_PER_MICROBATCH)
    return [{key: padded(key, group) for key in examples[0]} for group in groups]


def example_losses(logits, labels):
    """Mean token loss of each example: (rows, columns, words) and (rows, columns) to (rows,)."""
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # column t predicts token t + 1
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels).sum(1) / (labels != IGNORE).sum(1)


def accumulate_gradients(forward, examples):
    """Backpropagate the loss of a step, micro-batch by micro-batch, and return it, a scalar tensor.

    forward: function from a micro-batch without labels to an output with logits (rows, columns, words)."""
    loss = 0.0
    for microbatch in collate(examples):
        labels = microbatch.pop("labels")
        # A mean over the step's examples, as in transformers 4.45; its Trainer now weights by tokens.
        microbatch_loss = example_losses(forward(**microbatch).logits, labels).sum() / len(examples)
        microbatch_loss.backward()
        loss += microbatch_loss.detach()
    return loss


def check_memory(forward, examples):
    """Run the largest possible micro-batches once on a GPU: too little memory shows within seconds."""

    def full_microbatch(example):  # as many copies as fit
        return [example] * min(EXAMPLES_PER_STEP, max(1, TOKENS_PER_MICROBATCH // length(example)))

    if DEVICE != "cpu":
        accumulate_gradients(forward, full_microbatch(max(examples, key=length)))
        most_tokens = max(map(full_microbatch, examples), key=lambda rows: len(rows) * length(rows[0]))
        accumulate_gradients(forward, most_tokens)


def train(stage, module, forward, examples, first_rate):
    """Train the parameters of `module` that require gradients. Returns the stage's record (new_record).

    AdamW, linear decay to 0, no warm-up, gradient clip 1.0. Rate, order and dropout follow from SEED and the
    step's number alone, so a resumed run gives the same result. On SIGTERM or Ctrl-C: checkpoint, exit.
    forward: as in accumulate_gradients."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    tensors = [*parameters, *module.buffers()]  # LoReFT's R is stored as a change to a buffer
    optimizer = torch.optim.AdamW(parameters, first_rate, weight_decay=0.0)  # the fused rounds differently
    steps_per_epoch = math.ceil(len(examples) / EXAMPLES_PER_STEP)  # the last may have fewer examples
    steps = steps_per_epoch * stage.epochs
    print(f"\n{stage.title}: {sum(p.numel() for p in parameters):,} trainable parameters, {steps} steps")
    reset_peak_memory()
    check_memory(forward, examples)
    optimizer.zero_grad()
    record = restore_checkpoint(stage, tensors, optimizer)
    done, seconds_before = len(record["loss"]), record["seconds"]
    started = time.time()
    bar = tqdm(range(done, steps), initial=done, total=steps, disable=None, dynamic_ncols=True)
    with delayed_signals() as received:
        for step in bar:
            epoch, position = divmod(step, steps_per_epoch)
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(SEED + epoch))
            batch = [examples[i] for i in order.split(EXAMPLES_PER_STEP)[position]]
            torch.manual_seed(random.Random(f"{SEED} {step}").getrandbits(32))  # seeds the dropout
            rate = optimizer.param_groups[0]["lr"] = first_rate * ((steps - step) / steps)
            loss = accumulate_gradients(forward, batch)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if not (loss + norm).isfinite():
                values = f"loss {loss}, gradient {norm} at step {step + 1}"
                raise Stop(f"{values}: try a lower rate, or --dtype float32", 1)
            optimizer.step()
            optimizer.zero_grad()
            record["loss"].append(loss.item())
            record["seconds"] = seconds_before + time.time() - started
            log_progress(bar, "step", step + 1, started, f"loss {loss:.4f}, rate {rate:.2e}")
            if received or position == steps_per_epoch - 1:
                record["peak_memory_gb"] = max(record["peak_memory_gb"], peak_memory())
                state = {"settings": checkpoint_settings(stage), "tensors": tensors, "record": record}
                write(stage.folder / "checkpoint.pt", state | {"optimizer": optimizer.state_dict()})
            if received:
                name, status = ("Ctrl-C", 130) if received[0] == signal.SIGINT else ("SIGTERM", 85)
                tqdm.write(f"stopped by {name} at step {step + 1} of {steps}; the same command continues")
                sys.exit(status)
    return record


def log_progress(bar, what, done, started, text):
    """Show progress: on the bar or, without one (in a job's log), in a line every 50 steps (the paper's
    logging_steps) and at the end. started: time.time() before this process's first step."""
    bar.set_postfix_str(text)
    if bar.disable and (done % 50 == 0 or done == bar.total):
        pace = (time.time() - started) / (done - bar.n)  # n stays at the first one, as there is no bar
        left = timedelta(seconds=round(pace * (bar.total - done)))
        print(f"{what} {done} of {bar.total}: {text}, {pace:.2f} s per {what}, {left} left")


@contextlib.contextmanager
def delayed_signals():
    """Collect SIGTERM and Ctrl-C in a list, so that they do not end the program in the middle of a step."""
    received = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    usual = [signal.signal(kind, lambda number, _: received.append(number)) for kind in kinds]
    yield received
    for kind, handler in zip(kinds, usual):
        signal.signal(kind, handler)


# ----- Stage 1: LoRA (paper, section 3.2)
def lora_config():
    """LoRA's configuration; PEFT's default targets unless LORA_TARGETS names others."""
    from peft import LoraConfig

    targets = LORA_TARGETS.replace(",", " ").split()
    if LORA_TARGETS in ("", "all-linear"):  # PEFT's default for the model; PEFT's keyword
        targets = LORA_TARGETS or None
    sizes = dict(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT)
    return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **sizes)


def stage_1_lora(model, stage, examples):
    """`model` with the stage's adapter, as a peft.PeftModel: read if the stage is finished, else trained."""
    from peft import PeftModel, get_peft_model

    with lock_unfinished(stage):
        if stage.record:  # finished earlier, or by another process meanwhile
            return PeftModel.from_pretrained(model, stage.folder, config=lora_config())
        set_seed(SEED)  # directly before the weights are drawn: they depend on the seed alone
        model = get_peft_model(model, lora_config()).train()
        record = train(stage, model, partial(model, use_cache=False), examples, LEARNING_RATE_LORA)
        finish(stage, record, partial(model.save_pretrained, save_embedding_layers=False))
        return model


# ----- Stage 2: LoReFT (paper, section 3.3): at the last prompt token, h becomes h + R^T (W h + b - R h)
def add_intervention(model):
    """(pyreft.ReftModel around `model`, its intervention). R: REFT_RANK x hidden size, orthonormal rows."""
    with contextlib.redirect_stdout(None):  # importing it prints an advertisement
        from pyreft import LoreftIntervention, ReftConfig, get_reft_model

    set_seed(SEED)  # directly before the weights are drawn: they depend on the seed alone
    width = model.config.hidden_size
    intervention = LoreftIntervention(embed_dim=width, low_rank_dimension=REFT_RANK, dtype=model.dtype)
    rotation = intervention.rotate_layer.parametrizations.weight[0]
    rotation.base = rotation.base.contiguous()  # its layout decides the last bits in results/
    place = {"layer": REFT_LAYER, "component": "block_output", "low_rank_dimension": REFT_RANK}
    config = ReftConfig(representations=place | {"intervention": intervention})
    return get_reft_model(model, config), intervention


def prepare_forward(model, reft_model, examples):
    """(examples without the start that all prompts share, function `forward` for `train`).

    The paper backpropagates through all prompt tokens. Only the last one is edited: keys and values of those
    before it do not depend on what is trained, and need no gradient. The shared start is computed once and
    removed from `prefix`, which keeps at least one token, but not from prefix_mask."""
    common = os.path.commonprefix([example["prefix"][:-1] for example in examples])
    examples = [example | {"prefix": example["prefix"][len(common) :]} for example in examples]
    start = model.base_model(torch.tensor([common], device=DEVICE), use_cache=True).past_key_values

    def forward(input_ids, prefix, prefix_mask):
        cache = copy.deepcopy(start)
        cache.batch_repeat_interleave(len(input_ids))
        model.base_model(prefix, past_key_values=cache)  # fills the cache
        position = prefix_mask.sum(1, keepdim=True) + torch.arange(input_ids.shape[1], device=DEVICE)
        mask = torch.cat([prefix_mask, torch.ones_like(input_ids)], 1)
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position}
        # Column 0 is the last prompt token: there, and nowhere else, the hidden state is edited.
        return reft_model(inputs | {"past_key_values": cache}, unit_locations={"base": 0})[1]

    return examples, forward


def stage_2_loreft(model, stage, stage_1, examples):
    """A pyreft.ReftModel around `model`: its intervention is read if the stage is finished, else trained."""
    reft_model, intervention = add_intervention(model)
    stage.decided_by["STAGE_1"] = weights_hash(stage_1)  # not known before
    with lock_unfinished(stage):
        if not stage.record:
            adapter = stage.folder / "adapter"  # an intervention is used with the adapter it was trained on
            if stage_1.epochs and stage_1.folder != adapter:
                copy_stage(stage_1, adapter)
            examples, forward = prepare_forward(model, reft_model, examples)
            record = train(stage, intervention, forward, examples, LEARNING_RATE_REFT)
            reft_model.set_device("cpu", set_model=False)  # saved from the CPU, the file loads without a GPU
            with contextlib.redirect_stdout(None):
                finish(stage, record, reft_model.save)
    # Load the saved file even right after training: a later run then evaluates the same weights.
    # (Not by ReftModel.load, which always returns bfloat16.)
    weights = torch.load(stage.folder / stage.files[0], map_location=DEVICE, weights_only=True)
    intervention.load_state_dict(weights)
    reft_model.set_device(DEVICE, set_model=False)
    return reft_model


# ----- Evaluation (paper, section 4)
def generate_answers(model, reft_model, tokenizer, questions):
    """(the generated text for each question, in their order; the evaluation's record)."""
    print(f"\nevaluation of {len(questions):,} questions")
    reset_peak_memory()
    prompts = [row["tokens"] for row in questions]
    text_of = {}
    started = time.time()
    # Greedy: the chat model's own generation_config.json, which load_base_model leaves out, would sample.
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **ends)
    # Four times as many tokens fit without gradients. Longest first: too little memory shows at once.
    groups = microbatches([len(prompt) for prompt in prompts], 4 * TOKENS_PER_MICROBATCH)[::-1]
    bar = tqdm(groups, unit="micro-batch", disable=None, dynamic_ncols=True)
    for done, group in enumerate(bar, 1):
        # Left padding: the last column is the last prompt token.
        rows = tokenizer.pad({"input_ids": [prompts[i] for i in group]}, return_tensors="pt").to(DEVICE)
        columns = rows["input_ids"].shape[1]
        if reft_model:
            edited = dict(unit_locations={"base": columns - 1}, intervene_on_prompt=True)
            _, output = reft_model.generate(dict(rows), generation_config=greedy, **edited)
        else:
            output = model.generate(**rows, generation_config=greedy)
        text_of |= zip(group, tokenizer.batch_decode(output[:, columns:], skip_special_tokens=True))
        log_progress(bar, "micro-batch", done, started, f"{len(text_of):,} questions")
    record = new_record() | {"seconds": time.time() - started, "peak_memory_gb": peak_memory()}
    return [text_of[i].strip() for i in range(len(prompts))], record


def predict(text):
    """The answer in a generated text by the paper's rule: Yes, No, or Unknown, which counts as wrong."""
    return "Yes" if "Yes" in text else "No" if "No" in text else "Unknown"


# ----- The result: the accuracy, and all that is needed to understand it
SUMMARY = (  # of a result, in one line
    "accuracy {accuracy} (95 % interval {confidence_interval_95[0]:.2f} to {confidence_interval_95[1]:.2f}), "
    "{correct_predictions:,} of {num_validation_samples:,} correct, "
    "{yes_answers} Yes, {unknown_answers} Unknown"
)


def write_result(run, evaluation, questions, texts):
    """Write the result and the predictions of the run. Returns the result, the paper's five keys first.

    evaluation: its record, as those of the stages; texts: the generated text for each question."""
    from scipy.stats import binomtest

    rows = [{key: row[key] for key in ("question", "answer")} for row in questions]
    rows = [row | {"prediction": predict(text), "text": text} for row, text in zip(rows, texts)]
    predictions = [row["prediction"] for row in rows]
    n = len(rows)
    correct = sum(row["prediction"] == row["answer"] for row in rows)
    records = {"lora": run.lora.record, "reft": run.reft.record, "evaluation": evaluation}
    seconds = {part: record["seconds"] if record else 0.0 for part, record in records.items()}
    result = {
        "lora_epochs": EPOCHS_LORA,
        "reft_epochs": EPOCHS_REFT,
        "num_validation_samples": n,
        "correct_predictions": correct,
        "accuracy": f"{100 * correct / n:.2f}%",
        "confidence_interval_95": [100 * end for end in binomtest(correct, n).proportion_ci(method="wilson")],
        "yes_answers": predictions.count("Yes"),
        "unknown_answers": predictions.count("Unknown"),
        "settings": run.provenance["settings"] | run.decided_by | stage_hashes(run),
        "seconds": seconds | {"total": sum(seconds.values())},
        "commit": run.provenance["commit"],  # None in a cluster's job
        "script_sha256": run.provenance["script_sha256"],
        "loss": {part: (records[part] or {}).get("loss", []) for part in ("lora", "reft")},
    }
    for key in ("device", "peak_memory_gb", "tokens_per_microbatch", "versions"):
        result[key] = {part: record[key] for part, record in records.items() if record}
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write(run.file.with_suffix(".predictions.jsonl"), "".join(lines))
    write(run.file, json.dumps(result, indent=1) + "\n")  # last: the run is finished
    return result


def print_summary(run):
    """Print what was done, the result, the time and the files."""
    trained = " + ".join(f"{stage.title.split(', ')[1]} {stage.epochs} epochs" for stage in run.stages)
    seconds = ", ".join(f"{part} {value:.1f}" for part, value in run.result["seconds"].items())
    files = [run.file, run.file.with_suffix(".predictions.jsonl"), *(stage.folder for stage in run.stages)]
    print(f"\n{run.name}: {trained or 'the base model, untrained'}\n{SUMMARY.format(**run.result)}")
    if run.name in PAPER_ACCURACY and not SMOKE:
        print(f"paper    {PAPER_ACCURACY[run.name]:.2f}%")
    print(f"seconds  {seconds}; peak memory {max(run.result['peak_memory_gb'].values()):.1f} GB")
    print(f"files    {', '.join(map(str, files))}")


# =============================================================================================
# Bookkeeping: the experiment ends here. First, settings as flags, and the names of runs

HERE = Path(__file__).resolve().parent
if DEVICE == "cuda":
    DEVICE_NAME = torch.cuda.get_device_name()
else:
    DEVICE_NAME = f"CPU {os.uname().machine}, {torch.get_num_threads()} threads"
# fmt: off
# Settings that decide results, besides the epochs, with the paper's values. Other values go into the run's
# name, in this order: do not reorder. Give a new setting the value with which the script acts as before.
PAPER = dict(
    BASE_MODEL="meta-llama/Llama-2-7b-chat-hf", DATASET="google/boolq",
    LORA_RANK=8, LORA_ALPHA=32, LORA_DROPOUT=0.05, LORA_TARGETS="", LEARNING_RATE_LORA=2e-4,
    REFT_LAYER=15, REFT_RANK=4, LEARNING_RATE_REFT=2e-4,
    EXAMPLES_PER_STEP=32, MAX_LENGTH=2048, MAX_NEW_TOKENS=5, DTYPE="bfloat16", SEED=42,
    MAX_TRAIN_SAMPLES=0, MAX_EVAL_SAMPLES=0)
PREFIX = dict(  # of the value in the name, where it is not the setting's name in lower case
    EPOCHS_LORA="lora", EPOCHS_REFT="reft", BASE_MODEL="", DATASET="on_", LORA_TARGETS="lora_targets_",
    LEARNING_RATE_LORA="lr_lora", LEARNING_RATE_REFT="lr_reft", DTYPE="dtype_",
    MAX_TRAIN_SAMPLES="train", MAX_EVAL_SAMPLES="eval")
# A run without the stage does not depend on these.
LORA_SETTINGS = ["LORA_RANK", "LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGETS", "LEARNING_RATE_LORA"]
REFT_SETTINGS = ["REFT_LAYER", "REFT_RANK", "LEARNING_RATE_REFT"]
EVALUATION_SETTINGS = ["MAX_NEW_TOKENS", "MAX_EVAL_SAMPLES"]  # no stage depends on these
PAPER_ACCURACY = {"lora0-reft20": 83.36, "lora20-reft0": 85.05, "lora3-reft3": 85.17, "lora20-reft20": 85.47}
# What --smoke changes: the same script on the embedded toy, which needs larger steps.
SMOKE_VALUES = dict(
    BASE_MODEL=os.path.relpath(HERE / "smoke/model"), DATASET=os.path.relpath(HERE / "smoke/data"),
    DTYPE="float32", LEARNING_RATE_LORA=9e-4, LEARNING_RATE_REFT=1e-3,
    PUSH_TO_HUB=False, OUTPUT_DIR="output/smoke", RESULTS_DIR="results/smoke")
# Type, check and description of each setting. Settings that are not listed are True or False.
ALLOWED = {name: rule for names, *rule in [
    ("EPOCHS_LORA EPOCHS_REFT REFT_LAYER MAX_TRAIN_SAMPLES MAX_EVAL_SAMPLES SEED",
     int, lambda n: 0 <= n < 2**32, "a whole number from 0"),
    ("LORA_RANK LORA_ALPHA REFT_RANK EXAMPLES_PER_STEP TOKENS_PER_MICROBATCH MAX_NEW_TOKENS",
     int, lambda n: n >= 1, "a whole number from 1"),
    ("MAX_LENGTH", int, lambda n: n >= 2, "a whole number from 2"),
    ("LORA_DROPOUT", float, lambda x: 0 <= x < 1, "from 0 to below 1"),
    ("LEARNING_RATE_LORA LEARNING_RATE_REFT", float, lambda x: 0 < x < math.inf, "above 0"),
    ("DTYPE", str, lambda text: text in ("bfloat16", "float32"), "bfloat16 or float32"),
    ("BASE_MODEL DATASET OUTPUT_DIR RESULTS_DIR", str, str.strip, "a name, not empty"),
    ("RESULTS_FILE", str, re.compile(r"([^/]*\.json)?").fullmatch, "a file name in .json, without a folder"),
    ("HF_USER HF_REPO_LORA HF_REPO_REFIT LORA_TARGETS MERGED_DIR",
     str, lambda text: text.isprintable() and text != "None", 'one line, "" for none'),
] for name in names.split()}
# fmt: on


def allowed_value(name, text):
    """The value of the setting `name`, whose text comes from a flag or a constant."""
    kind, test, words = ALLOWED[name]
    with contextlib.suppress(ValueError):
        if test(kind(text)):
            return kind(text)
    raise argparse.ArgumentTypeError(f"must be {words} (it is {text!r})")


def read_settings(arguments):
    """All settings: the constants on the first screen, or what the flags in `arguments` say instead."""
    where = f"The constants at the top of {Path(__file__).name} say what each setting means."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=where, allow_abbrev=False)
    parser.error = partial(stop_if, True)
    parser.add_argument("--smoke", dest="SMOKE", action="store_true", help="the embedded toy, CPU, no Hub")
    defaults = globals() | (SMOKE_VALUES if "--smoke" in arguments else {})
    for name in SETTINGS:
        flag = "--" + name.lower().replace("_", "-")
        default = defaults[name]
        if name in ALLOWED:
            words = f"{ALLOWED[name][2]} (default: {default!r})".replace("%", "%%")
            # The default is passed as text, so that argparse checks an edited constant like a flag.
            options = dict(type=partial(allowed_value, name), default=str(default), metavar="X", help=words)
        else:
            stop_if(not isinstance(default, bool), f"{name} must be True or False, not {default!r}")
            options = dict(action=argparse.BooleanOptionalAction, default=default)
        parser.add_argument(flag, dest=name, **options)
    return vars(parser.parse_args(arguments))


def identity(settings, part):
    """(name, settings) of part "lora", "reft" or "run": the settings that decide its outcome, and a name such
    as lora3-reft3-seed7: the epochs, then what differs from PAPER (in a smoke run, from SMOKE_VALUES)."""
    absent = []
    if part != "run":
        absent += EVALUATION_SETTINGS
    if part == "lora":  # not "reft": stage 2 depends on stage 1's settings, too
        absent += ["EPOCHS_REFT", *REFT_SETTINGS]
    if not settings["EPOCHS_LORA"]:
        absent += LORA_SETTINGS
    if not settings["EPOCHS_REFT"]:
        absent += REFT_SETTINGS
    names = [name for name in ("EPOCHS_LORA", "EPOCHS_REFT", *PAPER) if name not in absent]
    usual = PAPER | (SMOKE_VALUES if settings["SMOKE"] else {})  # without the epochs, which are always named
    parts = []
    for name in names:
        value = settings[name]
        if name not in usual or value != usual[name]:
            text = os.path.basename(value.rstrip("/")) if isinstance(value, str) else f"{value:.10g}"
            parts.append(re.sub(r"[^A-Za-z0-9._+]+", "_", PREFIX.get(name, name.lower()) + text))
    hashed = ("BASE_MODEL", "DATASET")  # plan_run identifies these by their content
    return "-".join(parts), {name: settings[name] for name in names if name not in hashed}


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
def explained(what):
    """Turn any error of a library within the block into a Stop whose message begins with `what`.

    Its status is 1 if the Hub is unreachable or fails, and 2 otherwise: the user can fix it."""
    try:
        yield
    except (Stop, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, GatedRepoError):
            what = f"request access at https://huggingface.co/{error.repo_id}, and set HF_TOKEN to your token"
        response = getattr(error, "response", None)
        if response is not None:  # the Hub has answered
            status = 2 if response.status_code in (400, 401, 403, 404) else 1
        else:
            unreachable = (RequestError, ConnectionError, TimeoutError, LocalEntryNotFoundError)
            status = 1 if isinstance(error, unreachable) and not huggingface_hub.is_offline_mode() else 2
        raise Stop(f"{what} ({first_line(error)})", status) from error


def first_line(error):
    """The first line of an exception's message: libraries add pages of advice."""
    kind = "" if isinstance(error, Stop) else f"{type(error).__name__}: "
    return (kind + str(error).strip()).partition("\n")[0][:300]


def report_error(error):
    """Print what ended the program: one line, or the traceback of a bug. Returns the exit status."""
    if isinstance(error, torch.OutOfMemoryError):
        smaller = f"--tokens-per-microbatch below {TOKENS_PER_MICROBATCH}"
        error = Stop(f"GPU memory is full: set {smaller}, or use a GPU with more memory", 1)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error = Stop(f"the disk is full ({error.filename}): make room; the same command then continues", 1)
    if not isinstance(error, Stop):
        traceback.print_exception(error)
        return 1
    tqdm.write(f"heft: error: {error}", file=sys.stderr)  # not within a progress bar
    return error.status


def set_up_libraries():
    """Keep their messages off the screen (this script reports what goes wrong); give the Hub a timeout."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    huggingface_hub.set_client_factory(hub_client)


def hub_client():
    """huggingface_hub's HTTP client, with a timeout: by default, it waits for a stalled Hub for ever."""
    default = huggingface_hub.utils._http.default_client_factory
    with explained("cannot connect to the Hub: correct or unset SSL_CERT_FILE, SSL_CERT_DIR and *_PROXY"):
        client = default()
    client.timeout = 60  # seconds
    return client


# ----- The base model and the machine, checked before anything takes time
TOKENIZER_FILES = "tokenizer* *.model special_tokens_map.json added_tokens.json vocab* merges.txt".split()


@dataclass
class BaseModel:
    """BASE_MODEL without its weights."""

    folder: Path  # BASE_MODEL or, of a model on the Hub, its copy in the cache
    version: str  # hash of the files that decide its outputs; of a model on the Hub, its commit
    tokenizer: transformers.PreTrainedTokenizerBase
    meta_model: torch.nn.Module  # the model without weights, on the "meta" device


def inspect_base_model():
    """The BaseModel that BASE_MODEL names. Stop if it cannot be loaded, trained, merged or prompted."""
    with explained(f"cannot use {BASE_MODEL!r} as --base-model, the folder or Hub name of a language model"):
        if os.path.isdir(BASE_MODEL):
            folder = Path(BASE_MODEL)
            weights = any(folder.glob("*.safetensors"))
            stop_if(not weights, f"the folder {BASE_MODEL!r} holds no weights in safetensors form")
        else:
            small = dict(allow_patterns=["*.json", "*.model", "*.txt", "*.jinja"])
            quiet = dict(tqdm_class=partial(tqdm, disable=True))
            folder = Path(huggingface_hub.snapshot_download(BASE_MODEL, **small, **quiet))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        plain = config.get_text_config() is config and not hasattr(config, "quantization_config")
        stop_if(not plain, f"{BASE_MODEL!r} is multimodal or quantized: use a plain language model")
        adapter = (folder / "adapter_config.json").exists()  # transformers would attach it unasked
        stop_if(adapter, f"{BASE_MODEL!r} holds a PEFT adapter, too: merge it, or move it away")
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
        with torch.device("meta"):
            meta_model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPE))
        check_tokenizer(tokenizer)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # as in the paper
        check_stages(meta_model)
        patterns = ["*.safetensors", "config.json", *TOKENIZER_FILES]
        files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
        commit = None if os.path.isdir(BASE_MODEL) else folder.name
        model_version = commit or digest({file.name: digest(file) for file in files})
    return BaseModel(folder, model_version, tokenizer, meta_model)


def check_tokenizer(tokenizer):
    """Stop if it cannot produce the answers."""
    name = f"the tokenizer of {BASE_MODEL!r}"
    stop_if(not tokenizer.eos_token, f"{name} has no end-of-sequence token")
    for word in ("Yes", "No"):
        plain = tokenizer(word, add_special_tokens=False)["input_ids"]
        ended = tokenizer(word)["input_ids"][-len(plain) :] != plain
        stop_if(ended, f"{name} adds a token at the end of each text: set its add_eos_token to false")
        stop_if(predict(tokenizer.decode(plain)) != word, f"{name} cannot write {word!r}: use another model")


def check_stages(meta_model):
    """Stop if a stage does not fit the model, or if its update could not be merged."""
    config = meta_model.config
    if EPOCHS_REFT:
        with contextlib.redirect_stdout(None):  # see add_intervention
            from pyvene import type_to_module_mapping as known

        kind = type(meta_model)
        stop_if(kind not in known, f"pyvene does not know {kind.__name__}: use --epochs-reft 0")
        beyond = REFT_LAYER >= config.num_hidden_layers
        stop_if(beyond, f"--reft-layer {REFT_LAYER}: the blocks are 0 to {config.num_hidden_layers - 1}")
        stop_if(REFT_RANK > config.hidden_size, f"--reft-rank {REFT_RANK}: the width is {config.hidden_size}")
    if EPOCHS_LORA:
        from peft import get_peft_model

        with explained(f"--lora-targets {LORA_TARGETS!r} does not fit {BASE_MODEL!r}"):
            adapted = get_peft_model(meta_model, lora_config())
        for target in adapted.peft_config["default"].target_modules:  # PEFT complains only if none is found
            found = any(f".{name}".endswith(f".{target}") for name in adapted.targeted_module_names)
            stop_if(not found, f"--lora-targets: no layer of {BASE_MODEL!r} is called {target}")
        ends = [meta_model.get_input_embeddings(), meta_model.get_output_embeddings()]
        adapted_end = any(hasattr(layer, "base_layer") for layer in ends)  # PEFT wraps the layers it adapts
        shared = config.tie_word_embeddings and adapted_end
        name = f"--lora-targets {LORA_TARGETS}"
        stop_if(shared, f"{name}: input and output embeddings are one matrix, so no update can be merged")
        adapted.unload()  # get_peft_model has changed meta_model itself


def check_lengths(base, examples, questions):
    """Stop if a row is longer than the model allows, or has a token outside its vocabulary."""
    prompts = [question["tokens"] for question in questions]
    texts = [*prompts, *(example["input_ids"] for example in examples)]
    highest = max(base.tokenizer.eos_token_id, base.tokenizer.pad_token_id, *map(max, texts))
    words = base.meta_model.get_input_embeddings().weight.shape[0]
    stop_if(highest >= words, f"{BASE_MODEL!r} has {words} tokens, its tokenizer produces number {highest}")
    longest = max(*map(len, texts), *(len(prompt) + MAX_NEW_TOKENS for prompt in prompts))
    limits = [getattr(base.meta_model.config, "max_position_embeddings", None)]
    config = base.meta_model.config.to_dict()
    rope = config.get("rope_parameters") or {}
    for part in (rope, *rope.values()):  # for all layers, or for each kind of layer
        if isinstance(part, dict) and part.get("rope_type") in ("dynamic", "longrope"):
            limits.append(part.get("original_max_position_embeddings"))  # beyond, a row depends on its batch
    if EPOCHS_REFT:  # a sliding window would count the padding between prefix and last prompt token
        sizes = [size for name, size in config.items() if re.search("window(_size)?$", name)]
        limits += [size for size in sizes if type(size) is int]
    limit = min(filter(None, limits), default=longest)
    remedy = "leave out longer rows, or use another model (or --max-length; with a window, --epochs-reft 0)"
    stop_if(longest > limit, f"{BASE_MODEL!r} takes {limit} tokens, and a row has {longest}: {remedy}")


def check_device(base):
    """Stop if this machine cannot run the model. Its memory is measured later, by check_memory."""
    size = base.meta_model.num_parameters() / 1e9
    if DEVICE == "cuda":
        able = DTYPE == "float32" or torch.cuda.get_device_capability() >= (8, 0)
        stop_if(not able, f"{DEVICE_NAME} has no bfloat16 in hardware: use another GPU, or --dtype float32")
    elif size > 2:
        advice = "use a GPU of 32 GB (condor_submit heft.sub), or try --smoke"
        with explained(f"no GPU found, and {BASE_MODEL!r} has {size:.1f} billion parameters: {advice}"):
            torch.cuda.init()  # its error says whether there is no GPU or its driver is too old


def check_folders():
    """Create the folders for output. Stop if they cannot be written, or if one is the base model's."""
    same = MERGED_DIR and Path(MERGED_DIR).resolve() == Path(BASE_MODEL).resolve()
    stop_if(same, "--merged-dir is the folder of the base model, which it would overwrite")
    for folder in filter(None, (OUTPUT_DIR, RESULTS_DIR, MERGED_DIR)):
        with explained(f"cannot write in the folder {folder!r}: choose another"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()


def load_base_model(base):
    """The causal language model BASE_MODEL in DTYPE on the device; from safetensors only."""
    with explained(f"cannot load the model {BASE_MODEL!r}"):
        if not os.path.isdir(BASE_MODEL):  # the weights join the other files of this commit, in base.folder
            weights = dict(revision=base.version, allow_patterns="*.safetensors")
            huggingface_hub.snapshot_download(BASE_MODEL, **weights)
        # Its own generation_config.json would fill in what generate_answers leaves open.
        options = dict(generation_config=GenerationConfig(), use_safetensors=True, output_loading_info=True)
        options |= dict(dtype=getattr(torch, DTYPE), device_map=DEVICE)
        model, loading = AutoModelForCausalLM.from_pretrained(base.folder, **options)
    missing = sorted(loading["missing_keys"])
    stop_if(missing, f"the model {BASE_MODEL!r} lacks weights: {', '.join(missing[:3])} ...")
    model.name_or_path = BASE_MODEL  # PEFT writes it into the adapter: not the path of the Hub's cache
    return model


def reset_peak_memory():
    """Reset the peak that peak_memory reports."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux; elsewhere the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory():
    """Largest memory held since reset_peak_memory, in GB: the GPU's or, without one, this process's."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (torch.cuda.max_memory_allocated() if DEVICE == "cuda" else own) / 1e9


# ----- Stages and their records: heft.json, written last into a stage's folder, says what made its weights
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")  # the names that PEFT gives


@dataclass
class Stage:
    """One training stage: what decides its weights, where they are stored, and its record."""

    title: str  # in messages: "stage 1, LoRA"
    epochs: int  # passes over the data; 0: the run has no such stage
    decided_by: dict  # what decides its weights: settings; hashes of model, data and, when known, stage 1
    folder: Path  # holds heft.json and `files` when the stage is finished, and checkpoint.pt before
    files: tuple  # names of the weights and of their configuration, as PEFT or pyvene gives them
    repo: str  # its repository on the Hub, owner/name (without the owner until the Hub is queried)
    record: dict | None = None  # content of heft.json; None: the stage is not finished
    on_hub: Path | bool | None = None  # downloaded copy; False: the repository has none; None: not known


@dataclass
class Run:
    """What is evaluated: the base model after the stages that have epochs."""

    name: str  # such as lora3-reft3-seed7
    lora: Stage
    reft: Stage
    decided_by: dict  # all that decides the result, except the stages' weights: the result names their hashes
    provenance: dict  # for the result: all settings; commit and hash of this script
    file: Path  # of the result
    result: dict | None = None  # content of the file; None: not evaluated yet

    @property
    def stages(self):
        """The stages that the run has."""
        return [stage for stage in (self.lora, self.reft) if stage.epochs]


def plan_run(settings, base, train_rows, questions):
    """The Run: its stages, all that decides it, and the folders it uses."""
    # FORMAT: increase it when what older versions of this script made must not be reused.
    made_from = {"FORMAT": 3, "BASE_VERSION": base.version, "TRAIN_DATA": digest(train_rows)}

    def planned(part, title, epochs, repo, files):
        name, deciding = identity(settings, part)
        repo = repo or hub_name(name)
        return Stage(title, epochs, deciding | made_from, Path(OUTPUT_DIR, name), files, repo)

    reft_files = (f"intkey_layer_{REFT_LAYER}_comp_block_output_unit_pos_nunit_1#0.bin", "config.json")
    lora = planned("lora", "stage 1, LoRA", EPOCHS_LORA, HF_REPO_LORA, ADAPTER_FILES)
    reft = planned("reft", "stage 2, LoReFT", EPOCHS_REFT, HF_REPO_REFIT, reft_files)
    name, deciding = identity(settings, "run")
    deciding |= made_from | {"VALIDATION_DATA": digest(questions)}
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout.strip()
    provenance = {"settings": settings, "commit": commit or None, "script_sha256": digest(Path(__file__), 64)}
    file = Path(RESULTS_DIR, RESULTS_FILE or f"{name}.json")
    return Run(name, lora, reft, deciding, provenance, file)


def already_done(run):
    """Set `result` and query the Hub. True, after a message, if nothing is left to do."""
    run.result = read_matching(run.file, run.decided_by)
    if PUSH_TO_HUB and run.stages:
        query_hub(run)
    pushed = not PUSH_TO_HUB or all(stage.on_hub for stage in run.stages)
    if not run.result or not pushed or MERGED_DIR:
        return False
    print(f"already done: {run.file}; move it away to evaluate again\n{SUMMARY.format(**run.result)}")
    return True


def find_finished_stages(run):
    """Set `record` and `folder` of the finished stages. Stop if they or the result do not fit together."""
    # A stage 2 is used only with the stage 1 it was trained on, which lies in its folder: look there first.
    if EPOCHS_REFT:
        reuse(run.reft, run.reft.folder, run.reft.on_hub)
    if EPOCHS_LORA:
        reuse(run.lora, run.reft.folder / "adapter", run.lora.folder, run.lora.on_hub)
    if run.reft.record:
        read_matching(run.reft.folder / "heft.json", {"STAGE_1": weights_hash(run.lora)})
    if run.result:  # what is pushed or merged now are the weights it was measured on
        read_matching(run.file, stage_hashes(run))


def weights_hash(stage):
    """The hash of a stage's weights; None if it is not finished, or if the run does not have it."""
    return stage.record["weights"] if stage.record else None


def stage_hashes(run):
    """The weights that the run's result is measured on, as hashes."""
    return {"STAGE_1": weights_hash(run.lora), "STAGE_2": weights_hash(run.reft)}


def reuse(stage, *folders):
    """Use the first of the folders that holds the finished stage. Stop if one holds another run's files."""
    for folder in filter(None, folders):
        record = read_matching(folder / "heft.json", stage.decided_by)
        if record:
            weights = folder / stage.files[0]
            intact = weights.exists() and digest(weights) == record["weights"]
            stop_if(not intact, f"{weights} is not what heft.json beside it describes: move these files away")
            stage.record, stage.folder = record, folder
            print(f"{stage.title} is finished in {folder}")
            return
        # A checkpoint of other settings is refused now, not after hours.
        read_matching(folder / "checkpoint.pt", checkpoint_settings(stage))


def read_matching(file, expected, place=None):
    """The record, checkpoint or result in `file`, None if there is none.

    Stop if it is damaged, or made with other values of the settings in `expected`. place: what to call it."""
    if not os.path.exists(file):
        return None
    data = file.read_bytes()
    with explained(f"{place or file} is damaged or not of this program: move it away"):
        content = torch.load(io.BytesIO(data), "cpu") if file.suffix == ".pt" else json.loads(data)
        # A setting that is newer than the file had the paper's value when the file was written.
        found = PAPER | content["settings"]
    other = [f"{k.lower()} {found.get(k)!r}, not {v!r}" for k, v in expected.items() if found.get(k) != v]
    advice = "use those, move it away, or choose another --output-dir, --results-dir or repository"
    stop_if(other, f"{place or file} was made with {'; '.join(other)}: {advice}")
    return content


def new_record():
    """A record without training."""
    packages = "transformers peft pyreft pyvene accelerate datasets huggingface_hub".split()
    versions = {"python": sys.version.split()[0], "torch": str(torch.__version__)}  # +cpu or +cu128
    return {
        "device": DEVICE_NAME,
        "versions": versions | {name: version(name) for name in packages},
        "tokens_per_microbatch": TOKENS_PER_MICROBATCH,
        "loss": [],  # of each step
        "seconds": 0.0,
        "peak_memory_gb": 0.0,
    }


def checkpoint_settings(stage):
    """All that decides the steps after a checkpoint: the micro-batch size changes the dropout masks."""
    return stage.decided_by | {"TOKENS_PER_MICROBATCH": TOKENS_PER_MICROBATCH}


def restore_checkpoint(stage, tensors, optimizer):
    """Restore the state in the stage's checkpoint, if there is one. Returns the record so far."""
    file = stage.folder / "checkpoint.pt"
    state = read_matching(file, checkpoint_settings(stage))
    if not state:
        return new_record()
    for tensor, saved in zip(tensors, state["tensors"]):
        tensor.data.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    record = state["record"]
    if DEVICE_NAME not in record["device"].split(" + "):
        record["device"] += f" + {DEVICE_NAME}"
    print(f"resuming from {file} after step {len(record['loss'])}")
    return record


def finish(stage, record, write_weights):
    """Save the weights, then the record. write_weights: a function that takes a folder."""
    with tempfile.TemporaryDirectory(suffix=".tmp", dir=stage.folder) as folder:
        try:
            write_weights(folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # not all say that the disk is full
            if shutil.disk_usage(folder).free < 1e5:
                raise OSError(errno.ENOSPC, "no space left", stage.folder) from error
            raise
        for name in stage.files:
            Path(folder, name).replace(stage.folder / name)
    stage.record = record | {"settings": stage.decided_by, "weights": digest(stage.folder / stage.files[0])}
    write(stage.folder / "heft.json", json.dumps(stage.record))
    (stage.folder / "checkpoint.pt").unlink(missing_ok=True)


def copy_stage(stage, target):
    """Copy a finished stage into the folder `target`; heft.json, which says that all is there, comes last."""
    target.mkdir(exist_ok=True)
    for name in stage.files:
        shutil.copy(stage.folder / name, target)
    changed = digest(target / stage.files[0]) != stage.record["weights"]
    stop_if(changed, f"{stage.folder / stage.files[0]} has changed since it was trained: move it away")
    write(target / "heft.json", json.dumps(stage.record))


@contextlib.contextmanager
def lock_unfinished(stage):
    """Let only one process train a stage. After waiting, look again: another one may have finished it."""
    if stage.record:
        yield
        return
    stage.folder.mkdir(parents=True, exist_ok=True)
    with open(stage.folder / "lock", "w") as file:  # unlocked when it is closed, or when the process ends
        wait_for_lock(file)
        for left in list(stage.folder.glob("**/*.tmp")):  # by a process that was killed while it wrote
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
        reuse(stage, stage.folder)
        yield


def wait_for_lock(file):
    """Lock an open file. Do nothing if the file system does not support locks."""
    for second in range(LOCK_SECONDS):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if second == 0:
                print(f"waiting for another run, which holds {file.name}")
            time.sleep(1)
        except OSError:
            return None
    raise Stop(f"another run still holds {file.name}: try again later, or remove it if there is none", 1)


def digest(content, digits=16):
    """The first digits of the SHA-256 of a file (a Path), or of anything else as JSON."""
    if isinstance(content, Path):
        return hashlib.file_digest(content.open("rb"), "sha256").hexdigest()[:digits]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:digits]


def write(path, content):
    """Write text, or anything else with torch.save, then rename: a reader finds all of it or nothing."""
    buffer = io.BytesIO()  # torch.save into a file hides that the disk is full
    if isinstance(content, str):
        buffer.write(content.encode())
    else:
        torch.save(content, buffer)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    except OSError as error:  # which may lack the file name
        raise OSError(error.errno, error.strerror, path) from error
    finally:  # half a file would keep a full disk full
        temporary.unlink(missing_ok=True)


# ----- The Hub: queried at the start, where errors show early; filled at the end, when everything is on disk
def hub_name(name):
    """A name as the Hub allows it: at most 96 characters, and no -- or .. in it."""
    name = re.sub(r"([-.])[-.]+", r"\1", f"heft-{name}".replace("+", "_"))
    return name if len(name) <= 96 else f"{name[:79].rstrip('-.')}-{digest(name)}"


def query_hub(run):
    """Set `on_hub` of the stages. Stop if the token is not valid, or if a repository holds something else."""
    stages = run.stages
    advice = "set HF_TOKEN to a valid token, choose other repositories, or use --no-push-to-hub"
    stop_if(not huggingface_hub.get_token(), f"PUSH_TO_HUB needs a token: {advice}")
    try:
        with explained(f"cannot use {' and '.join(stage.repo for stage in stages)} on the Hub: {advice}"):
            huggingface_hub.whoami()  # fails if the token is not valid
            for stage in stages:
                stage.on_hub = find_on_hub(stage)
    except Stop as stop:
        if stop.status == 2:  # the user can fix it; 1: the Hub is down
            raise
        later = f"the Hub is unreachable, and the same command pushes later ({stop})"
        stop_if(run.result, f"{run.file} is finished; {later}", 1)
        print(f"the Hub is unreachable: nothing is reused from it, and pushing is tried at the end ({stop})")
    same = len({stage.repo for stage in stages}) < len(stages)
    stop_if(same, f"{stages[0].repo} cannot hold both stages: choose another --hf-repo-refit")


def find_on_hub(stage):
    """Complete stage.repo by its owner and, if that repository holds the finished stage, download it.

    Returns the stage's folder; False if there is nothing yet. Stop if the repository holds anything else.
    STAGE_1 is not compared: a stage 2 on the Hub brings its own stage 1 along, in adapter/."""
    if "/" not in stage.repo:
        stage.repo = f"{HF_USER or huggingface_hub.whoami()['name']}/{stage.repo}"
    try:
        files = set(huggingface_hub.list_repo_files(stage.repo)) - {".gitattributes"}
    except RepositoryNotFoundError:
        return False
    if not files:
        return False
    foreign = "heft.json" not in files
    stop_if(foreign, f"the Hub repository {stage.repo} holds something else: choose another, or empty it")
    names = ["heft.json", "adapter/*", *stage.files]
    snapshot = Path(huggingface_hub.snapshot_download(stage.repo, allow_patterns=names))
    expected = {name: value for name, value in stage.decided_by.items() if name != "STAGE_1"}
    read_matching(snapshot / "heft.json", expected, f"the Hub repository {stage.repo}")
    # The repository of stage 1 holds the merged model and, in adapter/, the stage.
    return snapshot / "adapter" if stage.files == ADAPTER_FILES else snapshot


def push_stages(model, base, run):
    """Upload the finished stages that the Hub does not have. Stop with status 1 if that fails."""
    failed = []
    for stage in run.stages:
        try:
            if not stage.on_hub:
                push(stage, model, base, run)
        except Exception as error:  # of many types; the other stage is pushed all the same
            failed.append(f"{stage.title} to {stage.repo} ({first_line(error)})")
    later = f"everything is saved; to push later, run: {shlex.join(['python', *sys.argv])}"
    stop_if(failed, f"not pushed: {'; '.join(failed)}; {later}", 1)


def push(stage, model, base, run):
    """Upload a finished stage in one commit, unless the repository has one with the same settings."""
    if find_on_hub(stage):  # another run may have pushed meanwhile
        print(f"{stage.repo} has {stage.title} of the same settings from another run: left as it is")
        return
    print(f"pushing {stage.title} to {stage.repo}")
    # Not in OUTPUT_DIR, which a cluster transfers: the merged model can be rebuilt in seconds.
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=".") as folder:
        folder = Path(folder)
        if run.lora.epochs:
            copy_stage(run.lora, folder / "adapter")
        if stage is run.lora:
            write_merged(model, base, folder)
            shutil.copy(folder / "adapter/heft.json", folder)
        else:
            copy_stage(run.reft, folder)
        write(folder / "README.md", model_card(stage, run))
        huggingface_hub.create_repo(stage.repo, private=PRIVATE_REPOS, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=stage.repo, folder_path=folder, commit_message="HEFT")


def write_merged(model, base, folder):
    """Save the merged model; copy the base model's tokenizer and generation_config.json unchanged."""
    with explained(f"cannot write the merged model to {folder}"):
        model.save_pretrained(folder)
    Path(folder, "generation_config.json").unlink(missing_ok=True)
    for name in ("generation_config.json", "chat_template*", *TOKENIZER_FILES):
        for path in base.folder.glob(name):
            shutil.copy(path, folder)


def model_card(stage, run):
    """The README of a repository: what it holds, the result of the run, the lines that load it."""
    names = (BASE_MODEL, DATASET)
    base, data = (os.path.basename(os.path.abspath(x)) if os.path.isdir(x) else x for x in names)
    if stage is run.lora:
        load = [f'model = AutoModelForCausalLM.from_pretrained("{stage.repo}", dtype=torch.{DTYPE})']
    else:  # in bfloat16, as pyreft loads every intervention in it
        load = [f'model = AutoModelForCausalLM.from_pretrained("{base}", dtype=torch.bfloat16)']
        load += [f'folder = huggingface_hub.snapshot_download("{stage.repo}")']
        if run.lora.epochs:
            load += ['model = PeftModel.from_pretrained(model, folder + "/adapter").merge_and_unload()']
        load += ["reft_model = pyreft.ReftModel.load(folder, model)"]
    lines = "\n".join(load)
    return f"""---
base_model: {base}
datasets: [{data}]
license: {"llama2" if "llama-2" in base.lower() else "other"}
---
This is {stage.title}, of the run {run.name}: {base}, fine-tuned by the reference reproduction of HEFT
(arXiv 2509.09801). Result of the run: {SUMMARY.format(**run.result)}.
```python
import huggingface_hub, pyreft, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
{lines}
```
Settings: `{json.dumps(stage.decided_by)}`. The licence of the base model applies.
"""


if __name__ == "__main__":
    try:
        main()
        status = 0
    except Exception as error:
        status = report_error(error)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python takes a second to exit
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)
