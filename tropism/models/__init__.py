"""The only files that import diffusers or transformers, and ``toy``, whose answers are known in closed form."""
