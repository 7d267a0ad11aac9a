"""Import and export in Hugging Face's layout: safetensors, the hub, PEFT adapters."""
