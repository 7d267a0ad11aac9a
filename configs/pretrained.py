"""A model that exists already, used as it is: sampled, talked to, exported.

    python -m jaxfm.main --config configs/pretrained.py --config.init_from=PATH --mode sample --prompt "Once upon a time" --temperature 0 --max_tokens 64
    python -m jaxfm.main --config configs/pretrained.py --config.init_from=PATH --mode chat
    python -m jaxfm.main --config configs/pretrained.py --config.init_from=PATH --mode export --output DIR

PATH is a directory in Hugging Face's layout (config.json, .safetensors, tokenizer files), a .gguf
file, the work directory of a run, or the id of a model on the hub ('org/name', with the extra hub).
The architecture, the tokenizer and the chat template come from there. To train it name it in
any other config: configs/sft.py with --config.init_from=PATH fine-tunes it.
Hardware: what the weights need, in --config.model.param_dtype=float32 or bfloat16.
"""  # noqa: E501

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """`smoke` is for small models and short prompts."""
    if arg not in ('', 'smoke'):
        raise ValueError(f"the argument is 'smoke' or nothing, got {arg!r}")
    config = ConfigDict()
    config.init_from = ''  # given on the command line
    config.sampling = dict(
        slots=8,
        max_length=256 if arg else 2048,  # prompt and completion; it costs memory for every slot
        max_tokens=64 if arg else 256,
        temperature=0.7,
    )
    return config
