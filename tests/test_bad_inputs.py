"""Bad inputs at the command line: each is one message with exit code 2, before anything is computed or written.

The table is by command and by section of a recipe; every case is of one of ten kinds.
"""

from __future__ import annotations

import collections
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from minitron_hf import PrunerConfig, count_tokens, make_plan, save_model
from minitron_hf.errors import DataError
from minitron_hf.recipe.schema import Recipe
from minitron_hf.recipe.settings import check_settings
from pocket import pocket_model, pocket_tokenizer
from test_cli import TEXTS, minitron
from test_vocabulary_pruning import SIZE, teacher_of, texts

KINDS = ("type", "range", "missing", "encoding", "key", "extra", "permission", "space", "model", "data")
#: What every command is given that shall fail for another reason.
GOOD = {
    "score": "score {teacher} --data {text} -o {out}",
    "plan": "plan {teacher} --scores {scores} --intermediate-size 0.5 -o {out}",
    "search": "search {teacher} --scores {scores} --space intermediate_size=[0.5] --max-parameters 1M --data {text} "
    "-o {out}",
    "prune": "prune {teacher} --plan {plan} -o {out}",
    "generate": "generate {teacher} --prompts {text} -o {out} --set max_new_tokens=2",
    "cache": "cache {teacher} --data {text} -o {out}",
    "distill": "distill {teacher} --teacher {other} --train-data {text} -o {out}",
    "evaluate": "evaluate teacher={teacher} --data {text} -o {out} --set speed=false",
    "recommend": "recommend {teacher} --target 0.5",
    "fit": "fit {teacher} --device h100 --intermediate-size 0.5",
    "run": "run {recipe} --dry-run",
}


def command(name: str, *cases: tuple[str, str, str]) -> list[tuple[str, str, str, str]]:
    """Cases of a command: kind, what is added to good arguments (with `=`: all arguments), words of the message."""
    good = GOOD.get(name, name)
    return [
        (name, kind, line[1:].strip() if line.startswith("=") else f"{good} {line}", words)
        for kind, line, words in cases
    ]


def section(name: str, *cases: tuple[str, str, str]) -> list[tuple[str, str, str, str]]:
    """Cases of a recipe's section: kind, entries to set (each behind a `;`), words of the message."""
    return [
        (f"{name}:", kind, GOOD["run"] + "".join(f";--set;{entry}" for entry in entries.split(";")), words)
        for kind, entries, words in cases
    ]


CASES = [
    *command(
        "quantize",
        ("missing", "= quantize {teacher}", "--output"),
        ("key", "= quantize {teacher} -o {out} --method int5", "no method 'int5'"),
        ("key", "= quantize {teacher} -o {out} --methods int8", "no such option"),
        ("type", "= quantize {teacher} -o {out} --group-size many", "a valid integer"),
        ("extra", "= quantize {teacher} surplus -o {out}", "unexpected extra argument"),
    ),
    *command(
        "doctor",
        ("extra", "= doctor surplus", "unexpected extra argument"),
        ("extra", "= doctor {teacher}", "unexpected extra argument"),
        ("key", "= doctor --fix", "no such option"),
        ("key", "= doctor --device cpu", "no such option"),
        ("key", "= doctor --token hf_abc", "no such option"),
    ),
    *section(
        "quantize",
        ("key", "quantize=[int5]", "int5"),
        ("type", "quantize=int8", "expected a list"),
        ("type", "quantize=[8]", "8"),
        ("type", "quantize={{int8: true}}", "expected a list"),
        ("key", "quantise=[int8]", "did you mean 'quantize'?"),
    ),
    *command(
        "score",
        ("missing", "= score {teacher} --data {text}", "--output"),
        ("missing", "= score {nowhere} --data {text} -o {out}", "does not exist"),
        ("missing", "= score {teacher} --data {nowhere}.jsonl -o {out}", "does not exist"),
        ("type", "--set num_rows=many", "num_rows='many': expected an integer"),
        ("range", "--set num_rows=0", "expected at least 1"),
        ("key", "--set num_row=3", "Did you mean 'num_rows'?"),
        ("key", "--set metric=magnitud", "Did you mean 'magnitude'?"),
        ("extra", "surplus", "unexpected extra argument"),
        ("encoding", "= score {teacher} --data {latin} -o {out}", "line 2"),
        ("permission", "= score {teacher} --data {text} -o /proc/scores", "/proc"),
        ("permission", "= score {teacher} --data {text} -o {file}", "is a file"),
        ("space", "", "No space left"),
        ("model", "= score {bert} --data {text} -o {out}", "bert"),
        ("model", "= score {torn} --data {text} -o {out}", "Cannot load the model"),
        ("data", "= score {teacher} --data {empty} -o {out}", "is empty"),
        ("data", "= score {teacher} --data {numbers} -o {out}", "expected text"),
        ("data", "--text-field txt", "Did you mean 'text'?"),
        ("data", "= score {teacher} --data {broken} -o {out}", "line 1, is not valid JSON"),
    ),
    *command(
        "plan",
        ("missing", "= plan {nowhere} --hidden-size 0.5", "does not exist"),
        ("missing", "= plan {teacher}", "names no size"),
        ("missing", "= plan {teacher} --scores {scores} -o {out}", "names no size"),
        ("missing", "--scores {nowhere}", "No importance scores"),
        ("type", "--hidden-size half", "expected an integer or a fraction"),
        ("range", "--hidden-size 1.5", "(0, 1]"),
        ("range", "--hidden-size nan", "expected an integer or a fraction"),
        ("range", "--set multiple_of=0", "multiple_of=0"),
        ("key", "--set hiden_size=0.5", "Did you mean 'hidden_size'?"),
        ("extra", "--target 0.5", "--scores belong together"),
        ("extra", "--set intermediate_size=0.25", "--intermediate-size exclude each other"),
        ("range", "= plan {teacher} --scores {scores} --target 1.0 --data {text}", "a fraction below 1"),
        ("missing", "= plan {teacher} --scores {scores} --vocab-size 40", "Pass --data with text"),
        ("extra", "--data {text}", "--scores belong together. Missing: --target"),
        ("missing", "= plan {teacher} --set target_active_parameters=0.5 --scores {scores}", "Missing: --data"),
        ("missing", "= plan {teacher} --target 0.5", "Missing: --data, --scores"),
        ("type", "--portable=maybe", "does not take a value"),
        ("range", "= plan {teacher} --hidden-size 1.0", "nothing would be cut"),
        ("range", "= plan {teacher} --scores {scores} --set num_hidden_layers=1.0 -o {out}", "nothing would be cut"),
        ("model", "= plan {narrow} --scores {scores} --target 0.9 --data {text} -o {out}", "another architecture"),
        ("permission", "= plan {teacher} --hidden-size 24 -o {file}/plan", "is a file"),
        ("space", "", "No space left"),
        ("model", "= plan {bert} --hidden-size 24", "bert"),
        ("data", "--scores {text}", "text.jsonl"),
        ("missing", "= plan {teacher} --vocab-size 40 -o {out}", "--data with text"),
        ("missing", "= plan {teacher} --vocab-size 40 --data {nowhere} -o {out}", "does not exist"),
        ("type", "--vocab-size few", "expected an integer or a fraction"),
        ("range", "= plan {teacher} --vocab-size 4000", "larger than the teacher's"),
        ("range", "= plan {teacher} --set vocab_size=0", "at least one unit"),
        ("key", "--set vocabsize=40", "Did you mean 'vocab_size'?"),
        ("data", "= plan {teacher} --vocab-size 40 --data {empty} -o {out}", "is empty"),
        ("data", "= plan {teacher} --vocab-size 40 --data {numbers} -o {out}", "expected text"),
        ("model", "= plan {teacher} --vocab-size 40 --data {text} -o {out}", "a WordLevel model"),
        ("model", "= plan {untokenised} --vocab-size 40 --data {text} -o {out}", "okenizer"),
    ),
    *command(
        "search",
        ("extra", "--set max_parameters=2", "--max-parameters exclude each other"),
        ("key", "--space vocab_size=[0.5]", "vocab_size is not searched"),
        ("type", "--set score_func=kl", "a score is a function"),
        ("missing", "--scores {nowhere}", "No importance scores"),
        ("type", "--space hidden_size=0.5", "expected a list of sizes"),
        ("type", "--max-parameters many", "expected a number"),
        ("range", "--set num_candidates=0", "expected at least 1"),
        ("range", "--max-parameters -1", "expected a number above 0"),
        ("key", "--space depth=[1]", "depth"),
        ("type", "--set score_func=foo", "a score is a function"),
        ("key", "--set num_candidate=3", "Did you mean 'num_candidates'?"),
        ("key", "--set distillation.lerning_rate=3", "Did you mean 'learning_rate'?"),
        ("range", "--max-active-parameters 0", "expected a number above 0"),
        ("range", "--set batch_size=0", "expected at least 1"),
        ("range", "--set tolerance=2", "tolerance"),
        ("encoding", "--eval-data {latin}", "line 2"),
        (
            "permission",
            "= search {teacher} --scores {scores} --space hidden_size=[1] --data {text} -o {file}",
            "file",
        ),
        ("data", "--eval-data {numbers}", "--eval-data"),
    ),
    *command(
        "prune",
        ("missing", "= prune {teacher} --plan {nowhere} -o {out}", "does not exist"),
        ("type", "--set num_rows=x", "expected an integer"),
        ("range", "--set batch_size=-1", "expected at least 1"),
        ("key", "--set samples=3", "arguments of repaired_weights"),
        ("type", "--set memory_limit=much", "expected a number"),
        ("extra", "--data {text}", "no repair"),
        ("encoding", "= prune {teacher} --plan {badplan} -o {out}", "not valid JSON"),
        ("permission", "= prune {teacher} --plan {plan} -o {teacher}", "is the teacher's own"),
        ("space", "", "No space left"),
        ("model", "= prune {narrow} --plan {plan} -o {out}", "other sizes"),
        ("model", "= prune {narrow} --plan {cut} -o {out}", "made for a llama model of other sizes"),
        ("model", "= prune {narrow} --plan {cut} -o {out} --in-memory", "made for a llama model of other sizes"),
        ("model", "= prune {bert} --plan {plan} -o {out}", "bert"),
    ),
    *command(
        "generate",
        ("missing", "= generate {teacher} --prompts {nowhere}.jsonl -o {out}", "does not exist"),
        ("missing", "= generate {teacher} -o {out} --set max_new_tokens=2", "num_rows has to say"),
        ("type", "--set temperature=hot", "expected a number"),
        ("range", "--set temperature=0", "more than 0"),
        ("range", "--num-rows 0", "expected at least 1"),
        ("key", "--set temperatur=1", "Did you mean 'temperature'?"),
        ("encoding", "= generate {teacher} --prompts {latin} -o {out}", "UTF-8"),
        ("permission", "= generate {teacher} --prompts {text} -o {file}", "is a file"),
        ("space", "", "No space left"),
        ("model", "--set chat=true", "no chat template"),
        ("data", "= generate {teacher} --prompts {other_columns} -o {out}", "has the columns a"),
    ),
    *command(
        "cache",
        ("extra", "--top-k 4 --set top_k=8", "--top-k exclude each other"),
        ("permission", "= cache {teacher} --data {text} -o {other}", "already holds files"),
        ("missing", "= cache {teacher} --data {nowhere}.txt -o {out}", "does not exist"),
        ("type", "--top-k many", "--top-k"),
        ("range", "--top-k 0", "expected at least 1"),
        ("range", "--top-k 98", "97 tokens"),
        ("range", "--num-draws 0", "expected at least 1"),
        ("extra", "--num-draws 9 --top-k 9", "the most likely tokens or drawn ones"),
        ("extra", "--num-draws 9 --dtype fixed12", "Leave out dtype"),
        ("model", "--num-draws 9 --set divergence=jsd", "forward KL only"),
        ("key", "--dtype fixed13", "Did you mean 'fixed12'?"),
        ("range", "--set max_length=1", "expected at least 2"),
        ("key", "--set nope=1", "fields of DistillationConfig"),
        ("extra", "--set output_dir=x", "output_dir is unknown"),
        ("encoding", "= cache {teacher} --data {latin} -o {out}", "UTF-8"),
        ("permission", "= cache {teacher} --data {text} -o {file}", "is a file"),
        ("space", "", "No space left"),
        ("model", "--set divergence=mse", "compares logits"),
        ("data", "= cache {teacher} --data {other_columns} -o {out}", "has the columns a"),
        ("type", "--server localhost:8000", "expected an address such as http://localhost:8000"),
        ("missing", "--server http://127.0.0.1:9", "does not answer"),
        ("extra", "--server-model llama", "--server, which is missing"),
        ("extra", "--server http://127.0.0.1:9 --num-draws 9", "draws none"),
        ("extra", "= cache {spelt} --data {text} -o {out} --plan {cut} --server http://x:1", "Leave out --server"),
        ("missing", "--plan {nowhere}", "does not exist. Write it with `minitron-hf plan`"),
        ("type", "--plan {text}", "is not a pruning plan. Expected a folder with pruning_plan.json"),
        ("range", "= cache {spelt} --data {text} -o {out} --plan {cut} --top-k 18", "17 tokens"),
        ("model", "--plan {cut}", "chosen with another tokenizer"),
        ("model", "= cache {wide} --plan {cut} --data {text} -o {out}", "the plan cuts a vocabulary of 97 tokens"),
        ("encoding", "--plan {badplan}", "badplan"),
        ("model", "--server http://127.0.0.1:9 --set temperature=2", "probabilities of prompts at temperature 1"),
        ("model", "--server http://127.0.0.1:9 --set hidden_loss=mse", "hidden states, which no server gives"),
    ),
    *command(
        "distill",
        ("permission", "= distill {teacher} --teacher {other} --train-data {text} -o {other}", "already holds files"),
        ("missing", "= distill {nowhere} --teacher {teacher} --train-data {text} -o {out}", "does not exist"),
        ("missing", "= distill {teacher} --train-data {text} -o {out}", "no teacher"),
        ("type", "--set learning_rate=fast", "expected a number"),
        ("range", "--set learning_rate=-1", "expected more than 0"),
        ("range", "--set seed=-3", "at least 0"),
        ("range", "--set per_device_train_batch_size=0", "expected at least 1"),
        ("key", "--set optim=adam", "not a valid OptimizerNames"),
        ("key", "--set report_to=tensorbord", "Did you mean 'tensorboard'?"),
        ("extra", "--num-processes 2", "--accelerate"),
        ("encoding", "--eval-data {latin}", "UTF-8"),
        ("permission", "= distill {teacher} --teacher {other} --train-data {text} -o {file}", "is a file"),
        ("space", "", "No space left"),
        ("model", "= distill {teacher} --teacher {wide} --train-data {text} -o {out}", "vocabulary"),
        ("data", "--eval-data {other_columns}", "--eval-data"),
        ("extra", "--train-images {text}", "--train-images holds the images of a teacher cache"),
        ("extra", "--eval-data {text} --eval-images {text}", "a corpus has its own images"),
        ("missing", "--eval-images {text}", "images of --eval-data, which is missing"),
        ("missing", "= distill {teacher} --train-images {text} -o {out}", "--train-data"),
        ("key", "--train-image {text}", "no such option"),
        ("data", "--set dataset_text_field=txt", "Did you mean 'text'?"),
    ),
    *command(
        "evaluate",
        ("missing", "= evaluate teacher= --data {text} -o {out}", "NAME=MODEL"),
        ("missing", "= evaluate teacher={nowhere} --data {text} -o {out}", "does not exist"),
        ("type", "--set num_rows=x", "expected an integer or null"),
        ("range", "--set num_rows=0", "expected at least 1"),
        ("range", "--set max_length=100000", "exceeds the context"),
        ("key", "--set refrence=x", "Did you mean 'reference'?"),
        ("extra", "--set models=x", "exclude each other"),
        ("encoding", "= evaluate teacher={teacher} --data {latin} -o {out}", "UTF-8"),
        ("permission", "= evaluate teacher={teacher} --data {text} -o /proc/x", "/proc"),
        ("data", "= evaluate teacher={teacher} --data {text} -o {ran}", "the folder of a run"),
        ("space", "", "No space left"),
        ("model", "student={wide}", "vocabulary"),
        ("data", "= evaluate teacher={teacher} --data {numbers} -o {out}", "expected text"),
    ),
    *command(
        "recommend",
        ("missing", "= recommend {teacher}", "--target"),
        ("type", "--tokens some", "expected a number"),
        ("range", "--tokens 0.1k --target 0.0001k", "--target 0.0001k: expected a number above 0"),
        ("range", "= recommend {teacher} --target nan", "expected a number"),
        ("range", "= recommend {teacher} --target -3", "above 0"),
        ("range", "--rounds 0", "at least 1"),
        ("range", "--teacher-learning-rate 0", "more than 0"),
        ("key", "--goal sped", "expected one of 'quality', 'latency'"),
        ("extra", "--set seed=1", "--output"),
        ("permission", "--train-data {text} --eval-data {text} -o {teacher}", "a folder"),
        ("extra", "--train-data {text} --eval-data {text} -o new.yaml --set distill.max_stepz=5", "max_steps"),
        ("extra", "--train-data {text} --eval-data {text} -o new.yaml --set scores.rows=5", "num_rows"),
        (
            "range",
            "--train-data {text} --eval-data {text} -o new.yaml --set distill.max_length=100000",
            "distill.max_length=100000: the teacher's context has 64 tokens",
        ),
        ("model", "= recommend {bert} --target 0.5", "bert"),
    ),
    *command(
        "fit",
        ("missing", "= fit {teacher}", "--device"),
        ("type", "--devices two", "--devices"),
        ("range", "--devices 0", "at least 1"),
        ("range", "--lora-rank 0", "at least 1"),
        ("range", "--max-length 1", "at least 2"),
        ("key", "--sharding zero4", "Did you mean 'zero"),
        ("key", "--fake-quantization nf4", "'int8', 'int4'"),
        ("key", "= fit {teacher} --device h1000", "h100"),
        ("extra", "--student {other}", "exclude each other"),
        ("range", "--vocab-size 4000", "larger than the teacher's"),
        ("type", "--vocab-size few", "expected an integer or a fraction"),
        ("model", "= fit {bert} --device h100 --hidden-size 8", "bert"),
    ),
    *command(
        "accelerate-config",
        ("key", "dpp", "Did you mean 'ddp'?"),
        ("missing", "{nowhere}", "no Accelerate configuration"),
        ("extra", "ddp fsdp2", "unexpected extra argument"),
        ("key", "--name ddp", "--name"),
        ("data", "{teacher}", "Accelerate configuration"),
    ),
    *command(
        "card",
        ("missing", "{nowhere}", "nowhere"),
        ("missing", "", "folder"),
        ("data", "{outside}", "outside"),
        ("permission", "{file}", "file"),
        ("encoding", "{badplan}", "not valid JSON"),
        ("extra", "{badplan} b", "unexpected extra argument"),
    ),
    *command(
        "publish",
        ("missing", "{nowhere} me/student", "does not exist"),
        ("missing", "{teacher}", "repo_id"),
        ("key", "{student} a/b/c", "owner/name"),
        ("encoding", "{student} mé/ü", "owner/name"),
        ("data", "{outside} me/student", "config.json"),
        ("data", "{teacher} me/student", "neither pruned nor distilled"),
        ("permission", "{student} me/student", "token"),
        ("extra", "{teacher} me/student main", "unexpected extra argument"),
        ("range", "{student} me/student --create-pr --tag v1", "merge first"),
        ("encoding", "{student} me/student --tag v:1", "expected the name of a branch or tag"),
        ("encoding", "{student} me/student --revision a..b", "expected the name of a branch or tag"),
    ),
    *command(
        "families",
        ("key", "lama", "Did you mean 'llama'?"),
        ("missing", "draft", "name a model type"),
        ("missing", "draft {nowhere}", "does not exist"),
        ("model", "draft {outside}", "no config.json"),
        ("permission", "draft llama -o {teacher}", "a folder"),
        ("permission", "draft llama -o {file}/x.py", "is a file"),
        ("extra", "llama gemma qwen", "unexpected extra argument"),
    ),
    *command(
        "run",
        ("extra", "--accelerate ddp --set distributed.config=fsdp2", "--accelerate exclude each other"),
        ("missing", "= run {nowhere}.yaml", "Cannot read the recipe"),
        ("encoding", "= run {latin_recipe}", "not UTF-8"),
        ("data", "= run {text}", "not valid YAML"),
        ("data", "= run {twice}", "there twice"),
        ("data", "= run {empty}", "no sections"),
        ("key", "--until distil", "Did you mean 'distill'?"),
        ("extra", "--until correct", "does not ask for"),
        ("type", "--set prune", "expected key=value"),
        ("type", "--set prune.hidden_size=[1,", "not valid YAML"),
        ("permission", "= run {teacher}", "Cannot read the recipe"),
        ("range", "--accelerate ddp --num-processes 0", "at least 1"),
        ("missing", "--num-processes 2", "--num-processes needs --accelerate"),
    ),
    *section(
        "teacher",
        ("missing", "teacher={nowhere}", "does not exist"),
        ("missing", "teacher={{dtype: float32}}", "lacks"),
        ("type", "teacher=[a, b]", "expected a section"),
        ("key", "teacher.modle=x", "Did you mean 'model'?"),
        ("key", "teacher.dtype=float7", "Did you mean 'float32'?"),
        ("type", "teacher.revision=12", "Write it in quotes"),
        ("model", "teacher={bert}", "bert"),
        ("model", "teacher={outside}", "no config.json"),
        ("data", "teacher={untokenised}", "tokenizer"),
    ),
    *section(
        "data",
        ("missing", "data.train={nowhere}.jsonl", "does not exist"),
        ("missing", "data={{train: {text}}}", "lacks"),
        ("type", "data.train.num_rows=1.5", "expected an integer"),
        ("range", "data.train.num_rows=0", "at least 1"),
        ("key", "data.train.spilt=x", "Did you mean 'split'?"),
        ("key", "data.eval.split=test", "test"),
        ("encoding", "data.eval={latin}", "line 2"),
        ("data", "data.train={chat}", "no chat template"),
        ("data", "data.calibration={chat}", "no chat template"),
        ("data", "data.calibration={empty}", "is empty"),
        ("data", "data.train={numbers}", "expected text"),
        ("data", "data.train.text_field=txt", "Did you mean 'text'?"),
        ("data", "data.eval={blank}", "no documents"),
        ("extra", "data.test={text}", "no entry test"),
        ("model", "data.train={ids}", "99999"),
        ("data", "data.train=[{text}, {ids}]", "data.train.2"),
        ("data", "data.train={other}", "is the folder of a model, not of a dataset"),
        ("range", "data.train=[{{source: {text}, weight: 0}}]", "more than 0"),
        ("key", "data.train=[{{source: {text}, wieght: 1}}]", "Did you mean 'weight'?"),
        ("key", "data.stopping_strategy=exhausted", "'all_exhausted'"),
        ("data", "data.streaming=true;distill.max_steps=-1", "distill.max_steps"),
        (
            "extra",
            "data.streaming=true;distill.max_steps=1;distill.packing=false;distributed={{config: ddp}}",
            "data.streaming with distributed",
        ),
    ),
    *section(
        "output_dir",
        ("type", "output_dir=3", "expected text"),
        ("missing", "output_dir=''", "expected text"),
        ("missing", "output_dir=null", "expected text"),
        ("permission", "output_dir=/proc/run", "/proc"),
        ("permission", "output_dir={file}/run", "is a file"),
        ("space", "output_dir={out}", "B free"),
    ),
    *section(
        "prune",
        ("type", "prune.hidden_size=wide", "expected a number"),
        ("range", "prune.intermediate_size=9999", "larger than the teacher's"),
        ("range", "prune.hidden_size=.nan", "(0, 1]"),
        ("type", "prune.vocab_size=few", "expected a number"),
        ("range", "prune.vocab_size=1.5", "(0, 1]"),
        ("range", "prune.vocab_size=4000", "larger than the teacher's"),
        ("key", "prune.vocabsize=40", "Did you mean 'vocab_size'?"),
        ("model", "prune.vocab_size=40", "with a WordLevel model"),
        (
            "extra",
            "prune.vocab_size=40;teacher_cache={{top_k: 4, server: http://x:1}}",
            "prune.vocab_size with teacher_cache",
        ),
        (
            "extra",
            "prune.vocab_size=40;rounds=[{{prune: {{hidden_size: 0.9}}}},{{prune: {{hidden_size: 0.9}}}}]",
            "prune.vocab_size in the rounds 1 and 2",
        ),
        ("key", "prune.hiden_size=8", "Did you mean 'hidden_size'?"),
        ("missing", "prune={{}}", "lacks prune"),
        ("type", "prune.contiguous=no", "expected true or false"),
        ("extra", "prune.num_experts=2", "no such size"),
    ),
    *section(
        "scores",
        ("type", "scores.max_length=long", "expected an integer"),
        ("range", "scores.max_length=100000", "context"),
        ("range", "scores.batch_size=0", "at least 1"),
        ("key", "scores.metric=acivation", "Did you mean 'activation'?"),
        ("key", "scores.num_row=3", "Did you mean 'num_rows'?"),
        ("range", "scores.iterations=0", "at least 1"),
        ("extra", "scores.block_length=2", "depth_metric"),
        ("extra", "scores.data=x", "data is unknown"),
    ),
    *section(
        "search",
        ("missing", "search={{max_parameters: 1M}}", "lacks space"),
        ("key", "prune={{}};search={{space: {{depth: [1]}}, max_parameters: 1000000}}", "depth"),
        ("type", "prune={{}};search={{space: {{hidden_size: [24]}}, max_parameters: many}}", "expected a number"),
        ("range", "prune={{}};search={{space: {{hidden_size: [24]}}, max_parameters: 1}}", "none of the"),
        (
            "range",
            "prune={{}};search={{space: {{hidden_size: [24]}}, max_parameters: 9, num_rounds: 0}}",
            "at least 1",
        ),
        ("extra", "search={{space: {{intermediate_size: [24]}}, max_parameters: 1}}", "in prune and in search"),
        ("missing", "prune={{}};search={{space: {{hidden_size: [24]}}}}", "needs a budget"),
    ),
    *section(
        "rounds",
        ("type", "rounds=2", "expected a list"),
        ("missing", "rounds=[{{teacher: previous}}]", "lacks"),
        ("key", "rounds=[{{prune: {{hiden_size: 4}}}}]", "Did you mean 'hidden_size'?"),
        ("key", "rounds=[{{prune: {{hidden_size: 24}}, teacher: last}}]", "expected one of 'original', 'previous'"),
        ("range", "rounds=[{{prune: {{hidden_size: 24}}, distill: {{learning_rate: 0}}}}]", "rounds.1.distill"),
        ("extra", "rounds=[{{prune: {{hidden_size: 24}}, lora: {{}}}}]", "no entry lora"),
    ),
    *section(
        "verify",
        ("type", "verify=no", "Write false"),
        ("type", "verify=1", "expected true or false"),
        ("type", "verify=null", "expected true or false"),
        ("type", "verify=[true]", "expected true or false"),
        ("key", "verfy=true", "Did you mean 'verify'?"),
    ),
    *section(
        "stream_weights",
        ("type", "stream_weights=no", "Write false"),
        ("type", "stream_weights=1", "expected true or false"),
        ("type", "stream_weights=null", "expected true or false"),
        ("key", "stream_weight=true", "Did you mean 'stream_weights'?"),
        ("extra", "stream_weights=true;verify=true", "Leave one of them out"),
        ("extra", "stream_weights=true;prune.repair=sequential", "both have to be in memory"),
    ),
    *section(
        "teacher_correction",
        ("missing", "teacher_correction={{num_tokens: 9}}", "lacks"),
        ("type", "teacher_correction={{num_tokens: 9.5, original_learning_rate: 1e-3}}", "expected an integer"),
        (
            "type",
            "teacher_correction={{num_tokens: 9Q, original_learning_rate: 1e-3}}",
            "teacher_correction.num_tokens=9Q: expected a number above 0, such as",
        ),
        ("range", "teacher_correction={{num_tokens: 9, original_learning_rate: -1}}", "more than 0"),
        (
            "key",
            "teacher_correction={{num_tokens: 9, original_learning_rate: 1, method: norm}}",
            "Did you mean 'norms'?",
        ),
        (
            "key",
            "teacher_correction={{num_tokens: 9, original_learning_rate: 1, arguments: {{sead: 1}}}}",
            "Did you mean 'seed'?",
        ),
        (
            "extra",
            "teacher_correction={{num_tokens: 9, original_learning_rate: 1, arguments: {{max_steps: 1}}}}",
            "num_tokens sets the number of steps",
        ),
    ),
    *section(
        "teacher_cache",
        ("range", "teacher_cache.top_k=0", "at least 1"),
        ("range", "teacher_cache.top_k=98", "97 tokens"),
        ("type", "teacher_cache.top_k=9.5", "expected an integer"),
        ("key", "teacher_cache.dtype=float61", "Did you mean 'float16'?"),
        ("key", "teacher_cache.topk=3", "Did you mean 'top_k'?"),
        ("range", "teacher_cache.num_draws=0", "at least 1"),
        ("type", "teacher_cache.num_draws=many", "expected an integer"),
        ("extra", "teacher_cache={{num_draws: 9, top_k: 9}}", "the most likely tokens or drawn ones"),
        ("extra", "teacher_cache={{num_draws: 9, dtype: fixed12}}", "Leave out dtype"),
        ("model", "teacher_cache={{num_draws: 9}};distill.divergence=jsd", "forward KL only"),
        ("model", "teacher_cache={{}};distill.divergence=mse", "compares logits"),
        ("type", "teacher_cache.server=8000", "expected text"),
        ("type", "teacher_cache.server=localhost", "expected an address"),
        ("missing", "teacher_cache={{server: 'http://127.0.0.1:9'}}", "does not answer"),
        ("extra", "teacher_cache.server_model=llama", "teacher_cache.server, which is missing"),
        ("extra", "teacher_cache={{server: 'http://127.0.0.1:9', num_draws: 9}}", "draws none"),
        ("model", "teacher_cache={{server: 'http://127.0.0.1:9'}};distill.temperature=2", "at temperature 1"),
        (
            "extra",
            "teacher_cache={{server: 'http://127.0.0.1:9'}};"
            "teacher_correction={{num_tokens: 9, original_learning_rate: 1}}",
            "offers the teacher as it was before",
        ),
    ),
    *section(
        "distill",
        ("type", "distill.learning_rate=fast", "expected a number"),
        ("type", "distill.max_steps=1e3", "Write 1000"),
        ("type", "distill.packing=yes", "Write true"),
        ("range", "distill.learning_rate=.inf", "finite"),
        ("range", "distill.max_length=0", "at least 2"),
        ("range", "distill.seed=-1", "at least 0"),
        ("range", "distill.per_device_train_batch_size=0", "at least 1"),
        ("range", "distill.temperature=0", "more than 0"),
        ("range", "distill.top_k=0", "at least 1"),
        ("range", "distill.top_k=98", "distill.top_k=98: the vocabulary has 97 tokens"),
        ("model", "distill.top_k=9;distill.divergence=mse", "top_k keeps probabilities"),
        ("model", "distill.top_k=9;teacher_cache={{}}", "cache has a top_k of its own"),
        ("range", "distill.hidden_loss=mse;distill.hidden_layers=[[99,0]]", "no layer 99"),
        ("key", "distill.lerning_rate=1", "Did you mean 'learning_rate'?"),
        ("key", "distill.eval_strategy=never", "IntervalStrategy"),
        ("key", "distill.lr_scheduler_kwargs={{min: 1}}", "min"),
        ("missing", "distill.report_to=clearml", "not installed"),
        ("extra", "distill.output_dir=x", "output_dir is unknown"),
        ("type", "distill.teacher_model_init_kwargs={{use_safetensors: no}}", "write true or false"),
        ("space", "distill.max_steps=9", "B free"),
        ("key", "distill.packing_strategy=bdf", "mean 'bfd'?"),
        ("key", "distill.log_level=loud", "'warning'"),
        ("range", "distill.max_length=100000", "context"),
        (
            "range",
            "rounds=[{{prune: {{hidden_size: 24}}, scores: {{max_length: 100000}}}}]",
            "rounds.1.scores.max_length",
        ),
        ("extra", "distill.resume_from_checkpoint=x", "is unknown"),
        ("data", "distill.completion_only_loss=true", "expected completion"),
        ("data", "distill.assistant_only_loss=true", "expected messages"),
        ("model", "distill.eos_token=<end>", "no such token"),
        ("type", "distill.teacher_model_init_kwargs=fast", "expected entries"),
        (
            "key",
            "distill.teacher_model_init_kwargs={{attn_impl: sdpa}}",
            "mean 'attn_implementation'?",
        ),
        ("key", "distill.dataset_kwargs={{skip_preparation: true}}", "skip_prepare_dataset"),
        ("key", "distill.activation_checkpointing_kwargs={{use_reentrent: false}}", "Did you mean 'use_reentrant'?"),
        ("key", "distill.include_num_input_tokens_seen=some", "'non_padding'"),
        ("missing", "distill.chat_template_path=/no/where", "chat_template_path"),
        ("permission", "distill.push_to_hub=true", "no access token"),
    ),
    *section(
        "generate",
        ("extra", "generate={{num_rows: 4}}", "no corpus reads its text"),
        ("missing", "data.train={{generated: true}}", "no section generate"),
        ("missing", "generate={{max_new_tokens: 4}};data.train={{generated: true}}", "num_rows has to say"),
        ("range", "generate={{num_rows: 4, top_p: 0}};data.train={{generated: true}}", "more than 0"),
        ("range", "generate={{num_rows: 4, max_new_tokens: 9999}};data.train={{generated: true}}", "context"),
        ("key", "generate={{num_row: 4}}", "Did you mean 'num_rows'?"),
        ("type", "generate={{num_rows: 4, chat: no}}", "Write false"),
        (
            "model",
            "generate={{num_rows: 4, chat: true, max_new_tokens: 4}};data.train={{generated: true}}",
            "no chat template",
        ),
        ("data", "generate={{prompts: {numbers}}};data.train={{generated: true}}", "generate"),
        ("extra", "generate={{num_rows: 4}};data.train={{generated: true, source: {text}}}", "either a source"),
    ),
    *section(
        "lora",
        ("range", "lora.r=0", "at least 1"),
        ("range", "lora.lora_dropout=2", "less than 1"),
        ("type", "lora.r=high", "expected an integer"),
        ("key", "lora.rank=4", "fields of peft.LoraConfig"),
        ("model", "lora={{r: 2, target_modules: [nothing]}}", "nothing"),
        ("model", "lora={{r: 2, target_modules: [lm_head]}}", "output head"),
        ("key", "lora={{r: 2, target_modules: [q_proj], rank_pattern: {{q_prj: 4}}}}", "Did you mean 'q_proj'?"),
        ("key", "lora={{r: 2, target_modules: [q_proj], alpha_pattern: {{k_proj: 4}}}}", "is called k_proj"),
        ("extra", "lora.task_type=CAUSAL_LM", "task_type is unknown"),
        ("model", "lora={{r: 2, target_modules: [q_proj], modules_to_save: [lm_heat]}}", "mean 'lm_head'?"),
    ),
    *section(
        "controls",
        ("key", "controls=[random_prunning]", "Did you mean 'random_pruning'?"),
        ("type", "controls=random_init", "expected a list"),
        ("type", "controls=[[random_init]]", "expected a list of text"),
        ("type", "controls={{random_init: true}}", "expected a list"),
        ("type", "controls=[1]", "expected a list of text"),
        ("extra", "controls=[random_init, random_init]", "each name once"),
    ),
    *section(
        "distributed",
        ("missing", "distributed={{num_processes: 2}}", "lacks"),
        ("key", "distributed={{config: dpp, num_processes: 2}}", "Did you mean 'ddp'?"),
        ("type", "distributed={{config: ddp, num_processes: two}}", "expected an integer"),
        ("range", "distributed={{config: ddp, num_processes: 0}}", "at least 1"),
        ("data", "distributed={{config: {text}, num_processes: 2}}", "Accelerate configuration"),
    ),
    *section(
        "evaluate",
        ("range", "evaluate.num_rows=0", "at least 1"),
        ("range", "evaluate.max_length=100000", "context"),
        ("range", "evaluate.num_fewshot=-1", "at least 0"),
        ("type", "evaluate.prompts=[5]", "expected a list of text"),
        ("type", "evaluate.tasks=piqa", "expected a list"),
        ("type", "evaluate.speed=off", "Write false"),
        ("key", "evaluate.promts=[a]", "Did you mean 'prompts'?"),
        ("missing", "evaluate.include_path=/no/where", "does not exist"),
        ("model", "evaluate={{tasks: [piqa], apply_chat_template: true}}", "no chat template"),
    ),
    *section(
        "publish",
        ("key", "publish.repo_id=a/b/c", "owner/name"),
        ("encoding", "publish.repo_id=mé/ü", "owner/name"),
        ("missing", "publish={{private: true}}", "lacks"),
        ("permission", "publish.repo_id=me/student", "no access token"),
        ("type", "publish={{repo_id: me/student, private: no}}", "Write false"),
        ("extra", "publish={{repo_id: me/student, token: hf_x}}", "no entry token"),
        ("data", "publish={{repo_id: me/student, quantized: true}}", "quantises nothing"),
        ("type", "publish={{repo_id: me/student, tag: 1}}", "publish.tag"),
        ("encoding", "publish={{repo_id: me/student, tag: a b}}", "expected the name of a branch or tag"),
        ("range", "publish={{repo_id: me/student, create_pr: true, tag: v1}}", "a pull request gets no tag"),
    ),
]


@pytest.fixture(scope="module")
def yard(tmp_path_factory) -> dict[str, Path]:
    """Good and bad models, corpora, plans and recipes, by name."""
    folder = tmp_path_factory.mktemp("yard")
    at = {name: folder / name for name in ("teacher", "other", "narrow", "wide", "untokenised", "torn", "bert")}
    for name, changes in (
        ("teacher", {}),
        ("other", {}),
        ("narrow", {"num_hidden_layers": 3}),
        ("wide", {"vocab_size": 101}),
    ):
        pocket_model("llama", dtype=torch.float32, **changes).save_pretrained(at[name])
        pocket_tokenizer().save_pretrained(at[name])
    pocket_model("llama", dtype=torch.float32).save_pretrained(at["untokenised"])
    shutil.copytree(at["teacher"], at["torn"])
    at["student"] = folder / "student"
    shutil.copytree(at["teacher"], at["student"])
    (at["student"] / "distillation.json").write_text('{"format": 1}')  # a student is known by what made it
    weights = at["torn"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    from transformers import BertConfig

    BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=97).save_pretrained(at["bert"])
    pocket_tokenizer().save_pretrained(at["bert"])
    files = {
        "text": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode(),
        "latin": b'{"text": "fine"}\n{"text": "caf\xe9"}\n',
        "empty": b"",
        "blank": b'{"text": ""}\n',
        "numbers": b'{"text": 3}\n',
        "broken": b'{"text": "a"\n',
        "other_columns": b'{"a": 1}\n',
        "chat": json.dumps({"messages": [{"role": "user", "content": "the old"}]}).encode(),
        "ids": b'{"input_ids": [1, 2, 99999]}\n',
    }
    for name, content in files.items():
        at[name] = folder / f"{name}.jsonl"
        at[name].write_bytes(content)
    at["file"] = folder / "file"
    at["file"].write_text("a file")
    at["nowhere"], at["out"], at["outside"] = folder / "nowhere", folder / "out", folder / "outside"
    at["outside"].mkdir()
    at["ran"] = folder / "ran"
    (at["ran"] / "stages").mkdir(parents=True)
    at["badplan"] = folder / "badplan"
    at["badplan"].mkdir()
    (at["badplan"] / "pruning_plan.json").write_bytes(b"\xff\xfe")
    (at["badplan"] / "config.json").write_text("{}")
    (at["badplan"] / "model.safetensors").touch()
    at["recipe"], at["latin_recipe"], at["twice"] = (folder / f"{name}.yaml" for name in ("recipe", "latin", "twice"))
    values = {
        "teacher": str(at["teacher"]),
        "data": {"train": str(at["text"]), "eval": str(at["text"])},
        "output_dir": str(at["out"]),
        "prune": {"intermediate_size": 0.5},
        "scores": {"num_rows": 8, "max_length": 16},
        "distill": {"max_steps": 2, "max_length": 16, "per_device_train_batch_size": 2},
        "evaluate": {"num_rows": 4, "speed": False},
    }
    at["recipe"].write_text(yaml.safe_dump(values))
    at["latin_recipe"].write_bytes(b"teacher: caf\xe9")
    at["twice"].write_text(f"{at['recipe'].read_text()}verify: true\nverify: false\n")
    at["scores"], at["plan"], at["cut"] = folder / "scores", folder / "plan", folder / "cut"
    score = f"score {at['teacher']} --data {at['text']} -o {at['scores']} --set max_length=16 --set num_rows=4"
    plan = f"plan {at['teacher']} --scores {at['scores']} --intermediate-size 0.5 -o {at['plan']}"
    at["spelt"] = folder / "spelt"
    model, tokenizer = teacher_of(dtype=torch.float32)
    save_model(model, at["spelt"], tokenizer)
    counts = count_tokens(texts(), tokenizer)
    make_plan(model, PrunerConfig(vocab_size=SIZE), token_counts=counts).save_pretrained(at["cut"])
    for line in (score, plan):
        made = minitron(*line.split())
        assert made.returncode == 0, made.stderr
    return at


def arguments(line: str, at: dict[str, Path]) -> list[str]:
    """The words of a line, with the yard's paths; behind the first `;`, words may hold spaces."""
    words, *entries = line.format_map(at).split(";")
    return [*words.split(), *entries]


def tree(folder: Path) -> dict[Path, int]:
    """Every path, and when it was last written to; a folder is, where the check tries to write into it."""
    return {path: path.stat().st_mtime_ns if path.is_file() else 0 for path in folder.rglob("*")}


@pytest.fixture
def barred(monkeypatch, offline):
    """No forward pass, no Hub, no token."""

    def computed(*args, **kwargs):
        raise AssertionError("something was computed")

    monkeypatch.setattr(torch.nn.Linear, "forward", computed)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No Hub, no token. A dry run that refuses nothing times this machine, so it may compute."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("COLUMNS", "200")


#: An argument as Python writes it; behind --set and --space it is the command line's.
PYTHON = re.compile(r"(?<![\w.'\"=\-/\[])[a-z][a-z0-9_]*=(?![=\s])\S*|\b\w+\([a-z_]+=[^()]*\)")
WRITTEN = re.compile(r"(--set[ =]'?|--space )\S+|\bkey=value|`[^`]*`")


def python_arguments(message: str, area: str) -> list[str]:
    """What a message names as Python does, though the user typed options, or the entries of a recipe."""
    from minitron_hf.recipe.schema import Recipe

    found = PYTHON.findall(WRITTEN.sub("", message))
    entries = Recipe.__dataclass_fields__ if area.endswith(":") or area == "run" else ()
    return [one for one in found if one.partition("=")[0] not in entries]


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("area", "kind", "line", "words"),
    CASES,
    ids=[f"{number}-{case[0]}-{case[1]}" for number, case in enumerate(CASES)],
)
def test_bad_inputs_are_one_message(area, kind, line, words, yard, barred, monkeypatch):
    if kind == "space":
        if ":" not in area:
            monkeypatch.setattr(Path, "write_bytes", no_space)
        usage = collections.namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**12, 2**12))
    before = tree(yard["teacher"].parent)
    result = minitron(*arguments(line, yard))
    message = result.stderr
    assert result.returncode == 2, (result.returncode, result.stdout, message)
    assert "Traceback" not in message
    assert "Details:" not in message, "an error of a library that is not explained"
    starts = [found.start() for found in re.finditer(r"^(minitron-hf|Error): ", message, re.MULTILINE)]
    assert len(starts) == 1, message
    said = message[starts[0] :]
    assert words.lower() in " ".join(said.lower().split()), said
    assert [one for one in python_arguments(said, area) if one.strip(".") not in line] == []
    assert len(said.strip().splitlines()) <= 3, said
    assert tree(yard["teacher"].parent) == before, "something was written"


def test_the_table_covers_every_command_section_and_kind():
    from minitron_hf.cli.app import COMMANDS
    from minitron_hf.recipe.schema import Recipe

    assert len(CASES) >= 150
    number = collections.Counter(area for area, *_ in CASES)
    names = [one.__name__.replace("_", "-") for one in COMMANDS]
    assert {name: number[name] for name in names if number[name] < 5} == {}
    sections = Recipe.__dataclass_fields__
    assert {name: number[f"{name}:"] for name in sections if number[f"{name}:"] < 5} == {}
    assert {kind for _, kind, *_ in CASES} == set(KINDS)


#: One of every kind, and every command that starts processes of its own.
AS_PROCESSES = [
    next(case for case in CASES if case[:2] == pair)
    for pair in (
        ("score", "encoding"),
        ("plan", "range"),
        ("search", "type"),
        ("prune", "permission"),
        ("cache", "data"),
        ("distill", "key"),
        ("evaluate", "missing"),
        ("families", "extra"),
        ("publish", "permission"),
        ("run", "encoding"),
        ("teacher:", "model"),
        ("distributed:", "range"),
        ("distill:", "missing"),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("area", "kind", "line", "words"), AS_PROCESSES, ids=[f"{a}{k}" for a, k, *_ in AS_PROCESSES])
def test_bad_inputs_are_one_message_of_a_process(area, kind, line, words, yard):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_TOKEN_PATH": "/nowhere", "COLUMNS": "200"}
    environment.pop("HF_TOKEN", None)
    before = tree(yard["teacher"].parent)
    process = [sys.executable, "-m", "minitron_hf.cli", *arguments(line, yard)]
    result = subprocess.run(process, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert words.lower() in " ".join(result.stderr.lower().split())
    assert tree(yard["teacher"].parent) == before


ACCEPTED = [
    "scores.iterations=2",
    "distill.eval_strategy=no",
    "evaluate.prompts=[a]",
    "distill.hidden_loss=mse",
    "teacher_cache.top_k=97",
    "teacher_cache.num_draws=9",
    "teacher_cache.dtype=fixed12",
    "lora={r: 2, target_modules: all-linear}",
    "teacher_correction={original_learning_rate: 1e-3, num_tokens: 64, arguments: {max_length: 16}}",
    "distill.lr_scheduler_type=cosine_with_min_lr;distill.lr_scheduler_kwargs={min_lr: 1e-6}",
    "distill.report_to=[]",
    "teacher.dtype=bfloat16",
]


@pytest.mark.slow
@pytest.mark.parametrize("entries", ACCEPTED)
def test_what_a_dry_run_accepts_is_run_to_its_end(entries, yard, tmp_path):
    given = [f"--set={entry}" for entry in (*entries.split(";"), f"output_dir={tmp_path / 'run'}")]
    dry = minitron("run", yard["recipe"], "--dry-run", *given)
    assert dry.returncode == 0, dry.stderr
    assert not (tmp_path / "run").exists()
    result = minitron("run", yard["recipe"], "--quiet", *given)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "README.md").is_file()


def test_a_single_process_that_is_called_rank_0_of_1_may_run(yard, monkeypatch):
    """Containers and job managers set these for every process."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert minitron("run", yard["recipe"], "--dry-run").returncode == 0


def test_a_lack_of_memory_is_called_one(yard, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    line = f"score {yard['teacher']} --data {yard['text']} -o {tmp_path / 'out'}".split()
    with monkeypatch.context() as during:
        during.setattr(torch.nn.Linear, "forward", full)
        result = minitron(*line)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert "Out of memory: CUDA out of memory." in result.stderr
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    result = minitron(*line)
    assert result.returncode == 2
    assert "Cannot load the model" in result.stderr
    assert "CUDA out of memory" in result.stderr
    assert "Free memory" in result.stderr


def test_what_nobody_has_foreseen_leaves_its_traceback_in_a_file(yard, tmp_path, monkeypatch):
    def wrong(*args, **kwargs):
        raise KeyError("surprise")

    monkeypatch.setattr(torch.nn.Linear, "forward", wrong)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = minitron("score", yard["teacher"], "--data", yard["text"], "-o", tmp_path / "out")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    [log] = tmp_path.glob("minitron-hf-*.log")
    assert str(log) in result.stderr
    assert "KeyError: 'surprise'" in log.read_text()


def test_benchmarks_are_looked_for_beforehand(yard, offline, monkeypatch):
    """Without the harness, whether or not it is installed here."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = minitron("run", yard["recipe"], "--dry-run", "--set=evaluate.tasks=[piqa]")
    assert result.returncode == 2
    assert "minitron-hf[eval]" in result.stderr
    until = minitron("run", yard["recipe"], "--dry-run", "--until", "distill", "--set=evaluate.tasks=[piqa]")
    assert until.returncode == 0, until.stderr


def test_home_is_meant_by_a_tilde(yard, monkeypatch):
    monkeypatch.setenv("HOME", str(yard["teacher"].parent))
    entries = ("teacher=~/teacher", "data.train=~/text.jsonl", "output_dir=~/elsewhere")
    result = minitron("run", "~/recipe.yaml", "--dry-run", *(f"--set={entry}" for entry in entries))
    assert result.returncode == 0, result.stderr
    assert minitron("plan", "~/teacher", "--set=layers_to_drop=[1]").returncode == 0


def test_corpora_on_the_hub_are_not_checked_offline_and_it_says_so(yard, offline):
    result = minitron("run", yard["recipe"], "--dry-run", "--set=data.train=someone/corpus")
    assert result.returncode == 0, result.stderr
    assert "Not checked: data.train: someone/corpus" in " ".join(result.stdout.split())


def test_a_dry_run_refuses_what_the_folder_holds(yard, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    recipe = ["run", yard["recipe"], f"--set=output_dir={folder}"]
    foreign = minitron(*recipe, "--dry-run")
    assert foreign.returncode == 2
    assert "already holds files" in foreign.stderr
    (folder / "thesis.tex").unlink()
    assert minitron(*recipe, "--quiet", "--until", "plan").returncode == 0
    other = [*recipe, "--set=prune.intermediate_size=0.25", "--dry-run"]
    refused = minitron(*other)
    assert refused.returncode == 2
    assert "prune.intermediate_size: 0.5 → 0.25" in refused.stderr
    assert minitron(*recipe, "--dry-run").returncode == 0
    assert minitron(*other, "--redo").returncode == 0


def test_the_first_round_is_not_blamed_for_the_recipe(tmp_path):
    """A typo in `distill` stands there, and not in a round that adds nothing to it."""
    rounds = [
        {"prune": {"intermediate_size": 0.8}},
        {"prune": {"intermediate_size": 0.5}, "distill": {"max_steps": 1}},
    ]
    values = {"teacher": "lab/model", "data": {"train": "a/b", "eval": "a/b"}, "output_dir": str(tmp_path / "run")}
    recipe = Recipe.from_dict({**values, "rounds": rounds, "distill": {"lerning_rate": 1.0}})
    with pytest.raises(DataError, match=r"(?<!rounds\.1\.)distill.*lerning_rate"):
        check_settings(recipe)


@pytest.mark.parametrize("entry", ["controls", "quantize"])
def test_a_wrong_entry_of_a_list_is_named_by_its_place(entry):
    values = {"teacher": "lab/model", "data": {"train": "a/b", "eval": "a/b"}, "output_dir": "run"}
    with pytest.raises(DataError, match=rf"{entry}\[0\]='nothing': expected one of"):
        Recipe.from_dict({**values, "prune": {"hidden_size": 8}, entry: ["nothing"]})
