"""Models in Hugging Face's layout, in and out: safetensors, the hub, adapters of PEFT."""
