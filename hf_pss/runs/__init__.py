"""One model of a run's folder, through which everything reads and writes it.

- `folder`: the names of files and checkpoints, and how large a file may be;
- `durable`: the only writer of whole files and folders;
- `log`: what the Trainer logged, from trainer_state.json;
- `records_files`: PSS's events and health readings, written and read;
- `options`: how `hf-pss train` was started;
- `checkpoint`: the only judge of whether a checkpoint is whole, and its marker;
- `rotation`: which checkpoints belong to a run, and which ones are removed;
- `safetensors_files`: weights, read in pieces;
- `follow`: a live run.
"""
