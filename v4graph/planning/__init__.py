"""What a model needs and how fast it can be, from config.json alone: bytes, FLOPs, launches, placement, time.

`weights`, `cache` and `work` count; `estimate` and `placement` set the counts against a GPU of `gpus.toml`.
"""
