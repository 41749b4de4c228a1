"""effc: a compiler for LLM inference in PyTorch."""
