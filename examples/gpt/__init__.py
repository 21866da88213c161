"""A small byte-level GPT and all that train_gpt.py needs to train and compare it."""
