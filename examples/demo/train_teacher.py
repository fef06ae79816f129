"""Train the demo's teacher: a byte-level BPE tokenizer and a small Llama, on the text of `text.py`, on one CPU core.

    python examples/demo/train_teacher.py

The seed, the order of the data and the number of threads are fixed, so the same Python and torch on the same kind of
CPU give the same weights. A checkpoint is written every minute or so; the same command continues from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the import: the merges' order must not depend on timing

import text
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minitron_hf.data import TokenRows, padded_batches, token_rows, tokenize
from minitron_hf.errors import MinitronError
from minitron_hf.files import digest, file_digest, replacing_file, replacing_folder, require_writable, versions

VOCAB_SIZE = 2048
CONTEXT = 256
BATCH_SIZE = 6
STEPS = 1800
SEED = 0
MUON_LR, ADAMW_LR = 0.02, 0.015
WEIGHT_DECAY = 0.1
WARMUP_STEPS = 50
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose post-processor puts the beginning-of-text token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def teacher_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """An ordinary small Llama: grouped-query attention, SwiGLU, RMSNorm, rotary positions, tied embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class BatchOrder:
    """Batches of a stream of shuffled documents, as a pure function of the step, so that a resumed run sees the same.

    Every epoch shuffles the documents anew and joins them as bos, text, eos, bos, text, eos, …
    """

    def __init__(self, document_ids: list[list[int]], seed: int) -> None:
        self.document_ids = document_ids
        self.seed = seed
        self.rows_per_epoch = sum(map(len, document_ids)) // (CONTEXT + 1)
        self.epoch = -1
        self.rows = torch.empty(0)

    def batch(self, step: int) -> torch.Tensor:
        """Token ids of one step, int64 [batch, context + 1]."""
        return torch.stack([self._row(step * BATCH_SIZE + index) for index in range(BATCH_SIZE)])

    def _row(self, index: int) -> torch.Tensor:
        epoch, row = divmod(index, self.rows_per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
            order = torch.randperm(len(self.document_ids), generator=generator).tolist()
            stream = torch.tensor([token for document in order for token in self.document_ids[document]])
            self.rows = stream[: self.rows_per_epoch * (CONTEXT + 1)].view(-1, CONTEXT + 1)
            self.epoch = epoch
        return self.rows[row]


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal by five Newton-Schulz steps (Jordan et al. 2024).

    `torch.optim.Muon` computes them in bfloat16, which is 50 to 100 times slower than float32 on a CPU without it;
    this one computes in float32, all matrices of one shape together.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter from its gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    if "momentum" not in self.state[parameter]:
                        self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                    momentum = self.state[parameter]["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(momentum, group["momentum"]))
                scale = group["lr"] * math.sqrt(max(1, rows / columns))
                for parameter, update in zip(parameters, orthogonal(torch.stack(updates))):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def orthogonal(m_NRC: torch.Tensor) -> torch.Tensor:
    """Replace the singular values of each matrix by numbers near 1: [N, rows, columns] → the same shape."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m_NRC.mT if m_NRC.shape[1] > m_NRC.shape[2] else m_NRC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if m_NRC.shape[1] > m_NRC.shape[2] else x


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers; AdamW for the embedding and, without decay, the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    groups = [
        {"params": [model.model.embed_tokens.weight], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return [
        Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(groups, lr=ADAMW_LR, betas=(0.9, 0.95)),
    ]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    return min((step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: TokenRows) -> float:
    """Mean cross-entropy in nats per predicted token; with rows that overlap by one, every token is predicted once."""
    total, count = 0.0, 0
    for batch in padded_batches(rows, 16):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        total += cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum").double().item()
        count += int((labels != -100).sum())
    return total / count


def unigram_loss(train_ids: Iterable[list[int]], rows: TokenRows) -> float:
    """The same number for a model that knows only how frequent each token is in the training text."""
    counts = torch.ones(VOCAB_SIZE, dtype=torch.float64)
    counts += torch.bincount(torch.tensor([t for ids in train_ids for t in ids]), minlength=VOCAB_SIZE)
    targets = torch.tensor([token for row in rows.rows for token in row[1:]])
    return -(counts / counts.sum()).log()[targets].mean().item()


def bits_per_byte(loss: float, rows: TokenRows) -> float:
    """Bits per byte of text from nats per predicted token."""
    assert rows.num_bytes is not None
    predicted = rows.num_tokens - len(rows)
    return loss * predicted / rows.num_bytes / math.log(2)


def train(steps: int, checkpoint: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, dict[str, Any]]:
    """Train tokenizer and model, or continue from the checkpoint; return them with the record of the training."""
    torch.manual_seed(SEED)
    texts = text.documents("train")
    tokenizer = train_tokenizer(texts)
    train_ids = [[*ids, tokenizer.eos_token_id] for ids in tokenize(texts, tokenizer)]
    validation = token_rows(text.documents("validation"), tokenizer, max_length=CONTEXT, packing=False, overlap=1)
    model = LlamaForCausalLM(teacher_config(tokenizer))
    steppers = optimizers(model)
    order = BatchOrder(train_ids, SEED)
    base_rates = [[group["lr"] for group in stepper.param_groups] for stepper in steppers]
    key = digest(text.text_digest(), model.config.to_dict(), steps, BATCH_SIZE, SEED, MUON_LR, ADAMW_LR, WEIGHT_DECAY)
    first_step, seconds, history = 0, 0.0, []
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["key"] == key:
            model.load_state_dict(state["model"])
            for stepper, saved in zip(steppers, state["optimizers"]):
                stepper.load_state_dict(saved)
            first_step, seconds, history = state["step"], state["seconds"], state["history"]
            print(f"continuing at step {first_step} from {checkpoint}", flush=True)
    print(
        f"{model.num_parameters():,} parameters, {sum(map(len, train_ids)):,} training tokens, "
        f"{steps * BATCH_SIZE * CONTEXT:,} to train on ({steps * BATCH_SIZE / order.rows_per_epoch:.2f} epochs)",
        flush=True,
    )

    began, running = time.monotonic() - seconds, []
    for step in range(first_step, steps):
        for stepper, rates in zip(steppers, base_rates):
            for group, rate in zip(stepper.param_groups, rates):
                group["lr"] = rate * learning_rate_factor(step, steps)
        ids = order.batch(step)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        for stepper in steppers:
            stepper.step()
        running.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.monotonic() - began
            entry = {
                "step": step + 1,
                "tokens": (step + 1) * BATCH_SIZE * CONTEXT,
                "loss": sum(running) / len(running),
            }
            running = []
            if (step + 1) % 200 == 0 or step + 1 == steps:
                entry["validation_loss"] = mean_loss(model.eval(), validation)
                model.train()
            history.append(entry)
            rate = entry["tokens"] / seconds
            print(json.dumps(entry), f"{rate:,.0f} tokens/s", f"{seconds:.0f} s", flush=True)
            with replacing_file(checkpoint) as temporary:
                torch.save(
                    {
                        "key": key,
                        "step": step + 1,
                        "seconds": seconds,
                        "history": history,
                        "model": model.state_dict(),
                        "optimizers": [stepper.state_dict() for stepper in steppers],
                    },
                    temporary,
                )
    loss = mean_loss(model.eval(), validation)
    unigram = unigram_loss(train_ids, validation)
    record = {
        "num_parameters": model.num_parameters(),
        "optimizer": {
            "matrices": {"name": "Muon", "lr": MUON_LR, "momentum": 0.95},
            "rest": {"name": "AdamW", "lr": ADAMW_LR, "betas": [0.9, 0.95]},
            "weight_decay": WEIGHT_DECAY,
            "schedule": f"linear warm-up over {WARMUP_STEPS} steps, cosine to 0",
        },
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "context": CONTEXT,
        "train_tokens": steps * BATCH_SIZE * CONTEXT,
        "epochs": round(steps * BATCH_SIZE / order.rows_per_epoch, 2),
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds),
        "validation": {
            "num_tokens": validation.num_tokens - len(validation),
            "num_bytes": validation.num_bytes,
            "loss": loss,
            "bits_per_byte": bits_per_byte(loss, validation),
            "unigram_loss": unigram,
            "unigram_bits_per_byte": bits_per_byte(unigram, validation),
            "uniform_loss": math.log(VOCAB_SIZE),
        },
        "history": history,
    }
    return model, tokenizer, record


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], folder: Path) -> None:
    """Write the teacher as a Hugging Face folder in float16, with its record and card, at once or not at all."""
    validation = token_rows(text.documents("validation"), tokenizer, max_length=CONTEXT, packing=False, overlap=1)
    with replacing_folder(folder) as temporary:
        model.half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        stored = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32).eval()
        record["validation"]["loss_of_the_stored_float16_weights"] = mean_loss(stored, validation)
        record = {
            "format": 1,
            "command": f"python examples/demo/train_teacher.py --steps {record['steps']}",
            "scripts": {name: file_digest(Path(__file__).with_name(name)) for name in ("text.py", "train_teacher.py")},
            "data": {
                "name": "standard library of CPython: pydoc topics, docstrings and block comments",
                "digest": text.text_digest(),
                **{
                    split: {"documents": len(texts), "bytes": sum(len(document.encode()) for document in texts)}
                    for split in text.SPLITS
                    for texts in [text.documents(split)]
                },
            },
            "versions": {**versions(), "tokenizers": version("tokenizers")},
            "files": {path.name: file_digest(path) for path in sorted(temporary.iterdir())},
            **record,
            "samples": samples(stored, tokenizer),
        }
        (temporary / "training.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (temporary / "README.md").write_text(card(record), "utf-8")


def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, str]]:
    """Two continuations of prompts: one greedy, one sampled."""
    found = []
    for prompt, settings in (
        ("Return a copy of the", {"do_sample": False}),
        ("The module defines the following functions", {"do_sample": True, "temperature": 0.7, "top_k": 40}),
    ):
        torch.manual_seed(SEED)
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=80, **settings)[0, ids["input_ids"].shape[1] :]
        decoding = "greedy" if not settings["do_sample"] else "sampled, temperature 0.7, top-k 40, seed 0"
        found.append(
            {"prompt": prompt, "decoding": decoding, "completion": tokenizer.decode(output, skip_special_tokens=True)}
        )
    return found


def card(record: dict[str, Any]) -> str:
    """The model card: how the teacher was made and how good it is."""
    data, validation, made_with = record["data"], record["validation"], record["versions"]
    shown = "\n\n".join(
        f"{sample['decoding'].capitalize()}:\n\n```text\n{sample['prompt']}▸{sample['completion'].rstrip()}\n```"
        for sample in record["samples"]
    )
    return f"""---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- minitron-hf
- demo
---

# The demo's teacher

A Llama of {record["num_parameters"]:,} parameters (6 layers, hidden size 192, 8 heads, 4 key-value heads, feed-forward
size 512, context {record["context"]}, tied embeddings) with its byte-level BPE of {VOCAB_SIZE:,} tokens. It exists so
that `make demo` has something real to prune and distil without a network. It writes the English of Python's
documentation, badly; use it for nothing else.

## How it was made

```sh
{record["command"]}
```

- Text: the documentation in the standard library of Python {made_with["python"]} (pydoc topics, docstrings, block
  comments; `examples/demo/text.py`): {data["train"]["documents"]:,} documents, {data["train"]["bytes"]:,} bytes for
  training, {data["validation"]["documents"]} documents, {data["validation"]["bytes"]:,} bytes for validation, parted
  by the names of modules and topics. Digest of the texts: `{data["digest"]}`. The text belongs to the Python Software
  Foundation and its contributors (PSF licence) and is not part of this folder; the weights were trained by this
  project.
- {record["steps"]:,} steps of {record["batch_size"]} × {record["context"]} tokens = {record["train_tokens"]:,} tokens
  ({record["epochs"]} epochs), Muon on the matrices of the layers (lr {MUON_LR}), AdamW on the rest (lr {ADAMW_LR}),
  {record["optimizer"]["schedule"]}, weight decay {WEIGHT_DECAY}, seed {record["seed"]}.
- {record["seconds"] / 60:.0f} minutes by the clock on {record["threads"]} CPU thread, beside other work.
  torch {made_with["torch"]}, transformers {made_with["transformers"]}, tokenizers {made_with["tokenizers"]}.
- Stored in float16. Digests of all files and the training history are in `training.json`.

## How good it is

On the validation text ({validation["num_tokens"]:,} tokens, {validation["num_bytes"]:,} bytes, windows of
{record["context"]} tokens):

| model | loss, nats per token | bits per byte |
|---|---|---|
| this one | {validation["loss_of_the_stored_float16_weights"]:.4f} | {validation["bits_per_byte"]:.3f} |
| training text's token frequencies | {validation["unigram_loss"]:.4f} | {validation["unigram_bits_per_byte"]:.3f} |

(float32 weights, before storing: {validation["loss"]:.4f}.)

{shown}
"""


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train the demo's teacher.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("teacher"), help="folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="file to continue from (default: beside the output folder, and deleted at the end)",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        require_writable(arguments.output.parent)
        checkpoint = arguments.checkpoint or arguments.output.with_suffix(".checkpoint.pt")
        save(*train(arguments.steps, checkpoint), arguments.output)
        if arguments.checkpoint is None:
            checkpoint.unlink()
    except MinitronError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
