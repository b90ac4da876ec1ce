"""Small self-contained worlds that supply captions, pictures and exact rewards without any download."""
