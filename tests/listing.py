"""The paper's procedure in its plainest form, on today's packages: the reference for parity and for speed.

Stage 1 pads every text to MAX_LENGTH, one text per forward, 32 accumulated; stage 2 takes 8 texts per forward
with every token in the graph, 4 accumulated; evaluation takes one prompt at a time. It shares with
heft_finetuning.py the prompt and the order of the examples, and nothing else.
Its differences from the paper's script are in README.md, under what changes the numbers: greedy decoding, and
a step's loss that is a mean over its examples also where fewer than 32 are left.
"""

import contextlib

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    get_linear_schedule_with_warmup,
    set_seed,
)

with contextlib.redirect_stdout(None):
    from pyreft import LoreftIntervention, ReftConfig, get_reft_model


def optimize(parameters, forward, examples, per_forward, epochs, rate, seed, per_step=32):
    """AdamW, linear decay, clip 1.0. `forward(list of examples)` is a mean loss. Returns each step's loss."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    total = -(-len(examples) // per_step) * epochs
    schedule = get_linear_schedule_with_warmup(optimizer, 0, total)
    losses = []
    for epoch in range(epochs):
        # The order of the script: one of its own for each epoch, from the seed.
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        what = f"epoch {epoch + 1} of {epochs}"
        for start in tqdm(range(0, len(order), per_step), desc=what, dynamic_ncols=True):
            step = [examples[i] for i in order[start : start + per_step]]
            total_loss = 0.0
            for first in range(0, len(step), per_forward):
                group = step[first : first + per_forward]
                loss = forward(group) * len(group) / len(step)
                loss.backward()
                total_loss += loss.item()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(total_loss)
    return losses


def stage_1(model, tokenizer, rows, epochs, rate=2e-4, dropout=0.05, max_length=2048, seed=42):
    """LoRA on the whole text. Returns (PeftModel, losses)."""
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.pad_token or tokenizer.eos_token
    texts = [f"{row['prompt']} {row['answer']}{tokenizer.eos_token}" for row in rows]
    size = dict(truncation=True, max_length=max_length, padding="max_length")
    examples = [tokenizer(text, **size) for text in texts]
    # Labels are the tokens, without the padding token: where that is EOS, the real EOS is left out, too.
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    set_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=dropout)
    model = get_peft_model(model, config)
    model.train()

    def forward(group):
        return model(**collator(group).to(model.device)).loss

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, optimize(trainable, forward, examples, 1, epochs, rate, seed)


def stage_2(model, tokenizer, rows, epochs, rate=2e-4, layer=15, max_length=2048, seed=42):
    """LoReFT at the last prompt token. Returns (ReftModel, losses)."""
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.pad_token or tokenizer.eos_token
    size, examples = dict(truncation=True, max_length=max_length), []
    for row in rows:
        text = row["prompt"] + row["answer"] + tokenizer.eos_token
        n = len(tokenizer(row["prompt"], **size)["input_ids"])
        tokens = tokenizer(text, **size)["input_ids"]
        examples.append({"input_ids": tokens, "labels": [-100] * n + tokens[n:], "location": n - 1})
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100, padding="longest")
    set_seed(seed)
    width = model.config.hidden_size
    intervention = LoreftIntervention(embed_dim=width, low_rank_dimension=4, dtype=model.dtype)
    place = {"layer": layer, "component": "block_output", "low_rank_dimension": 4}
    reft_model = get_reft_model(model, ReftConfig(representations=place | {"intervention": intervention}))

    def forward(group):
        rows = [{key: e[key] for key in ("input_ids", "labels")} for e in group]
        inputs = collator([row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows])
        inputs = inputs.to(model.device)
        labels = inputs.pop("labels")
        where = {"sources->base": (None, [[[e["location"]] for e in group]])}
        _, output = reft_model(dict(inputs), unit_locations=where, labels=labels)
        return output.loss

    trainable = list(intervention.parameters())
    return reft_model, optimize(trainable, forward, examples, 8, epochs, rate, seed)


def evaluate(model, tokenizer, rows, reft_model=None, max_new_tokens=5):
    """The generated text of each prompt, one at a time, greedily."""
    texts = []
    model.eval()
    ends = dict(pad_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    greedy = dict(max_new_tokens=max_new_tokens, do_sample=False, **ends)
    for row in tqdm(rows, desc="one prompt at a time", dynamic_ncols=True):
        inputs = tokenizer(row["prompt"], return_tensors="pt").to(model.device)
        length = inputs["input_ids"].shape[1]
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        if reft_model:
            where = {"sources->base": (None, [[[length - 1]]])}
            _, output = reft_model.generate(inputs, unit_locations=where, intervene_on_prompt=True, **greedy)
        else:
            output = model.generate(**inputs, **greedy)
        texts.append(tokenizer.decode(output[0, length:], skip_special_tokens=True).strip())
    return texts
