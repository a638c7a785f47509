"""The paper's procedure in its plainest form, on today's packages: the reference for parity and for speed.

Stage 1 pads every text to MAX_LENGTH, one text per forward, 32 accumulated; stage 2 takes 8 texts per forward
with every token in the graph, 4 accumulated; evaluation takes one prompt at a time. It shares with
heft_finetuning.py the prompt and the order of the examples, and nothing else.
Differences from the paper's script are those that the README lists as changing its numbers: greedy decoding,
and a step's loss that is a mean over its examples also where fewer than 32 are left.
"""

import contextlib

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, get_linear_schedule_with_warmup, set_seed

with contextlib.redirect_stdout(None):
    from pyreft import LoreftIntervention, ReftConfig, get_reft_model


def optimize(parameters, forward, examples, per_forward, epochs, rate, seed, per_step=32, steps=None):
    """AdamW, linear decay, clip 1.0; `forward(list of examples)` is a mean loss. Returns the loss of each step."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    total = -(-len(examples) // per_step) * epochs
    schedule = get_linear_schedule_with_warmup(optimizer, 0, total)
    losses = []
    for epoch in range(epochs):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed + epoch)).tolist()  # the Trainer's
        for start in tqdm(range(0, len(order), per_step), desc=f"epoch {epoch + 1} of {epochs}", dynamic_ncols=True):
            step = [examples[i] for i in order[start:start + per_step]]
            total_loss = 0.0
            for first in range(0, len(step), per_forward):
                group = step[first:first + per_forward]
                loss = forward(group) * len(group) / len(step)
                loss.backward()
                total_loss += loss.item()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(total_loss)
            if steps and len(losses) == steps:
                return losses
    return losses


def stage_1(model, tokenizer, rows, epochs, seed=42, rate=2e-4, rank=8, alpha=32, dropout=0.05, max_length=2048, per_step=32, steps=None):
    """LoRA on the whole text. Returns (PeftModel, losses)."""
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.eos_token
    texts = [f"{row['prompt']} {row['answer']}{tokenizer.eos_token}" for row in rows]
    examples = [tokenizer(text, truncation=True, max_length=max_length, padding="max_length") for text in texts]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)  # labels are the tokens, without the padding and what equals it
    set_seed(seed)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout))
    model.train()

    def forward(group):
        return model(**collator(group).to(model.device)).loss

    return model, optimize((p for p in model.parameters() if p.requires_grad), forward, examples, 1, epochs, rate, seed, per_step, steps)


def stage_2(model, tokenizer, rows, epochs, seed=42, rate=2e-4, layer=15, rank=4, max_length=2048, per_step=32, steps=None):
    """LoReFT at the last prompt token. Returns (ReftModel, losses)."""
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.eos_token
    examples = []
    for row in rows:
        prompt = tokenizer(row["prompt"], truncation=True, max_length=max_length)["input_ids"]
        text = tokenizer(row["prompt"] + row["answer"] + tokenizer.eos_token, truncation=True, max_length=max_length)["input_ids"]
        examples.append({"input_ids": text, "labels": [-100] * len(prompt) + text[len(prompt):], "location": len(prompt) - 1})
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100, padding="longest")
    set_seed(seed)
    intervention = LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=rank, dtype=model.dtype)
    reft_model = get_reft_model(model, ReftConfig(representations={
        "layer": layer, "component": "block_output", "low_rank_dimension": rank, "intervention": intervention}))

    def forward(group):
        inputs = collator([{"input_ids": e["input_ids"], "labels": e["labels"], "attention_mask": [1] * len(e["input_ids"])} for e in group]).to(model.device)
        labels = inputs.pop("labels")
        _, output = reft_model(dict(inputs), unit_locations={"sources->base": (None, [[[e["location"]] for e in group]])}, labels=labels)
        return output.loss

    return reft_model, optimize(intervention.parameters(), forward, examples, 8, epochs, rate, seed, per_step, steps)


def evaluate(model, tokenizer, rows, reft_model=None, max_new_tokens=5):
    """The generated text of each prompt, one at a time, greedily."""
    texts = []
    model.eval()
    greedy = dict(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    for row in tqdm(rows, desc="one prompt at a time", dynamic_ncols=True):
        inputs = tokenizer(row["prompt"], return_tensors="pt").to(model.device)
        length = inputs["input_ids"].shape[1]
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        if reft_model:
            _, output = reft_model.generate(inputs, unit_locations={"sources->base": (None, [[[length - 1]]])}, intervene_on_prompt=True, **greedy)
        else:
            output = model.generate(**inputs, **greedy)
        texts.append(tokenizer.decode(output[0, length:], skip_special_tokens=True).strip())
    return texts
