"""The training loop: train (the loop), schedule (rows of each step, validation steps), optimizer (learning rate,
clipping), checkpoint (one file), checkpoints (when to write, what to resume), progress (speed and time left).

Entry point: `train.train`. May import all of finetune.
"""
