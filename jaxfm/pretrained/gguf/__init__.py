"""Models and tokenizers in .gguf files, the format of llama.cpp."""
