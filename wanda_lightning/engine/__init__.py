"""The pruning loop, what it checks and measures, its journal and its processes."""
