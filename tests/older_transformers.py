"""Students as they are saved, read by Transformers 4.57: `write FOLDER` with this package, `read FOLDER` with that.

Run by `ranges.py`. The readers have neither this package nor the tests' dependencies.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
#: Pocket → fields of its config.
STUDENTS = {
    "llama": {"rope_parameters": LLAMA3},
    "qwen2": {"rope_parameters": YARN},
    "qwen3_moe": {},
    "gpt_neox": {},
    "gemma3_text": {},
    "phi": {},
}
TEXT = "the old <extra> way"


def write(folder: Path) -> None:
    from minitron_hf import PrunerConfig, apply_plan, make_plan, save_model
    from pocket import pocket_model, pocket_tokenizer, pocket_tokens

    for name, fields in STUDENTS.items():
        teacher = pocket_model(name, dtype=torch.float32, **fields)
        depth = teacher.config.num_hidden_layers
        request = PrunerConfig(num_hidden_layers=depth - 1, layers_to_drop=(1,))
        student = apply_plan(teacher, make_plan(teacher, request))
        tokenizer = pocket_tokenizer(extra_special_tokens=["<extra>"])
        save_model(student, folder / name, tokenizer)
        tokens = pocket_tokens(2, 40)
        with torch.no_grad():
            torch.save((tokens, student(tokens).logits), folder / name / "expected.pt")
        (folder / name / "expected.json").write_text(json.dumps(tokenizer(TEXT).input_ids))


def read(folder: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for path in sorted(folder.iterdir()):
        tokens, expected = torch.load(path / "expected.pt")
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        ids = AutoTokenizer.from_pretrained(path)(TEXT).input_ids
        assert ids == json.loads((path / "expected.json").read_text()), (path.name, ids)
    print(f"Transformers {transformers.__version__} reads {', '.join(sorted(STUDENTS))}.")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
