"""Export to PowerInfer's GGUF files."""
