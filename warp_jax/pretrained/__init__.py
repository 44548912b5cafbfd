"""Models from outside: Hugging Face folders and GGUF files."""
