"""Load and export pretrained models: Hugging Face folders and GGUF files."""
