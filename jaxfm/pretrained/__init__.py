"""Models that others made, and ours for others: the formats of the outside world.

Whatever the format, a model arrives as `source.Pretrained`: the config of Hugging Face and tensors
under the names of Hugging Face, of which any part is read alone.
"""
