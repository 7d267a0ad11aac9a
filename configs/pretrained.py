"""Use an existing model without training it: sample from it, chat with it, evaluate it, export it.

    python -m jaxfm.main --config configs/pretrained.py --config.init_from=PATH --mode sample --prompt "Once upon a time" --temperature 0 --max_tokens 64
    python -m jaxfm.main --config configs/pretrained.py --config.init_from=PATH --mode chat
    python -m jaxfm.main --config configs/pretrained.py --config.init_from=PATH --mode export --output DIR
    python -m jaxfm.main --config configs/pretrained.py --config.init_from=PATH --mode eval --config.evals.mine.name=perplexity --config.evals.mine.path=FILE

PATH is a directory in Hugging Face's layout (config.json, .safetensors, tokenizer files), a .gguf
file, the work directory of a run, or the id of a model on the hub ('org/name'; install the extra
`hub`). The architecture, the tokenizer and the chat template come from the model. To train it, give
--config.init_from=PATH with any other config: with configs/sft.py it is fine-tuned.
Hardware: enough memory for the weights, which --config.model.param_dtype=bfloat16 halves.
"""  # noqa: E501

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """With arg='smoke': shorter limits, for small models and short prompts."""
    if arg not in ('', 'smoke'):
        raise ValueError(f"the only argument is 'smoke', got {arg!r}")
    config = ConfigDict()
    config.init_from = ''  # give it on the command line
    config.sampling = dict(
        slots=8,
        max_length=256 if arg else 2048,  # prompt + completion; each slot caches it
        max_tokens=64 if arg else 256,
        temperature=0.7,
    )
    return config
