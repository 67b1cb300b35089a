"""Native operations for the CPU: C++ in `cpu/`, built by `build`, called by `native`, on weights made by `packing`.

Nothing here knows a model, a step plan or transformers. Where the processor or a compiler is missing, `native.library`
gives None and everybody above goes on with torch.
"""
