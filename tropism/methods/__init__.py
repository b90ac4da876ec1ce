"""One published method per file, each a pair of verbs: ``experience`` and ``loss``."""
