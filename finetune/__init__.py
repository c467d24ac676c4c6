"""Trains and evaluates adapters and models: one process per job, apart from the server.

    python -m finetune new JOB --model MODEL --data FILE.jsonl [KEY=VALUE ...]
    python -m finetune check JOB        # rows as they are trained, time and memory
    python -m finetune train JOB        # also under torchrun and accelerate launch; JOB/out holds the result

__main__ (command line, events, signals), ray_worker, new (job folders), settings, prepare (file -> rows), check and
estimate, imported (adapters trained elsewhere), process_group, position, limits.
data <- modeling <- evaluation <- output <- training; each may import the files above and, of core, only types, errors,
files, i18n, config, jobs.protocol, model and engine.lora.
"""
